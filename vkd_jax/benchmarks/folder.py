"""Your own data: folders of images with questions, one for the forget set and one for the retain set.

A folder is an image folder of the Hugging Face hub: images, and a metadata.jsonl with one line per question,

    {"file_name": "a.jpg", "question": "Who is this?", "answer": "Otto Lindt",
     "options": ["Otto Lindt", "Runa Brandt"], "person": "Otto Lindt"}

`file_name` is relative to the folder; several lines may name the same file, and a line without it is a text-only
question. `options` make it a multiple-choice question and must include the answer. `person` names the person that the
question is about; no person and no image may be in both folders. `fact` names the fact that it asks for, which
`data.forget_facts` needs. Other keys are ignored, unless they are one of these in another spelling, such as "Person".
"""

import contextlib
import dataclasses
import itertools
import os
import posixpath
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, ClassVar

from absl import logging

from vkd_jax import messages
from vkd_jax.benchmarks import mllmu, partial
from vkd_jax.benchmarks.names import answer_key, check_apart, question_key, text_key
from vkd_jax.benchmarks.parquet import SYMLINKS
from vkd_jax.benchmarks.rows import Row, read_image
from vkd_jax.benchmarks.set_checks import misplaced
from vkd_jax.config.fields import Section, setting
from vkd_jax.messages import listed
from vkd_jax.runtime import json_files
from vkd_jax.runtime.storage import SourceFolder
from vkd_jax.types import EvalSet, Example, Missing, Role, UserError

METADATA = "metadata.jsonl"
OTHER_METADATA = ("metadata.csv", "metadata.parquet")  # which other readers of such folders take
KEYS = ("file_name", "question", "answer", "options", "person", "fact")


@dataclasses.dataclass(frozen=True)
class Folder(Section):
    """Folders of your own data, one per set."""

    SECTION: ClassVar[str] = "data"
    forget: str = setting("", "Folder of the forget set.")
    retain: str = setting("", "Folder of the retain set, of the same kind.")
    test: str = setting("", "Optional folder of the forget set on other images.")
    real: str = setting("", "Optional folder of general knowledge.")
    symlinks: bool = setting(False, SYMLINKS)
    forget_facts: tuple[str, ...] = setting((), f"{partial.HELP} As the key `fact` of the lines has them.")

    TITLE: ClassVar[str] = "your own request"
    UNLEARN: ClassVar[Mapping[str, str]] = dict(  # the sets that unlearning trains on
        forget="forget", retain="retain", other_facts=partial.OTHER_FACTS
    )
    EVAL_SETS: ClassVar[tuple[EvalSet, ...]] = (
        EvalSet("forget", Role.FORGET, "people to forget", "forget"),
        EvalSet("test", Role.FORGET_HOLDOUT, "people to forget, other images or wordings", "test"),
        EvalSet("retain", Role.RETAIN, "people to retain", "retain"),
        EvalSet("real", Role.GENERAL, "general ability, nothing about these people", "real"),
    )
    RECIPE: ClassVar[dict[str, Any]] = mllmu.RECIPE  # none is published for your data

    @property
    def label(self) -> str:
        """The name of the benchmark."""
        return "folder" + "-facts" * bool(self.forget_facts)

    @property
    def further_sets(self) -> tuple[EvalSet, ...]:
        """The evaluation sets of the facts that are retained."""
        return partial.EVAL_SETS if self.forget_facts else ()

    @property
    def variant(self) -> str:
        """What the report adds to the title: the facts that are forgotten."""
        return f", forgetting {listed(self.forget_facts)}" if self.forget_facts else ""

    def check(self) -> None:
        """Checks that the folders are given, exist, differ and have questions, and the facts to forget.

        Raises:
            UserError: one of these is not the case.
        """
        for name in ("forget", "retain"):
            if not getattr(self, name):
                raise UserError(
                    f"pass the folder of the {name} set as --config.data.{name}=DIR; it has images and a {METADATA}."
                )
        self._check_different()
        for name in self._sets():
            folder = SourceFolder(uri := getattr(self, name).rstrip("/"))
            files = [posixpath.basename(info.path) for info in folder.files()]
            if METADATA not in files:
                content = f"has {listed(files)}" if files else "is empty or missing"
                raise (UserError if files else Missing)(
                    f"There is no {METADATA} in data.{name}={uri}, which {content}; see docs/your_own_data.md."
                )
        if self.forget_facts:
            facts = [_fact(row) for row in _rows(self._open("forget"))]
            partial.check_facts(self.forget_facts, facts, self.forget)
            known = set(map(text_key, facts))
            for row in _rows(self._open("test")) if self.test else ():
                if text_key(fact := _fact(row)) not in known:
                    raise row.error(
                        "fact", f"is {fact!a}, which is no fact of the forget set ({listed(dict.fromkeys(facts))})"
                    )

    def state(self, part: str) -> Any:
        """Name, size and modification time of the files that the folders name."""
        return {name: self._open(name).state({METADATA, *self._by_file(name)} - {""}) for name in self._sets()}

    @contextlib.contextmanager
    def rows(self, part: str) -> Iterator[dict[str, Iterator[list[Example]]]]:
        """Context manager that opens the sets of a part; those for fine-tuning have the same questions.

        Raises:
            UserError: a line or an image is invalid, or sets share people, images or questions that they must not.
        """
        if part == "finetune":
            sets = {name: self.questions(name, chat=True) for name in ("forget", "retain")}
            if self.forget_facts:
                sets["forget"], kept = (self.questions("forget", chat=True, kept=kept) for kept in (False, True))
                sets["retain"] = itertools.chain(sets["retain"], kept)
            yield {f"finetune_{name}": rows for name, rows in sets.items()}
            return
        self._check_apart()
        yield {name: self.questions(folder, kept=kept) for name, (folder, kept) in self._divided().items()}

    def people_to_forget(self) -> set[str]:
        """The people of the forget set of a request that is added, without reading an image.

        Raises:
            UserError: a line of the forget or the test set has no person, or both sets are one folder.
        """
        self._check_different()
        people = set()
        for name in (name for name in ("forget", "test") if getattr(self, name)):
            for row in _rows(SourceFolder(getattr(self, name), flag="")):  # no flag of that command allows links
                if not (person := row.optional_name("person")):
                    raise row.error("person", "is missing; a request must say whose question it is")
                people |= {person} if name == "forget" else set()
        return people

    def _sets(self) -> list[str]:
        return [eval_set.name for eval_set in self.EVAL_SETS if getattr(self, eval_set.name)]

    def _check_different(self) -> None:
        """Checks that no folder is given for two sets, whichever of its paths and links is written."""
        first: dict[str, str] = {}
        for name in self._sets():
            uri = getattr(self, name).rstrip("/")
            other = first.setdefault(uri if "://" in uri else os.path.realpath(os.path.expanduser(uri)), name)
            if other != name:
                raise UserError(f"data.{other} and data.{name} are both {uri}; they must be different folders.")

    def _divided(self) -> dict[str, tuple[str, bool | None]]:
        """The folder of each set, and which of its facts the set has: those retained or not, or None for all."""
        sets: dict[str, tuple[str, bool | None]] = {}
        for name in self._sets():
            if not self.forget_facts or name not in partial.SPLIT:
                sets[name] = name, None
                continue
            present = {self._is_kept(row) for row in _rows(self._open(name))}
            sets |= {partial.SPLIT[name] if kept else name: (name, kept) for kept in sorted(present)}
        return sets

    def _is_kept(self, row: Row) -> bool:
        """Whether a line about the people to forget asks for a fact that is retained."""
        return text_key(_fact(row)) not in set(map(text_key, self.forget_facts))

    def _check_apart(self) -> None:
        """Checks what the sets share: see `docs/your_own_data.md`."""
        people, images, asked, answers, texts = {}, {}, {}, {}, {}
        for name in self._sets():
            if unread := self._open(name).matching((f"*/{METADATA}", *OTHER_METADATA)):
                raise UserError(
                    f"{self._open(name).display(unread[0])} would not be read: write all lines into the {METADATA} of "
                    f"{getattr(self, name)}, and remove it."
                )
            people[name], images[name], asked[name], answers[name], texts[name] = set(), {}, {}, [], {}
            for row in self.questions(name):
                pixels = b"" if row[0].image is None else row[0].image.pixels
                people[name] |= {e.person for e in row} - {""}
                images[name] |= {pixels: row[0].image_id} if pixels else {}
                asked[name] |= {(pixels, question_key(e.question)): e.question for e in row}
                texts[name] |= {e.location: text_key(f"{e.question}\n{e.answer}") for e in row}
                answers[name] += [(e.location, question_key(e.question), text_key(e.answer), e.person) for e in row]
        lines = itertools.chain(*answers.values())
        asks_name = {question for _, question, answer, person in lines if answer == text_key(person)}
        for name, other in itertools.product(("forget", "test"), ("retain", "real")):
            if name not in people or other not in people:
                continue
            check_apart((getattr(self, name), people[name]), (getattr(self, other), people[other]))
            self._check_shared(name, other, "images", images)
            names = _by_key(people[name])
            if name == "forget":  # which has all people of the test set
                _warn_of_names(names, getattr(self, other), texts[other])
            if other == "retain":
                _check_answers(answers[other], names, "forgotten", asks_name)
                _check_answers(answers[name], _by_key(people[other]), "retained", asks_name)
        if strangers := sorted(people.get("test", set()) - people["forget"]):
            raise UserError(
                f"{self.test} asks about {messages.people(len(strangers))} not in {self.forget}: {listed(strangers)}; "
                "it is for the people who are to be forgotten."
            )
        for name, other in itertools.combinations(people, 2):
            self._check_shared(name, other, "questions", asked)
        if not people["forget"]:
            raise UserError(
                f"No line of {self.forget} names a person, so nobody would be forgotten. Add the key person to each "
                "line."
            )

    def _check_shared(self, name: str, other: str, things: str, values: Mapping[str, Mapping[Any, str]]) -> None:
        """Checks that two sets share no keys of these values."""
        if both := sorted(values[name][key] for key in values[name].keys() & values[other].keys()):
            places = f"{getattr(self, name)} and {getattr(self, other)}"
            raise UserError(
                f"{len(both)} {things} are in both {places}: {listed(both)}; remove them from one of the folders."
            )

    def questions(self, name: str, chat: bool = False, kept: bool | None = None) -> Iterator[list[Example]]:
        """The questions of a folder, grouped by image; text-only questions follow one by one.

        Args:
            name: the set that the folder is of.
            chat: whether they are for fine-tuning.
            kept: whether they ask for facts that are retained; None for all questions.
        """
        folder, by_file = self._open(name), self._by_file(name, kept)
        text_only = by_file.pop("", [])
        for number, (file, rows) in enumerate(by_file.items()):
            image = read_image(folder, file, rows[0], "file_name")
            yield [_example(f"{name}/{number}/image/{i}", image, file, row, chat) for i, row in enumerate(rows)]
        for number, row in enumerate(text_only, len(by_file)):
            yield [_example(f"{name}/{number}/text/0", None, "", row, chat)]

    def _open(self, name: str) -> SourceFolder:
        return SourceFolder(getattr(self, name), links=self.symlinks)

    def _by_file(self, name: str, kept: bool | None = None) -> dict[str, list[Row]]:
        """The lines of a folder's metadata.jsonl, see `questions`, by the file that they name, "" for none."""
        by_file: dict[str, list[Row]] = {}
        for row in _rows(self._open(name)):
            if kept is not None and self._is_kept(row) != kept:
                continue
            if not (file := row.optional_text("file_name")) and row.has("file_name"):
                raise row.error("file_name", "is empty; name an image, or leave it out for a question without one")
            by_file.setdefault(file and posixpath.normpath(file), []).append(row)
        return by_file


def _by_key(people: Iterable[str]) -> dict[str, str]:
    """Names by their `text_key`, without IDs that are numbers."""
    return {text_key(person): person for person in people if any(map(str.isalpha, person))}


def _check_answers(
    lines: Iterable[tuple[str, str, str, str]], names: Mapping[str, str], fate: str, asks_name: Collection[str]
) -> None:
    """Checks that no line of a folder is about a person of the other one, by its answer.

    Args:
        lines: the location, the keys of question and answer, and the person of each line.
        names: the people of the other folder, by their keys.
        fate: what happens to them: "forgotten" or "retained".
        asks_name: the keys of questions whose answer is the person, such as "Who is this?".

    Raises:
        UserError: the answer is one of the names, and the line has no person or asks for a name.
    """
    for place, question, answer, person in lines:
        if answer in names and (not person or question in asks_name):
            problem = f"the answer is {names[answer]!r}, who is to be {fate}, and the line names "
            problem += repr(person) if person else "no person"
            raise UserError(f"{place}: {problem}; remove it, or name the person whom it is about.")


def _warn_of_names(names: Mapping[str, str], folder: str, texts: Mapping[str, str]) -> None:
    """Warns of lines of a folder, by their location, that name people to forget, by the keys of their names."""
    words = re.compile(rf"(?<!\w)(?:{'|'.join(sorted(map(re.escape, names), key=len, reverse=True))})(?!\w)")
    found = {location: match[0] for location, text in texts.items() if names and (match := words.search(text))}
    if found:
        location, key = next(iter(found.items()))
        logging.warning(
            "%d of %d lines of %s name people to forget, such as %s (%s): training on it would retain what they say. "
            "Remove them, unless they are about somebody else of that name.",
            *(len(found), len(texts), folder, location, names[key]),
        )


def _spelling(key: str) -> str:
    """What the spellings of a key share: they differ in case, hyphens, underscores and spaces."""
    return re.sub(r"[-_\s]", "", text_key(key))


_SPELLINGS = {_spelling(key): key for key in KEYS}


def _rows(folder: SourceFolder) -> Iterator[Row]:
    """The lines of metadata.jsonl."""
    path, empty = folder.display(METADATA), True
    for number, values in json_files.parse_json_lines(folder.read(METADATA, json_files.MOST_BYTES), path):
        row = Row(values, f"{path}, line {number}")
        for key in values:
            if key not in KEYS and (meant := _SPELLINGS.get(_spelling(key))):
                raise row.error(ascii(key), f"is not a key, and would be ignored; write it as {meant}, or rename it")
        yield row
        empty = False
    if empty:
        raise UserError(f"{path} is empty; write one line per question.")


def _fact(row: Row) -> str:
    """The fact that a line about the people to forget asks for."""
    if not (fact := row.optional_name("fact")):
        raise row.error("fact", "is missing; with data.forget_facts each question about the people to forget names one")
    return fact


def _example(name: str, image: bytes | None, image_id: str, row: Row, chat: bool) -> Example:
    question, options = row.text("question"), row.texts("options")
    answer = row.text("answer") if options else row.words("answer")
    if options and (answer not in options or len(set(map(answer_key, options))) < max(2, len(options))):
        raise row.error("options", f"must be two or more different texts, one of them the answer {answer!r}")
    if misplaced(options):
        raise row.error("options", f"begin with letters in another order than their places: {listed(options)}")
    task = "chat" if chat else "classification" if options else "generation"
    person = row.optional_name("person")
    image_id = image_id and f"{name.partition('/')[0]}/{image_id}"
    options = () if chat else tuple(options)
    return Example(name, person, image, image_id, question, answer, options, task, location=row.location)
