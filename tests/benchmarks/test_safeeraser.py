"""SafeEraser, on small snapshots written here and on the drawn warning signs in its layout."""

import io
import json
import re

import pytest
from PIL import Image

from vkd_jax import benchmarks
from vkd_jax.benchmarks.safeeraser import HARMLESS, NAME, UNHARM, SafeEraser
from vkd_jax.evaluation import judge
from vkd_jax.evaluation.metrics import refusals
from vkd_jax.evaluation.metrics.summary import summaries
from vkd_jax.methods import idk
from vkd_jax.types import UserError


def png(shade):
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (shade, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def record(number, **more):
    return {
        "image_path": f"./images/bolt/{number}.png",
        "SDImage_path": f"sd/bolt/{number}.png",
        "unsafe_pairs": [
            {"question": f"What is {i}?", "model_response": "A warning.", "sd_response": "A tree."} for i in range(2)
        ],
        "UnharmPair_text1": {"Question": "Is the sky blue?", "Prediction": "Yes."},
        "UnharmPair_image1": {"Question": "Which shape?", "Prediction": "A triangle."},
    } | more


def write(folder, train, val=(), prompts=None):
    for name, records in (("all_train.json", train), ("all_val.json", val or [record(2)])):
        (folder / name).write_text(json.dumps(records))
    (folder / "prompt.json").write_text(json.dumps({"idk": ["I don't know."]} if prompts is None else prompts))


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "snapshot"
    for number in range(3):
        for path in (f"images/bolt/{number}.png", f"sd/bolt/{number}.png"):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(png(10 * number + path.startswith("sd")))
    write(folder, [record(0), record(1)])
    return folder


def read(folder, finetune=False):
    benchmark = benchmarks.create("safeeraser", {"source": str(folder)})
    return benchmarks.read(benchmark, folder.parent / "built", finetune)


def test_sets(folder):
    sets = read(folder, finetune=True)
    assert {name: len(examples) for name, examples in sets.items()} == {
        "forget": 4, "test": 2, "retain": 4, "harmless": 4, "harmless_test": 2, "retain_test": 2,
        "finetune_forget": 4, "finetune_retain": 8, "finetune_refusals": 1,
    }  # fmt: skip
    forget, harmless, retain = sets["forget"][0], sets["harmless"][0], sets["retain"]
    assert (forget.question, forget.answer, forget.image) == ("What is 0?", "A warning.", png(0))
    assert (harmless.question, harmless.answer, harmless.image) == ("What is 0?", "A tree.", png(1))
    assert [(e.image, e.answer) for e in retain[:2]] == [(png(0), "A triangle."), (None, "Yes.")]
    rules = {name: {e.rule for e in sets[name]} for name in ("forget", "harmless_test", "retain_test")}
    assert rules == {"forget": {NAME}, "harmless_test": {HARMLESS}, "retain_test": {UNHARM}}
    assert {e.person for e in (forget, harmless, *retain)} == {"bolt"}


def test_both_spellings_are_the_same_data(folder):
    expected = read(folder)
    other = record(0)
    other["image_id"] = other.pop("image_path")
    for name in ("UnharmPair_text1", "UnharmPair_image1"):
        other[name] = {"Question": other[name]["Question"], "Answer": other[name]["Prediction"]}
    write(folder, [other, record(1)])
    assert read(folder) == expected


def test_a_category_may_be_named_and_pairs_may_be_missing(folder):
    write(folder, [record(0, category="fire", UnharmPair_text1=None)])
    sets = read(folder)
    assert {e.person for e in sets["forget"]} == {"fire"} and len(sets["retain"]) == 1


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"image_path": "images/bolt/9.png"}, "all_train.json, row 0: image_path cannot be used"),
        ({"image_path": None}, "all_train.json, row 0: image_path is missing"),
        ({"SDImage_path": None}, "row 0: SDImage_path is missing"),
        ({"unsafe_pairs": []}, "row 0: unsafe_pairs is missing or empty"),
        ({"unsafe_pairs": [{"question": "a"}]}, "row 0: unsafe_pairs[0].model_response is missing"),
        ({"UnharmPair_image1": {"Question": "a"}}, "row 0: UnharmPair_image1.Prediction is missing"),
        ({"UnharmPair_image1": "a"}, "row 0: UnharmPair_image1 is the text 'a', not an object"),
    ],
)
def test_bad_records(folder, changes, problem):
    write(folder, [record(0) | changes], [record(1)])
    with pytest.raises(UserError, match=re.escape(problem)):
        read(folder)


def test_a_harmless_image_is_not_the_unsafe_one(folder):
    write(folder, [record(0), record(1, SDImage_path="images/bolt/1.png")])
    with pytest.raises(
        UserError, match=r"2 questions are both to be forgotten and not: .* forget and harmless share all"
    ):
        read(folder)


def test_an_image_without_a_folder_has_no_category(folder):
    (folder / "a.png").write_bytes(png(1))
    write(folder, [record(0, image_path="a.png")], [record(1)])
    with pytest.raises(UserError, match="row 0: image_path is in no folder that names its category"):
        read(folder)


def test_missing_refusals(folder):
    for prompts in ({"other": []}, {"idk": []}, {"idk": ["\u200b", "."]}):
        write(folder, [record(0)], prompts=prompts)
        with pytest.raises(UserError, match="prompt.json: idk is missing or empty"):
            read(folder, finetune=True)


@pytest.mark.parametrize(
    "text",
    [*idk.REFUSALS, "I\u2019m sorry, but I can\u2019t  help.", "That is BEYOND MY knowledge.", "As an AI, no."],
)
def test_refusals(text):
    assert refusals.is_refusal(text)


@pytest.mark.parametrize("text", ["", "A red car.", "The sign warns of a wet floor.", "Nothing is in the picture."])
def test_other_answers(text):
    assert not refusals.is_refusal(text)


def answer(set_name, prediction, rule, **more):
    return {
        "set": set_name, "id": prediction, "person": "bolt", "task": "generation", "modality": "vqa", "options": [],
        "question": "What is it?", "answer": "a b c d", "prediction": prediction, "correct": False, "rule": rule,
    } | more  # fmt: skip


RECORDS = [
    *(answer("forget", x, NAME, asr=y) for x, y in (("I cannot say.", 0.0), ("It warns.", 1.0), ("x", 1.0))),
    answer("test", "I cannot say.", NAME),
    *(answer("harmless_test", x, HARMLESS) for x in ("I don't know.", "a", "b", "c")),
    answer("retain", "a b x y", UNHARM, judge=0.7),
]


def test_published_figures():
    figures = {
        name: kinds["generation_vqa"].metrics for name, kinds in summaries(RECORDS, SafeEraser.EVAL_SETS).items()
    }
    published = ("rr", "sarr", "asr", "rouge_l_precision", "judge")
    assert {name: {m: x[m].mean for m in published if m in x} for name, x in figures.items()} == {
        "forget": {"rr": pytest.approx(1 / 3), "asr": pytest.approx(2 / 3)}, "test": {"rr": 1.0},
        "harmless_test": {"sarr": 0.25}, "retain": {"rouge_l_precision": 0.5, "judge": 0.7},
    }  # fmt: skip


class Script:
    """A judge that keeps its prompts and calls every answer unsafe."""

    def __init__(self):
        self.prompts = []

    def replies(self, prompts):
        self.prompts += prompts
        return [judge.Reply("1")] * len(prompts)


def test_a_judge_is_asked_by_category_whether_an_answer_is_unsafe(tmp_path):
    file, script = tmp_path / "judge.json", Script()
    file.write_text(json.dumps({"safeeraser/fire": {"prompt": "FIRE {question} {prediction}", "largest": 1}}))
    records = [RECORDS[1], answer("forget", "x", NAME, person="fire"), RECORDS[-1]]
    records = [{key: value for key, value in r.items() if key not in ("asr", "judge")} for r in records]
    scores = [(r.get("asr"), r.get("judge")) for r in judge.judged(script, judge.read_rules(file), records)]
    assert scores == [(1.0, None), (1.0, None), (None, 0.1)]
    assert "category bolt" in script.prompts[0] and "Reference" not in script.prompts[0]
    assert script.prompts[1] == "FIRE What is it? x" and "Reference answer: a b c d" in script.prompts[2]


def test_the_drawn_signs_in_this_layout(tmp_path):
    sets = benchmarks.read(SafeEraser(people=3, n_people=20), tmp_path, finetune=True)
    assert {name: len(examples) for name, examples in sets.items()} == {
        "forget": 40, "test": 10, "retain": 80, "harmless": 40, "harmless_test": 10, "retain_test": 20,
        "finetune_forget": 40, "finetune_retain": 120, "finetune_refusals": 4,
    }  # fmt: skip
    assert len({e.person for e in sets["forget"]}) == 4 and len({e.image for e in sets["forget"]}) == 20
    asked = [{e.question for e in sets[name]} for name in ("forget", "harmless", "test")]
    assert asked[0] == asked[1] == asked[2]
    answers = {e.person: set() for e in sets["forget"]}
    for e in (*sets["forget"], *sets["test"]):
        answers[e.person].add(e.answer)
    assert all(len(texts) == 2 for texts in answers.values())  # one for each question
    assert all(refusals.is_refusal(e.answer) for e in sets["finetune_refusals"])
    assert not any(refusals.is_refusal(e.answer) for name in ("forget", "harmless", "retain") for e in sets[name])
