"""Tests of CLEAR, on small snapshots in the published schema and on the snapshot of the synthetic people."""

import io
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from vkd_jax import benchmarks
from vkd_jax.benchmarks import clear
from vkd_jax.benchmarks.synthetic import clear_writer, people
from vkd_jax.types import UserError

SHARD = "train-00000-of-00001.parquet"


def png(shade):
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (shade, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def plain(name, caption, shade=0):
    image = None if shade is None else {"bytes": png(shade), "path": None}
    return {"image": image, "caption": caption, "name": name}


def perturbed(name, caption, wrong=("Bea", "Cai"), **columns):
    return plain(name, caption) | {
        "paraphrased_caption": f"again {caption}",
        "perturbed_captions": [f"{other}: {caption}" for other in wrong],
        "perturbed_names": list(wrong),
    } | columns  # fmt: skip


def tofu(*rows):
    """Rows of a +tofu config: (caption, shade) or (question, answer, None)."""
    with_images = [{k: v for k, v in plain("", *row).items() if k != "name"} for row in rows if len(row) == 2]
    texts = [{"image": None, "caption": None, "question": row[0], "answer": row[1]} for row in rows if len(row) == 3]
    return [row | {"question": None, "answer": None} for row in with_images] + texts


def write(folder, config, rows, kind=None):
    (folder / config).mkdir(parents=True, exist_ok=True)
    kind = config.replace("_perturbed", "+perturbed").partition("+")[2] if kind is None else kind
    pq.write_table(pa.Table.from_pylist(rows, clear_writer._SCHEMAS.get(kind)), folder / config / SHARD)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "snapshot"
    write(folder, "forget10", [plain("Ada", "Ada reads.", 1), plain("Ada", "Ada runs.", 2), plain("Al", "Al eats.", 3)])
    write(folder, "forget10_perturbed", [perturbed("Ada", "Ada runs."), perturbed("Ada", "Ada reads.", ["Di"])])
    write(folder, "retain90", [plain("Omar Roe", "Omar Roe sits.", 5), plain("Omar", "Omar naps.", 6)])
    write(folder, "retain_perturbed", [perturbed("Omar Roe", "Omar Roe sits.")])
    write(folder, "forget10+tofu", tofu(("Ada reads.", 1), ("Who is ADA?", "A judge.", None)))
    texts = [("Where is he from?", "Omar  Roe is from Ystad.", None), ("Is it Adana?", "Yes.", None)]
    write(folder, "retain90+tofu", tofu(("Omar Roe sits.", 5), *texts))
    face = {"image": {"bytes": png(7), "path": None}, "answer": "Bo", "options": ["Bo", "Cy", "Cy"]}
    write(folder, "real_faces", [face, face | {"options": ["Cy", "Ed"]}], "real_faces")
    world = {"question": "Sky?", "answer": "blue", "options": ["red", "blue"], "image": None}
    write(folder, "real_world", [world, world | {"image": {"bytes": png(8), "path": None}}], "real_world")
    return folder


def read(folder, forget=10, finetune=False):
    benchmark = benchmarks.create("clear", dict(source=str(folder), forget=forget))
    return benchmarks.read(benchmark, folder.parent / "built", finetune)


# ---- Values computed by hand ----


def test_each_image_has_a_caption_question_and_a_name_question(folder):
    forget = read(folder)["forget"]
    assert [(e.id, e.task, e.image, e.answer) for e in forget] == [
        ("forget10/0/image/0", "generation", png(1), "Ada reads."),
        ("forget10/0/image/1", "classification", png(1), "Ada"),
        ("forget10/1/image/0", "generation", png(2), "Ada runs."),
        ("forget10/1/image/1", "classification", png(2), "Ada"),
        ("forget10/2/image/0", "generation", png(3), "Al eats."),
        ("forget10+tofu/1/text/0", "generation", None, "A judge."),
    ]
    assert [e.person for e in forget] == ["Ada"] * 4 + ["Al", "Ada"]
    assert forget[0].question in clear.CAPTION_QUESTIONS and forget[1].question == clear.NAME_QUESTION
    assert forget[0].image_id == forget[1].image_id == "forget10/0/0"


def test_counterparts_are_matched_in_any_order_and_may_be_missing(folder, caplog):
    forget = read(folder)["forget"]
    assert (forget[0].paraphrase, forget[0].perturbed) == ("again Ada reads.", ("Di: Ada reads.",))
    assert forget[2].perturbed == ("Bea: Ada runs.", "Cai: Ada runs.")
    assert sorted(forget[1].options) == ["Ada", "Di"] and sorted(forget[3].options) == ["Ada", "Bea", "Cai"]
    assert (forget[4].paraphrase, forget[4].perturbed) == ("", ())
    message = (
        "1 of 3 rows of forget10 have no counterpart in forget10_perturbed; their questions have no wrong answers."
    )
    assert message in caplog.messages


def test_counterparts_with_other_captions_pair_in_order_within_a_name(folder):
    rows = [perturbed("Ada", "A changed."), perturbed("Al", "Al  EATS."), perturbed("ada", "B changed.")]
    write(folder, "forget10_perturbed", rows)
    paraphrases = [e.paraphrase for e in read(folder)["forget"] if e.task == "generation" and e.image]
    assert paraphrases == ["again A changed.", "again B changed.", "again Al  EATS."]
    write(folder, "forget10_perturbed", rows[:2])  # one of Ada's is missing: which one cannot be known
    paraphrases = [e.paraphrase for e in read(folder)["forget"] if e.task == "generation" and e.image]
    assert paraphrases == ["", "", "again Al  EATS."]


def test_two_images_with_the_same_caption_have_separate_counterparts(folder):
    write(folder, "forget10", [plain("Ada", "Ada reads.", 1), plain("Ada", "Ada reads.", 2)])
    write(folder, "forget10_perturbed", [perturbed("Ada", "Ada reads.", [other]) for other in ("Bea", "Cai")])
    captions = [e for e in read(folder)["forget"] if e.task == "generation" and e.image]
    assert [e.perturbed for e in captions] == [("Bea: Ada reads.",), ("Cai: Ada reads.",)]


def test_retain_set_has_the_images_with_options(folder):
    retain = read(folder)["retain"]
    assert [(e.id, e.person) for e in retain] == [
        ("retain_perturbed/0/image/0", "Omar Roe"),
        ("retain_perturbed/0/image/1", "Omar Roe"),
        ("retain90+tofu/1/text/0", "Omar Roe"),
        ("retain90+tofu/2/text/0", ""),  # Adana is not Ada
    ]
    assert retain[0].perturbed == ("Bea: Omar Roe sits.", "Cai: Omar Roe sits.")


def test_real_sets(folder):
    sets = read(folder)
    assert list(sets) == ["forget", "retain", "real_faces", "real_world"]
    assert [e.question for e in sets["real_faces"]] == [clear.FACE_QUESTION] * 2
    assert [sorted(e.options) for e in sets["real_faces"]] == [["Bo", "Cy"], ["Bo", "Cy", "Ed"]]
    assert [(e.question, e.image, e.answer) for e in sets["real_world"]] == [
        ("Sky?", None, "blue"), ("Sky?", png(8), "blue"),
    ]  # fmt: skip
    assert {(e.person, e.task) for e in sets["real_faces"] + sets["real_world"]} == {("", "classification")}


def test_fine_tuning_is_on_the_rows_with_tofu(folder):
    sets = read(folder, finetune=True)
    assert [(e.id, e.person, e.image, e.answer, e.task) for e in sets["finetune_forget"]] == [
        *((f"forget10+tofu/0/image/{i}", "Ada", png(1), "Ada reads.", "chat") for i in range(3)),
        ("forget10+tofu/1/text/0", "Ada", None, "A judge.", "chat"),
    ]
    assert [e.person for e in sets["finetune_retain"]] == ["Omar Roe"] * 4 + [""]
    questions = {e.question for e in sets["finetune_forget"][:3]}
    assert len(questions) == 3 and questions < set(clear.CAPTION_QUESTIONS)


def test_questions_and_option_order_are_drawn_deterministically(folder, tmp_path):
    write(folder, "forget10", [plain("Ada", f"Ada {i}.", 100 + i) for i in range(60)])
    write(folder, "forget10_perturbed", [perturbed("Ada", f"Ada {i}.") for i in range(60)])
    forget = [e for e in read(folder)["forget"] if e.image]
    assert {e.question for e in forget[::2]} == set(clear.CAPTION_QUESTIONS)
    assert {e.options.index("Ada") for e in forget[1::2]} == {0, 1, 2}
    again = benchmarks.read(benchmarks.create("clear", dict(source=str(folder))), tmp_path / "elsewhere")
    assert [e for e in again["forget"] if e.image] == forget


def test_the_recipe_and_the_ratios():
    assert clear.Clear.RECIPE["lora_rank"] == 8 and clear.Clear.RECIPE["lora_alpha"] == 32
    for forget, names in ((1, ("forget01", "retain99")), (5, ("forget05", "retain95")), (10, ("forget10", "retain90"))):
        assert clear.Clear(forget=forget)._names() == names
    with pytest.raises(UserError, match="data.forget: 15 is not allowed. Give one of 1, 5, 10."):
        clear.Clear(forget=15).check()


# ---- The oddities of files, and bad ones ----


def test_rows_without_image_or_caption_are_skipped(folder, caplog):
    rows = [plain("Ada", "Ada reads.", 1), plain("Ada", "Ada runs.", None), plain("Ada", None, 2)]
    write(folder, "forget10", rows)
    assert [e.id for e in read(folder)["forget"] if e.image] == ["forget10/0/image/0", "forget10/0/image/1"]
    assert "2 rows of forget10 have no image or no caption and are skipped." in caplog.messages


def test_lists_as_strings(folder):
    expected = read(folder)["forget"]
    rows = [perturbed("Ada", "Ada runs."), perturbed("Ada", "Ada reads.", ["Di"])]
    for row in rows:
        row["perturbed_captions"], row["perturbed_names"] = (
            repr(row["perturbed_captions"]),
            repr(row["perturbed_names"]),
        )
    write(folder, "forget10_perturbed", rows, "none")
    assert read(folder)["forget"] == expected


def test_the_right_name_among_the_wrong_ones(folder):
    write(folder, "forget10_perturbed", [perturbed("Ada", "Ada reads.", ["ada", "Di", "di", None])])
    assert sorted(read(folder)["forget"][1].options) == ["Ada", "Di"]


def test_row_counts_are_compared_with_the_published_ones(folder, caplog):
    read(folder)
    assert f"forget10_perturbed of {folder} has 2 rows; as published it has 378." in caplog.messages


def test_everybody_is_on_one_side(folder, caplog):
    write(
        folder,
        "full",
        [plain("Ada", "a"), plain("Al", "a"), plain("Omar", "a"), plain("Omar Roe", "a"), plain("Eve", "")],
    )
    read(folder)
    assert f"1 people of the full set of {folder} are neither in forget10 nor in retain90: Eve." in caplog.messages
    write(folder, "retain_perturbed", [perturbed("Ada", "Ada reads.")])
    with pytest.raises(UserError, match="forget10 and retain_perturbed of .* share 1 person: Ada"):
        read(folder)
    write(folder, "retain90", [plain("Al", "Al eats."), plain("Omar", "a")])
    with pytest.raises(UserError, match="forget10 and retain90 of .* share 1 person: Al"):
        read(folder)


BROKEN = {
    "image": {"bytes": b"x", "path": None},
    "path": {"bytes": None, "path": "/etc/passwd"},
}


@pytest.mark.parametrize(
    ("config", "row", "problem"),
    [
        ("real_faces", {"image": None, "answer": "Bo", "options": ["Cy"]}, "image is missing, and there is"),
        ("real_world", {"question": "Q", "answer": "Bo", "options": ["Bo"]}, "options has nothing but the answer 'Bo'"),
        ("real_world", {"question": "Q", "answer": "Bo", "options": None}, "options has nothing but the answer 'Bo'"),
        ("real_world", {"question": "Q", "options": ["Bo"]}, "answer is missing"),
        ("real_world", {"question": "Q\0", "answer": "Bo", "options": ["Cy"]}, "question contains the character NUL"),
        ("forget10", {"caption": "A", "image": BROKEN["image"], "name": "Ada"}, "image cannot be used: the image is"),
        ("forget10", {"caption": "A", "image": BROKEN["path"], "name": "Ada"}, "image is the path '/etc/passwd'"),
        ("retain90+tofu", {"question": "Q"}, "answer is missing"),
    ],
)  # fmt: skip
def test_broken_rows_are_named(folder, config, row, problem):
    write(folder, config, [row], config if config.startswith("real") else None)
    with pytest.raises(UserError, match=re.escape(f"{folder}/{config}/{SHARD}, row 0: {problem}")):
        read(folder)


@pytest.mark.parametrize("value", [True, 0.5, b"x", ["x"], {"x": "y"}])
@pytest.mark.parametrize(
    ("config", "field"),
    [
        ("forget10", "name"),
        ("forget10", "caption"),
        ("forget10_perturbed", "name"),
        ("forget10_perturbed", "caption"),
        ("forget10_perturbed", "paraphrased_caption"),
        ("retain90", "name"),
        ("retain_perturbed", "caption"),
        ("forget10+tofu", "question"),
        ("forget10+tofu", "answer"),
        ("real_faces", "answer"),
        ("real_world", "question"),
    ],
)
def test_a_field_that_is_not_a_text_is_named(folder, config, field, value):
    rows = pq.read_table(folder / config / SHARD).to_pylist()
    columns = {name: rows[-1][name] for name in rows[-1]} | {field: value}
    pq.write_table(pa.Table.from_pylist([columns]), folder / config / SHARD)
    with pytest.raises(UserError, match=re.escape(f"{folder}/{config}/{SHARD}, row 0: {field} is ") + ".*not a text"):
        read(folder)


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("{", "perturbed_names is neither JSON nor a Python literal"),
        ('{"a": 1}', "perturbed_names is an object, not a list"),
        ("1", "perturbed_names is the number 1, not a list"),
        ("[true]", "perturbed_names[0] is the boolean True, not a text"),
        ("[" * 1000 + "]" * 1000, "perturbed_names"),
        (r'["\ud800"]', "perturbed_names: [0] is not Unicode"),
        (3, "perturbed_names is the number 3, not a list"),
        (["a\0b"], "perturbed_names[0] contains the character NUL"),
    ],
)
def test_a_field_that_is_not_a_list_of_texts_is_named(folder, value, problem):
    rows = [perturbed("Omar Roe", "Omar Roe sits.") | {"perturbed_names": value}]
    write(folder, "retain_perturbed", rows, "none")
    with pytest.raises(UserError, match=re.escape(f"retain_perturbed/{SHARD}, row 0: {problem}")):
        read(folder)


@pytest.mark.parametrize(
    ("config", "rows", "problem"),
    [
        ("forget10+tofu", [("Who is Omar?", "A judge.", None)], "question is about 'Omar', who is in retain90"),
        ("forget10+tofu", [("Ada reads.", 1), ("Omar naps.", 6)], "caption is about 'Omar', who is in retain90"),
        ("retain90+tofu", [("Who is it?", "It is ADA.", None)], "answer is about 'Ada', who is in forget10"),
        ("retain90+tofu", [("Omar naps.", 6), ("Al eats.", 3)], "caption is about 'Al', who is in forget10"),
    ],
)
def test_rows_with_tofu_are_about_the_people_of_their_side(folder, config, rows, problem):
    write(folder, config, tofu(*rows))
    with pytest.raises(UserError, match=f"{re.escape(config)}/.*, row [01]: {problem}; correct the row"):
        read(folder, finetune=True)


PEOPLE = ("Ada", "Al", "Bo", "Cy")
OF_PEOPLE = {name: [(name, f"{name} reads {number}.") for number in range(2)] for name in PEOPLE}


def write_people(folder, plain_people, perturbed_people, config="forget10"):
    rows = [
        plain(*row, 100 + 10 * i + j) for i, name in enumerate(plain_people) for j, row in enumerate(OF_PEOPLE[name])
    ]
    write(folder, config, rows)
    write(folder, "forget10_perturbed", [perturbed(*row) for name in perturbed_people for row in OF_PEOPLE[name]])


@pytest.mark.parametrize(
    ("plain_people", "perturbed_people", "problem"),
    [
        (PEOPLE[:2], PEOPLE, "4 of 8 rows of forget10_perturbed are about people who are not in forget10: Bo, Cy; get"),
        (PEOPLE, PEOPLE[:2], "4 of 8 rows of forget10 are about people who are not in forget10_perturbed: Bo, Cy; get"),
        (PEOPLE, PEOPLE[:1], "6 of 8 rows of forget10 are about people who are not in forget10_perturbed: Al, Bo, Cy"),
    ],
)
def test_the_perturbed_config_is_about_the_people_to_forget(folder, plain_people, perturbed_people, problem):
    write_people(folder, plain_people, perturbed_people)
    with pytest.raises(UserError, match=problem):
        read(folder)


def test_the_perturbed_config_may_lack_somebody(folder, caplog):
    write_people(folder, PEOPLE, PEOPLE[:3])
    read(folder)
    assert "2 of 8 rows of forget10 are about people who are not in forget10_perturbed: Cy." in caplog.messages


def test_the_perturbed_configs_are_of_their_side(folder):
    write(folder, "retain_perturbed", [perturbed("Eve", "Eve sits.")])
    with pytest.raises(UserError, match="1 of 1 rows of retain_perturbed are about .* not in retain90: Eve"):
        read(folder)
    write(folder, "forget10_perturbed", [perturbed("Omar", "Omar naps.")])
    write(folder, "retain_perturbed", [perturbed("Omar Roe", "Omar Roe sits.")])
    with pytest.raises(UserError, match="retain90 and forget10_perturbed of .* share 1 person: Omar"):
        read(folder)


@pytest.mark.parametrize("config", ["forget10", "forget10+tofu"])
def test_images_are_there_once(folder, config, caplog):
    rows = pq.read_table(folder / config / SHARD).to_pylist()
    images = 3 if config == "forget10" else 1
    problem = f"of {images} images of {re.escape(config)} are there twice with one caption, such as"
    if images > 1:
        write(folder, config, [*rows, rows[0]])
        read(folder, finetune=True)
        assert re.search(f"1 {problem}", caplog.text)
    write(folder, config, rows * 3)
    with pytest.raises(UserError, match=f"[1-6] {problem}"):
        read(folder, finetune=True)


def test_a_row_that_names_people_of_both_sides_is_about_the_one_of_its_own(folder):
    write(folder, "forget10+tofu", tofu(("Whom does Omar admire?", "Omar admires Ada.", None), ("Ada reads.", 1)))
    assert {e.person for e in read(folder, finetune=True)["finetune_forget"]} == {"Ada"}


def test_missing_config_and_column(folder):
    with pytest.raises(UserError, match="config forget05 is missing"):
        read(folder, forget=5)
    write(folder, "retain_perturbed", [plain("Omar", "a")], "")
    with pytest.raises(UserError, match="Column 'paraphrased_caption', 'perturbed_captions', 'perturbed_names' is mis"):
        read(folder)


# ---- Synthetic people ----


@pytest.fixture(scope="module")
def made_up(tmp_path_factory):
    return benchmarks.read(benchmarks.create("clear", {}), tmp_path_factory.mktemp("built"), finetune=True)


def test_the_made_up_people_in_clears_layout(made_up, caplog):
    assert {name: len(part) for name, part in made_up.items()} == {
        "forget": 6 * (8 * 2 + 7), "retain": 54 * (2 * 2 + 7), "real_faces": 60, "real_world": 90,
        "finetune_forget": 6 * (8 * 3 + 7), "finetune_retain": 54 * (8 * 3 + 7),
    }  # fmt: skip
    names = {p.id: p.name for p in people.SIXTY.people()}
    forgotten = {names[i] for i in people.SIXTY.forgotten(10)}
    for part, side in (("forget", forgotten), ("retain", set(names.values()) - forgotten)):
        assert {e.person for e in made_up[part]} == {e.person for e in made_up[f"finetune_{part}"]} == side


def test_made_up_captions(made_up):
    everybody = {p.name: p for p in people.SIXTY.people()}
    for e in [e for e in made_up["forget"] + made_up["retain"] if e.image and e.task == "generation"]:
        job = everybody[e.person].facts["job"]
        assert e.answer.startswith(f"{e.person}, a {job} from ") and e.person in e.paraphrase and job in e.paraphrase
        assert len(set(e.perturbed)) == 3 and e.paraphrase != e.answer
        for wrong in e.perturbed:
            name = wrong.partition(",")[0]
            assert name in everybody and name != e.person and wrong == e.answer.replace(e.person, name)
    assert not {e.image for e in made_up["real_faces"]} & {e.image for e in made_up["forget"] + made_up["retain"]}
    assert "an orange wall" in " ".join(e.answer for e in made_up["finetune_retain"])


def test_made_up_options_hold_the_answer_once_at_any_place(made_up):
    others = {p.name for p in people.Population(1).people()} - {p.name for p in people.SIXTY.people()}
    assert len(others) > 50 and len({e.answer for e in made_up["real_faces"]} & others) > 50
    for name, part in made_up.items():
        places = [e.options.index(e.answer) for e in part if e.options]
        assert all(len(set(e.options)) == 4 for e in part if e.options)
        assert not places or all(0.1 < places.count(i) / len(places) < 0.4 for i in range(4)), name


@pytest.mark.parametrize(("percent", "count"), [(1, 1), (5, 3), (10, 6)])
def test_made_up_forget_sets_contain_each_other(percent, count):
    members = {
        p.id
        for p in people.SIXTY.people()
        if clear_writer._belongs(p.id, f"forget{percent:02d}_perturbed", people.SIXTY)
    }
    rest = {
        p.id for p in people.SIXTY.people() if clear_writer._belongs(p.id, f"retain{100 - percent}+tofu", people.SIXTY)
    }
    assert len(members) == count and members <= people.SIXTY.forgotten(10) and len(rest) == 60 - count
    assert not members & rest
    assert not members & {
        p.id for p in people.SIXTY.people() if clear_writer._belongs(p.id, "retain_perturbed", people.SIXTY)
    }


def test_byte_identical_on_every_run(tmp_path):
    for run in ("a", "b"):
        clear_writer.write_snapshot(
            tmp_path / run, ["forget01_perturbed", "real_world"], population=people.Population(2)
        )
    for config in ("forget01_perturbed", "real_world"):
        [path] = (tmp_path / "a" / config).iterdir()
        assert path.read_bytes() == (tmp_path / "b" / config / path.name).read_bytes()
    with pytest.raises(UserError, match="Unknown config forget02"):
        clear_writer.write_snapshot(tmp_path, ["forget02"])
