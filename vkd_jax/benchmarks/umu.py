"""UMU-Bench: the published data set, or the synthetic people in the same layout.

Set    | config           | questions about
forget | forget_N         | the people to forget
retain | retain_(100-N)   | all other people
real   | Real_Person_Set  | real people, known from elsewhere; `person` is ""
finetune_forget, finetune_retain | forget_N, retain_(100-N) | MM_QA with the image, and UM_QA; trains the vanilla model

The cells Classify, Cloze and Generation are Python literals with the same questions under `unimodal` and `muitimodal`,
as the data spell it. A question with an image and its text-only counterpart are a pair, of which AccF, AccR, RLF and
RLR are computed.

A cloze answer is a sentence's end, such as "Oslo.". By default it is the truth without that period; with
`rules=upstream` the truth ends before the first period, as in the benchmark's own code, where "St. Ives." is "St",
and may be found within words.
Upstream matches an answer to the most similar option, which is `eval.protocol=letter:similar_option`.

Reference: the repository QDRhhhh/UMU-bench; the data set linbojunzi/UMU-bench.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from vkd_jax.benchmarks import mllmu, parquet
from vkd_jax.benchmarks.names import has_words
from vkd_jax.benchmarks.parquet import Snapshot
from vkd_jax.benchmarks.rows import Row
from vkd_jax.config.fields import setting
from vkd_jax.messages import listed
from vkd_jax.types import EvalSet, Example, Role

FORGET_RATIOS = (5, 10, 15)
REAL = "Real_Person_Set"
TEXT, IMAGE = "unimodal", "muitimodal"  # keys of the data
TASKS = {"Classify": "classification", "Cloze": "cloze", "Generation": "generation"}
ROWS = {
    "Full_Set": 500, REAL: 153,
    "forget_5": 25, "forget_10": 50, "forget_15": 75, "retain_95": 475, "retain_90": 450, "retain_85": 425,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Umu(parquet.PublishedBenchmark):
    """UMU-Bench."""

    forget: int = setting(5, "Percent of the people in the forget set.", choices=FORGET_RATIOS)
    rules: str = setting(
        parquet.OURS, "'upstream' ends the truth of a cloze question before its first period.", choices=parquet.RULES
    )

    TITLE: ClassVar[str] = "UMU-Bench"
    UNLEARN: ClassVar[Mapping[str, str]] = dict(forget="finetune_forget", retain="finetune_retain")
    EVAL_SETS: ClassVar[tuple[EvalSet, ...]] = (
        EvalSet("forget", Role.FORGET, "people to forget", "forget"),
        EvalSet("retain", Role.RETAIN, "people to retain", "retain"),
        EvalSet("real", Role.GENERAL, "real people, known from elsewhere", "real"),
    )
    RECIPE: ClassVar[dict[str, Any]] = mllmu.RECIPE  # the benchmark adapts its scripts

    @property
    def label(self) -> str:
        """The name of the benchmark with the forget ratio."""
        return f"umu-forget{self.forget}"

    @contextlib.contextmanager
    def rows(self, part: str) -> Iterator[dict[str, Iterator[list[Example]]]]:
        """Context manager that opens the sets of a part.

        Raises:
            UserError: a config, shard or column is missing, a file, cell or image is damaged, the forget set is empty,
                people are in both the forget and the retain set, or most have more than one row.
        """
        forget, retain = f"forget_{self.forget}", f"retain_{100 - self.forget}"
        with self.open_snapshot(part) as files:
            members = {config: [_person(row) for row in files.rows(config, ["ID"])] for config in (forget, retain)}
            parquet.check_people(self.source, *((config, set(people)) for config, people in members.items()))
            for config, people in members.items():
                parquet.check_one_row_each(config, people)
            parquet.check_row_counts(files, self.source, ROWS)
            if part == "finetune":
                yield {"finetune_forget": _finetune(files, forget), "finetune_retain": _finetune(files, retain)}
                return
            yield {
                "forget": self._questions(files, forget),
                "retain": self._questions(files, retain),
                "real": self._questions(files, REAL),
            }

    def _configs(self, part: str) -> tuple[str, ...]:
        configs = f"forget_{self.forget}", f"retain_{100 - self.forget}"
        return configs if part == "finetune" else (*configs, REAL)

    def _write_synthetic(self, folder: str, configs: tuple[str, ...]) -> None:
        from vkd_jax.benchmarks.synthetic import umu_writer  # imports the names of columns from this module

        umu_writer.write_snapshot(folder, configs, self.population)

    def _questions(self, files: Snapshot, config: str) -> Iterator[list[Example]]:
        """The questions of a config, row by row."""
        for row in files.rows(config, ["ID", "image", *TASKS]):
            person, image, examples = "" if config == REAL else _person(row), row.image("image"), []
            for column, task in TASKS.items():
                cell = row.row(column)
                for side in (IMAGE, TEXT) if image is not None or cell.has(IMAGE) else (TEXT,):
                    questions = _filled(cell, side)
                    if side == IMAGE and image is None:
                        raise row.error("image", f"is missing, and {column} has questions about it")
                    shown = (image, f"{row.name}/0") if side == IMAGE else (None, "")
                    for key in questions.fields():
                        item = questions.row(key)
                        question, answer, options = self._parsed(item, task)
                        name = f"{row.name}/{'image' if side == IMAGE else 'text'}/{task}.{key}"
                        pair = f"{row.name}/{key}"
                        examples.append(
                            Example(name, person, *shown, question, answer, options, task, pair=pair, rule=self._rule)
                        )
            yield examples

    @property
    def _rule(self) -> str:
        return f"umu:{parquet.UPSTREAM}" if self.rules == parquet.UPSTREAM else ""

    def _parsed(self, item: Row, task: str) -> tuple[str, str, tuple[str, ...]]:
        """Question, answer and options of an item."""
        question, answer = item.text("question"), item.text("answer").strip()
        if task == "classification":
            row = item.row("options")
            options = {letter: row.text(letter) for letter in row.fields()}
            letter, _, text = (part.strip() for part in answer.partition("."))
            return question, item.option("answer", options, letter, text), tuple(options.values())
        if task == "cloze":
            truth = answer.partition(".")[0] if self.rules == parquet.UPSTREAM else answer.removesuffix(".")
            if not has_words(truth):
                raise item.error("answer", f"is {answer!a}, which has no words before its period")
            return mllmu.cloze_prompt(question), truth, ()
        return question, item.words("answer").strip(), ()


def _finetune(files: Snapshot, config: str) -> Iterator[list[Example]]:
    """The question-answer pairs of a config as `chat` examples."""
    for row in files.rows(config, ["ID", "image", "MM_QA", "UM_QA"]):
        image, person, examples = row.image("image"), _person(row), []
        for column, kind in (("MM_QA", "image"), ("UM_QA", "text")):
            cell = row.row(column)
            if kind == "image" and image is None and not cell.has("question"):
                continue
            questions, answers = _filled(cell, "question"), _filled(cell, "answer")
            if kind == "image" and image is None:
                raise row.error("image", f"is missing, and {column} has questions about it")
            shown = (image, f"{row.name}/0") if kind == "image" else (None, "")
            for key in questions.fields():
                name = f"{row.name}/{kind}/{key}"
                examples.append(Example(name, person, *shown, questions.text(key), answers.text(key), task="chat"))
        yield examples


def _filled(cell: Row, key: str) -> Row:
    """A part of a cell, which has questions or answers.

    Raises:
        UserError: it is missing or has none.
    """
    if not cell.has(key):
        raise cell.error(key, f"is missing; the cell has {listed(cell.fields())}")
    part = cell.row(key)
    if not part.fields():
        raise cell.error(key, "is empty")
    return part


def _person(row: Row) -> str:
    return row.identifier("ID")
