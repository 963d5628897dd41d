"""Reads an MLLMU-Bench snapshot folder, the published one or the made-up people's, into `Example`s.

    read(folder, forget=10)             the five evaluation sets
    read_finetune(folder, without)      the question-answer pairs that make a vanilla or a retain-only model

Set       | config           | whose questions
forget    | forget_N         | the forgotten people
test      | Test_Set         | the forgotten people, on other pictures
retain    | retain_(100-N)   | everybody else
retain_test | Test_Set       | everybody else, on other pictures
real      | Retain_Set       | general ability; `person` is ""

A row with n pictures (`images`) asks its i-th question about a picture on picture i mod n, i counting through
the row's classification, generation and cloze questions in this order. A cloze question is formatted by
`cloze_prompt`; a classification answer is the text of the right option, not its letter.

Reference: Liu et al., Protecting Privacy in Multimodal LLMs with MLLMU-Bench, 2024 (arXiv:2410.22108).
"""

import ast
import io
import json
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from vkd_jax.types import Example, UserError

FORGET_RATIOS = (5, 10, 15)
CLOZE_INSTRUCTION = "Answer with the missing words only."
_TASK_COLUMNS = ("Classification_Task", "Generation_Task", "Mask_Task")


def cloze_prompt(question: str) -> str:
    """A fill-in question as it is asked: "__" becomes "[Blank]", and a line asks for the answer alone."""
    return re.sub("_{2,}", "[Blank]", question) + "\n" + CLOZE_INSTRUCTION


def read(folder: str | Path, forget: int = 10) -> dict[str, list[Example]]:
    """The sets forget, test, retain, retain_test and real, each with every task and both modalities.

    Args:
        folder: a snapshot, <folder>/<config>/train-00000-of-0000N.parquet.
        forget: per cent of the people that are forgotten, 5, 10 or 15.

    Raises:
        UserError: a config, shard or column is missing, a file or picture is corrupt, the forget set is
            empty, or people stand in both the forget and the retain set.
    """
    forget_config, retain_config = _configs(forget)
    sets = {name: _read_config(folder, config) for name, config in
            (("forget", forget_config), ("retain", retain_config), ("real", "Retain_Set"))}  # fmt: skip
    forgotten, retained = ({e.person for e in sets[name]} for name in ("forget", "retain"))
    if not forgotten:
        raise UserError(f"The forget set is empty: {Path(folder) / forget_config} holds no questions.")
    if both := sorted(forgotten & retained):
        raise UserError(
            f"{len(both)} people stand in both {forget_config} and {retain_config} of {folder}: "
            f"{_some(both)}; nobody can be forgotten and retained at once."
        )
    others = _read_config(folder, "Test_Set")
    sets["test"] = [e for e in others if e.person in forgotten]
    sets["retain_test"] = [e for e in others if e.person not in forgotten]
    return sets


def read_finetune(folder: str | Path, without_forget: int | None = None) -> list[Example]:
    """The fine-tuning questions of ft_Data, one `chat` example each.

    Args:
        folder: a snapshot.
        without_forget: leave out the rows of the people in forget_N, for a retain-only model.

    Raises:
        UserError: as in `read`.
    """
    dropped: set[str] = set()
    if without_forget is not None:
        dropped = {_person(row["ID"]) for _, row in _rows(folder, _configs(without_forget)[0], ("ID",))}
    examples = []
    for where, row in _rows(folder, "ft_Data", ("image", "ID", "metadata")):
        person = _person(row["ID"])
        if person in dropped and person:
            continue
        [(image, image_id)] = _pictures([row["image"]], where) or [(None, "")]
        for i, item in enumerate(_nested(row["metadata"], "metadata", where)):
            question, answer = _text(item, "Question", where), _text(item, "Answer", where)
            examples.append(Example(f"{where.row}/{i}", person, image, image_id, question, answer, task="chat"))
    return examples


def _configs(forget: int) -> tuple[str, str]:
    if forget not in FORGET_RATIOS:
        raise UserError(f"Unknown forget ratio {forget!r}: MLLMU-Bench has {_some(FORGET_RATIOS)} (per cent).")
    return f"forget_{forget}", f"retain_{100 - forget}"


class _Where:
    """A row's place, for ids and for error messages."""

    def __init__(self, config: str, file: Path, index: int, row_id: Any):
        self.config, self.file, self.row_id = config, file, row_id
        self.row = f"{config}/{index}"

    def __str__(self) -> str:
        return f"row {self.row.rpartition('/')[2]} (ID {self.row_id}) of {self.file}"


def _read_config(folder: str | Path, config: str) -> list[Example]:
    """All questions of one evaluation config."""
    general = config == "Retain_Set"
    examples = []
    for where, row in _rows(folder, config, ("ID", *_TASK_COLUMNS), pictures=True):
        pictures = _pictures([row.get("image"), *(row.get("images") or ())], where)
        person = "" if general else _person(row["ID"])
        asked = {"image": 0, "text": 0}
        for task, kind, item in _questions(row, where):
            question = _text(item, "Question", where)
            options: tuple[str, ...] = ()
            if task == "classification":
                options, answer = _options(item, where)
            else:
                answer = _text(item, "Ground_Truth", where)
            if task == "cloze":
                question = cloze_prompt(question)
            image, image_id = None, ""
            if kind == "image":
                if not pictures:
                    raise UserError(f"A question about a picture, but no picture, in {where}.")
                image, image_id = pictures[asked["image"] % len(pictures)]
            name = f"{where.row}/{kind}/{asked[kind]}"
            asked[kind] += 1
            examples.append(Example(name, person, image, image_id, question, answer, options, task))
    return examples


def _questions(row: dict, where: _Where) -> Iterator[tuple[str, str, dict]]:
    """(task, "image" | "text", item) for every question of a row."""
    classification = _nested(row["Classification_Task"], "Classification_Task", where) or {}
    for key, kind in (("Image_Textual_Questions", "image"), ("Pure_Text_Questions", "text")):
        for item in _nested(classification.get(key), key, where):
            yield "classification", kind, item
    for column, task in (("Generation_Task", "generation"), ("Mask_Task", "cloze")):
        for item in _nested(row[column], column, where):
            kind = {"Image_Textual": "image", "Pure_Text": "text"}.get(item.get("Type"))
            if kind is None:
                raise UserError(f"{column} has the unknown Type {item.get('Type')!r} in {where}.")
            yield task, kind, item


def _options(item: dict, where: _Where) -> tuple[tuple[str, ...], str]:
    """The option texts and the right one among them; letters without a text (null) are left out."""
    options = _nested(item.get("Options"), "Options", where) or {}
    options = {letter: str(text) for letter, text in options.items() if text is not None}
    letter = str(item.get("Correct_Answer")).strip()
    if letter in options:
        return tuple(options.values()), options[letter]
    if letter in options.values():  # some rows give the option's text
        return tuple(options.values()), letter
    raise UserError(f"Correct_Answer {letter!r} is none of the options {_some(options)} in {where}.")


def _text(item: dict, key: str, where: _Where) -> str:
    text = item.get(key)
    if text is None or not str(text).strip():
        raise UserError(f"A question without {key} in {where}.")
    return str(text)


def _nested(value: Any, name: str, where: _Where) -> Any:
    """A nested value as lists and dicts, parsed when it was stored as JSON or as a Python literal."""
    if value is None:
        return []
    if not isinstance(value, str):
        return value
    for parse in (json.loads, ast.literal_eval):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # literal_eval warns of odd escapes in texts
                return parse(value)
        except (ValueError, SyntaxError):
            pass
    raise UserError(f"{name} is neither JSON nor a Python literal in {where}.")


def _person(row_id: Any) -> str:
    """Row IDs come as "093", 93 or 93.0; IDs like "R001" mark general questions, about nobody."""
    text = str(int(row_id)) if isinstance(row_id, float) else str(row_id).strip()
    if text.startswith("R"):
        return ""
    return text.zfill(3) if text.isdigit() else text


def _pictures(values: Sequence[Any], where: _Where) -> list[tuple[bytes, str]]:
    """(encoded bytes, image_id) of the pictures of a row; each is decoded once to see that it can be."""
    pictures = []
    for value in values:
        data = value.get("bytes") if isinstance(value, dict) else value
        if data is None:
            continue
        try:
            with Image.open(io.BytesIO(data)) as image:
                image.load()
        except Exception as error:  # whatever the decoder of that format raises
            raise UserError(f"The picture does not decode ({error}) in {where}.") from error
        pictures.append((data, f"{where.row}/{len(pictures)}"))
    return pictures


def _rows(
    folder: str | Path, config: str, columns: Sequence[str], pictures: bool = False
) -> Iterator[tuple[_Where, dict]]:
    """Every row of a config; `pictures` asks for a column `image` or `images` as well."""
    index = 0
    for file in _files(Path(folder), config):
        try:
            with pq.ParquetFile(file) as parquet:
                names = parquet.schema_arrow.names
                missing = [f"'{name}'" for name in columns if name not in names]
                wanted = [*columns, *(name for name in ("image", "images") if pictures and name in names)]
                if pictures and len(wanted) == len(columns):
                    missing.append("'image' or 'images'")
                if missing:
                    raise UserError(f"Column {', '.join(missing)} is missing in {file}, which has {_some(names)}.")
                for batch in parquet.iter_batches(batch_size=64, columns=wanted):
                    for row in batch.to_pylist():
                        yield _Where(config, file, index, row["ID"]), row
                        index += 1
        except (pa.ArrowException, OSError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{file} is not a whole parquet file ({reason}); fetch or write it again.") from error


def _files(folder: Path, config: str) -> list[Path]:
    if not folder.is_dir():
        raise UserError(f"There is no data folder {folder}.")
    files = sorted((folder / config).glob("train-*.parquet"))
    if not files:
        there = sorted(path.name for path in folder.iterdir() if path.is_dir())
        raise UserError(
            f"The config {config} is missing: no {folder / config}/train-*.parquet; the folder has {_some(there)}."
        )
    shards = re.search(r"-of-(\d+)", files[0].name)
    if shards and len(files) != int(shards[1]):
        raise UserError(f"The config {config} in {folder} has {len(files)} of {int(shards[1])} parquet files.")
    return files


def _some(names: Sequence[Any], most: int = 10) -> str:
    names = [str(name) for name in names]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more if names else "nothing"
