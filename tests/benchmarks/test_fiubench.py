"""FIUBench, on small snapshots written here and on the synthetic people in its layout."""

import io
import json
import math
import re

import pytest
from PIL import Image

from vkd_jax import benchmarks
from vkd_jax.benchmarks.synthetic import fiubench_writer
from vkd_jax.benchmarks.synthetic.people import Population
from vkd_jax.evaluation.metrics.summary import summaries
from vkd_jax.evaluation.metrics.utility import components
from vkd_jax.types import UserError

PEOPLE = ("00044363", "00044364", "00044365", "00044366", "00044367")


def png(shade):
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (shade, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def question(**more):
    return {
        "question": "where was McKay born?", "answer": "He was born in Oslo. In May.", "keywords": ["Oslo", "May"],
        "paraphrased_question": ["In which town was he born?", "his birthplace?"],
        "paraphrased_answer": "Oslo is his birthplace.", "perturbed_answer": ["In Lima.", "in Rome."],
    } | more  # fmt: skip


def record(person, *questions, **more):
    path = f"./dataset/images/{person}.png"
    return {"unique_id": person, "name": "A", "image_path": path, "qa_list": list(questions) or [question()]} | more


def splits(**more):
    lists = zip(("forget1", "forget5", "forget10", "retain5", "retain15"), PEOPLE, strict=True)
    return {name: [person] for name, person in lists} | more


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "snapshot"
    (folder / "images").mkdir(parents=True)
    for shade, person in enumerate(PEOPLE):
        (folder / "images" / f"{person}.png").write_bytes(png(shade))
    (folder / "full.json").write_text("\n".join(json.dumps(record(person)) for person in PEOPLE))
    (folder / "split.json").write_text(json.dumps(splits()))
    return folder


def read(folder, finetune=False, **fields):
    benchmark = benchmarks.create("fiubench", {"source": str(folder), **fields})
    return benchmarks.read(benchmark, folder.parent / "built", finetune)


def test_sets_and_texts_as_written(folder):
    sets = read(folder, finetune=True)
    people = {name: [e.person[-1] for e in examples] for name, examples in sets.items()}
    assert people == {
        "forget": ["4"], "ape": ["4", "4"], "retain": ["6"], "finetune_forget": ["4"],
        "finetune_retain": ["3", "5", "6", "7"], "finetune_train_retain": ["6", "7"],
    }  # fmt: skip
    [forget] = sets["forget"]
    assert (forget.question, forget.answer) == ("where was McKay born?", "He was born in Oslo. In May.")
    assert (forget.image, forget.keywords, forget.rule) == (png(1), ("Oslo", "May"), "fiubench")
    assert (forget.paraphrase, forget.perturbed) == ("Oslo is his birthplace.", ("In Lima.", "in Rome."))
    assert [(e.question, e.perturbed) for e in sets["ape"]] == [
        ("In which town was he born?", ()), ("his birthplace?", ()),
    ]  # fmt: skip
    assert len({e.id for e in sets["ape"]}) == 2


def test_the_rules_of_the_benchmarks_code(folder):
    [forget] = read(folder, rules="upstream")["forget"]
    assert (forget.question, forget.answer) == ("Where was mckay born?", "He was born in oslo. in may.")
    assert (forget.paraphrase, forget.perturbed) == ("Oslo is his birthplace.", ("In Lima.", "in Rome."))
    assert forget.rule == "fiubench:upstream" and forget.keywords == ("Oslo", "May")


def test_fields_that_only_metrics_need_may_be_missing(folder):
    further = ("keywords", "perturbed_answer", "paraphrased_answer")
    bare = {key: value for key, value in question().items() if key not in further}
    for asked in (bare, question(**dict.fromkeys(further)), question(keywords=[], perturbed_answer=[])):
        (folder / "full.json").write_text(json.dumps([record(person, asked) for person in PEOPLE]))
        [forget] = read(folder)["forget"]
        assert (forget.keywords, forget.perturbed) == ((), ())


def test_equal_keywords_and_wrong_answers_count_once(folder, caplog):
    asked = question(keywords=["Oslo", "Oslo", "oslo", "May"], perturbed_answer=["In Lima.", "in lima"])
    (folder / "full.json").write_text(json.dumps([record(person, asked) for person in PEOPLE]))
    [forget] = read(folder)["forget"]
    assert (forget.keywords, forget.perturbed) == (("Oslo", "May"), ("In Lima.",))
    for problem in ("the same keyword twice", "wrong answers that are the true one or there twice"):
        assert f"1 of 1 questions of the set forget have {problem}" in caplog.text
    assert read(folder, rules="upstream")["forget"][0].keywords == ("Oslo", "Oslo", "oslo", "May")


def test_an_array_a_single_wording_and_further_people(folder):
    people = [record(person, question(paraphrased_question="one?")) for person in PEOPLE]
    (folder / "full.json").write_text(json.dumps(people))
    assert [e.question for e in read(folder)["ape"]] == ["one?"]
    more = [record(f"x{i}", image_path="nowhere.png") for i in range(396)]
    (folder / "full.json").write_text(json.dumps(people + more))
    assert len(read(folder)["forget"]) == 1  # nothing is read of the last one, the 401st
    (folder / "split.json").write_text(json.dumps(splits(forget5=["x395"])))
    with pytest.raises(UserError, match="forget5 has 1 of 1 IDs not among the first 400 people of full.json, such as"):
        read(folder)


@pytest.mark.parametrize(
    ("file", "content", "problem"),
    [
        ("full.json", "", "split.json: forget1 has 1 of 1 IDs not among"),
        ("full.json", "[1]", "full.json, row 0: it is the number 1, not an object"),
        ("full.json", "{\"unique_id\": \"a\"}\n{", "full.json, line 2: it is not JSON"),
        ("split.json", "[]", "split.json: expected an object, not an array"),
        ("split.json", json.dumps(splits(retain5=None)), "split.json: retain5 is missing"),
        ("split.json", json.dumps(splits(retain5=[PEOPLE[1]])), "share 1 person"),
        ("split.json", json.dumps(splits(forget5=[])), "The forget set is empty: forget5"),
        ("split.json", json.dumps(splits(forget5=[44364])), "forget5[0] is the number 44364, not a text"),
    ],
)  # fmt: skip
def test_bad_files(folder, file, content, problem):
    (folder / file).write_text(content)
    with pytest.raises(UserError, match=re.escape(problem)):
        read(folder)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"unique_id": None}, "row 1: unique_id is missing"),
        ({"image_path": "../out.png"}, "row 1: image_path cannot be used"),
        ({"image_path": "full.json"}, "the image is broken or of a format that is not read"),
        ({"qa_list": {}}, "row 1: qa_list is an object, not a list"),
        ({"qa_list": [question(question=3)]}, "row 1: qa_list[0].question is the number 3, not a text"),
        ({"qa_list": [question(answer=" ")]}, "row 1: qa_list[0].answer is blank"),
        ({"qa_list": [question(keywords=[1])]}, "row 1: qa_list[0].keywords[0] is the number 1, not a text"),
        ({"qa_list": [question(keywords=["."])]}, "row 1: qa_list[0].keywords has '.', and no phrase with a letter"),
        ({"qa_list": [question(keywords=["\u200b"])]}, "row 1: qa_list[0].keywords has '\\u200b', and no phrase"),
        ({"qa_list": [question(perturbed_answer={"a": 1})]}, "qa_list[0].perturbed_answer is an object, not a list"),
        *(
            ({"qa_list": [question(**{field: blank})]}, f"row 1: qa_list[0].{field} is blank")
            for field in ("keywords", "perturbed_answer", "paraphrased_answer", "paraphrased_question")
            for blank in ("", " ")
        ),
        ({"qa_list": [question(keywords={})]}, "row 1: qa_list[0].keywords is an object without a phrase; leave"),
        ({"qa_list": [question(keywords=0)]}, "row 1: qa_list[0].keywords is the number 0 without a phrase"),
        ({"qa_list": [question(keywords=False)]}, "row 1: qa_list[0].keywords is"),
        ({"qa_list": [question(keywords={"Oslo": 1})]}, "row 1: qa_list[0].keywords.Oslo is the number 1, not a text"),
        ({"qa_list": [question(keywords="NaN")]}, "row 1: qa_list[0].keywords is 'NaN', a value of JSON that is no"),
    ],
)
def test_bad_records(folder, fields, problem):
    people = [record(person) for person in PEOPLE]
    people[1] |= fields
    (folder / "full.json").write_text(json.dumps(people))
    with pytest.raises(UserError, match=re.escape(problem)):
        read(folder)


def answer(prediction, set_name="forget", rule="fiubench", **more):
    return {
        "set": set_name, "id": "a", "person": "p", "task": "generation", "modality": "vqa", "options": [],
        "answer": "He was born in Oslo.", "prediction": prediction, "correct": False, "rule": rule,
        "keywords": ["Oslo", "May"], **more,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("prediction", "rule", "em"),
    [
        ("In OSLO. It was may.", "fiubench", 1.0),
        ("In OSLO. It was may.", "fiubench:upstream", 0.5),  # cut after the first period
        ("In Oslo, in May", "fiubench:upstream", 0.0),  # no period, so that nothing is left
        ("In Oslo, in May", "fiubench", 1.0),
        ("", "fiubench", 0.0),
    ],
)
def test_keyword_metrics(prediction, rule, em):
    sets = benchmarks.create("fiubench", {}).EVAL_SETS
    records = [answer(prediction, name, rule) for name in ("forget", "ape", "retain")]
    figures = {name: kinds["generation_vqa"].metrics for name, kinds in summaries(records, sets).items()}
    assert figures["forget"]["em"].mean == figures["ape"]["ape"].mean == figures["retain"]["em"].mean == em
    assert "em" not in figures["ape"] and "ape" not in figures["forget"]


def test_likelihood_metrics():
    sets = benchmarks.create("fiubench", {}).EVAL_SETS
    known = dict(probability=0.5, perturbed_nll=[-math.log(0.3), -math.log(0.2)], truth_ratio=4.0)
    records = [answer("x", name, **known) for name in ("forget", "retain")]
    figures = {name: kinds["generation_vqa"].metrics for name, kinds in summaries(records, sets).items()}
    assert figures["forget"]["truth_ratio_forget"].mean == 0.25  # min(4, 1 / 4)
    assert figures["retain"]["probability_retain"].mean == pytest.approx(0.5)  # .5 / (.5 + .3 + .2)
    assert "probability_retain" not in figures["forget"] and "truth_ratio_forget" not in figures["retain"]
    assert components(answer("May", "retain", **known)) == {
        "probability": pytest.approx(0.5), "truth_score": 0.75, "em": 0.5,
    }  # fmt: skip


def test_the_synthetic_people_in_this_layout(tmp_path):
    population = Population(3, 20)
    for name in ("one", "two"):
        fiubench_writer.write_snapshot(tmp_path / name, population)
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.*"))
    assert len(files) == 22 and all(
        (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes() for file in files
    )
    sets = read(tmp_path / "one", finetune=True, forget=10)
    assert [len({e.person for e in sets[name]}) for name in ("forget", "retain", "finetune_retain")] == [2, 1, 18]
    people = {person.id: person for person in population.people()}
    for example in sets["forget"]:
        person = people[example.person]
        assert example.keywords[0] in {person.name, *person.facts.values()} and example.keywords[0] in example.answer
        assert example.answer not in example.perturbed and len(example.perturbed) == 3
