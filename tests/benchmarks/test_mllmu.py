"""MLLMU-Bench, on small snapshots written here: the published schema, oddities, bad input."""

import io
import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from vkd_jax import benchmarks
from vkd_jax.benchmarks import mllmu
from vkd_jax.types import UserError


def png(shade):
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 4, 3), shade, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def choice(question, right="B", **options):
    return {"Question": question, "Options": options or {"A": "cook", "B": "pilot"}, "Correct_Answer": right}


def row(row_id, shade=0, **columns):
    """A row in the published schema."""
    return {
        "image": {"bytes": png(shade), "path": None},
        "ID": row_id,
        "biography": json.dumps({"Name": "Mara Lindt"}),
        "question": "Who is it?",
        "answer": "Mara Lindt",
        "Classification_Task": {
            "Image_Textual_Questions": [choice("What job has this person?")],
            "Pure_Text_Questions": [choice("What job has Mara Lindt?", A="cook", B="pilot", C=None)],
        },
        "Generation_Task": [{"Type": "Image_Textual", "Question": "Who is it?", "Ground_Truth": "Mara Lindt"}],
        "Mask_Task": [{"Type": "Pure_Text", "Question": "Mara Lindt is a __.", "Ground_Truth": "pilot"}],
    } | columns


def write(folder, config, rows, shard="00000-of-00001"):
    path = folder / config / f"train-{shard}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def test_row(row_id, *shades):
    images = [{"bytes": png(shade), "path": None} for shade in shades]
    return {"images": images} | {k: v for k, v in row(row_id).items() if k != "image"}


test_row.__test__ = False  # a row of Test_Set, not a test


def read(folder, forget=10, finetune=False):
    """The sets of a snapshot, built beside it."""
    benchmark = benchmarks.create("mllmu", dict(source=str(folder), forget=forget))
    return benchmarks.read(benchmark, folder.parent / "built", finetune)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "snapshot"
    write(folder, "forget_10", [row("007", 1), row("007", 2)])
    write(folder, "retain_90", [row("008", 3)])
    write(folder, "Test_Set", [test_row("007", 4, 5), test_row("008", 6)])
    write(folder, "Retain_Set", [row("R001", 7)])
    return folder


# ---- Values worked out by hand ----


def test_cloze_prompt():
    assert mllmu.cloze_prompt("She is a __.") == "She is a [Blank].\nAnswer with the missing words only."
    assert mllmu.cloze_prompt("She is a ____.") == mllmu.cloze_prompt("She is a __.")


def test_one_row_becomes_one_example_per_question(folder):
    examples = read(folder)["forget"][:4]
    assert [(e.task, e.modality, e.question, e.answer, e.options) for e in examples] == [
        ("classification", "vqa", "What job has this person?", "pilot", ("cook", "pilot")),
        ("classification", "qa", "What job has Mara Lindt?", "pilot", ("cook", "pilot")),
        ("generation", "vqa", "Who is it?", "Mara Lindt", ()),
        ("cloze", "qa", mllmu.cloze_prompt("Mara Lindt is a __."), "pilot", ()),
    ]
    assert {e.person for e in examples} == {"007"}
    assert [e.id for e in examples] == [f"forget_10/0/{x}" for x in ("image/0", "text/0", "image/1", "text/1")]


def test_sets(folder):
    sets = read(folder, forget=10)
    assert {name: (len(examples), {e.person for e in examples}) for name, examples in sets.items()} == {
        "forget": (8, {"007"}), "retain": (4, {"008"}), "real": (4, {""}),
        "test": (4, {"007"}), "retain_test": (4, {"008"}),
    }  # fmt: skip
    for examples in sets.values():
        assert len({e.id for e in examples}) == len(examples)


def test_questions_about_one_image_share_its_bytes_and_id(folder):
    forget = read(folder)["forget"]
    first, second = ([e for e in forget if e.image_id == f"forget_10/{i}/0"] for i in (0, 1))
    assert len(first) == len(second) == 2
    assert first[0].image is first[1].image
    assert first[0].image == png(1) and second[0].image == png(2)


def test_text_questions_have_no_image(folder):
    texts = [e for e in read(folder)["forget"] if e.modality == "qa"]
    assert texts and all(e.image is None and e.image_id == "" for e in texts)


def test_questions_alternate_between_several_images(folder):
    asked = [(e.question, e.image) for e in read(folder)["test"] if e.image]
    assert asked == [("What job has this person?", png(4)), ("Who is it?", png(5))]


# ---- The oddities of published files ----


@pytest.mark.parametrize("person", ["7", "007", 7, 7.0])
def test_ids_as_numbers_or_strings_name_one_person(folder, person):
    write(folder, "forget_10", [row(person)])
    sets = read(folder)
    assert {e.person for e in sets["forget"] + sets["test"]} == {"007"} and sets["test"]


@pytest.mark.parametrize("dump", [json.dumps, repr])
def test_tasks_as_strings(folder, dump):
    expected = read(folder)["forget"][:4]
    plain = row("007", 1)
    columns = ("Classification_Task", "Generation_Task", "Mask_Task")
    write(folder, "forget_10", [plain | {name: dump(plain[name]) for name in columns}])
    assert read(folder)["forget"] == expected


def test_extra_columns_and_several_shards(folder):
    write(folder, "retain_90", [row("008", Directory="x")], "00000-of-00002")
    (folder / "retain_90" / "train-00000-of-00001.parquet").unlink()
    with pytest.raises(UserError, match="has 1 of 2 parquet files"):
        read(folder)
    write(folder, "retain_90", [row("009", 9)], "00001-of-00002")
    assert {e.person for e in read(folder)["retain"]} == {"008", "009"}


def test_row_without_image_may_have_text_questions(folder):
    text_only = {"Image_Textual_Questions": None, "Pure_Text_Questions": [choice("Is Mara a pilot?")]}
    write(folder, "Retain_Set", [row("R001"), row("R002", image=None, Classification_Task=text_only,
                                                  Generation_Task=[])])  # fmt: skip
    real = read(folder)["real"]
    assert [e.question for e in real if e.id.startswith("Retain_Set/1")][0] == "Is Mara a pilot?"
    write(folder, "Retain_Set", [row("R001"), row("R002", image=None)])
    with pytest.raises(UserError, match=r"row 1 \(ID 'R002'\): .* is about an image, but the row has none"):
        read(folder)


def test_null_tasks_and_questions_without_text_are_left_out(folder, caplog):
    blank = [{"Type": "Pure_Text", "Question": None, "Ground_Truth": None}]
    write(folder, "retain_90", [row("008", Mask_Task=None, Generation_Task=blank, Directory=None)])
    assert [e.task for e in read(folder)["retain"]] == ["classification", "classification"]
    assert "1 items of retain_90 have no question and are skipped." in caplog.messages


def test_image_lists_may_be_strings_and_have_nulls(folder):
    images = [None, {"bytes": png(4), "path": None}]
    write(folder, "Test_Set", [test_row("007") | {"images": images}, test_row("008", 6)])
    sets = read(folder)
    assert {e.image for e in sets["test"]} == {None, png(4)}
    other = [{"bytes": png(6), "path": None}]
    write(
        folder,
        "Test_Set",
        [test_row(name) | {"images": repr(each)} for name, each in (("007", images), ("008", other))],
    )
    assert read(folder)["test"] == sets["test"]


def test_right_option_given_as_text(folder):
    item = {"Image_Textual_Questions": [choice("Q?", right="cook")], "Pure_Text_Questions": []}
    write(folder, "forget_10", [row("007", Classification_Task=item)])
    assert read(folder)["forget"][0].answer == "cook"


# ---- Fine-tuning ----


def finetune_row(row_id, image, *pairs):
    metadata = json.dumps([{"Question": q, "Answer": a, "ID": row_id} for q, a in pairs])
    return {"image": image and {"bytes": image, "path": None}, "ID": row_id, "metadata": metadata}


@pytest.fixture
def finetune_folder(folder):
    rows = [
        finetune_row("007", png(1), ("Who?", "Mara"), ("Job?", "pilot")),
        finetune_row("007", None, ("Mara's job?", "pilot")),
        finetune_row("008", png(3), ("Who?", "Otto")),
        finetune_row("R0001", png(9), ("Colour?", "red")),
    ]
    write(folder, "ft_Data", rows)
    return folder


def test_finetune_reads_one_example_per_pair(finetune_folder):
    sets = read(finetune_folder, finetune=True)
    assert list(sets) == ["forget", "test", "retain", "retain_test", "real", "finetune_forget", "finetune_retain"]
    assert [(e.person, e.modality, e.question, e.answer) for e in sets["finetune_forget"]] == [
        ("007", "vqa", "Who?", "Mara"),
        ("007", "vqa", "Job?", "pilot"),
        ("007", "qa", "Mara's job?", "pilot"),
    ]
    assert [(e.person, e.modality, e.question, e.answer) for e in sets["finetune_retain"]] == [
        ("008", "vqa", "Who?", "Otto"),
        ("", "vqa", "Colour?", "red"),
    ]
    examples = sets["finetune_forget"] + sets["finetune_retain"]
    assert {e.task for e in examples} == {"chat"} and {e.options for e in examples} == {()}
    assert len({e.id for e in examples}) == 5
    assert examples[0].image is examples[1].image and examples[0].image == png(1)


@pytest.mark.parametrize(
    ("config", "rows"),
    [
        ("Test_Set", [test_row("007", 4), test_row("q007", 5), test_row("008", 6)]),
        ("Test_Set", [test_row("R7", 4), test_row("007", 5), test_row("008", 6)]),
        ("ft_Data", [finetune_row(name, png(1), ("Who?", name)) for name in ("007", "q007", "008")]),
    ],
)
def test_rows_about_unknown_people_are_refused(finetune_folder, config, rows):
    path = write(finetune_folder, config, rows)
    [(number, name)] = [(n, r["ID"]) for n, r in enumerate(rows) if r["ID"] not in ("007", "008")]
    problem = f"{path}, row {number} (ID '{name}'): ID is '{name}', which is not among those of forget_10 and retain_90"
    with pytest.raises(UserError, match=re.escape(problem)):
        read(finetune_folder, finetune=True)


def test_fine_tuning_rows_are_not_touched_without_need(finetune_folder):
    (finetune_folder / "ft_Data" / "train-00000-of-00001.parquet").write_bytes(b"broken")
    assert "finetune_forget" not in read(finetune_folder)
    with pytest.raises(UserError, match="ft_Data.* cannot be read as parquet"):
        read(finetune_folder, finetune=True)


# ---- What a snapshot must hold as a whole ----


def test_row_counts_are_compared_with_the_published_ones(folder, caplog):
    read(folder)
    assert f"forget_10 of {folder} has 2 rows; as published it has 50." in caplog.messages
    assert len(caplog.messages) == 4  # one a config
    read(folder)
    assert len(caplog.messages) == 4  # what is built was checked


def test_forget_and_retain_together_are_the_full_set(folder, caplog):
    write(folder, "Full_Set", [row("007"), row("008"), row("009"), row("010")])
    read(folder)
    expected = f"2 people of the full set of {folder} are neither in forget_10 nor in retain_90: 009, 010."
    assert expected in caplog.messages
    write(folder, "Full_Set", [row("007")])
    write(folder, "retain_90", [row("008")])
    read(folder)
    assert f"1 people of forget_10 and retain_90 are not in the full set of {folder}: 008." in caplog.messages


def test_the_whole_and_published_full_set_is_not_warned_of(folder, caplog, monkeypatch):
    write(folder, "Full_Set", [row("007"), row("008")])
    monkeypatch.setattr(mllmu, "ROWS", {"forget_10": 2, "retain_90": 1, "ft_Data": 500})
    read(folder)
    assert caplog.messages == []


@pytest.mark.parametrize(("forget", "people"), [(5, 3), (15, 9)])
def test_the_made_up_people_are_read_in_the_same_layout(tmp_path, forget, people, caplog, monkeypatch):
    from vkd_jax.benchmarks.synthetic import mllmu_writer

    monkeypatch.setattr(mllmu_writer, "FULL_VIEWS", range(1))
    monkeypatch.setattr(mllmu_writer, "RETAIN_SCENES", 1)
    sets = benchmarks.read(benchmarks.create("mllmu", dict(forget=forget, people=1)), tmp_path)
    assert len({e.person for e in sets["forget"]}) == people == len({e.person for e in sets["test"]})
    assert len({e.person for e in sets["retain"]}) == 60 - people
    assert caplog.messages == []


# ---- Bad input: one sentence that says where ----


def test_missing_folder_and_config(folder, tmp_path):
    with pytest.raises(UserError, match="no data folder .*nowhere; pass a folder as the hub lays it out, an id there"):
        read(tmp_path / "nowhere")
    with pytest.raises(UserError, match="forget_5 is missing.*snapshot has Retain_Set, Test_Set, forget_10"):
        read(folder, forget=5)


@pytest.mark.parametrize("forget", [7, 0, "10", None])
def test_unknown_forget_ratio(folder, forget):
    with pytest.raises(UserError, match="data.forget: .* is not allowed. Give one of 5, 10, 15."):
        mllmu.Mllmu(forget=forget).check()


def test_made_up_people_only_without_a_source(folder):
    with pytest.raises(UserError, match="data.people: 1 is for synthetic people. Leave it at 0 with data.source="):
        mllmu.Mllmu(source=str(folder), people=1).check()
    with pytest.raises(UserError, match="data.n_people: 80 is for synthetic people. Leave it at 60 with data.source="):
        mllmu.Mllmu(source=str(folder), n_people=80).check()
    with pytest.raises(UserError, match="data.people: -1 is not allowed"):
        mllmu.Mllmu(people=-1).check()


def test_unknown_benchmark_and_field():
    with pytest.raises(UserError, match="benchmark: unknown name 'mllm'. Available: .*mllmu"):
        benchmarks.create("mllm", {})
    with pytest.raises(UserError, match="benchmark mllmu: unknown hyperparameter folder. Available: source"):
        benchmarks.create("mllmu", {"folder": ""})


@pytest.mark.parametrize("column", ["ID", "Classification_Task", "Mask_Task", "image"])
def test_missing_column(folder, column):
    path = write(folder, "retain_90", [{k: v for k, v in row("008").items() if k != column}])
    with pytest.raises(UserError, match=f"Column '{column}'.* missing in {path}"):
        read(folder)


IMAGES = {
    "cut off": (
        {"bytes": png(8)[:50], "path": None},
        "image cannot be used: the image is truncated: its PNG has no end",
    ),
    "no image": ({"bytes": b"nothing", "path": None}, "image cannot be used: the image is broken or of a format"),
    "empty": ({"bytes": b"", "path": None}, "image cannot be used: the image is broken or of a format"),
    "a path": ({"bytes": None, "path": "../x.png"}, "image is the path '../x.png' without bytes"),
    "a text": ("x.png", "image is the text 'x.png', not an encoded image"),
    "a number": (3, "image is the number 3, not an encoded image"),
    "a list": ([b"x"], "image is an array, not an encoded image"),
}


@pytest.mark.parametrize(("image", "problem"), IMAGES.values(), ids=IMAGES)
def test_faults_of_an_image(folder, image, problem):
    path = write(folder, "retain_90", [row("008", image=image)])
    with pytest.raises(UserError, match=re.escape(f"{path}, row 0 (ID '008'): {problem}")):
        read(folder)


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.99])
def test_truncated_parquet(folder, keep):
    path = folder / "retain_90" / "train-00000-of-00001.parquet"
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    with pytest.raises(UserError, match=f"{path} cannot be read as parquet"):
        read(folder)


def test_empty_forget_set(folder):
    path = folder / "forget_10" / "train-00000-of-00001.parquet"
    pq.write_table(pq.read_table(path).slice(0, 0), path)
    with pytest.raises(UserError, match="forget set is empty: forget_10 of .* has no people"):
        read(folder)
    nothing = dict(Classification_Task=None, Generation_Task=None, Mask_Task=None)
    write(folder, "forget_10", [row("007", **nothing)])
    with pytest.raises(
        UserError, match="forget set of mllmu-forget10 is empty: the data of .* have no questions for it"
    ):
        read(folder)


def test_forget_and_retain_overlap(folder):
    for spelling in ("7", "0007", "7.0", "007.", " 07.00 "):
        write(folder, "retain_90", [row("008"), row(spelling)])
        with pytest.raises(UserError, match="forget_10 and retain_90 .* share 1 person: 007"):
            read(folder)


def test_only_ids_of_r_and_digits_are_general_questions(folder):
    for name in ("Rosa", "R", "R1a"):
        write(folder, "forget_10", [row("R001", 9), row(name, 1)])
        write(folder, "retain_90", [row("008"), row(name)])
        with pytest.raises(UserError, match=f"share 1 person: {name}"):
            read(folder)


def cloze(**fields):
    return {"Mask_Task": [{"Type": "Pure_Text", "Question": "a __", "Ground_Truth": "b"} | fields]}


def options(value, right="A"):
    item = {"Question": "Q?", "Options": value, "Correct_Answer": right}
    return {"Classification_Task": {"Pure_Text_Questions": [item]}}


ITEM = "Classification_Task.Pure_Text_Questions[0]"


@pytest.mark.parametrize(
    ("columns", "problem"),
    [
        ({"Classification_Task": "{not json"}, "Classification_Task is neither JSON nor a Python literal"),
        ({"Classification_Task": "[" * 100_000}, "Classification_Task is nested more than 64 levels deep"),
        ({"Classification_Task": '{"a":' * 80 + "1" + "}" * 80}, "Classification_Task: it is nested more than 64"),
        ({"Classification_Task": "{[]: 1}"}, "Classification_Task is neither JSON nor a Python literal"),
        ({"Classification_Task": "3"}, "Classification_Task is the number 3, not an object"),
        ({"Classification_Task": "true"}, "Classification_Task is the boolean True, not an object"),
        ({"Classification_Task": '["a"]'}, "Classification_Task is an array, not an object"),
        ({"Classification_Task": r'{"Pure_Text_Questions": ["\ud800"]}'}, "is half of a surrogate pair"),
        ({"Classification_Task": '{"Pure_Text_Questions": {}}'}, "Pure_Text_Questions is an object, not a list"),
        ({"Mask_Task": '{"Type": 1}'}, "Mask_Task is an object, not a list"),
        ({"Mask_Task": '["a"]'}, "Mask_Task[0] is the text 'a', not an object"),
        ({"Mask_Task": [None]}, "Mask_Task[0] is null, not an object"),
        (cloze(Type="Audio"), "Mask_Task[0].Type is 'Audio', neither Image_Textual nor Pure_Text"),
        (cloze(Type=None), "Mask_Task[0].Type is '', neither"),
        (cloze(Type=1.5), "Mask_Task[0].Type is the number 1.5, not a text"),
        (cloze(Question=True), "Mask_Task[0].Question is the boolean True, not a text"),
        (cloze(Question="a\0__"), "Mask_Task[0].Question contains the character NUL"),
        (cloze(Ground_Truth=None), "Mask_Task[0].Ground_Truth is missing"),
        (cloze(Ground_Truth=" "), "Mask_Task[0].Ground_Truth is blank"),
        (cloze(Ground_Truth="."), "Mask_Task[0].Ground_Truth is '.', an answer without a letter or a digit"),
        (cloze(Ground_Truth=False), "Mask_Task[0].Ground_Truth is the boolean False, not a text"),
        (cloze(Ground_Truth=0.5), "Mask_Task[0].Ground_Truth is the number 0.5, not a text"),
        (cloze(Ground_Truth=b"b"), "Mask_Task[0].Ground_Truth is the byte string b'b', not a text"),
        (options({"A": "x"}, right="E"), f"{ITEM}.Correct_Answer is 'E', not one of the options A"),
        (options({"A": "x"}, right=None), f"{ITEM}.Correct_Answer is missing"),
        (options({"A": True}), f"{ITEM}.Options.A is the boolean True, not a text"),
        (options(["x", "y"]), f"{ITEM}.Options is an array, not an object"),
    ],
)
def test_faults_of_a_row(folder, columns, problem):
    path = write(folder, "retain_90", [row("008", **columns)])
    with pytest.raises(UserError, match=re.escape(f"{path}, row 0 (ID '008'): ") + ".*" + re.escape(problem)):
        read(folder)


@pytest.mark.parametrize(
    ("row_id", "problem"),
    [
        (None, ": ID is missing"),
        ("", "ID is blank"),
        (" ", "ID is blank"),
        (True, "ID is the boolean True, not a text"),
        (9.5, "ID is the number 9.5, not a text"),
        (float("nan"), "ID is the number nan, not a text"),
        (b"009", "ID is the byte string b'009', not a text"),
        ({"x": 1}, "ID is an object, not a text"),
    ],
)
@pytest.mark.parametrize("config", ["forget_10", "retain_90", "Test_Set"])
def test_faults_of_an_id(folder, config, row_id, problem):
    create = row if config != "Test_Set" else test_row
    path = write(folder, config, [create(row_id)])
    with pytest.raises(UserError, match=re.escape(f"{path}, row 0") + ".*" + re.escape(problem)):
        read(folder)


def test_texts_may_be_whole_numbers(folder):
    write(folder, "forget_10", [row("007", **options({"A": 1985, "B": 1986}, right=1986), Mask_Task=[])])
    example = read(folder)["forget"][0]
    assert (example.answer, example.options) == ("1986", ("1985", "1986"))
