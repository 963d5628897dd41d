"""MLLMU-Bench: the published data set, or the synthetic people in the same layout.

Set         | config           | questions about
forget      | forget_N         | the people to forget
test        | Test_Set         | the people to forget, with other images
retain      | retain_(100-N)   | all other people
retain_test | Test_Set         | all other people, with other images
real        | Retain_Set       | general ability; `person` is ""
finetune_forget, finetune_retain | ft_Data | the people to forget, and all others; trains the vanilla model

The i-th image question of a row with n images (`images`) shows image i mod n; i counts the classification, generation
and cloze questions of the row in this order. A cloze question is formatted by `cloze_prompt`; a classification answer
is the text of the correct option, not its letter.

Reference: Liu et al., Protecting Privacy in Multimodal LLMs with MLLMU-Bench, 2024 (arXiv:2410.22108).
"""

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

from absl import logging

from vkd_jax.benchmarks import parquet
from vkd_jax.benchmarks.parquet import RowLocation, Snapshot, nested_list, preview, required_text
from vkd_jax.config.fields import Section, setting
from vkd_jax.types import EvalSet, Example, Role, UserError

FORGET_RATIOS = (5, 10, 15)
CLOZE_INSTRUCTION = "Answer with the missing words only."
ROWS = {  # as published
    "Full_Set": 500, "ft_Data": 500, "Test_Set": 500, "Retain_Set": 153,
    "forget_5": 25, "forget_10": 50, "forget_15": 75, "retain_95": 475, "retain_90": 450, "retain_85": 425,
}  # fmt: skip
_TASK_COLUMNS = ("Classification_Task", "Generation_Task", "Mask_Task")


@dataclasses.dataclass(frozen=True)
class Mllmu(parquet.PublishedBenchmark, Section):
    """MLLMU-Bench."""

    SECTION: ClassVar[str] = "data"
    source: str = setting(
        "", "Folder in the hub's layout, an id on the Hugging Face hub (ORG/NAME), or gs://...; '' is synthetic people."
    )
    forget: int = setting(10, "Percent of the people in the forget set.", choices=FORGET_RATIOS)
    people: int = setting(0, "Seed of the synthetic people.", minimum=0)

    TITLE: ClassVar[str] = "MLLMU-Bench"
    UNLEARN: ClassVar[Mapping[str, str]] = dict(forget="forget", retain="retain")  # the sets that unlearning trains on
    EVAL_SETS: ClassVar[tuple[EvalSet, ...]] = (
        EvalSet("forget", Role.FORGET, "people to forget", "forget"),
        EvalSet("test", Role.FORGET_HOLDOUT, "people to forget, other images or wordings", "test"),
        EvalSet("retain", Role.RETAIN, "people to retain", "retain"),
        EvalSet("retain_test", Role.RETAIN_HOLDOUT, "people to retain, other images or wordings", "retain test"),
        EvalSet("real", Role.GENERAL, "general ability, nothing about these people", "real"),
    )
    RECIPE: ClassVar[dict[str, Any]] = dict(
        lora_rank=16, lora_alpha=16.0, lora_dropout=0.05, learning_rate=2e-5, batch_size=4, epochs=5
    )

    @property
    def label(self) -> str:
        """The name of the benchmark with the forget ratio."""
        return f"mllmu-forget{self.forget}"

    @contextlib.contextmanager
    def rows(self, part: str) -> Iterator[dict[str, Iterator[list[Example]]]]:
        """Context manager that opens the sets of a part.

        Raises:
            UserError: a config, shard or column is missing, a file or image is corrupt, the forget set is
                empty, or people are in both the forget and the retain set.
        """
        with parquet.open_snapshot(self.source, self._configs(part), self._write_synthetic) as files:
            forget, retain = self._configs("evaluation")[:2]
            forgotten = _people(files, forget)
            if part == "finetune":
                parquet.check_row_counts(files, self.source, {"ft_Data": ROWS["ft_Data"]})
                yield {
                    "finetune_forget": _finetune(files, lambda person: person in forgotten),
                    "finetune_retain": _finetune(files, lambda person: person not in forgotten),
                }
                return
            everybody = _people(files, "Full_Set") if files.has("Full_Set") else None
            retained = _people(files, retain)
            parquet.check_row_counts(files, self.source, ROWS)
            parquet.check_people(self.source, (forget, forgotten), (retain, retained), everybody)
            yield {
                "forget": _evaluation_rows(files, forget),
                "test": _evaluation_rows(files, "Test_Set", lambda person: person in forgotten),
                "retain": _evaluation_rows(files, retain),
                "retain_test": _evaluation_rows(files, "Test_Set", lambda person: person not in forgotten),
                "real": _evaluation_rows(files, "Retain_Set"),
            }

    def _configs(self, part: str) -> tuple[str, ...]:
        forget = f"forget_{self.forget}"
        return (forget, "ft_Data") if part == "finetune" else (
            forget, f"retain_{100 - self.forget}", "Test_Set", "Retain_Set"
        )  # fmt: skip

    def _write_synthetic(self, folder: str, configs: tuple[str, ...]) -> None:
        from vkd_jax.benchmarks.synthetic import mllmu_writer  # imports `cloze_prompt` from this module

        mllmu_writer.write_snapshot(folder, configs, self.people)


def cloze_prompt(question: str) -> str:
    """Formats a fill-in question: "__" becomes "[Blank]", and a line asks for the missing words only."""
    return re.sub("_{2,}", "[Blank]", question) + "\n" + CLOZE_INSTRUCTION


def _people(files: Snapshot, config: str) -> set[str]:
    return {_person(row["ID"]) for _, row in files.rows(config, ["ID"])} - {""}


def _finetune(files: Snapshot, is_member: Callable[[str], bool]) -> Iterator[list[Example]]:
    """The question-answer pairs of ft_Data about the selected people, one `chat` example each."""
    for location, row in files.rows("ft_Data", ["image", "ID", "metadata"]):
        if not is_member(person := _person(row["ID"])):
            continue
        image = parquet.image_bytes(row["image"], location)
        image_id = "" if image is None else f"{location.row}/0"
        yield [
            Example(f"{location.row}/{i}", person, image, image_id, *pair, task="chat")
            for i, item in enumerate(nested_list(row["metadata"], "metadata", location))
            for pair in [(required_text(item, "Question", location), required_text(item, "Answer", location))]
        ]


def _evaluation_rows(
    files: Snapshot, config: str, is_member: Callable[[str], bool] = lambda person: True
) -> Iterator[list[Example]]:
    """The questions of an evaluation config about the selected people, row by row."""
    general, blank = config == "Retain_Set", 0
    for location, row in files.rows(config, ["ID", *_TASK_COLUMNS], either=["image", "images"]):
        person = "" if general else _person(row["ID"])
        if not is_member(person):
            continue
        values = [row.get("image"), *nested_list(row.get("images"), "images", location)]
        images = [data for value in values if (data := parquet.image_bytes(value, location)) is not None]
        counts, examples = {"image": 0, "text": 0}, []
        for task, kind, item in _questions(row, location):
            if not str(item.get("Question") or "").strip():
                blank += 1
                continue
            question = required_text(item, "Question", location)
            options: tuple[str, ...] = ()
            if task == "classification":
                options, answer = _options(item, location)
            else:
                answer = required_text(item, "Ground_Truth", location)
            if task == "cloze":
                question = cloze_prompt(question)
            image, image_id = None, ""
            if kind == "image":
                if not images:
                    raise UserError(f"A question about an image, but no image, in {location}.")
                number = counts["image"] % len(images)
                image, image_id = images[number], f"{location.row}/{number}"
            name = f"{location.row}/{kind}/{counts[kind]}"
            counts[kind] += 1
            examples.append(Example(name, person, image, image_id, question, answer, options, task))
        yield examples
    if blank:
        logging.warning("%d items of %s have no question and are skipped.", blank, config)


def _questions(row: dict, location: RowLocation) -> Iterator[tuple[str, str, dict]]:
    """(task, "image" | "text", item) for every question of a row."""
    classification = nested_list(row["Classification_Task"], "Classification_Task", location) or {}
    for key, kind in (("Image_Textual_Questions", "image"), ("Pure_Text_Questions", "text")):
        for item in nested_list(classification.get(key), key, location):
            yield "classification", kind, item
    for column, task in (("Generation_Task", "generation"), ("Mask_Task", "cloze")):
        for item in nested_list(row[column], column, location):
            kind = {"Image_Textual": "image", "Pure_Text": "text"}.get(item.get("Type"))
            if kind is None:
                raise UserError(f"{column} has the unknown Type {item.get('Type')!r} in {location}.")
            yield task, kind, item


def _options(item: dict, location: RowLocation) -> tuple[tuple[str, ...], str]:
    """The option texts and the correct one; letters without a text (null) are skipped."""
    options = nested_list(item.get("Options"), "Options", location) or {}
    options = {letter: str(value) for letter, value in options.items() if value is not None}
    letter = str(item.get("Correct_Answer")).strip()
    if letter in options:
        return tuple(options.values()), options[letter]
    if letter in options.values():  # some rows give the option's text
        return tuple(options.values()), letter
    raise UserError(f"Correct_Answer {letter!r} is not one of the options {preview(options)} in {location}.")


def _person(row_id: Any) -> str:
    """The person of a row ID, which may be "093", 93 or 93.0; IDs like "R001" mark general questions."""
    name = str(int(row_id)) if isinstance(row_id, float) else str(row_id).strip()
    if name.startswith("R"):
        return ""
    return name.zfill(3) if name.isdigit() else name
