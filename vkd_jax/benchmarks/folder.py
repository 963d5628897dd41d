"""Your own data: folders of images with questions, one for the forget set and one for the retain set.

A folder is an image folder of the Hugging Face hub: images, and a metadata.jsonl with one line per question,

    {"file_name": "a.jpg", "question": "Who is this?", "answer": "Otto Lindt",
     "options": ["Otto Lindt", "Runa Brandt"], "person": "Otto Lindt"}

`file_name` is relative to the folder; several lines may name the same file, and a line without it is a text-only
question. `options` make it a multiple-choice question and must include the answer. `person` names the person that the
question is about; no person may be in both folders. Other keys are ignored.
"""

import contextlib
import dataclasses
import hashlib
import json
import posixpath
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from vkd_jax.benchmarks import parquet
from vkd_jax.benchmarks.parquet import preview
from vkd_jax.config.fields import Section, setting
from vkd_jax.runtime.storage import SourceFolder
from vkd_jax.types import EvalSet, Example, Role, UserError

METADATA = "metadata.jsonl"


@dataclasses.dataclass(frozen=True)
class Folder(Section):
    """Folders of your own data, one per set."""

    SECTION: ClassVar[str] = "data"
    forget: str = setting("", "Folder of the forget set.")
    retain: str = setting("", "Folder of the retain set, of the same kind.")
    test: str = setting("", "Optional folder of the forget set on other images.")
    real: str = setting("", "Optional folder of general knowledge.")

    TITLE: ClassVar[str] = "your own request"
    UNLEARN: ClassVar[Mapping[str, str]] = dict(forget="forget", retain="retain")  # the sets that unlearning trains on
    EVAL_SETS: ClassVar[tuple[EvalSet, ...]] = (
        EvalSet("forget", Role.FORGET, "people to forget", "forget"),
        EvalSet("test", Role.FORGET_HOLDOUT, "people to forget, other images or wordings", "test"),
        EvalSet("retain", Role.RETAIN, "people to retain", "retain"),
        EvalSet("real", Role.GENERAL, "general ability, nothing about these people", "real"),
    )
    RECIPE: ClassVar[dict[str, Any]] = dict(  # those of MLLMU-Bench, since none are published for your data
        lora_rank=16, lora_alpha=16.0, lora_dropout=0.05, learning_rate=2e-5, batch_size=4, epochs=5
    )

    @property
    def label(self) -> str:
        """The name of the benchmark."""
        return "folder"

    def check(self) -> None:
        """Checks that the folders are given, exist, differ and have questions.

        Raises:
            UserError: one of these is not the case.
        """
        for name in ("forget", "retain"):
            if not getattr(self, name):
                raise UserError(
                    f"pass the folder of the {name} set as --config.data.{name}=DIR; it has images and a {METADATA}."
                )
        named = {name: getattr(self, name).rstrip("/") for name in self._sets()}
        for name, uri in named.items():
            if same := [other for other in named if other < name and named[other] == uri]:
                raise UserError(f"data.{same[0]} and data.{name} are both {uri}; they must be different folders.")
            folder = SourceFolder(uri)
            files = [posixpath.basename(info.path) for info in folder.files()]
            if METADATA not in files:
                content = f"has {preview(files)}" if files else "is empty or missing"
                raise UserError(
                    f"There is no {METADATA} in data.{name}={uri}, which {content}; see docs/your_own_data.md."
                )

    def state(self, part: str) -> Any:
        """Name, size and modification time of the files in the folders."""
        folders = {name: SourceFolder(getattr(self, name)) for name in self._sets()}
        return {name: folder.state(folder.files(recursive=True)) for name, folder in folders.items()}

    @contextlib.contextmanager
    def rows(self, part: str) -> Iterator[dict[str, Iterator[list[Example]]]]:
        """Context manager that opens the sets of a part; those for fine-tuning have the same questions.

        Raises:
            UserError: a line or an image is invalid, or a person or image is in both the forget and the retain set.
        """
        if part == "finetune":
            yield {f"finetune_{name}": self.questions(name, chat=True) for name in ("forget", "retain")}
            return
        self._check_disjoint()
        yield {name: self.questions(name) for name in self._sets()}

    def _sets(self) -> list[str]:
        return [eval_set.name for eval_set in self.EVAL_SETS if getattr(self, eval_set.name)]

    def _check_disjoint(self) -> None:
        people, images = {}, {}
        for name in self._sets():
            people[name], images[name] = set(), {}
            for row in self.questions(name):
                people[name] |= {e.person for e in row} - {""}
                if row[0].image is not None:
                    images[name][hashlib.sha256(row[0].image).digest()] = row[0].image_id
        for name in [name for name in ("forget", "test") if name in people]:
            same = images[name].keys() & images["retain"]
            for kind, both in (
                ("people", people[name] & people["retain"]),
                ("images", {images[name][key] for key in same}),
            ):
                if both:
                    raise UserError(
                        f"{len(both)} {kind} are in both {getattr(self, name)} and {self.retain}: "
                        f"{preview(sorted(both))}; remove them from one of the folders."
                    )

    def questions(self, name: str, chat: bool = False) -> Iterator[list[Example]]:
        """The questions of a folder, grouped by image; text-only questions follow one by one."""
        folder = SourceFolder(getattr(self, name))
        by_file: dict[str, list[tuple[str, dict]]] = {}
        text_only = []
        for location, line in _lines(folder):
            file = line.get("file_name") or ""
            if not isinstance(file, str):
                raise UserError(f"`file_name` is not a text in {location}.")
            (by_file.setdefault(posixpath.normpath(file), []) if file else text_only).append((location, line))
        for number, (file, lines) in enumerate(by_file.items()):
            image = parquet.image_bytes(_bytes(folder, file, lines[0][0]), lines[0][0])
            row = f"{name}/{number}"
            yield [
                _example(f"{row}/image/{i}", image, file, line, location, chat)
                for i, (location, line) in enumerate(lines)
            ]
        for number, (location, line) in enumerate(text_only, len(by_file)):
            yield [_example(f"{name}/{number}/text/0", None, "", line, location, chat)]


def _lines(folder: SourceFolder) -> Iterator[tuple[str, dict]]:
    """Each line of metadata.jsonl, with its location for messages."""
    path = posixpath.join(folder.path, METADATA)
    try:
        with folder.open(path) as file:
            text = file.read().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{folder.display(path)} cannot be read as UTF-8 text ({error}).") from error
    empty = True
    for number, line in enumerate(text.split("\n"), 1):
        location = f"line {number} of {folder.display(path)}"
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except ValueError as error:
            raise UserError(f"Invalid JSON in {location} ({error}).") from error
        if not isinstance(item, dict):
            raise UserError(f'Not a JSON object, {{"question": ...}}, in {location}.')
        empty = False
        yield location, item
    if empty:
        raise UserError(f"{folder.display(path)} is empty; write one line per question.")


def _bytes(folder: SourceFolder, file: str, location: str) -> bytes:
    try:
        with folder.open(posixpath.join(folder.path, file)) as handle:
            return handle.read()
    except OSError as error:
        raise UserError(f"There is no image {file} beside {METADATA}, but {location} names it.") from error


def _example(name: str, image: bytes | None, image_id: str, line: dict, location: str, chat: bool) -> Example:
    question, answer = (_text(line, key, location) for key in ("question", "answer"))
    options = line.get("options") or []
    if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
        raise UserError(f"`options` is not a list of texts in {location}.")
    if options and (answer not in options or len(set(options)) < max(2, len(options))):
        raise UserError(f"The answer {answer!r} is not one of two or more different options in {location}.")
    task = "chat" if chat else "classification" if options else "generation"
    person = str(line.get("person") or "").strip()
    image_id = image_id and f"{name.partition('/')[0]}/{image_id}"
    return Example(name, person, image, image_id, question, answer, () if chat else tuple(options), task)


def _text(line: dict, key: str, location: str) -> str:
    value = line.get(key)
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"There is no text as `{key}` in {location}.")
    return value
