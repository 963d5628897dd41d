"""Hostile inputs as data: a case is an input, a command, and what the command must and must not say about it."""

import dataclasses
import json
import shutil
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fork_server import ROOT, ForkServer, Outcome

TINY_LLAVA = ROOT / "vkd_jax" / "assets" / "tiny_llava"
TINY_CONFIG = ROOT / "configs" / "tiny.py"
LONGEST = 600  # characters of a sentence
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclasses.dataclass(frozen=True)
class Case:
    """A hostile input.

    Attributes:
        name: what is wrong.
        prepare: writes the input into the folder that the command runs in, and returns the command's arguments.
        holds: texts that the sentence contains, in any case of letters.
        command: module of vkd_jax to run.
        status: expected exit status: 2 for bad input, 1 if training diverged, 0 if all is well.
        lacks: texts that neither output contains.
        seconds: limit of time, generous.
    """

    name: str
    prepare: Callable[[Path], list[str]]
    holds: tuple[str, ...]
    command: str = "ask"
    status: int = 2
    lacks: tuple[str, ...] = ()
    seconds: float = 60.0

    def __str__(self) -> str:
        return self.name.replace(" ", "_")


def check(case: Case, server: ForkServer, folder: Path) -> None:
    """Runs a case in an empty folder, and asserts all that is promised about bad input."""
    args = case.prepare(folder)
    outcome = server.run(f"vkd_jax.{case.command}", args, folder, case.seconds)
    shown = (
        f"exit status {outcome.status} after {outcome.seconds} s\n{outcome.stdout[-2000:]}\n{outcome.stderr[-4000:]}"
    )
    assert outcome.status is not None, f"not finished: {shown}"
    assert outcome.status == case.status, shown
    assert "Traceback" not in outcome.stderr, shown
    for text in case.lacks:
        assert text not in outcome.stdout + outcome.stderr, f"{text!r} in: {shown}"
    if case.status:
        check_sentence(case, outcome, shown)
        check_nothing_half_written(folder / "run")
    else:
        for text in case.holds:
            assert text.lower() in (outcome.stdout + outcome.stderr).lower(), f"{text!r} missing: {shown}"


def check_sentence(case: Case, outcome: Outcome, shown: str) -> None:
    """Asserts that stderr ends in one printable sentence, that it is short, and that it holds the texts of the case."""
    lines = outcome.stderr.split("\n")
    assert lines.pop() == "", shown
    sentence = lines[-1]
    assert sentence.startswith("error: ") and sum(line.startswith("error: ") for line in lines) == 1, shown
    assert len(sentence) <= LONGEST, f"{len(sentence)} characters: {shown}"
    assert sentence.isprintable(), shown
    assert outcome.stdout == "", shown
    for text in case.holds:
        assert text.lower() in sentence.lower(), f"{text!r} missing: {shown}"


def check_nothing_half_written(workdir: Path) -> None:
    """Asserts that a refused run left no figure, no model and no unfinished file, and that its JSON is strict."""
    files = [path for path in workdir.rglob("*") if path.is_file()] if workdir.is_dir() else []
    names = {str(path.relative_to(workdir)) for path in files}
    wrong = [name for name in names if name.endswith((".tmp", ".safetensors")) or "incomplete" in name]
    assert not wrong and not names & {"results.json", "report.md"}, sorted(names)
    for path in files:
        if path.suffix == ".json" and path.name != "config.json":  # which a case may have damaged
            json.loads(path.read_bytes(), parse_constant=refuse_constant)


def refuse_constant(text: str) -> None:
    """Fails for a number that JSON does not have."""
    raise AssertionError(f"a file has {text}, which is not JSON")


# ---- Inputs ----


def written(path: Path, content: Any) -> Path:
    """Writes a file and the folders that lead to it; a text and bytes as they are, anything else as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(content, (str, bytes)):
        content = json.dumps(content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    return path


def model_copy(folder: Path, **files: Any) -> Path:
    """A copy of tiny_llava in `folder`/model, with some files replaced, or removed if they are None.

    Args:
        folder: where the copy is made.
        **files: content of a file by its name, with "__" for the dot; a function gets the JSON that is there.
    """
    copy = folder / "model"
    if not copy.exists():
        shutil.copytree(TINY_LLAVA, copy)
    for key, content in files.items():
        path = copy / key.replace("__", ".")
        if callable(content):
            content = content(json.loads(path.read_text("utf-8")))
        path.unlink(missing_ok=True)
        if content is not None:
            written(path, content)
    return copy


def asked(change: Callable[[Path], Any], *args: str) -> Callable[[Path], list[str]]:
    """Prepares a question to a copy of tiny_llava that `change` has changed."""

    def prepare(folder: Path) -> list[str]:
        change(model_copy(folder))
        return ["--model=model", "--question=Who is it?", *args]

    return prepare


def with_files(*args: str, **files: Any) -> Callable[[Path], list[str]]:
    """Prepares a question to a copy of tiny_llava with other files; see `model_copy`."""

    def prepare(folder: Path) -> list[str]:
        model_copy(folder, **files)
        return ["--model=model", "--question=Who is it?", *args]

    return prepare


def config(section: str = "", **fields: Any) -> Callable[[Path], list[str]]:
    """Fields of config.json, or of a section of it, are changed."""

    def change(values: dict[str, Any]) -> dict[str, Any]:
        if section:
            return values | {section: values[section] | fields}
        return values | fields

    return with_files(config__json=change)


def nested(levels: int) -> str:
    """JSON arrays within each other."""
    return "[" * levels + "]" * levels


def with_tensors(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], list[str]]:
    """Prepares a question to a copy of tiny_llava whose tensors, by name, `change` has changed in place."""
    from safetensors.numpy import load_file, save_file

    def prepare(folder: Path) -> list[str]:
        path = model_copy(folder) / WEIGHTS
        tensors = load_file(path)
        tensors = change(tensors) or tensors
        save_file(tensors, path, metadata={"format": "pt"})
        return ["--model=model", "--question=Who is it?"]

    return prepare


def settings(*args: str) -> Callable[[Path], list[str]]:
    """Prepares a run of configs/tiny.py with these flags; unless one gives them, its data and model do not exist."""
    absent = ["--config.data.source=absent", "--config.model.path=absent", "--config.train.steps=1"]
    flags = {arg.partition("=")[0]: arg for arg in (f"--config={TINY_CONFIG}", "--workdir=run", *absent)}
    given = {arg.partition("=")[0]: arg for arg in args}
    rest = [arg for arg in args if arg.partition("=")[0] not in flags or arg != given[arg.partition("=")[0]]]
    return lambda folder: [*(given.get(name, arg) for name, arg in flags.items()), *rest]


def config_file(text: str, *args: str) -> Callable[[Path], list[str]]:
    """Prepares a run of a config file with this text."""

    def prepare(folder: Path) -> list[str]:
        written(folder / "my_config.py", textwrap.dedent(text))
        return ["--config=my_config.py", "--workdir=run", *args]

    return prepare


FOLDER_CONFIG = """
from vkd_jax.config import defaults


def get_config():
    config = defaults.base()
    config.data = defaults.benchmark("folder", forget="request/forget", retain="request/retain")
    config.model.path = "absent"
    config.train.steps = 1
    return config
"""


def request(change: Callable[[Path], Any], *args: str) -> Callable[[Path], list[str]]:
    """Prepares a run on folders of data that `change` has changed; its model does not exist.

    Without a change, request/forget has two questions about Otto and request/retain two about Runa.
    """

    def prepare(folder: Path) -> list[str]:
        for name, person, color in (("forget", "Otto", "red"), ("retain", "Runa", "blue")):
            image_file(folder / "request" / name / "a.png", color)
            write_rows(folder / "request" / name, [row(person), row(person, question=f"What does {person} do?")])
        change(folder / "request")
        return config_file(FOLDER_CONFIG, *args)(folder)

    return prepare


def row(person: str = "Otto", **changes: Any) -> dict[str, Any]:
    """A row of metadata.jsonl."""
    return {"file_name": "a.png", "question": f"Who is {person}?", "answer": "a judge", "person": person} | changes


def write_rows(folder: Path, rows: list[Any]) -> None:
    """Writes metadata.jsonl: texts as they are, other rows as JSON."""
    lines = [line if isinstance(line, str) else json.dumps(line) for line in rows]
    written(folder / "metadata.jsonl", "".join(line + "\n" for line in lines))


def forget_rows(*rows: Any) -> Callable[[Path], list[str]]:
    """Prepares a run whose forget set has these rows."""
    return request(lambda folder: write_rows(folder / "forget", list(rows)))


def image_file(path: Path, color: str = "red", size: tuple[int, int] = (48, 48)) -> Path:
    """Writes an image of one color."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)
    return path


def snapshot(change: Callable[[dict[str, list[dict[str, Any]]]], Any], *args: str) -> Callable[[Path], list[str]]:
    """Prepares a run on a copy of MLLMU-Bench whose rows, by config, `change` has changed; its model does not exist."""

    def prepare(folder: Path) -> list[str]:
        def about(name: str, color: str) -> dict[str, Any]:
            file = image_file(folder / f"{name}_{color}.png", color)
            return mllmu_row(name, {"bytes": file.read_bytes(), "path": "a.png"})

        rows = {
            "forget_10": [about("001", "red")],
            "retain_90": [about("002", "blue")],
            "Test_Set": [about("001", "orange"), about("002", "navy")],
            "Retain_Set": [about("R001", "green")],
        }
        rows = change(rows) or rows
        for config, content in rows.items():
            write_parquet(folder / "snapshot" / config / "train-00000-of-00001.parquet", content)
        return settings("--config.data.source=snapshot", *args)(folder)

    return prepare


def mllmu_row(row_id: Any, image: Any) -> dict[str, Any]:
    """A row of an evaluation config, with one question of each task."""
    options = {"A": "a judge", "B": "a nurse"}
    question = {"Question": "What is the job?", "Options": options, "Correct_Answer": "A"}
    open_question = {"Type": "Image_Textual", "Question": "What is the job?", "Ground_Truth": "a judge"}
    return {
        "ID": row_id,
        "image": image,
        "Classification_Task": json.dumps({"Image_Textual_Questions": [question], "Pure_Text_Questions": [question]}),
        "Generation_Task": json.dumps([open_question]),
        "Mask_Task": json.dumps([open_question]),
    }


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes rows as pyarrow infers their types."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
