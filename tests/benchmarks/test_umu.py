"""UMU-Bench, on small snapshots written here and on the synthetic people in its layout."""

import io
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from vkd_jax import benchmarks
from vkd_jax.benchmarks.synthetic import umu_writer
from vkd_jax.benchmarks.synthetic.people import Population
from vkd_jax.evaluation.metrics import pairs
from vkd_jax.evaluation.metrics.correctness import LETTER_RULES
from vkd_jax.evaluation.metrics.summary import summaries
from vkd_jax.types import UserError

OPTIONS = {"A": "cook", "B": "pilot", "C": "judge", "D": "nurse"}


def png(shade):
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (shade, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def sides(image, text):
    """A cell, with the misspelt key of the data."""
    return repr({"unimodal": {"k": text}, "muitimodal": {"k": image}})


def row(person, shade=0, **more):
    choice = {"options": OPTIONS, "answer": "B. pilot"}
    return {
        "ID": person, "image": {"bytes": png(shade), "path": None}, "Biography": "Ann's life",
        "MM_QA": repr({"question": {"k": "Job?"}, "answer": {"k": "It's a pilot."}}),
        "UM_QA": repr({"question": {"k": "Ann's job?"}, "answer": {"k": "A pilot."}}),
        "Classify": sides({"question": "Job?", **choice}, {"question": "Ann's job?", **choice}),
        "Cloze": sides(
            {"question": "Lives in __.", "answer": "St. Ives."}, {"question": "Ann lives in __.", "answer": "St. Ives."}
        ),
        "Generation": sides(
            {"question": "Who?", "answer": "A pilot."}, {"question": "Who is Ann?", "answer": "A pilot."}
        ),
    } | more  # fmt: skip


def write(folder, config, rows):
    path = folder / config / "train-00000-of-00001.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "snapshot"
    for shade, (config, person) in enumerate([("forget_5", "001"), ("retain_95", "002"), ("Real_Person_Set", "R1")]):
        write(folder, config, [row(person, shade)])
    return folder


def read(folder, finetune=False, **fields):
    benchmark = benchmarks.create("umu", {"source": str(folder), **fields})
    return benchmarks.read(benchmark, folder.parent / "built", finetune)


def test_one_row_becomes_pairs_of_questions(folder):
    sets = read(folder, finetune=True)
    assert [(e.task, e.modality, e.question.partition("\n")[0], e.answer) for e in sets["forget"]] == [
        ("classification", "vqa", "Job?", "pilot"),
        ("classification", "qa", "Ann's job?", "pilot"),
        ("cloze", "vqa", "Lives in [Blank].", "St. Ives"),
        ("cloze", "qa", "Ann lives in [Blank].", "St. Ives"),
        ("generation", "vqa", "Who?", "A pilot."),
        ("generation", "qa", "Who is Ann?", "A pilot."),
    ]
    assert {e.pair for e in sets["forget"]} == {"forget_5/0/k"} and sets["forget"][0].options == tuple(OPTIONS.values())
    assert {name: {e.person for e in examples} for name, examples in sets.items()} == {
        "forget": {"001"}, "retain": {"002"}, "real": {""}, "finetune_forget": {"001"}, "finetune_retain": {"002"},
    }  # fmt: skip
    assert [(e.question, e.answer, e.image) for e in sets["finetune_forget"]] == [
        ("Job?", "It's a pilot.", png(0)), ("Ann's job?", "A pilot.", None),
    ]  # fmt: skip
    upstream = read(folder, rules="upstream")["forget"]
    assert [e.answer for e in upstream if e.task == "cloze"] == ["St", "St"]


@pytest.mark.parametrize(
    ("cells", "problem"),
    [
        ({"Classify": "{"}, "row 0 (ID '001'): Classify is neither JSON nor a Python literal"),
        ({"Classify": "[1]"}, "Classify is a list, not an object"),
        ({"Classify": sides({"question": "Job?", "options": OPTIONS, "answer": "E. king"}, {})},
         "Classify.muitimodal.k.answer is 'E', not one of the options"),
        ({"Classify": sides({"question": "Job?", "options": OPTIONS, "answer": f"A. {OPTIONS['B']}"}, {})},
         f"Classify.muitimodal.k.answer is 'A', the option '{OPTIONS['A']}', but its text is '{OPTIONS['B']}'"),
        ({"Classify": sides({"question": "Job?", "options": OPTIONS, "answer": f"A. {OPTIONS['B'].upper()}."}, {})},
         "but its text is"),
        ({"Cloze": sides({"question": "Lives in __.", "answer": "\u3164."}, {})}, "has no words before its period"),
        ({"Cloze": sides({"question": "Lives in __.", "answer": "."}, {})}, "has no words before its period"),
        ({"Cloze": sides({"question": None, "answer": "x"}, {})}, "Cloze.muitimodal.k.question is missing"),
        ({"Generation": sides({"question": "Who?", "answer": 1.5}, {})},
         "Generation.muitimodal.k.answer is the number"),
        ({"Classify": repr({"unimodal": {"k": {}}, "multimodal": {}})},
         "Classify.muitimodal is missing; the cell has unimodal, multimodal"),
        ({"Cloze": sides({"question": "Lives in __.", "answer": "Oslo."}, None)}, "Cloze.unimodal is empty"),
        ({"Cloze": repr({"muitimodal": {"k": {"question": "__?", "answer": "Oslo."}}})}, "Cloze.unimodal is missing"),
        ({"Classify": "{}"}, "Classify.muitimodal is missing; the cell has nothing"),
        *(({column: "{xax: {xkx: xA cook.x, xkx: xA pilot.x}}".replace("x", quote)},
           f"{column} cannot be used: an object has the key 'k' twice, with two values")
          for column in ("Classify", "Cloze", "Generation", "MM_QA", "UM_QA") for quote in ("'", '"')),
        ({"Generation": repr({"unimodal": {}, "muitimodal": {}})}, "Generation.muitimodal is empty"),
        ({"MM_QA": repr({"Question": {}, "Answer": {}})}, "MM_QA.question is missing; the cell has Question, Answer"),
        ({"MM_QA": repr({"question": {}, "answer": {}})}, "MM_QA.question is empty"),
        ({"UM_QA": None}, "UM_QA.question is missing"),
        ({"image": None}, "image is missing, and Classify has questions about it"),
        ({"ID": None}, "ID is missing"),
        ({"ID": "002"}, "share 1 person"),
    ],
)  # fmt: skip
def test_bad_rows(folder, cells, problem):
    write(folder, "forget_5", [row("001", **cells)])
    with pytest.raises(UserError, match=re.escape(problem).replace("a\\ list", "an?\\ (list|array)")):
        read(folder, finetune=True)


@pytest.mark.parametrize("part", [False, True])
def test_each_person_has_one_row(folder, part, caplog):
    write(folder, "forget_5", [row(person, 10 + i) for i, person in enumerate(("001", "001", "003", "004"))])
    read(folder, finetune=part)
    assert "1 of 3 people of forget_5 have more than one row, such as 001" in caplog.text
    for people in (("001",) * 3, ("001", "003") * 2):
        write(folder, "forget_5", [row(person, 10 + i) for i, person in enumerate(people)])
        with pytest.raises(UserError, match=r"(1 of 1|2 of 2) people of forget_5 have more than one row, such as 001"):
            read(folder, finetune=part)


@pytest.mark.parametrize(
    ("a", "b", "rlf", "rlr"), [(1, 1, 1, 1), (1, 0, 1, 0), (0, 0, 0, 0), (0.5, 0.25, 5 / 12, 1 / 3)]
)
def test_rouge_of_pairs(a, b, rlf, rlr):
    assert (pairs.dominant(a, b), pairs.harmonic(a, b)) == pytest.approx((rlf, rlr))


def answer(set_name, key, modality, prediction, correct, task="cloze", protocol="cloze"):
    return {
        "set": set_name, "id": f"{key}/{modality}", "person": "p", "task": task, "modality": modality,
        "options": [], "answer": "a pilot", "prediction": prediction, "correct": correct, "pair": key,
        "protocol": protocol,
    }  # fmt: skip


def test_metrics_of_pairs():
    sets = benchmarks.create("umu", {}).EVAL_SETS
    right = {"a": (True, True), "b": (False, False), "c": (True, False), "d": (False, False)}
    records = [
        answer(name, key, modality, "x", correct)
        for name in ("forget", "retain")
        for key, both in right.items()
        for modality, correct in zip(("vqa", "qa"), both, strict=True)
    ]
    records += [answer("forget", "alone", "vqa", "x", False)]  # has no counterpart
    said = {"vqa": "a pilot", "qa": "a pilot from Oslo and"}  # ROUGE-L 1 and 4 / 7
    records += [
        answer(name, "e", modality, text, False, "generation", "generation")
        for name in ("forget", "retain")
        for modality, text in said.items()
    ]
    found = summaries(records, sets)
    assert found["forget"]["cloze_vqa"].metrics["acc_f"].mean == 0.5 and found["forget"]["cloze_vqa"].n == 5
    assert found["retain"]["cloze_vqa"].metrics["acc_r"].mean == 0.25
    assert "acc_r" not in found["forget"]["cloze_vqa"].metrics and "acc_f" not in found["forget"]["cloze_qa"].metrics
    rouge = 4 / 7
    assert found["forget"]["generation_vqa"].metrics["rlf"].mean == pytest.approx((1 + rouge**2) / (1 + rouge))
    assert found["retain"]["generation_vqa"].metrics["rlr"].mean == pytest.approx(2 * rouge / (1 + rouge))


@pytest.mark.parametrize(
    ("text", "similar", "strict"),
    [("He is a pilot.", "B", None), ("", "A", None), ("D", "", "D"), ("The answer is C.", "", "C"), ("B.", "", None)],
)
def test_rules_of_other_benchmarks_for_options(text, similar, strict):
    options = tuple(OPTIONS.values())
    assert LETTER_RULES["letter:strict"](text, options) == strict
    if similar:
        assert LETTER_RULES["letter:similar_option"](text, options) == similar


def test_the_synthetic_people_in_this_layout(tmp_path):
    configs, population = ("forget_10", "retain_90", "Real_Person_Set"), Population(3, 20)
    for name in ("one", "two"):
        umu_writer.write_snapshot(tmp_path / name, configs, population)
    for config in configs:
        [one, two] = [next((tmp_path / name / config).iterdir()).read_bytes() for name in ("one", "two")]
        assert one == two
    sets = read(tmp_path / "one", finetune=True, forget=10)
    assert [len({e.person for e in sets[name]}) for name in ("forget", "retain", "finetune_retain")] == [2, 18, 18]
    people = {person.id: person for person in population.people()}
    for example in sets["forget"]:
        person = people[example.person]
        assert example.task == "generation" or example.answer in person.facts.values()
    pairs_of = {(e.task, e.pair) for e in sets["forget"]}
    assert len(pairs_of) * 2 == len(sets["forget"])
