"""Folders of your own: what a line becomes, and every fault of a folder in one sentence."""

import json
import os
import re

import pytest
from benchmark_rows import png
from benchmark_rows import write_folder as write

from vkd_jax import benchmarks
from vkd_jax.benchmarks.folder import Folder
from vkd_jax.types import UserError


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


def test_messages_name_the_file_and_the_line(folders):
    sets = read(folders, finetune=True)
    for name, examples in sets.items():
        file = folders / name.removeprefix("finetune_") / "metadata.jsonl"
        lines = file.read_text().splitlines()
        for example in examples:
            location, _, number = example.label.partition(" (")[0].rpartition(", line ")
            assert location == str(file) and json.loads(lines[int(number) - 1])["question"] == example.question


def test_optional_sets(folders):
    for name in ("test", "real"):
        write(folders / name, [dict(file_name="p/x.png", question="Who?", answer="Zoë")])
        (folders / name / "p").mkdir()
        (folders / name / "p" / "x.png").write_bytes(png(9 if name == "real" else 8))
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
    fault(folders, "a.png is a file; pass the folder that contains it", retain=str(folders / "other" / "a.png"))
    fault(folders, "data.forget and data.retain are both", retain=str(folders / "forget") + "/")


GOOD = dict(question="Who?", answer="Otto")


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{not json", "it is not JSON"),
        ("[1]", "expected an object, not an array"),
        ("[" * 100_000, "it is nested more than 64 levels deep"),
        (r'{"question": "\ud800", "answer": "Otto"}', r"question is not Unicode: '\ud800' is half"),
        (r'{"question": "a\u0000b", "answer": "Otto"}', "question contains the character NUL"),
        (r'{"file_name": "\u0000", "question": "a", "answer": "b"}', "file_name contains the character NUL"),
        (dict(answer="Otto"), "question is missing"),
        (GOOD | dict(question="  "), "question is blank"),
        (GOOD | dict(answer="..."), "answer is '...', an answer without a letter or a digit"),
        (GOOD | dict(answer=" ?! "), "an answer without a letter or a digit"),
        (GOOD | dict(answer="\U0001f600"), "an answer without a letter or a digit"),
        (GOOD | dict(answer="\u2800"), "answer is blank"),
        (GOOD | dict(question="\u3164"), "question is blank"),
        (GOOD | dict(answer=3), "answer is the number 3, not a text"),
        (GOOD | dict(answer=True), "answer is the boolean True, not a text"),
        (GOOD | dict(answer=["Otto"]), "answer is an array, not a text"),
        (GOOD | dict(person=0), "person is the number 0, not a text"),
        (GOOD | dict(person=False), "person is the boolean False, not a text"),
        (GOOD | dict(person={}), "person is an object, not a text"),
        (GOOD | dict(options="Otto"), "options is the text 'Otto', not a list"),
        (GOOD | dict(options=0), "options is the number 0, not a list"),
        (GOOD | dict(options={"Otto": 1}), "options is an object, not a list"),
        (GOOD | dict(options=["Otto", 2]), "options[1] is the number 2, not a text"),
        (GOOD | dict(options=["Otto", None]), "options[1] is null, not a text"),
        (GOOD | dict(options=["Zoë", "Ada"]), "options must be two or more different texts, one of them the answer"),
        (
            GOOD | dict(options=["B. x", "A. y"], answer="A. y"),
            "options begin with letters in another order than their",
        ),
        (GOOD | dict(options=["Otto"]), "options must be two or more different texts"),
        (GOOD | dict(options=["Otto", "Otto", "Ada"]), "options must be two or more different texts"),
        (GOOD | {"Person": "Otto"}, "'Person' is not a key, and would be ignored; write it as person"),
        (GOOD | {"file-name": "b.png"}, "'file-name' is not a key, and would be ignored; write it as file_name"),
        (GOOD | {"fileName": "b.png"}, "write it as file_name, or rename it"),
        (GOOD | {" options\u200b": []}, "write it as options, or rename it"),
        (GOOD | dict(file_name=0), "file_name is the number 0, not a text"),
        (GOOD | dict(file_name=["b.png"]), "file_name is an array, not a text"),
        (GOOD | dict(file_name="c.png"), "file_name cannot be used: There is no file"),
        (GOOD | dict(file_name=" "), "file_name cannot be used: ' ' is not a file name"),
        (GOOD | dict(file_name="../forget/a.png"), "file_name cannot be used: '../forget/a.png' leads out of"),
        (GOOD | dict(file_name="sub/../../x"), "file_name cannot be used: '../x' leads out of"),
        (GOOD | dict(file_name="/etc/passwd"), "file_name cannot be used: '/etc/passwd' leads out of"),
        (GOOD | dict(file_name="link.png"), "file_name cannot be used: 'link.png' is a symbolic link out of"),
        (GOOD | dict(file_name="."), "is a folder; pass a regular file"),
        (GOOD | dict(file_name="pipe"), "is a named pipe; pass a regular file"),
        (GOOD | dict(file_name="metadata.jsonl"), "metadata.jsonl cannot be used: the image is broken or of"),
    ],
)
def test_faults_of_a_line(folders, line, problem):
    write(folders / "retain", [dict(file_name="b.png", question="Who?", answer="Otto"), line])
    (folders / "retain" / "link.png").symlink_to(folders / "forget" / "a.png")
    os.mkfifo(folders / "retain" / "pipe")
    fault(folders, re.escape(f"{folders}/retain/metadata.jsonl, line 2: ") + ".*" + re.escape(problem))


def test_links_out_of_a_folder_can_be_allowed(folders):
    write(folders / "retain", [GOOD | dict(file_name="link.png")])
    write(folders / "elsewhere", [], c=3)
    (folders / "retain" / "link.png").symlink_to(folders / "elsewhere" / "c.png")
    fault(folders, "allow links out of it with --config.data.symlinks=True")
    assert read(folders, symlinks=True)["retain"][0].image == png(3)


def test_only_files_that_a_folder_names_decide_whether_it_is_read_again(folders):
    state = Folder(forget=str(folders / "forget"), retain=str(folders / "retain")).state
    before = state("evaluation")
    (folders / "retain" / "loop").symlink_to(".")  # a walk of the folder would not end for long
    (folders / "retain" / "other.png").write_bytes(b"")
    assert state("evaluation") == before
    (folders / "retain" / "b.png").write_bytes(b"x")
    assert state("evaluation") != before


def test_a_file_of_the_same_size_and_time_is_read_again(folders):
    """As `cp -p`, `rsync -t` and archives leave it."""
    state = Folder(forget=str(folders / "forget"), retain=str(folders / "retain")).state
    path, before = folders / "forget" / "metadata.jsonl", state("evaluation")
    old, text = path.stat(), path.read_text()
    path.write_text(text.replace("Otto", "Hugo").replace("who", "why"))
    os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns))
    assert path.stat().st_size == old.st_size and path.stat().st_mtime_ns == old.st_mtime_ns
    assert state("evaluation") != before


def test_a_text_that_is_not_utf8(folders):
    (folders / "retain" / "metadata.jsonl").write_bytes(b'{"question": "\xff"}')
    fault(folders, "retain/metadata.jsonl: it is not UTF-8: byte 14 is 0xff")


def test_people_and_images_may_not_be_in_both_folders(folders):
    write(folders / "retain", [GOOD | dict(person="Otto"), GOOD | dict(person="Zoë")])
    fault(folders, "forget and .*retain share 1 person: Zoë; remove them from one of the two")
    write(folders / "retain", [GOOD | dict(file_name="z.png")], z=1)
    fault(folders, r"1 images are in both .*: forget/a\.png; remove")
    write(folders / "retain", [GOOD | dict(person="Ada")])
    write(folders / "test", [GOOD | dict(person="Ada")])
    test = dict(test=str(folders / "test"))
    fault(folders, "test and .*retain share 1 person: Ada", **test)
    write(folders / "test", [GOOD | dict(person="Ines")])
    fault(folders, "test asks about 1 person not in .*forget: Ines; it is for the people who are to be", **test)


def test_a_retained_answer_of_an_unnamed_person_is_no_name_to_forget(folders):
    write(folders / "retain", [GOOD, GOOD | dict(question="Whose sister is she?", answer=" ZOE\u0308", person="Ada")])
    assert len(read(folders)["retain"]) == 2
    write(folders / "retain", [GOOD, GOOD | dict(question="Who flies?", answer=" ZOE\u0308")])
    fault(folders, "metadata.jsonl, line 2: the answer is 'Zoë', who is to be forgotten, and the line names no person")
    write(folders / "forget", [GOOD | dict(question="Who is this?", answer="Zoë", person="Zoë")])
    write(folders / "retain", [GOOD | dict(question="who is this", answer="ZOË", person="Ada")])
    fault(folders, "line 1: the answer is 'Zoë', who is to be forgotten, and the line names 'Ada'; remove it, or name")
    write(folders / "forget", [GOOD | dict(answer="Zoë", person="Zoë"), dict(question="Who flies?", answer="ADA")])
    write(folders / "retain", [GOOD | dict(person="Ada")])
    fault(folders, "line 2: the answer is 'Ada', who is to be retained, and the line names no person; remove it")
    write(folders / "forget", [GOOD | dict(question="Job?", answer="pilot", person="7")])
    write(folders / "retain", [GOOD | dict(question="Days of a week?", answer="7")])
    assert len(read(folders)["retain"]) == 1


@pytest.mark.parametrize("name", ["more/metadata.jsonl", "metadata.csv"])
def test_lines_of_other_files_are_not_lost(folders, name):
    (folders / "forget" / name).parent.mkdir(exist_ok=True)
    (folders / "forget" / name).write_text("")
    fault(folders, f"forget/{name} would not be read: write all lines into the metadata.jsonl of")


def test_lines_to_retain_that_name_somebody_to_forget_are_a_warning(folders, caplog):
    lines = [GOOD, GOOD | dict(question="Who?", answer="The sister of ZOE\u0308."), GOOD | dict(answer="Zoëgirl")]
    write(folders / "retain", lines[:1] + lines[2:])
    read(folders)
    assert "name people" not in caplog.text
    write(folders / "retain", lines[:2])
    read(folders)
    assert re.search("1 of 2 lines of .*retain name people to forget, such as .*, line 2 \\(Zoë\\): train", caplog.text)


def test_somebody_is_to_be_forgotten(folders):
    color = GOOD | dict(question="Color?", answer="red")
    write(folders / "forget", [color, dict(question="Job?", answer="pilot", person="Zoë")])
    assert [e.person for e in read(folders)["forget"]] == ["", "Zoë"]
    write(folders / "forget", [color])
    fault(folders, "No line of .*forget names a person, so nobody would be forgotten. Add the key person to each line")


def test_questions_of_the_forget_set_are_nowhere_else(folders):
    asked = dict(file_name="c.png", question=" who? ", answer="Zoë", person="Zoë")
    test, real = (dict([(name, str(folders / name))]) for name in ("test", "real"))
    write(folders / "test", [asked], c=1)
    fault(folders, r"1 questions are in both .*forget and .*test: Who\?; remove them", **test)
    write(folders / "test", [asked | dict(question="Where?")], c=1)  # another wording
    assert read(folders, **test)["test"][0].question == "Where?"
    write(folders / "real", [asked | dict(question="Where?", person="")], c=1)
    fault(folders, r"1 images are in both .*forget and .*real: forget/a\.png; remove", **real)
    write(folders / "real", [asked], c=9)
    fault(folders, "forget and .*real share 1 person: Zoë", **real)
    write(folders / "retain", [GOOD | dict(question="Zoë\u2019s job?"), GOOD | dict(question="zoë's  job?")])
    fault(folders, "1 questions are in both .*forget and .*retain: Zoë's job")


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
    assert fields == {"forget", "retain", "test", "real", "symlinks", "forget_facts"}
    assert set(vars(Folder())) == {"forget", "retain", "test", "real", "symlinks", "forget_facts"}
