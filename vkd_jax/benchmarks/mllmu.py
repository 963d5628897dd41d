"""MLLMU-Bench: the published data set, or the synthetic people in the same layout.

Set         | config           | questions about
forget      | forget_N         | the people to forget
test        | Test_Set         | the people to forget, with other images
retain      | retain_(100-N)   | all other people
retain_test | Test_Set         | all other people, with other images
real        | Retain_Set       | general ability; `person` is ""
appearance  | Appearance       | the looks of the people to forget, with `appearance` (synthetic people only)
other_facts, other_facts_test    | forget and test, the facts that `forget_facts` does not name (synthetic people)
finetune_forget, finetune_retain | ft_Data | the people to forget, and all others; trains the vanilla model

The i-th image question of a row with n images (`images`) shows image i mod n; i counts the classification, generation
and cloze questions of the row in this order. A cloze question is formatted by `cloze_prompt`; a classification answer
is the text of the correct option, not its letter.

Reference: Liu et al., Protecting Privacy in Multimodal LLMs with MLLMU-Bench, 2024 (arXiv:2410.22108).
"""

import contextlib
import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

from absl import logging

from vkd_jax.benchmarks import names, parquet, partial
from vkd_jax.benchmarks.parquet import Snapshot
from vkd_jax.benchmarks.rows import Row
from vkd_jax.benchmarks.synthetic.facts import BIOGRAPHY_FACTS, FACTS, IMAGE_KINDS, NAME_QUESTION, Kind
from vkd_jax.config.fields import setting
from vkd_jax.messages import listed
from vkd_jax.types import EvalSet, Example, Role

FORGET_RATIOS = (5, 10, 15)
CLOZE_INSTRUCTION = "Answer with the missing words only."
ROWS = {  # as published
    "Full_Set": 500, "ft_Data": 500, "Test_Set": 500, "Retain_Set": 153,
    "forget_5": 25, "forget_10": 50, "forget_15": 75, "retain_95": 475, "retain_90": 450, "retain_85": 425,
}  # fmt: skip
_TASK_COLUMNS = ("Classification_Task", "Generation_Task", "Mask_Task")
RECIPE = dict(lora_rank=16, lora_alpha=16.0, lora_dropout=0.05, learning_rate=2e-5, batch_size=4, epochs=5)


@dataclasses.dataclass(frozen=True)
class Mllmu(parquet.PublishedBenchmark):
    """MLLMU-Bench."""

    forget: int = setting(10, "Percent of the people in the forget set.", choices=FORGET_RATIOS)
    appearance: bool = setting(
        False,
        "Whether questions about the appearance of the people to forget are asked as a retained set, and taught when a "
        "vanilla model is made. Only for synthetic people.",
    )
    forget_facts: tuple[str, ...] = setting((), f"{partial.HELP} Only for synthetic people.", choices=IMAGE_KINDS)

    TITLE: ClassVar[str] = "MLLMU-Bench"
    UNLEARN: ClassVar[Mapping[str, str]] = dict(  # the sets that unlearning trains on
        forget="forget", retain="retain", other_facts=partial.OTHER_FACTS
    )
    EVAL_SETS: ClassVar[tuple[EvalSet, ...]] = (
        EvalSet("forget", Role.FORGET, "people to forget", "forget"),
        EvalSet("test", Role.FORGET_HOLDOUT, "people to forget, other images or wordings", "test"),
        EvalSet("retain", Role.RETAIN, "people to retain", "retain"),
        EvalSet("retain_test", Role.RETAIN_HOLDOUT, "people to retain, other images or wordings", "retain test"),
        EvalSet("real", Role.GENERAL, "general ability, nothing about these people", "real"),
    )
    RECIPE: ClassVar[dict[str, Any]] = RECIPE

    @property
    def label(self) -> str:
        """The name of the benchmark with the forget ratio."""
        return f"mllmu-forget{self.forget}" + "-appearance" * self.appearance + "-facts" * bool(self.forget_facts)

    @property
    def further_sets(self) -> tuple[EvalSet, ...]:
        """The evaluation sets that fields add."""
        title = "people to forget, their appearance"
        appearance = (EvalSet("appearance", Role.RETAIN_FACTS, title, "appearance"),) if self.appearance else ()
        return (*(partial.EVAL_SETS if self.forget_facts else ()), *appearance)

    @property
    def variant(self) -> str:
        """What the report adds to the title: the share that is forgotten, and the facts."""
        return super().variant + (f", of {listed(self.forget_facts)}" if self.forget_facts else "")

    def check(self) -> None:
        """Also checks that questions about the appearance exist, and that some facts would be retained.

        Raises:
            UserError: a source is given, which has no such questions and does not name facts, or all facts are named.
        """
        super().check()
        if self.appearance and self.source:
            raise self.error("appearance", f"{self.source} has no questions about it. Give False.")
        if self.forget_facts and self.source:
            raise self.error(
                "forget_facts", f"{self.source} does not say which fact a question asks for. Leave it empty."
            )
        partial.check_facts(self.forget_facts, IMAGE_KINDS)

    @contextlib.contextmanager
    def rows(self, part: str) -> Iterator[dict[str, Iterator[list[Example]]]]:
        """Context manager that opens the sets of a part.

        Raises:
            UserError: a config, shard or column is missing, a file or image is corrupt, the forget set is
                empty, people are in both the forget and the retain set, or a row is about somebody who is in neither.
        """
        with self.open_snapshot(part) as files:
            forget, retain = self._configs("evaluation")[:2]
            forgotten = _people(files, forget)

            def is_forgotten(person: str) -> bool:
                return person in forgotten

            retained = _people(files, retain) if retain in files.configs else set()
            if retained or self.source:
                parquet.check_people(self.source, (forget, forgotten), (retain, retained))
                _check_members(files, forgotten | retained, f"{forget} and {retain}")
            if part == "finetune":
                parquet.check_row_counts(files, self.source, {"ft_Data": ROWS["ft_Data"]})
                kept = partial.select(_finetune(files, is_forgotten), self._is_kept) if self.forget_facts else ()
                yield {
                    "finetune_forget": partial.select(_finetune(files, is_forgotten), self._is_chosen),
                    "finetune_retain": itertools.chain(_finetune(files, lambda person: person not in forgotten), kept),
                }
                return
            everybody = _people(files, "Full_Set") if files.has("Full_Set") else None
            parquet.check_row_counts(files, self.source, ROWS)
            parquet.check_people(self.source, (forget, forgotten), (retain, retained), everybody)
            sets = {
                "forget": partial.select(_evaluation_rows(files, forget), self._is_chosen),
                "test": partial.select(_evaluation_rows(files, "Test_Set", is_forgotten), self._is_chosen),
                "retain": _evaluation_rows(files, retain),
                "retain_test": _evaluation_rows(files, "Test_Set", lambda person: person not in forgotten),
                "real": _evaluation_rows(files, "Retain_Set"),
            }
            if self.forget_facts:
                for name, config in (("forget", forget), ("test", "Test_Set")):
                    rows = _evaluation_rows(files, config, is_forgotten)
                    sets[partial.SPLIT[name]] = partial.select(rows, self._is_kept)
            if self.appearance:
                sets["appearance"] = _evaluation_rows(files, "Appearance", is_forgotten)
            yield sets

    def _is_chosen(self, example: Example) -> bool:
        """Whether a question about the people to forget asks for a fact that is forgotten: all of them by default."""
        return not self.forget_facts or not _facts_asked(example.question).isdisjoint(self.forget_facts)

    def _is_kept(self, example: Example) -> bool:
        return not self._is_chosen(example)

    def _configs(self, part: str) -> tuple[str, ...]:
        forget = f"forget_{self.forget}"
        retain = f"retain_{100 - self.forget}"
        if part == "finetune":
            return (forget, retain, "ft_Data") if self.source else (forget, "ft_Data")
        further = ("Appearance",) if self.appearance else ()
        return forget, retain, "Test_Set", "Retain_Set", *further

    def _write_synthetic(self, folder: str, configs: tuple[str, ...]) -> None:
        from vkd_jax.benchmarks.synthetic import mllmu_writer  # imports `cloze_prompt` from this module

        mllmu_writer.write_snapshot(folder, configs, self.population, appearance=self.appearance)


def cloze_prompt(question: str) -> str:
    """Formats a fill-in question: "__" becomes "[Blank]", and a line asks for the missing words only."""
    return re.sub("_{2,}", "[Blank]", question) + "\n" + CLOZE_INSTRUCTION


@functools.cache
def _facts_asked(question: str) -> frozenset[str]:
    """The facts about a synthetic person that a question asks for, by its wording."""
    if question == NAME_QUESTION:
        return frozenset(["name"])
    if re.fullmatch(r"Who is .+\?", question):
        return frozenset(BIOGRAPHY_FACTS)
    return frozenset(name for name, fact in FACTS.items() if _asks_for(question, fact))


def _asks_for(question: str, fact: Kind) -> bool:
    """Whether a question has one of the wordings of a fact, about whomever."""
    clozes = cloze_prompt(fact.image_cloze), cloze_prompt(fact.text_cloze)
    wordings = (fact.image_question, fact.text_question, *clozes)
    return any(re.fullmatch(".+".join(map(re.escape, text.split("{name}"))), question) for text in wordings)


def _people(files: Snapshot, config: str) -> set[str]:
    return {_person(row) for row in files.rows(config, ["ID"])} - {""}


def _check_members(files: Snapshot, known: set[str], place: str) -> None:
    """Checks that Test_Set and ft_Data are about known people; ft_Data may have general questions, too."""
    for config in ("Test_Set", "ft_Data"):
        for row in files.rows(config, ["ID"]) if config in files.configs else ():
            parquet.check_member(row, "ID", _person(row), known | ({""} if config == "ft_Data" else set()), place)


def _finetune(files: Snapshot, is_member: Callable[[str], bool]) -> Iterator[list[Example]]:
    """The question-answer pairs of ft_Data about the selected people, one `chat` example each."""
    for row in files.rows("ft_Data", ["image", "ID", "metadata"]):
        if not is_member(person := _person(row)):
            continue
        image = row.image("image")
        image_id = "" if image is None else f"{row.name}/0"
        yield [
            Example(f"{row.name}/{i}", person, image, image_id, item.text("Question"), item.text("Answer"), task="chat")
            for i, item in enumerate(row.rows("metadata"))
        ]


def _evaluation_rows(
    files: Snapshot, config: str, is_member: Callable[[str], bool] = lambda person: True
) -> Iterator[list[Example]]:
    """The questions of an evaluation config about the selected people, row by row."""
    general, blank = config == "Retain_Set", 0
    for row in files.rows(config, ["ID", *_TASK_COLUMNS], either=["image", "images"]):
        person = "" if general else _person(row)
        if not is_member(person):
            continue
        image = row.image("image")
        images = [*([] if image is None else [image]), *row.images("images")]
        counts, examples = {"image": 0, "text": 0}, []
        for task, kind, item in _questions(row):
            if not item.optional_text("Question").strip():
                blank += 1
                continue
            question = item.text("Question")
            options: tuple[str, ...] = ()
            if task == "classification":
                options, answer = _options(item)
            else:
                answer = item.words("Ground_Truth")
            if task == "cloze":
                question = cloze_prompt(question)
            image, image_id = None, ""
            if kind == "image":
                if not images:
                    raise item.error("Question", "is about an image, but the row has none")
                number = counts["image"] % len(images)
                image, image_id = images[number], f"{row.name}/{number}"
            name = f"{row.name}/{kind}/{counts[kind]}"
            counts[kind] += 1
            examples.append(Example(name, person, image, image_id, question, answer, options, task))
        yield examples
    if blank:
        logging.warning("%d items of %s have no question and are skipped.", blank, config)


def _questions(row: Row) -> Iterator[tuple[str, str, Row]]:
    """(task, "image" | "text", item) for every question of a row."""
    classification = row.row("Classification_Task")
    for key, kind in (("Image_Textual_Questions", "image"), ("Pure_Text_Questions", "text")):
        for item in classification.rows(key):
            yield "classification", kind, item
    for column, task in (("Generation_Task", "generation"), ("Mask_Task", "cloze")):
        for item in row.rows(column):
            name = item.optional_text("Type")
            kind = {"Image_Textual": "image", "Pure_Text": "text"}.get(name)
            if kind is None:
                raise item.error("Type", f"is {name!a}, neither Image_Textual nor Pure_Text")
            yield task, kind, item


def _options(item: Row) -> tuple[tuple[str, ...], str]:
    """The option texts and the correct one; letters without a text are skipped."""
    row = item.row("Options")
    options = {letter: text for letter in row.fields() if (text := row.optional_text(letter)).strip()}
    letter = item.text("Correct_Answer").strip()
    if letter not in options and letter in options.values():  # some rows give the option's text
        return tuple(options.values()), letter
    return tuple(options.values()), item.option("Correct_Answer", options, letter)


def _person(row: Row) -> str:
    """The person of a row's ID: "093" for "093", "0093", 93 and 93.0; "" for "R001" and the like, general questions."""
    name = names.plain_number(row.identifier("ID"))
    if re.fullmatch("R[0-9]+", name):
        return ""
    return name.zfill(3) if name.isdecimal() else name
