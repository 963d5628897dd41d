"""Data folders and snapshots that cannot be right: rows, file names, images and parquet files."""

import datetime
import io
import json
import os
import shutil
import struct
import zlib

import pyarrow.parquet as pq
import pytest
from hostile_cases import (
    Case,
    check,
    forget_rows,
    image_file,
    request,
    row,
    snapshot,
    write_parquet,
    write_rows,
    written,
)
from PIL import Image

from vkd_jax import registry


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, data=b""):
    """A PNG file of these dimensions that has these bytes of pixels."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def image(content):
    """The image of the forget set has other bytes."""
    return request(lambda folder: written(folder / "forget" / "a.png", content))


def encoded(mode, format, width=48, height=48):
    """An image file of Pillow."""
    stream = io.BytesIO()
    Image.new(mode, (width, height)).save(stream, format)
    return stream.getvalue()


def instead_of_image(make):
    """Another kind of file is in the place of the image."""

    def change(folder):
        (folder / "forget" / "a.png").unlink()
        make(folder / "forget" / "a.png")

    return request(change)


def named(name):
    """A row names a file that links to an image."""

    def change(folder):
        outside = image_file(folder / "outside.png", "green")
        write_rows(folder / "forget", [row(file_name=name.format(outside=outside.absolute()))])

    return request(change)


def linked(name, target):
    """A row names a file that a symbolic link leads to."""

    def change(folder):
        image_file(folder / "elsewhere" / "b.png", "green")
        os.symlink(target, folder / "forget" / name.split("/")[0])
        write_rows(folder / "forget", [row(file_name=name)])

    return request(change)


def metadata(content):
    return request(lambda folder: written(folder / "forget" / "metadata.jsonl", content))


def both(**fields):
    """Both folders have a row with these fields."""

    def change(folder):
        for name in ("forget", "retain"):
            write_rows(folder / name, [row(**fields), row(question="And?", **fields)])

    return request(change)


def endless_metadata(folder):
    (folder / "forget" / "metadata.jsonl").unlink()
    os.mkfifo(folder / "forget" / "metadata.jsonl")


def without(key):
    return forget_rows({name: value for name, value in row().items() if name != key})


def of_two(forget, retain):
    """The forget and the retain set have people of these names."""

    def change(folder):
        for name, person in (("forget", forget), ("retain", retain)):
            write_rows(folder / name, [row(person, question="Who?"), row(person, question="And?")])

    return request(change)


def choice(**fields):
    """The classification question of a row has other fields."""
    question = {"Question": "What is the job?", "Options": {"A": "a judge", "B": "a nurse"}, "Correct_Answer": "A"}
    return cells("Classification_Task", json.dumps({"Image_Textual_Questions": [question | fields]}))


def copied(source, target, *rows):
    """Another set is a copy of one of the folders, or has these rows."""

    def change(folder):
        shutil.copytree(folder / source, folder / target, dirs_exist_ok=True)
        if rows:
            write_rows(folder / target, list(rows))

    return request(change, f"--config.data.{target}=request/{target}")


def again(**options):
    """The image of the retain set is that of the forget set, encoded anew."""
    return request(lambda f: Image.open(f / "forget" / "a.png").save(f / "retain" / "a.png", **options))


def one_byte_more(folder):
    """The image of the retain set is that of the forget set and a byte."""
    written(folder / "retain" / "a.png", (folder / "forget" / "a.png").read_bytes() + b"\0")


def column_twice(folder):
    """The ID is in two columns of the forget set."""
    path = folder / "snapshot" / "forget_10" / "train-00000-of-00001.parquet"
    table = pq.read_table(path)
    pq.write_table(table.append_column("ID", table["ID"]), path)


def also(prepare, change):
    """Another change of what a case has prepared."""

    def both(folder):
        args = prepare(folder)
        change(folder)
        return args

    return both


def suite(name, **fields):
    """A standard suite whose questions have other fields."""

    def change(folder):
        cls = registry.lookup("suite", registry.SUITES, name)
        cls().write_stand_in(folder / "suite")
        path = next((folder / "suite" / cls.CONFIG).glob("*.parquet"))
        rows = pq.read_table(path).to_pylist()
        write_parquet(path, [item | fields for item in rows])

    settings = f"--config.eval.general={name}", f"--config.eval.general_source={name}=suite"
    return also(request(lambda _: None, *settings), change)


def cells(column, value, config="forget_10"):
    """A column of a config has another value in every row."""

    def change(rows):
        for item in rows[config]:
            item[column] = value

    return snapshot(change)


def test_set(*ids):
    """The test set has the rows of these people alone."""
    return snapshot(lambda rows: rows | {"Test_Set": [row for row in rows["Test_Set"] if row["ID"] in ids]})


test_set.__test__ = False  # a case, not a test
TASKS = ("Classification_Task", "Generation_Task", "Mask_Task")
LINE = ("line 1", "metadata.jsonl")
FORGET = ("row 0", "forget_10")
NESTED = "[" * 100_000 + "]" * 100_000

CASES = [
    # Files from outside the folder.
    Case("image above the folder", named("../outside.png"), ("outside.png", "folder")),
    Case("image at an absolute path", named("{outside}"), ("outside.png", "folder")),
    Case("image above a folder below", named("x/../../outside.png"), ("outside.png", "folder")),
    Case("link out of the folder", linked("b.png", "../elsewhere/b.png"), ("b.png", "link")),
    Case("linked folder", linked("images/b.png", "../elsewhere"), ("images/b.png", "link")),
    Case("link to itself", linked("b.png", "b.png"), ("b.png",)),
    Case("link to nothing", linked("b.png", "nothing.png"), ("b.png",)),
    # Fields of the wrong type.
    Case("person 0 in both folders", both(person=0), ("person", "line 1")),
    Case("person false", both(person=False), ("person", "line 1")),
    Case("person that is a list", both(person=["Otto"]), ("person", "line 1")),
    Case("person that is an object", both(person={}), ("person", "line 1")),
    Case("question that is a number", forget_rows(row(question=7)), ("question", *LINE)),
    Case("question that is null", forget_rows(row(question=None)), ("question", *LINE)),
    *(
        Case(f"person {name}", both(person=name), (f"person is the text '{name.strip()}'", "line 1"))
        for name in ("nan", "NaN", "None", "null", "<NA>", "N/A ")
    ),
    Case("person of invisible characters", both(person="\u2060"), ("person", "line 1", "invisible")),
    Case(
        "person in two spellings",
        request(lambda folder: write_rows(folder / "retain", [row("OTTO")])),
        ("forget", "retain", "another spelling", "Otto and OTTO"),
    ),
    Case("question of invisible characters", forget_rows(row(question="\u200b\ufeff")), ("question", *LINE)),
    Case("blank question", forget_rows(row(question=" ")), ("question", *LINE)),
    Case("answer that is true", forget_rows(row(answer=True)), ("answer", *LINE)),
    Case("answer without a letter", forget_rows(row(answer="?!")), ("answer", "letter", *LINE)),
    Case("answer that is a list", forget_rows(row(answer=["a judge"])), ("answer", *LINE)),
    Case("no answer", without("answer"), ("answer", *LINE)),
    Case("no question", without("question"), ("question", *LINE)),
    Case("file name that is a number", forget_rows(row(file_name=3)), ("file_name", *LINE)),
    Case("file name that is false", forget_rows(row(file_name=False)), ("file_name", *LINE)),
    Case("file name that is empty", forget_rows(row(file_name="")), ("file_name is empty", *LINE)),
    Case("file name that is a list", forget_rows(row(file_name=[])), ("file_name", *LINE)),
    Case("options that are a text", forget_rows(row(options="a judge")), ("options", *LINE)),
    Case("options that are false", forget_rows(row(options=False)), ("options", *LINE)),
    Case("options that are an object", forget_rows(row(options={"a judge": 1})), ("options", *LINE)),
    Case("options with a number", forget_rows(row(options=["a judge", 3])), ("options", *LINE)),
    Case("one option", forget_rows(row(options=["a judge"])), ("options", *LINE)),
    Case("the same option twice", forget_rows(row(options=["a judge", "a judge"])), ("options", *LINE)),
    Case("answer that is no option", forget_rows(row(options=["x", "y"])), ("options", *LINE)),
    Case("row that is a list", forget_rows([1, 2]), LINE),
    Case("row that is a number", forget_rows(row(), "7"), ("line 2", "metadata.jsonl")),
    # Texts.
    Case("lone surrogate in a question", forget_rows(row(question="Who\ud800?")), ("question", "surrogate", "line 1")),
    Case("lone surrogate in a name", forget_rows(row(person="Ot\udcffto")), ("person", "surrogate", "line 1")),
    Case("100000 accents", forget_rows(row(person="e" + "\u0301\u0323" * 50_000)), ("person", "combining", "line 1")),
    Case("question of a million letters", forget_rows(row(question="x" * 1_000_001)), ("1,000,001 characters", *LINE)),
    Case("NUL in an answer", forget_rows(row(answer="a\0b")), ("answer", "NUL", "line 1")),
    Case("NUL in a file name", forget_rows(row(file_name="a\0.png")), ("file_name", "line 1")),
    Case("surrogate in a file name", forget_rows(row(file_name="\ud800.png")), ("file_name", "line 1")),
    Case("control characters in a file name", forget_rows(row(file_name="\x1b[2J.png")), ("metadata.jsonl",)),
    Case("file name of 10000 letters", forget_rows(row(file_name="a" * 10_000)), ("too long",)),
    Case("long person in both folders", both(person="Otto" * 1000), ("share 1 person",)),
    # metadata.jsonl as a whole.
    Case("no JSON", metadata("nonsense"), LINE),
    Case("half a row", metadata('{"question": "Wh'), LINE),
    Case("number that is NaN", metadata('{"question": NaN, "answer": "x"}'), LINE),
    Case("nested deeply", metadata('{"question": ' + NESTED + "}"), LINE),
    Case("number of 100000 digits", metadata('{"question": ' + "9" * 100_000 + "}"), LINE),
    Case("not UTF-8", metadata(b'{"question": "\xff"}'), ("metadata.jsonl", "UTF-8")),
    Case("UTF-16", metadata('{"question": "x"}'.encode("utf-16")), ("metadata.jsonl", "UTF-8")),
    Case("empty", metadata(""), ("metadata.jsonl", "empty")),
    Case("blank lines", metadata("\n\n \n"), ("metadata.jsonl", "empty")),
    Case("named pipe", request(endless_metadata), ("metadata.jsonl",)),
    Case("no metadata", request(lambda folder: (folder / "forget" / "metadata.jsonl").unlink()), ("metadata.jsonl",)),
    # Images.
    Case("missing image", request(lambda folder: (folder / "forget" / "a.png").unlink()), ("a.png", "metadata.jsonl")),
    Case("text as an image", image(b"no image"), ("a.png",)),
    Case("empty image", image(b""), ("a.png",)),
    Case("half an image", image(png(48, 48, b"\0" * 99)), ("a.png",)),
    Case("decompression bomb", image(png(60_000, 60_000)), ("a.png", "pixels"), lacks=("DecompressionBombError",)),
    Case("image without height", image(png(48, 0)), ("a.png",)),
    Case("image with negative dimensions", image(png(2**31, 2**31 + 5)), ("a.png",)),
    Case("named pipe as an image", instead_of_image(os.mkfifo), ("a.png",)),
    Case("endless image", instead_of_image(lambda path: os.symlink("/dev/zero", path)), ("a.png",)),
    Case("folder as an image", instead_of_image(lambda path: path.mkdir()), ("a.png",)),
    Case("image with 32 bits", image(encoded("I", "TIFF")), ("a.png", "save it as PNG")),
    Case("image of another program", image(encoded("RGB", "EPS")), ("a.png", "save it as PNG")),
    Case("image that is a strip", image(encoded("L", "PNG", 1, 201)), ("a.png", "1 x 201", "longer side")),
    # People and folders.
    Case("one person in both folders", both(person="Otto"), ("share 1 person", "Otto")),
    Case("person with control characters in both", both(person="Ot\x1b[31mto"), ("share 1 person",)),
    Case("person composed and decomposed", of_two("Jos\u00e9", "Jose\u0301"), ("share 1 person", "Jos")),
    Case("person with two kinds of spaces", of_two("Otto Lindt", "Otto\u00a0 Lindt"), ("share 1 person", "Otto Lindt")),
    Case("person with a filler", of_two("Otto", "Ot\u3164to"), ("share 1 person", "Otto")),
    Case("person with another hyphen", of_two("Anne-Marie", "Anne\u2011Marie"), ("another spelling", "Anne-Marie")),
    Case("one image in both folders", request(lambda f: image_file(f / "retain" / "a.png", "red")), ("both", "images")),
    Case("one image compressed otherwise", again(compress_level=0), ("both", "images", "a.png")),
    Case("one image with a palette", again(format="GIF"), ("both", "images", "a.png")),
    Case("one image and a byte", request(one_byte_more), ("both", "images", "a.png")),
    Case("test set that is the forget set", copied("forget", "test"), ("questions", "both", "request/test")),
    Case("general set of the people to forget", copied("forget", "real"), ("share 1 person", "request/real")),
    Case(
        "general set of images to forget",
        copied("forget", "real", row("Zoe", question="Where?")),
        ("images", "both", "request/real"),
    ),
    Case("test set of strangers", copied("forget", "test", row("Zoe")), ("1 person not in", "Zoe")),
    Case("one text question in both sets", both(file_name=None, person=""), ("questions", "both", "Who is ?")),
    Case("one folder twice", request(lambda _: None, "--config.data.retain=request/forget"), ("retain", "forget")),
    Case(
        "one folder by two names",
        request(lambda _: None, "--config.data.retain=request/../request/forget"),
        ("data.forget and data.retain", "different folders"),
    ),
    Case("missing folder", request(lambda _: None, "--config.data.forget=nothing"), ("nothing",)),
    Case("unknown address", request(lambda _: None, "--config.data.forget=ftp://x/y"), ("ftp",)),
    Case("folder of control characters", request(lambda _: None, "--config.data.forget=a\x1b[2Jb"), ("data.forget",)),
    # Parquet rows.
    Case("null ID", cells("ID", None), ("ID", *FORGET)),
    Case("ID that is NaN", cells("ID", float("nan")), ("ID", *FORGET)),
    Case("ID that is infinite", cells("ID", float("inf")), ("ID", *FORGET)),
    Case("ID without its last digits", cells("ID", 2.0**60), ("ID is the number 1.15292e+18", *FORGET)),
    Case("ID that is a date", cells("ID", datetime.date(2026, 1, 2)), ("Column 'ID'", "forget_10", "type date32[day]")),
    Case(
        "time in an item",
        cells("Mask_Task", [{"Type": datetime.timedelta(1)}]),
        ("Column 'Mask_Task'", "forget_10", "type duration[us] in list"),
    ),
    Case("boolean ID", cells("ID", True), ("ID", *FORGET)),
    Case("ID that is a list", cells("ID", ["001"]), ("ID", *FORGET)),
    Case("ID that is the text nan", cells("ID", "nan"), ("ID is the text 'nan'", *FORGET)),
    Case("empty ID", cells("ID", " "), ("ID", *FORGET)),
    Case("tasks that are a list", cells("Classification_Task", "[1, 2]"), ("Classification_Task", *FORGET)),
    Case("tasks that are a number", cells("Generation_Task", 7), ("Generation_Task", *FORGET)),
    Case("tasks that are a text", cells("Generation_Task", '"x"'), ("Generation_Task", *FORGET)),
    Case("tasks that are no JSON", cells("Mask_Task", "{"), ("Mask_Task", *FORGET)),
    Case("tasks nested deeply", cells("Mask_Task", NESTED), ("Mask_Task", *FORGET)),
    Case("items that are numbers", cells("Generation_Task", "[1]"), ("Generation_Task", *FORGET)),
    Case("type that is a list", cells("Generation_Task", '[{"Type": [], "Question": "x"}]'), ("Type", *FORGET)),
    Case(
        "question that is an object",
        cells("Generation_Task", '[{"Type": "Pure_Text", "Question": {}, "Ground_Truth": "x"}]'),
        ("Question", *FORGET),
    ),
    Case(
        "options that are a number",
        cells(
            "Classification_Task", '{"Pure_Text_Questions": [{"Question": "x", "Options": 3, "Correct_Answer": "A"}]}'
        ),
        ("Options", *FORGET),
    ),
    Case(
        "answer without options",
        cells(
            "Classification_Task", '{"Pure_Text_Questions": [{"Question": "x", "Options": {}, "Correct_Answer": "A"}]}'
        ),
        ("Correct_Answer", *FORGET),
    ),
    Case("one option in a table", choice(Options={"A": "a judge"}), ("row forget_10/0", "different")),
    Case("options of one text", choice(Options={"A": "x", "B": "x "}), ("row forget_10/0", "different")),
    Case("answer whose option is blank", choice(Options={"A": " ", "B": "x"}), ("Correct_Answer", *FORGET)),
    Case("two columns of one name", also(cells("ID", "001"), column_twice), ("ID", "twice", "forget_10")),
    Case("suite: unknown sampling", suite("pope", category="easy"), ("category", "easy", "random")),
    Case("suite: one option", suite("scienceqa", choices=["x"], answer=0), ("row ScienceQA-IMG/0", "different")),
    Case("suite: index of 5000 digits", suite("scienceqa", answer="9" * 5000), ("answer", "whole number")),
    Case("suite: markers for an answer", suite("mmvet", answer="<AND>"), ("answer", "row 0", "no words")),
    Case("image that is a number", cells("image", 7), ("image", *FORGET)),
    Case("image of broken bytes", cells("image", {"bytes": b"\x89PNG", "path": "x"}), ("image", *FORGET)),
    Case("image bomb", cells("image", {"bytes": png(60_000, 60_000), "path": "x"}), ("image", "pixels", *FORGET)),
    Case("no image for a question", cells("image", None), ("image", *FORGET)),
    Case(
        "no rows in the forget set", snapshot(lambda rows: rows | {"forget_10": rows["forget_10"][:0]}), ("forget_10",)
    ),
    Case("test set of nobody to forget", test_set("002"), ("The test set of mllmu-forget10 is empty", "snapshot")),
    Case("test set of nobody to retain", test_set("001"), ("The retain_test set of mllmu-forget10 is empty",)),
    Case(
        "general set without questions",
        snapshot(lambda rows: [rows["Retain_Set"][0].update(dict.fromkeys(TASKS, "[]"))] and None),
        ("The real set of mllmu-forget10 is empty",),
    ),
    Case("missing config", snapshot(lambda rows: rows.pop("Test_Set") and None), ("Test_Set",)),
    Case(
        "missing column",
        snapshot(lambda rows: rows["retain_90"][0].pop("Mask_Task") and None),
        ("Mask_Task", "retain_90"),
    ),
    Case(
        "a person forgotten and retained under another ID",
        snapshot(lambda rows: rows | {"retain_90": [{**rows["forget_10"][0], "ID": "002"}]}),
        ("forget_10/0/0", "same pixels", "retain_90/0/0"),
    ),
    Case(
        "one person in both sets",
        snapshot(lambda rows: rows | {"retain_90": rows["forget_10"]}),
        ("share 1 person", "001"),
    ),
]


@pytest.mark.parametrize("case", [Case(**{**vars(c), "command": "main"}) for c in CASES], ids=str)
def test_data_is_refused(case, fork_server, tmp_path):
    check(case, fork_server, tmp_path)
