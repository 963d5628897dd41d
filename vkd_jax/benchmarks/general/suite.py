"""`Suite`: the base class of the standard suites of general ability."""

import contextlib
import dataclasses
import hashlib
import re
import string
import tempfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from absl import logging

from vkd_jax import registry
from vkd_jax.benchmarks import parquet
from vkd_jax.benchmarks.parquet import Snapshot
from vkd_jax.benchmarks.rows import Row
from vkd_jax.data.batching import rng
from vkd_jax.types import EvalSet, Example, Role, SuiteQuestion, UserError

SHORT = "Answer the question using a single word or phrase."  # the prompts of LLaVA-1.5 and lmms-eval
LETTER = "Answer with the option's letter from the given choices directly."
YES_NO = ("yes", "no")


@dataclasses.dataclass(frozen=True)
class Suite:
    """A standard suite: its published files, its sets, and how a row becomes a question.

    A sample is drawn before the images are read, since some suites have hundreds of thousands of them. It has whole
    groups, such as all questions about one image.

    Args:
        source: a folder in the hub's layout, a URI such as gs://bucket/folder, or an id on the hub; "" writes a small
            stand-in of drawn images.
        most: the largest number of questions per set; 0 takes all.
        seed: seed of the sample.
    """

    source: str = ""
    most: int = 0
    seed: int = 0

    HUB: ClassVar[str]  # id on the hub, in the layout that is read
    CONFIG: ClassVar[str] = "data"  # the folder with the questions
    MORE_CONFIGS: ClassVar[tuple[str, ...]] = ()  # further folders
    SPLIT: ClassVar[str] = "test"
    ROWS: ClassVar[int]  # number of rows, as published
    GROUP_COLUMNS: ClassVar[tuple[str, ...]] = ()  # the columns that `group` reads; () if each row is a group
    SET_COLUMNS: ClassVar[tuple[str, ...]] = ()  # the columns that `set_of` reads
    COLUMNS: ClassVar[tuple[str, ...]]  # the columns that `question` reads, besides the image
    OPTIONAL: ClassVar[tuple[str, ...]] = ()  # columns that it reads if they exist
    TITLE: ClassVar[str]
    EVAL_SETS: ClassVar[tuple[EvalSet, ...]]
    UNLEARN: ClassVar[Mapping[str, str]] = {}
    RECIPE: ClassVar[Mapping[str, Any]] = {}

    @property
    def name(self) -> str:
        """The key of the suite in `registry.SUITES`."""
        return registry.name_of(registry.SUITES, self)

    @property
    def label(self) -> str:
        """The name, for folders."""
        return f"general-{self.name}"

    @property
    def asked_sets(self) -> tuple[EvalSet, ...]:
        """The sets; those of a stand-in say so in their titles, which are beside every figure."""
        if self.source:
            return self.EVAL_SETS
        return tuple(dataclasses.replace(s, title=f"{s.title} (drawn stand-in)") for s in self.EVAL_SETS)

    def check(self) -> None:
        """Checks the source before anything is read.

        Raises:
            UserError: it is neither a folder, nor a URI, nor an id on the hub.
        """
        try:
            if self.source:
                parquet.check_source(self.source)
        except UserError as error:
            raise UserError(
                f"eval.general_source: there is no folder {self.source} for {self.name}. Give a folder that has one "
                f"for each suite, {self.name}=DIR, {self.name}=ORG/NAME for an id on the hub, or hub for the usual ids."
            ) from error

    def state(self, part: str) -> Any:
        """Name, size and modification time of the files of the source."""
        return self._snapshot(self.source).state() if self.source else []

    @contextlib.contextmanager
    def rows(self, part: str) -> Iterator[dict[str, Iterator[list[Example]]]]:
        """Context manager that opens the sets.

        Raises:
            UserError: a file or column is missing, a row is wrong, or there are no rows.
        """
        with self._open() as files:
            count = files.count(self.CONFIG)
            if not count:
                raise UserError(f"{self.TITLE}: {files.folder.display(self.CONFIG)} has no rows. Get it again.")
            if self.source and count != self.ROWS:
                message = "%s of %s has %d rows; as published it has %d."
                logging.warning(message, self.TITLE, self.source, count, self.ROWS)
            groups = self._groups(files)
            self.check_groups(files)
            yield {name: self.examples(files, self._drawn(name, rows)) for name, rows in groups.items() if rows}

    # ---- What a suite defines ----

    def set_of(self, row: Row) -> str:
        """The name of the set that a row belongs to."""
        return self.EVAL_SETS[0].name

    def group(self, row: Row) -> str:
        """The group of a row: what its questions have in common that are drawn together."""
        return row.identifier(self.GROUP_COLUMNS[0]) if self.GROUP_COLUMNS else row.name

    def has_truth(self, row: Row) -> bool:
        """Whether the answers of a row say what is right. Rows where they do not are skipped, and counted."""
        return True

    def question(self, row: Row) -> Mapping[str, Any]:
        """The fields of the row's question: `question`, `answer`, and others of `SuiteQuestion`."""
        raise NotImplementedError

    def write_stand_in(self, folder: str | Path) -> None:
        """Writes drawn images and questions about them in the published layout."""
        from vkd_jax.benchmarks.synthetic import suites_writer  # only without a source

        suites_writer.write(folder, self.name, self.CONFIG, self.SPLIT)

    def check_groups(self, files: Snapshot) -> None:
        """Checks what a suite requires of all rows together."""

    def examples(self, files: Snapshot, chosen: Collection[int]) -> Iterator[list[Example]]:
        """The questions of the rows with these numbers."""
        columns = list(dict.fromkeys(["image", *self.GROUP_COLUMNS, *self.SET_COLUMNS, *self.COLUMNS]))
        skipped = 0
        for row in files.rows(self.CONFIG, columns, optional=self.OPTIONAL, only=chosen):
            if not self.has_truth(row):
                skipped += 1
                continue
            image = row.image("image")
            if image is None:
                raise row.error("image", "is missing")
            yield [self.example(row, image)]
        if skipped:
            logging.warning("%d questions of %s, which most people left blank, are skipped.", skipped, self.TITLE)

    # ---- Shared ----

    def example(self, row: Row, image: bytes) -> SuiteQuestion:
        """The question of a row about an image. Equal images have equal ids, so that each is encoded once."""
        image_id = f"{self.name}/{hashlib.sha256(image).hexdigest()[:16]}"
        fixed = dict(person="", image=image, image_id=image_id, task="suite", suite=self.name, group=self.group(row))
        return SuiteQuestion(id=f"{row.name}/image/0", **fixed, **self.question(row))

    def _groups(self, files: Snapshot) -> dict[str, dict[str, list[int]]]:
        """The numbers of the rows of each group, by set, from columns without images."""
        groups: dict[str, dict[str, list[int]]] = {s.name: {} for s in self.EVAL_SETS}
        columns = list(dict.fromkeys([*self.GROUP_COLUMNS, *self.SET_COLUMNS])) or [self.COLUMNS[0]]
        for number, row in enumerate(files.rows(self.CONFIG, columns)):
            groups[self.set_of(row)].setdefault(self.group(row), []).append(number)
        return groups

    def _drawn(self, name: str, groups: Mapping[str, list[int]]) -> set[int]:
        """The rows of a seeded sample of whole groups: the first in a random order that fit."""
        lists = list(groups.values())
        if not self.most or sum(map(len, lists)) <= self.most:
            return {number for numbers in lists for number in numbers}
        drawn: set[int] = set()
        for index in rng(self.seed, f"eval/{name}").permutation(len(lists)):
            if not drawn or len(drawn) + len(lists[index]) <= self.most:
                drawn.update(lists[index])
        return drawn

    @contextlib.contextmanager
    def _open(self) -> Iterator[Snapshot]:
        if self.source:
            yield self._snapshot(self.source)
            return
        with tempfile.TemporaryDirectory() as folder:
            self.write_stand_in(folder)
            yield self._snapshot(folder)

    def _snapshot(self, source: str) -> Snapshot:
        field = f"eval.general_source={self.name}=DIR"
        return Snapshot(source, (self.CONFIG, *self.MORE_CONFIGS), split=self.SPLIT, field=field)


def general(name: str, title: str, short: str = "") -> EvalSet:
    """The evaluation set of a suite."""
    return EvalSet(name, Role.GENERAL, title, short or title)


def whole_number(row: Row, field: str) -> int:
    """A field that is a whole number.

    Raises:
        UserError: it is something else.
    """
    text = row.identifier(field)
    if not re.fullmatch(r"[0-9]{1,18}", text):
        raise row.error(field, f"is {text[:40]!r}, not a whole number of at most 18 digits")
    return int(text)


def yes_or_no(row: Row) -> str:
    """The field `answer`, which is yes or no in any case.

    Raises:
        UserError: it is something else.
    """
    answer = row.text("answer").strip().lower().rstrip(".")
    if answer not in YES_NO:
        raise row.error("answer", f"is {answer!r}, neither yes nor no")
    return answer


def lettered(question: str, options: tuple[str, ...], hint: str = "") -> str:
    """The prompt of a question with options, after a hint if there is one."""
    lines = [f"{letter}. {text}" for letter, text in zip(string.ascii_uppercase, options, strict=False)]
    return "\n".join([*([hint] if hint.strip() else []), question, *lines, LETTER])
