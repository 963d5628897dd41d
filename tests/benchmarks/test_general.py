"""Standard suites: their stand-ins in the published layouts, whole groups in samples, and wrong rows."""

import collections
import dataclasses
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vkd_jax import registry
from vkd_jax.benchmarks import general
from vkd_jax.benchmarks.synthetic import suites_writer
from vkd_jax.config.evaluation import EvalConfig
from vkd_jax.types import Role, SuiteQuestion, UserError

SETS = {  # of each suite: questions of each set of the stand-in
    "gqa": {"gqa": 28},
    "mmbench": {"mmbench": 40},
    "mme": {"mme_perception": 40, "mme_cognition": 20},
    "mmvet": {"mmvet": 10},
    "pope": {"pope_random": 20, "pope_popular": 20, "pope_adversarial": 20},
    "scienceqa": {"scienceqa": 10},
    "textvqa": {"textvqa": 4},
    "vizwiz": {"vizwiz": 28},
    "vqav2": {"vqav2": 28},
}


def create(name, **fields):
    return registry.lookup("suite", registry.SUITES, name)(**fields)


def questions(suite):
    """All questions by set, without a cache."""
    with suite.rows("evaluation") as sets:
        return {name: [example for row in rows for example in row] for name, rows in sets.items()}


def stand_in(name, folder):
    create(name).write_stand_in(folder)
    return create(name, source=str(folder))


def change(suite, config, edit):
    """Rewrites the rows of a file of a suite's folder."""
    [file] = (Path(suite.source) / config).iterdir()
    table = pq.read_table(file)
    rows = table.to_pylist()
    edit(rows)
    pq.write_table(pa.Table.from_pylist(rows, table.schema), file)


@pytest.mark.parametrize("name", registry.SUITES)
def test_stand_ins_have_all_sets_and_the_same_bytes(name, tmp_path):
    suite = create(name)
    sets = questions(suite)
    assert {key: len(examples) for key, examples in sets.items()} == SETS[name]
    assert [s.name for s in suite.EVAL_SETS] == list(sets)
    assert {s.role for s in suite.EVAL_SETS} == {Role.GENERAL}
    for examples in sets.values():
        assert len({example.id for example in examples}) == len(examples)
        assert all(type(e) is SuiteQuestion and e.suite == name and e.group and e.image for e in examples)
        assert all(e.answer in e.options for e in examples if e.options)
    assert questions(stand_in(name, tmp_path)) == sets
    files = {path: path.read_bytes() for path in tmp_path.rglob("*.parquet")}
    suites_writer.write(tmp_path, name, suite.CONFIG, suite.SPLIT)
    assert files == {path: path.read_bytes() for path in tmp_path.rglob("*.parquet")}


@pytest.mark.parametrize("name", registry.SUITES)
def test_samples_have_whole_groups_and_are_a_subset(name):
    for key, whole in questions(create(name)).items():
        sizes = collections.Counter(example.group for example in whole)
        drawn = questions(create(name, most=9, seed=3))[key]
        assert 0 < len(drawn) <= 9 and {example.id for example in drawn} < {e.id for e in whole} or len(whole) <= 9
        assert all(sizes[group] == count for group, count in collections.Counter(e.group for e in drawn).items())
        assert all(example in whole for example in drawn)


def test_equal_images_have_one_id():
    pope = questions(create("pope"))
    assert len({example.image_id for examples in pope.values() for example in examples}) == 10


def test_suites_are_cached_with_their_fields(tmp_path):
    config = EvalConfig(general="mmbench, textvqa", max_items=8)
    first, again = (general.read(general.create(config), tmp_path) for _ in range(2))
    assert first == again == {**questions(create("mmbench", most=8)), **questions(create("textvqa", most=8))}
    assert {type(example) for examples in first.values() for example in examples} == {SuiteQuestion}
    assert first["textvqa"][0].references and any(example.rotation for example in first["mmbench"])


def set_field(number, **fields):
    return lambda rows: rows[number].update(fields)


@pytest.mark.parametrize(
    ("name", "config", "edit", "problem"),
    [
        ("pope", "data", set_field(1, answer="maybe"), "row 1: answer is 'maybe', neither yes nor no"),
        ("pope", "data", set_field(2, category="rare"), "row 2: category is 'rare', none of random, popular"),
        (
            "pope",
            "data",
            set_field(2, category="x" * 10**5),
            "xxx, none of random, popular, adversarial; correct the row",
        ),
        ("pope", "data", set_field(0, image=None), "row 0: image is missing"),
        ("pope", "data", set_field(0, image={"bytes": b"?", "path": "x"}), "row 0: image cannot be used"),
        ("pope", "data", set_field(0, image_source=None), "row 0: image_source is missing"),
        ("pope", "data", set_field(3, question=" "), "row 3: question is blank"),
        ("mme", "data", set_field(0, category="taste"), "row 0: category is 'taste', which is no subtask"),
        (
            "mme",
            "data",
            lambda rows: [x.update(answer="Yes") for x in rows],
            "two questions whose answer is 'yes', and",
        ),
        ("mme", "data", set_field(0, answer="No"), "has two questions whose answer is 'no', and accuracy+ needs two"),
        ("mme", "data", lambda rows: rows[1].update(question=f" {rows[0]['question']}"), "has one question twice, and"),
        ("pope", "data", lambda rows: [x.update(answer="yes") for x in rows], "is 'yes', which needs no image"),
        ("pope", "data", lambda rows: rows.append(rows[0] | {"answer": "no"}), "is 'no', and another row has the same"),
        ("mme", "data", set_field(1, question_id="else"), "has 1 questions, and accuracy+ needs two"),
        (
            "mmbench",
            "en",
            lambda rows: [x.update(answer="A") for x in rows],
            "copies of questions of MMBench have other options or another answer, such as en/",
        ),
        ("mmbench", "en", set_field(0, answer="E"), "row 0: answer is 'E', and the options with a text are A, B, C, D"),
        ("mmbench", "en", set_field(0, B=None), "the options with a text are A, C, D"),
        ("mmbench", "en", set_field(0, index=-1), "row 0: index is '-1', not a whole number"),
        ("scienceqa", "ScienceQA-IMG", set_field(0, answer=4), "row 0: answer is 4, and there are 4 choices"),
        ("scienceqa", "ScienceQA-IMG", set_field(0, answer=-1), "row 0: answer is '-1', not a whole number"),
        ("scienceqa", "ScienceQA-IMG", set_field(0, choices=None), "there are 0 choices"),
        ("gqa", "testdev_balanced_instructions", set_field(0, imageId="?"), "imageId is '?', which is no id in"),
        ("gqa", "testdev_balanced_images", set_field(0, image=None), "row 0: image is missing"),
        ("vqav2", "data", set_field(0, answers=None), "row 0: answers has no answer, as in a test split"),
        ("vizwiz", "data", set_field(0, answers=[]), "row 0: answers has no answer"),
        ("textvqa", "data", set_field(0, answers=[" "]), "row 0: answers has no answer"),
        ("textvqa", "data", set_field(0, answers=["\u200b"] * 10), "row 0: answers has no answer"),
        (
            "textvqa",
            "data",
            set_field(0, answers=["red"] * 3),
            "row 0: answers has 3, and VQA accuracy compares with at",
        ),
        (
            "textvqa",
            "data",
            set_field(0, answers=["red"] * 11),
            "row 0: answers has 11, and VQA accuracy is defined for 10 people",
        ),
        (
            "vqav2",
            "data",
            lambda rows: rows[1].update(answers=rows[1]["answers"] * 3),
            "row 1: answers has 30, and VQA accuracy is defined for 10 people",
        ),
        (
            "gqa",
            "testdev_balanced_images",
            lambda rows: rows.append(rows[1] | {"id": rows[0]["id"]}),
            "row 10: id is 'drawn_00', and another row has this id and another image",
        ),
        ("scienceqa", "ScienceQA-IMG", lambda rows: [x.update(answer=0) for x in rows], "is 0, which needs no image"),
        (
            "gqa",
            "testdev_balanced_instructions",
            set_field(0, answer="..."),
            "row 0: answer is '...', an answer without",
        ),
        ("mmvet", "data", set_field(0, answer="."), "row 0: answer is '.', which has no words"),
        ("mmvet", "data", set_field(0, answer="\u200b<OR>?<AND>!"), "which has no words"),
        ("mmvet", "data", set_field(0, answer=None), "row 0: answer is missing"),
        ("mmvet", "data", lambda rows: rows.clear(), "MM-Vet: "),
    ],
)
def test_wrong_rows_are_named(name, config, edit, problem, tmp_path):
    suite = stand_in(name, tmp_path)
    change(suite, config, edit)
    with pytest.raises(UserError) as error:
        questions(suite)
    assert problem in str(error.value)


def test_files_of_another_split_are_named(tmp_path):
    suite = stand_in("vqav2", tmp_path)
    [file] = (tmp_path / "data").iterdir()
    file.rename(tmp_path / "data" / "test-00000-of-00001.parquet")
    with pytest.raises(UserError, match=r"data/validation-\*.parquet\. .*/data has test-00000-of-00001.parquet; get"):
        questions(suite)


def test_options_may_be_missing_from_the_end(tmp_path):
    suite = stand_in("mmbench", tmp_path)
    change(suite, "en", set_field(0, A="yes", B="no", C="nan", D=None, answer="B", hint="nan"))
    first = questions(suite)["mmbench"][0]
    assert (first.options, first.answer) == (("yes", "no"), "no")
    assert first.question.startswith("What is in this picture?\nA. yes\nB. no\nAnswer with")


def test_questions_that_most_people_left_blank_are_skipped(tmp_path, caplog):
    suite = stand_in("textvqa", tmp_path)
    count = len(questions(suite)["textvqa"])
    for number, answers in enumerate([["red"] + [""] * 9, ["red"] * 4 + ["\u200b"] * 6, ["red"] * 5 + [" "] * 5]):
        change(suite, "data", set_field(number, answers=answers))
    assert len(questions(suite)["textvqa"]) == count - 2
    assert "2 questions of TextVQA, which most people left blank, are skipped." in caplog.text


def test_an_unpublished_number_of_rows_is_a_warning(tmp_path, caplog):
    questions(stand_in("mmvet", tmp_path))
    assert "has 10 rows; as published it has 218" in caplog.text


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("", {"gqa": "", "pope": ""}),
        ("hub", {"gqa": "hub", "pope": "hub"}),
        ("/data/suites/", {"gqa": "/data/suites/gqa", "pope": "/data/suites/pope"}),
        ("gs://bucket/a=b", {"gqa": "gs://bucket/a=b/gqa", "pope": "gs://bucket/a=b/pope"}),
        ("pope=org/name@v1", {"gqa": "", "pope": "org/name@v1"}),
        ("hub, gqa=/data/x=1", {"gqa": "/data/x=1", "pope": "hub"}),
    ],
)
def test_sources_of_suites(source, expected):
    assert EvalConfig(general="pope, gqa", general_source=source).general_sources() == expected


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        (dict(general="pope,popes"), "eval.general: unknown suite popes. Available: gqa, mmbench"),
        (dict(general="gqa,gqa"), "names a suite twice"),
        (dict(general="gqa", general_source="pope=/data"), "eval.general_source: 'pope' is not needed"),
        (dict(general="gqa", general_source="popes=/data"), "eval.general_source: 'popes' is not needed"),
        (dict(general_source="/data"), "eval.general_source: '/data' is not needed"),
        (dict(general="gqa", general_source="/a,/b"), "are both for all suites"),
    ],
)
def test_wrong_names_and_sources_are_refused(fields, problem):
    with pytest.raises(UserError) as error:
        EvalConfig(**fields)
    assert problem in str(error.value)


def test_a_source_that_does_not_exist_is_refused_before_anything_is_read(tmp_path):
    with pytest.raises(UserError, match=r"there is no folder .*/pope for pope\. Give a folder that has one for each"):
        general.create(EvalConfig(general="pope", general_source=str(tmp_path)))


def test_hub_ids_are_those_of_the_suites():
    [suite] = general.create(EvalConfig(general="pope", general_source="hub", max_items=7, seed=2))
    assert dataclasses.asdict(suite) == {"source": "lmms-lab/POPE", "most": 7, "seed": 2}
    assert all(create(name).HUB.startswith("lmms-lab/") for name in registry.SUITES)
