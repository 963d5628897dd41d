"""Suites of questions with lettered options: ScienceQA and MMBench."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from vkd_jax.benchmarks.general.suite import Suite, general, lettered, whole_number
from vkd_jax.benchmarks.names import plain_name, text_key
from vkd_jax.benchmarks.parquet import Snapshot
from vkd_jax.benchmarks.rows import Row
from vkd_jax.benchmarks.set_checks import refuse_most
from vkd_jax.types import EvalSet, UserError

ROTATION = 1_000_000  # MMBench adds multiples of it to the index of a question's copies
MOST_OPTIONS = 26  # letters
FEWEST = 8  # questions whose answers would hardly be at one place by chance
EMPTY = "nan"  # what published files have in the place of an empty field


@dataclasses.dataclass(frozen=True)
class ScienceQA(Suite):
    """ScienceQA: school questions with an image, the test split.

    Reference: Lu et al. (2022), Learn to explain: multimodal reasoning via thought chains for science question
    answering (arXiv:2209.09513).
    """

    HUB: ClassVar[str] = "lmms-lab/ScienceQA"
    CONFIG: ClassVar[str] = "ScienceQA-IMG"
    ROWS: ClassVar[int] = 2017
    TITLE: ClassVar[str] = "ScienceQA"
    EVAL_SETS: ClassVar[tuple[EvalSet, ...]] = (general("scienceqa", "ScienceQA"),)
    COLUMNS: ClassVar[tuple[str, ...]] = ("question", "choices", "answer")
    OPTIONAL: ClassVar[tuple[str, ...]] = ("hint", "subject")

    def check_groups(self, files: Snapshot) -> None:
        """Checks that the right options are not all at one place.

        Raises:
            UserError: they are, so that the first letter or the like would always be right.
        """
        rows = files.rows(self.CONFIG, ["choices", "answer"])
        places = [whole_number(row, "answer") for row in rows if len(row.texts("choices")) > 1]
        if len(places) >= FEWEST and len(set(places)) == 1:
            where = files.folder.display(self.CONFIG)
            raise UserError(
                f"ScienceQA: every answer in {where} is {places[0]}, which needs no image. Get the files again."
            )

    def question(self, row: Row) -> Mapping[str, Any]:
        """A question with options; `answer` is the index of the right one."""
        options, index = tuple(row.texts("choices")), whole_number(row, "answer")
        if not index < len(options) <= MOST_OPTIONS:
            raise row.error("answer", f"is {index}, and there are {len(options)} choices, counted from 0")
        hint = row.optional_text("hint")
        question = lettered(row.text("question"), options, hint and f"Context: {hint}")
        return dict(question=question, answer=options[index], options=options, category=row.optional_text("subject"))


@dataclasses.dataclass(frozen=True)
class MMBench(Suite):
    """MMBench: English, development split, with the copies of each question whose options are rotated.

    Reference: Liu et al. (2023), MMBench: is your multi-modal model an all-around player? (arXiv:2307.06281).
    """

    HUB: ClassVar[str] = "lmms-lab/MMBench"
    CONFIG: ClassVar[str] = "en"
    SPLIT: ClassVar[str] = "dev"
    ROWS: ClassVar[int] = 4329
    TITLE: ClassVar[str] = "MMBench"
    EVAL_SETS: ClassVar[tuple[EvalSet, ...]] = (general("mmbench", "MMBench, English, development split", "MMBench"),)
    GROUP_COLUMNS: ClassVar[tuple[str, ...]] = ("index",)
    COLUMNS: ClassVar[tuple[str, ...]] = ("question", "answer", "A", "B")
    OPTIONAL: ClassVar[tuple[str, ...]] = ("C", "D", "hint", "category")

    def group(self, row: Row) -> str:
        """The question, of which all copies have the same index but for a multiple of `ROTATION`."""
        return str(whole_number(row, "index") % ROTATION)

    def check_groups(self, files: Snapshot) -> None:
        """Checks that the copies of a question have its options and its answer, in another order.

        Raises:
            UserError: most have not.
        """
        first: dict[str, tuple[str, Any]] = {}
        others, copies = [], 0
        for row in files.rows(self.CONFIG, [*self.GROUP_COLUMNS, *self.COLUMNS], optional=self.OPTIONAL):
            fields = self.question(row)
            content = text_key(fields["answer"]), sorted(map(text_key, fields["options"]))
            name, expected = first.setdefault(self.group(row), (row.name, content))
            copies += name != row.name
            others += [(name, row.name)] if content != expected else []
        refuse_most(others, copies, "copies of questions of MMBench have other options or another answer")

    def question(self, row: Row) -> Mapping[str, Any]:
        """A question with two to four options; `answer` is a letter."""
        options = {letter: row.optional_text(letter).strip() for letter in "ABCD" if row.has(letter)}
        options = {letter: text for letter, text in options.items() if plain_name(text) not in ("", EMPTY)}
        letter, hint = row.text("answer").strip(), row.optional_text("hint").strip()
        if "".join(options) != "ABCD"[: len(options)] or letter not in options:
            given = ", ".join(options) or "none"
            raise row.error("answer", f"is {letter!r}, and the options with a text are {given}")
        texts = tuple(options.values())
        return dict(
            question=lettered(row.text("question"), texts, "" if hint == EMPTY else hint),
            answer=options[letter],
            options=texts,
            category=row.optional_text("category"),
            rotation=whole_number(row, "index") // ROTATION,
        )
