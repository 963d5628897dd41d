"""Your own request: folders of pictures with questions, one of what is to be forgotten and one of what is to stay.

A folder is what the Hugging Face hub calls an image folder: pictures, and a metadata.jsonl with a line a question,

    {"file_name": "a.jpg", "question": "Who is this?", "answer": "Otto Lindt",
     "options": ["Otto Lindt", "Runa Brandt"], "person": "Otto Lindt"}

`file_name` is relative to the folder; several lines may name one file, and a line without it is a question in text
alone. `options` make it a question with a choice, the answer among them; `person` says whose knowledge it asks for,
so that nobody stands on both sides. Other keys are left alone.
"""

import contextlib
import dataclasses
import hashlib
import json
import posixpath
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from vkd_jax.benchmarks import snapshot
from vkd_jax.benchmarks.snapshot import Place, some
from vkd_jax.config.fields import Section, setting
from vkd_jax.types import EvalSet, Example, Role, UserError

METADATA = "metadata.jsonl"


@dataclasses.dataclass(frozen=True)
class Folder(Section):
    """Folders of your own, each a set."""

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
    RECIPE: ClassVar[dict[str, Any]] = dict(  # nothing is published for your people: MLLMU-Bench's
        lora_rank=16, lora_alpha=16.0, lora_dropout=0.05, learning_rate=2e-5, batch_size=4, epochs=5
    )

    @property
    def label(self) -> str:
        """The benchmark."""
        return "folder"

    def check(self) -> None:
        """Refuses folders that are not named, not there, the same, or without questions.

        Raises:
            UserError: as it says.
        """
        for name in ("forget", "retain"):
            if not getattr(self, name):
                raise UserError(
                    f"pass the folder of what is to be {'forgotten' if name == 'forget' else 'retained'} as "
                    f"--config.data.{name}=DIR, with pictures and a {METADATA} in it."
                )
        named = {name: getattr(self, name).rstrip("/") for name in self._sets()}
        for name, uri in named.items():
            if same := [other for other in named if other < name and named[other] == uri]:
                raise UserError(f"data.{same[0]} and data.{name} are both {uri}; give each a folder of its own.")
            place = Place(uri)
            files = [posixpath.basename(info.path) for info in place.files()]
            if METADATA not in files:
                there = f"holds {some(files)}" if files else "is empty or missing"
                raise UserError(
                    f"There is no {METADATA} in data.{name}={uri}, which {there}; see docs/your_own_data.md."
                )

    def state(self, part: str) -> Any:
        """What the folders hold."""
        places = {name: Place(getattr(self, name)) for name in self._sets()}
        return {name: place.state(place.files(recursive=True)) for name, place in places.items()}

    @contextlib.contextmanager
    def rows(self, part: str) -> Iterator[dict[str, Iterator[list[Example]]]]:
        """The sets of a part; those for fine-tuning ask the same.

        Raises:
            UserError: a line or a picture is at fault, or a person or picture is to be both forgotten and retained.
        """
        if part == "finetune":
            yield {f"finetune_{name}": self.questions(name, chat=True) for name in ("forget", "retain")}
            return
        self._check_disjoint()
        yield {name: self.questions(name) for name in self._sets()}

    def _sets(self) -> list[str]:
        return [eval_set.name for eval_set in self.EVAL_SETS if getattr(self, eval_set.name)]

    def _check_disjoint(self) -> None:
        people, pictures = {}, {}
        for name in self._sets():
            people[name], pictures[name] = set(), {}
            for row in self.questions(name):
                people[name] |= {e.person for e in row} - {""}
                if row[0].image is not None:
                    pictures[name][hashlib.sha256(row[0].image).digest()] = row[0].image_id
        for name in [name for name in ("forget", "test") if name in people]:
            same = pictures[name].keys() & pictures["retain"]
            for kind, both in (
                ("people", people[name] & people["retain"]),
                ("pictures", {pictures[name][key] for key in same}),
            ):
                if both:
                    raise UserError(
                        f"{len(both)} {kind} stand in both {getattr(self, name)} and {self.retain}: "
                        f"{some(sorted(both))}; nothing can be forgotten and retained at once."
                    )

    def questions(self, name: str, chat: bool = False) -> Iterator[list[Example]]:
        """The questions of a folder, those on one picture together; text-only ones follow one by one."""
        place = Place(getattr(self, name))
        by_file: dict[str, list[tuple[str, dict]]] = {}
        alone = []
        for where, line in _lines(place):
            file = line.get("file_name") or ""
            if not isinstance(file, str):
                raise UserError(f"`file_name` is not a text in {where}.")
            (by_file.setdefault(posixpath.normpath(file), []) if file else alone).append((where, line))
        for number, (file, lines) in enumerate(by_file.items()):
            picture = snapshot.picture(_bytes(place, file, lines[0][0]), lines[0][0])
            row = f"{name}/{number}"
            yield [
                _example(f"{row}/image/{i}", picture, file, line, where, chat) for i, (where, line) in enumerate(lines)
            ]
        for number, (where, line) in enumerate(alone, len(by_file)):
            yield [_example(f"{name}/{number}/text/0", None, "", line, where, chat)]


def _lines(place: Place) -> Iterator[tuple[str, dict]]:
    """Each line of metadata.jsonl, and how to name it."""
    path = posixpath.join(place.path, METADATA)
    try:
        with place.open(path) as file:
            text = file.read().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{place.shown(path)} cannot be read as UTF-8 text ({error}).") from error
    empty = True
    for number, line in enumerate(text.split("\n"), 1):
        where = f"line {number} of {place.shown(path)}"
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except ValueError as error:
            raise UserError(f"There is no JSON in {where} ({error}).") from error
        if not isinstance(item, dict):
            raise UserError(f'There is no JSON object, {{"question": ...}}, in {where}.')
        empty = False
        yield where, item
    if empty:
        raise UserError(f"There is no line in {place.shown(path)}; write one for each question.")


def _bytes(place: Place, file: str, where: str) -> bytes:
    try:
        with place.open(posixpath.join(place.path, file)) as handle:
            return handle.read()
    except OSError as error:
        raise UserError(f"There is no picture {file} beside {METADATA}, but it is named in {where}.") from error


def _example(name: str, picture: bytes | None, image_id: str, line: dict, where: str, chat: bool) -> Example:
    question, answer = (_text(line, key, where) for key in ("question", "answer"))
    options = line.get("options") or []
    if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
        raise UserError(f"`options` is not a list of texts in {where}.")
    if options and (answer not in options or len(set(options)) < max(2, len(options))):
        raise UserError(f"The answer {answer!r} is not one of two or more different options in {where}.")
    task = "chat" if chat else "classification" if options else "generation"
    person = str(line.get("person") or "").strip()
    image_id = image_id and f"{name.partition('/')[0]}/{image_id}"
    return Example(name, person, picture, image_id, question, answer, () if chat else tuple(options), task)


def _text(line: dict, key: str, where: str) -> str:
    value = line.get(key)
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"There is no text as `{key}` in {where}.")
    return value
