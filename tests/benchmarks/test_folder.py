"""Folders of your own: what a line becomes, and every fault of a folder in one sentence."""

import io
import json
import re

import pytest
from PIL import Image

from vkd_jax import benchmarks
from vkd_jax.benchmarks.folder import Folder
from vkd_jax.types import UserError


def png(shade):
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (shade, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def write(folder, lines, **images):
    """Writes a folder with these lines (dicts or raw texts) and images NAME.png of these shades."""
    folder.mkdir(exist_ok=True)
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (folder / "metadata.jsonl").write_text("\n".join(texts), encoding="utf-8")
    for name, shade in images.items():
        (folder / f"{name}.png").write_bytes(png(shade))
    return folder


@pytest.fixture
def folders(tmp_path):
    forget = [
        dict(file_name="a.png", question="Who?", answer="Zoë", options=["Zoë", "Otto"], person="Zoë", licence="x"),
        dict(question="Zoë's job?", answer="pilot", person="Zoë"),
        dict(file_name="./a.png", question="What job?", answer="pilot", person="Zoë"),
        "",
    ]
    write(tmp_path / "forget", forget, a=1)
    write(tmp_path / "retain", [dict(file_name="b.png", question="Who?", answer="Otto", person="Otto")], b=2)
    return tmp_path


def read(folders, finetune=False, **more):
    fields = dict(forget=str(folders / "forget"), retain=str(folders / "retain")) | more
    return benchmarks.read(benchmarks.create("folder", fields), folders / "built", finetune)


# ---- Values worked out by hand ----


def test_each_line_is_a_question(folders):
    sets = read(folders)
    assert list(sets) == ["forget", "retain"]
    assert [(e.id, e.task, e.image, e.question, e.answer, e.options, e.person) for e in sets["forget"]] == [
        ("forget/0/image/0", "classification", png(1), "Who?", "Zoë", ("Zoë", "Otto"), "Zoë"),
        ("forget/0/image/1", "generation", png(1), "What job?", "pilot", (), "Zoë"),
        ("forget/1/text/0", "generation", None, "Zoë's job?", "pilot", (), "Zoë"),
    ]
    assert sets["forget"][0].image is sets["forget"][1].image
    assert {e.image_id for e in sets["forget"]} == {"forget/a.png", ""}


def test_fine_tuning_asks_the_same(folders):
    sets = read(folders, finetune=True)
    for name in ("forget", "retain"):
        chat = [(e.id, e.image, e.question, e.answer, e.person) for e in sets[f"finetune_{name}"]]
        assert chat == [(e.id, e.image, e.question, e.answer, e.person) for e in sets[name]]
        assert {(e.task, e.options) for e in sets[f"finetune_{name}"]} == {("chat", ())}


def test_optional_sets(folders):
    for name in ("test", "real"):
        write(folders / name, [dict(file_name="p/x.png", question="Who?", answer="Zoë")])
        (folders / name / "p").mkdir()
        (folders / name / "p" / "x.png").write_bytes(png(9))
    sets = read(folders, test=str(folders / "test"), real=(folders / "real").as_uri() + "/")
    assert list(sets) == ["forget", "test", "retain", "real"]
    assert [(e.image, e.person, e.image_id) for e in sets["real"]] == [(png(9), "", "real/p/x.png")]


def test_a_changed_folder_is_read_again(folders):
    assert read(folders)["retain"][0].image == png(2)
    (folders / "retain" / "b.png").write_bytes(png(22))
    assert read(folders)["retain"][0].image == png(22)


# ---- Faults: one sentence each ----


def fault(folders, match, **more):
    with pytest.raises(UserError, match=match) as error:
        read(folders, **more)
    assert str(error.value).endswith(".") and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["forget", "retain"])
def test_both_folders_are_needed(folders, name):
    fault(folders, f"pass the folder of the {name} set as --config.data.{name}=DIR", **{name: ""})
    fault(folders, f"no metadata.jsonl in data.{name}=.*nowhere, which is empty or missing", **{name: "nowhere"})


def test_folders_without_questions(folders):
    (folders / "other").mkdir()
    other = dict(retain=str(folders / "other"))
    fault(folders, "no metadata.jsonl in data.retain=.*other, which is empty or missing", **other)
    (folders / "other" / "a.png").write_bytes(png(3))
    fault(folders, "no metadata.jsonl in data.retain=.*other, which has a.png", **other)
    write(folders / "other", ["", " "])
    fault(folders, ".*other/metadata.jsonl is empty", **other)
    fault(folders, "cannot be read", retain=str(folders / "other" / "a.png"))
    fault(folders, "data.forget and data.retain are both", retain=str(folders / "forget") + "/")


GOOD = dict(question="Who?", answer="Otto")


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("{not json", "Invalid JSON in line 2 of .*retain/metadata.jsonl"),
        ("[1]", "Not a JSON object, .* in line 2 of"),
        (dict(answer="Otto"), "no text as `question` in line 2 of"),
        (GOOD | dict(answer=3), "no text as `answer` in line 2 of"),
        (GOOD | dict(options="Otto"), "`options` is not a list of texts in line 2 of"),
        (GOOD | dict(options=[1, 2]), "`options` is not a list of texts in line 2 of"),
        (GOOD | dict(options=["Zoë", "Ada"]), "answer 'Otto' is not one of two or more different options in line 2"),
        (GOOD | dict(options=["Otto"]), "not one of two or more different options in line 2"),
        (GOOD | dict(options=["Otto", "Otto", "Ada"]), "not one of two or more different options in line 2"),
        (GOOD | dict(file_name="c.png"), "no image c.png beside metadata.jsonl, but line 2 of .* names it"),
        (GOOD | dict(file_name=["b.png"]), "`file_name` is not a text in line 2 of"),
        (GOOD | dict(file_name="metadata.jsonl"), "image cannot be decoded .* in line 2 of"),
    ],
)
def test_faults_of_a_line(folders, line, match):
    write(folders / "retain", [dict(file_name="b.png", question="Who?", answer="Otto"), line])
    fault(folders, match)


def test_a_text_that_is_not_utf8(folders):
    (folders / "retain" / "metadata.jsonl").write_bytes(b'{"question": "\xff"}')
    fault(folders, "retain/metadata.jsonl cannot be read as UTF-8")


def test_people_and_images_may_not_be_in_both_folders(folders):
    write(folders / "retain", [GOOD | dict(person="Otto"), GOOD | dict(person="Zoë")])
    fault(folders, "1 people are in both .*forget and .*retain: Zoë; remove them from one of the folders")
    write(folders / "retain", [GOOD | dict(file_name="z.png")], z=1)
    fault(folders, r"1 images are in both .*: forget/a\.png; remove")
    write(folders / "retain", [GOOD | dict(person="Ada")])
    write(folders / "test", [GOOD | dict(person="Ada")])
    fault(folders, "1 people are in both .*test and .*retain: Ada", test=str(folders / "test"))


def test_the_page_of_the_docs_says_what_is_so(tmp_path):
    """Its metadata.jsonl is read, its keys and folders are those that there are."""
    from pathlib import Path

    page = (Path(__file__).parents[2] / "docs" / "your_own_data.md").read_text("utf-8")
    lines = [json.loads(line) for line in re.findall(r'^ *(\{"(?:file_name|question)".*\})$', page, re.MULTILINE)]
    assert len(lines) >= 3
    for name in {line["file_name"] for line in lines if "file_name" in line}:
        (tmp_path / "forget").mkdir(exist_ok=True)
        (tmp_path / "forget" / name).write_bytes(png(1))
    write(tmp_path / "forget", lines)
    write(tmp_path / "retain", [GOOD])
    assert len(read(tmp_path)["forget"]) == len(lines)
    fields = set(re.findall(r"--config\.data\.(\w+)=", page)) - {"source"}  # of published benchmarks
    assert fields == {"forget", "retain", "test", "real"}
    assert set(vars(Folder())) == {"forget", "retain", "test", "real"}
