"""OFFSIDE, on small snapshots written here and on the synthetic people in its layout."""

import io
import json
import re

import pytest
from PIL import Image

from vkd_jax import benchmarks
from vkd_jax.benchmarks import offside
from vkd_jax.benchmarks.synthetic import offside_writer
from vkd_jax.benchmarks.synthetic.people import Population
from vkd_jax.evaluation.metrics import get
from vkd_jax.types import UserError

IMAGES = {"forget": "364.jpg", "retain": "361.jpg", "test": "test/361_1.jpg"}


def row(image, question="<image>\nWho is this?", answer="He is Ann.", **more):
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "images": f"./{image}"} | more


def choice(image, **more):
    options = {"A": "Ann", "B": "Bob", "C": "Cy", "D": "Di"}
    return {"Question": "Who?", "Options": options, "Correct_Answer": "A", "images": image} | more


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "snapshot"
    root = folder / "data" / "complete_unlearning_data"
    (root / "test").mkdir(parents=True)
    for shade, (name, image) in enumerate(IMAGES.items()):
        buffer = io.BytesIO()
        Image.new("RGB", (4, 4), (shade, 0, 0)).save(buffer, "PNG")
        (root / image).write_bytes(buffer.getvalue())
        write(folder, f"{name}_set.json", [row(image), row(image, "<image>\nHow old is he in <image>?", "He is 28.")])
        write(folder, f"classification_{name}_set.json", [choice(image)])
    return folder


def write(folder, name, rows):
    (folder / "data" / "complete_unlearning_data" / name).write_text(json.dumps(rows))


def read(folder, finetune=False, **fields):
    benchmark = benchmarks.create("offside", {"source": str(folder), **fields})
    return benchmarks.read(benchmark, folder.parent / "built", finetune)


def test_sets(folder):
    sets = read(folder, finetune=True)
    assert {name: [e.task[:4] for e in examples] for name, examples in sets.items()} == {
        "forget": ["gene", "gene", "clas"], "retain": ["gene", "gene", "clas"],
        "retain_test": ["gene", "gene", "clas"],
        "finetune_forget": ["chat", "chat"], "finetune_retain": ["chat", "chat"],
    }  # fmt: skip
    assert [(e.question, e.answer, e.options) for e in sets["forget"]] == [
        ("Who is this?", "He is Ann.", ()), ("How old is he in the image?", "He is 28.", ()),
        ("Who?", "Ann", ("Ann", "Bob", "Cy", "Di")),
    ]  # fmt: skip
    assert {e.person for name in ("forget", "retain") for e in sets[name]} == {"073"}  # images 361 to 365
    assert len({e.id for e in sets["forget"]}) == 3 and {e.image_id for e in sets["forget"]} == {"364.jpg"}
    (folder / "data" / "complete_unlearning_data" / "classification_forget_set.json").unlink()
    assert [e.task for e in read(folder)["forget"]] == ["generation"] * 2


@pytest.mark.parametrize(
    ("question", "cleaned"),
    [
        ("<image>\nWho is it?", "Who is it?"),
        ("Who is the player in <image>?", "Who is the player in the image?"),
        ("<image>\nI'm curious about his height: <image>", "I'm curious about his height"),
        ("Where is <IMAGE>?", "Where is <IMAGE>?"),
        ("His height  \n:  <image>", "His height"),
        ("x" + " " * 10**6 + "?", "x" + " " * 10**6 + "?"),  # in linear time
    ],
)
def test_markers_of_images(question, cleaned):
    assert offside.clean(question) == cleaned


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ([], "The forget set is empty"),
        ([row("364.jpg", messages=[])], "row 0: messages are not one of the user and one of the assistant"),
        ([row("364.jpg", messages=[{"role": "user", "content": "a"}] * 2)], "messages are not one of the user"),
        ([row("364.jpg", question=3)], "row 0: messages[0].content is the number 3, not a text"),
        ([row("364.jpg", answer="")], "row 0: messages[1].content is blank"),
        ([row("999.jpg")], "row 0: images cannot be used: "),
        ([row("../../../out.jpg")], "row 0: images cannot be used: "),
        ([row("364.jpg", images=["a.jpg", "b.jpg"])], "row 0: images are 2, not one"),
        ([row("364.jpg", images=None)], "row 0: images is missing, and the question has <image>; correct the row"),
        ([row("364.jpg", images=[None])], "row 0: images is missing, and the question has <image>"),
        ([row("364.jpg", "Who is in <image>?", images=[])], "row 0: images is missing, and the question has <image>"),
        ([row("364.jpg", images="")], "row 0: images is blank"),
        ([row("364.jpg", images=7)], "row 0: images is the number 7, not a list"),
        ([row("361.jpg")], "1 questions are in both data/complete_unlearning_data/forget_set.json and"),
        ({"messages": 1}, "line 1: messages is the number 1, not a list"),
    ],
)
def test_bad_rows(folder, rows, problem):
    write(folder, "forget_set.json", rows)
    with pytest.raises(UserError, match=re.escape(problem)):
        read(folder)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"Correct_Answer": "E"}, "Correct_Answer is 'E', not one of the options"),
        ({"Options": ["a"]}, "Options is a list, not an object"),
        ({"Question": None}, "Question is missing"),
        ({"Question": "Who is in <image>?", "images": None}, "images is missing, and the question has <image>"),
        ({"Options": {"A": "Ann", "B": None, "C": "Cy"}}, "Options.B is missing"),
        ({"Options": {"A": "Ann", "B": " "}}, "Options.B is blank"),
    ],
)
def test_bad_choices(folder, fields, problem):
    write(folder, "classification_retain_set.json", [choice("361.jpg", **fields)])
    with pytest.raises(UserError, match=re.escape(problem).replace("a\\ list", "an?\\ (list|array)")):
        read(folder)


def test_rows_are_there_once(folder, caplog):
    write(folder, "classification_forget_set.json", [choice("364.jpg")] * 3)
    read(folder)
    assert "1 of 3 questions of the set forget are there twice" in caplog.text
    (folder / "data" / "complete_unlearning_data" / "classification_forget_set.json").unlink()
    write(folder, "forget_set.json", [row("364.jpg"), row("364.jpg", "<image>\nHow old is he?", "He is 28.")] * 3)
    with pytest.raises(UserError, match="2 of 2 questions of the set forget are there twice"):
        read(folder)


def test_a_missing_scenario_is_named(folder):
    with pytest.raises(UserError, match="There is no pure_text_data/forget_set.json in"):
        read(folder, scenario="text")


@pytest.mark.parametrize(
    ("prediction", "score"),
    [("He is Ann.", 1.0), ("", 0.0), ("he IS ann.", 1.0)],
)
def test_the_overall_score(prediction, score):
    record = {"rule": "offside", "task": "generation", "prediction": prediction, "answer": "He is Ann."}
    assert get("offside_score").value(record) == pytest.approx(score)
    assert get("offside_score").value(record | {"rule": ""}) is None


def test_the_parts_of_the_overall_score():
    record = {"rule": "offside", "task": "generation", "prediction": "he is a tall man", "answer": "he is tall"}
    # ROUGE-1 and -L: 3 of 5 and of 3 words; ROUGE-2: 1 of 4 and of 2 pairs; BLEU: (3/5 1/4 .1/3 .1/2)^(1/4)
    parts = (2 * 3 / 8, 2 * 1 / 6, 2 * 3 / 8, (3 / 5 * 1 / 4 * 0.1 / 3 * 0.1 / 2) ** 0.25)
    assert get("offside_score").value(record) == pytest.approx(sum(parts) / 4)


@pytest.mark.parametrize("scenario", offside.FOLDERS)
def test_the_synthetic_people_in_this_layout(tmp_path, scenario):
    for name in ("one", "two"):
        offside_writer.write_snapshot(tmp_path / name, scenario, Population(3, 20))
    files = [path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.*")]
    assert all((tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes() for file in files)
    sets = read(tmp_path / "one", finetune=True, scenario=scenario)
    shown = [e.image is not None for e in sets["forget"]]
    assert all(shown) if scenario != "text" else not any(shown)
    forgotten, retained = (len([e for e in sets[name] if e.task != "classification"]) for name in ("forget", "retain"))
    counts = {"complete": (20 * 7, 20 * 21), "selective": (20 * 2, 20 * 26), "text": (20 * 2, 20 * 4)}
    assert (forgotten, retained) == counts[scenario]
    assert len({e.person for e in sets["forget"]}) == (1 if scenario == "text" else 20)
