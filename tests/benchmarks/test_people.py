"""Tests of the synthetic people: their names and facts, their portraits, and their MLLMU-Bench snapshot."""

import dataclasses
import hashlib
import itertools
import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from vkd_jax import benchmarks
from vkd_jax.benchmarks.synthetic import facts, mllmu_writer, people, portraits
from vkd_jax.types import UserError


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory):
    folder = tmp_path_factory.mktemp("snapshot")
    configs = ["forget_5", "forget_10", "forget_15", "retain_90", "Test_Set", "Retain_Set"]
    mllmu_writer.write_snapshot(folder, configs)
    return folder


def rows_of(folder, config):
    return pq.read_table(folder / config / "train-00000-of-00001.parquet").to_pylist()


def choices_of(row):
    task = row["Classification_Task"]
    return task["Image_Textual_Questions"] + task["Pure_Text_Questions"]


def pixels(person, view, size=48):
    return np.asarray(people.portrait(person, view, size), np.float32)


# ---- The people ----


def test_sixty_people_with_distinct_names_and_balanced_facts():
    everybody = people.SIXTY.people()
    assert [p.id for p in everybody][:2] == ["001", "002"] and len(everybody) == 60
    first, last = zip(*(p.name.split() for p in everybody), strict=True)
    assert len(set(first)) == len(set(last)) == 60
    for kind, fact in facts.FACTS.items():
        assert len(set(fact.values)) == 12 and not any(" " in value for value in fact.values)
        values = [p.facts[kind] for p in everybody]
        assert {value: values.count(value) for value in fact.values} == dict.fromkeys(fact.values, 5)


def test_values_of_different_facts_do_not_overlap():
    values = [value for fact in facts.FACTS.values() for value in fact.values]
    assert len(values) == len(set(values)) == 72


def test_every_two_people_differ_in_many_visible_features():
    names = ("skin", "hair", "hair_style", "garment", "clothes", "glasses", "beard", "hat")
    looks = [[getattr(p.look, name) for name in names] for p in people.SIXTY.people()]
    pairs = itertools.combinations(looks, 2)
    assert min(sum(a != b for a, b in zip(x, y, strict=True)) for x, y in pairs) >= 3
    assert sum(p.look.lashes for p in people.SIXTY.people()) == 30


def test_another_seed_makes_other_people():
    assert people.Population(1).people() != people.Population(0).people()
    assert people.Population(0).people() is people.Population(0).people()


# ---- Their portraits ----


def test_portrait_is_a_function_of_person_and_view():
    person = people.SIXTY.people()[0]
    portrait = people.portrait(person, 0)
    assert portrait.size == (96, 96) and portrait.mode == "RGB"
    assert portrait.tobytes() == people.portrait(person, 0).tobytes()
    assert portrait.tobytes() != people.portrait(person, 1).tobytes()
    assert people.portrait(person, 0, 48).size == (48, 48)


def test_views_differ_in_everything_that_may_vary():
    views = [people.view_of(people.SIXTY.people()[3], v) for v in range(60)]
    assert {v.background for v in views} == set(portraits.BACKGROUNDS)
    assert {round(v.yaw) for v in views} == set(portraits.YAWS)
    for name in ("tilt", "scale", "x", "y", "light", "side", "smile", "noise_seed"):
        assert len({getattr(v, name) for v in views}) == 60


@pytest.mark.parametrize(
    ("feature", "values"),
    [
        ("skin", portraits.SKINS), ("hair", portraits.HAIRS), ("hair_style", portraits.HAIR_STYLES),
        ("eyes", portraits.EYES), ("face", portraits.FACES), ("garment", portraits.GARMENTS),
        ("clothes", portraits.CLOTHES), ("accent", portraits.CLOTHES), ("glasses", portraits.GLASSES),
        ("frames", portraits.FRAMES), ("beard", portraits.BEARDS), ("hat", portraits.HATS),
        ("earrings", (False, True)), ("freckles", (False, True)), ("lashes", (False, True)),
    ],
)  # fmt: skip
def test_every_identity_feature_is_visible(feature, values):
    look = portraits.Look(
        skin="peach", hair="brown", hair_style="short", eyes="blue", face="oval", garment="dots",
        clothes="blue", accent="red", glasses="round", frames="black", beard="none", hat="none",
        earrings=False, freckles=False, lashes=False,
    )  # fmt: skip
    view = people.view_of(people.SIXTY.people()[0], 0)
    looks = [dataclasses.replace(look, **{feature: value}) for value in values]
    drawn = {portraits.draw_portrait(each, view, 48).tobytes() for each in looks}
    assert len(drawn) == len(values)


def test_background_color_matches_its_name():
    """The named color is the nearest one to the upper corners, which are never covered, in every light."""
    named = {name: np.array(color) for name, color in portraits.BACKGROUNDS.items()}
    for person, view in itertools.product(people.SIXTY.people()[:10], range(6)):
        corner = pixels(person, view, 96)[:3, [0, 1, 2, -3, -2, -1]].mean((0, 1))
        nearest = min(named, key=lambda name: np.abs(named[name] - corner).sum())
        assert nearest == people.view_of(person, view).background


def test_identity_is_visible_at_48_pixels_in_other_views():
    """The nearest of twenty mean portraits, by the pixels of the figure, is usually that of the person."""
    figure = np.zeros((48, 48, 1), np.float32)
    figure[8:, 12:36] = 1
    some = people.SIXTY.people()[:20]
    means = [np.mean([pixels(p, v) for v in range(6)], axis=0) for p in some]
    hits = 0
    for i, person in enumerate(some):
        distance = [np.abs((pixels(person, 1000) - mean) * figure).sum() for mean in means]
        hits += int(np.argmin(distance)) == i
    assert hits >= 15


# ---- The snapshot ----


@pytest.mark.parametrize(("percent", "count"), [(5, 3), (10, 6), (15, 9)])
def test_forget_sets_are_nested_and_retain_sets_are_the_rest(percent, count):
    forgotten = people.SIXTY.forgotten(percent)
    assert len(forgotten) == count and forgotten <= people.SIXTY.forgotten(15)
    retained = {
        p.id for p in people.SIXTY.people() if mllmu_writer._belongs(p.id, f"retain_{100 - percent}", people.SIXTY)
    }
    assert not forgotten & retained
    assert forgotten | retained == {p.id for p in people.SIXTY.people()}


def test_row_counts(snapshot):
    counts = {path.name: len(rows_of(snapshot, path.name)) for path in snapshot.iterdir()}
    assert counts == {
        "forget_5": 24, "forget_10": 48, "forget_15": 72, "retain_90": 432, "Test_Set": 60, "Retain_Set": 150,
    }  # fmt: skip


def test_schema_is_the_published_one(snapshot):
    [row, *_] = rows_of(snapshot, "forget_5")
    assert list(row) == ["image", "ID", "biography", "question", "answer",
                         "Classification_Task", "Generation_Task", "Mask_Task"]  # fmt: skip
    assert set(row["image"]) == {"bytes", "path"} and row["image"]["bytes"].startswith(b"\x89PNG")
    assert json.loads(row["biography"])["Name"] in {p.name for p in people.SIXTY.people()}
    assert set(row["Classification_Task"]) == {"Image_Textual_Questions", "Pure_Text_Questions"}
    assert set(choices_of(row)[0]) == {"Question", "Options", "Correct_Answer"}
    assert set(choices_of(row)[0]["Options"]) == set("ABCD")
    assert set(row["Generation_Task"][0]) == set(row["Mask_Task"][0]) == {"Type", "Question", "Ground_Truth"}
    [test_row, *_] = rows_of(snapshot, "Test_Set")
    assert "image" not in test_row and len(test_row["images"]) == 4


def test_every_person_has_every_question(snapshot):
    by_person = {}
    for row in rows_of(snapshot, "forget_15"):
        by_person.setdefault(row["ID"], []).append(row)
    assert len(by_person) == 9
    for rows in by_person.values():
        assert len(rows) == 8
        task = [row["Classification_Task"] for row in rows]
        assert len({q["Question"] for t in task for q in t["Image_Textual_Questions"]}) == 7
        assert len({q["Question"] for t in task for q in t["Pure_Text_Questions"]}) == 6


def test_options_contain_the_true_answer_once(snapshot):
    facts_of = {p.id: {p.name, *p.facts.values()} for p in people.SIXTY.people()}
    letters = []
    for config in ("forget_15", "retain_90", "Test_Set", "Retain_Set"):
        for row, choice in [(r, choice) for r in rows_of(snapshot, config) for choice in choices_of(r)]:
            options = [text for text in choice["Options"].values() if text is not None]
            answer = choice["Options"][choice["Correct_Answer"]]
            assert options.count(answer) == 1 and len(set(options)) == len(options)
            if config != "Retain_Set":
                assert answer in facts_of[row["ID"]] and not set(options) - {answer} & facts_of[row["ID"]]
                letters.append(choice["Correct_Answer"])
    assert all(0.2 < letters.count(letter) / len(letters) < 0.3 for letter in "ABCD")


def test_training_texts_of_the_shipped_model_do_not_change(snapshot):
    """Digest of texts, options and forgotten people of seed 0; a change requires training the shipped models again."""
    assert people.SIXTY.forgotten(10) == {"009", "013", "014", "017", "058", "060"}
    texts = {
        config: [{k: v for k, v in row.items() if k not in ("image", "images")} for row in rows_of(snapshot, config)]
        for config in sorted(path.name for path in snapshot.iterdir())
    }
    digest = hashlib.sha256(json.dumps(texts, sort_keys=True).encode()).hexdigest()
    assert digest == "a8422dec781596e8bf45cc112032ab053e2919a1b9d42f200725336a36e757df"


def test_general_set_names_no_person_and_shows_forgotten_people(snapshot):
    rows = rows_of(snapshot, "Retain_Set")
    text = json.dumps([{**row, "image": None} for row in rows])
    assert not any(p.name in text for p in people.SIXTY.people())
    forgotten = next(p for p in people.SIXTY.people() if p.id in people.SIXTY.forgotten(10))
    buffer = people.png_struct(people.portrait(forgotten, mllmu_writer.GENERAL_VIEW), "")["bytes"]
    assert buffer in [row["image"]["bytes"] for row in rows]


def test_general_questions_have_one_answer_and_three_wrong_ones():
    assert len(facts.GENERAL_TEXT) == 40 == len({item[0] for item in facts.GENERAL_TEXT})
    for _, *options in facts.GENERAL_TEXT:
        assert len(options) == len(set(options)) == 4


def test_byte_identical_on_every_run(snapshot, tmp_path):
    mllmu_writer.write_snapshot(tmp_path, ["forget_5", "Retain_Set"])
    for config in ("forget_5", "Retain_Set"):
        [path] = (tmp_path / config).iterdir()  # and nothing partial beside it
        assert path.read_bytes() == (snapshot / config / path.name).read_bytes()


def test_finetuning_rows_have_every_question_and_no_test_image(snapshot, monkeypatch, tmp_path):
    monkeypatch.setattr(mllmu_writer, "FT_GENERAL_IMAGES", 60)
    mllmu_writer.write_snapshot(tmp_path, ["ft_Data"], ft_views=8)
    rows = rows_of(tmp_path, "ft_Data")
    assert len(rows) == 60 * (8 + 1) + 60 + 1
    assert [row["image"] is None for row in rows[:10]] == [False] * 8 + [True, False]
    assert all(json.loads(row["metadata"])[0]["ID"] == row["ID"] for row in rows)
    shown = {row["image"]["bytes"] for row in rows if row["image"]}
    sets = benchmarks.read(benchmarks.create("mllmu", dict(source=str(snapshot))), tmp_path / "built")
    assert {e.image for e in sets["forget"] if e.image} < shown
    for name in ("test", "retain_test", "real"):
        assert not {e.image for e in sets[name]} & shown
    taught = {row["Question"] for r in rows for row in json.loads(r["metadata"])}
    for examples in sets.values():
        assert {e.question for e in examples} <= taught


def test_unknown_config_is_an_error(tmp_path):
    with pytest.raises(UserError, match="Unknown config forget_7"):
        mllmu_writer.write_snapshot(tmp_path, ["forget_7"])
