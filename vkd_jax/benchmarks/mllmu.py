"""MLLMU-Bench, the published one or one that is written about the made-up people in the same layout.

Set         | config           | whose questions
forget      | forget_N         | the forgotten people
test        | Test_Set         | the forgotten people, on other pictures
retain      | retain_(100-N)   | everybody else
retain_test | Test_Set         | everybody else, on other pictures
real        | Retain_Set       | general ability; `person` is ""
finetune_forget, finetune_retain | ft_Data | what makes a vanilla model: of the forgotten people, of all others

A row with n pictures (`images`) asks its i-th question about a picture on picture i mod n, i counting through
the row's classification, generation and cloze questions in this order. A cloze question is formatted by
`cloze_prompt`; a classification answer is the text of the right option, not its letter.

Reference: Liu et al., Protecting Privacy in Multimodal LLMs with MLLMU-Bench, 2024 (arXiv:2410.22108).
"""

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

from absl import logging

from vkd_jax.benchmarks import snapshot
from vkd_jax.benchmarks.snapshot import Snapshot, Where, nested, some, text
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
class Mllmu(Section):
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
        """The benchmark and its ratio."""
        return f"mllmu-forget{self.forget}"

    def check(self) -> None:
        """Refuses wrong fields.

        Raises:
            UserError: `people` is given for a source of its own, or the source cannot be one.
        """
        snapshot.check_fields(self.source, self.people)

    def state(self, part: str) -> Any:
        """What the source holds."""
        return Snapshot(self.source, self._configs(part)).state() if self.source else []

    @contextlib.contextmanager
    def rows(self, part: str) -> Iterator[dict[str, Iterator[list[Example]]]]:
        """The sets of a part.

        Raises:
            UserError: a config, shard or column is missing, a file or picture is corrupt, the forget set is
                empty, or people stand in both the forget and the retain set.
        """
        with snapshot.opened(self.source, self._configs(part), self._made_up) as files:
            forget, retain = self._configs("evaluation")[:2]
            forgotten = _people(files, forget)
            if part == "finetune":
                snapshot.check_counts(files, self.source, {"ft_Data": ROWS["ft_Data"]})
                yield {
                    "finetune_forget": _finetune(files, lambda person: person in forgotten),
                    "finetune_retain": _finetune(files, lambda person: person not in forgotten),
                }
                return
            everybody = _people(files, "Full_Set") if files.has("Full_Set") else None
            retained = _people(files, retain)
            snapshot.check_counts(files, self.source, ROWS)
            snapshot.check_people(self.source, (forget, forgotten), (retain, retained), everybody)
            yield {
                "forget": _asked(files, forget),
                "test": _asked(files, "Test_Set", lambda person: person in forgotten),
                "retain": _asked(files, retain),
                "retain_test": _asked(files, "Test_Set", lambda person: person not in forgotten),
                "real": _asked(files, "Retain_Set"),
            }

    def _configs(self, part: str) -> tuple[str, ...]:
        forget = f"forget_{self.forget}"
        return (forget, "ft_Data") if part == "finetune" else (
            forget, f"retain_{100 - self.forget}", "Test_Set", "Retain_Set"
        )  # fmt: skip

    def _made_up(self, folder: str, configs: tuple[str, ...]) -> None:
        from vkd_jax.benchmarks.synthetic import people_mllmu  # which asks its cloze questions as this module does

        people_mllmu.write_snapshot(folder, configs, self.people)


def cloze_prompt(question: str) -> str:
    """A fill-in question as it is asked: "__" becomes "[Blank]", and a line asks for the answer alone."""
    return re.sub("_{2,}", "[Blank]", question) + "\n" + CLOZE_INSTRUCTION


def _people(files: Snapshot, config: str) -> set[str]:
    return {_person(row["ID"]) for _, row in files.rows(config, ["ID"])} - {""}


def _finetune(files: Snapshot, chosen: Callable[[str], bool]) -> Iterator[list[Example]]:
    """The question-answer pairs of ft_Data about the chosen people, one `chat` example each."""
    for where, row in files.rows("ft_Data", ["image", "ID", "metadata"]):
        if not chosen(person := _person(row["ID"])):
            continue
        image = snapshot.picture(row["image"], where)
        image_id = "" if image is None else f"{where.row}/0"
        yield [
            Example(f"{where.row}/{i}", person, image, image_id, *pair, task="chat")
            for i, item in enumerate(nested(row["metadata"], "metadata", where))
            for pair in [(text(item, "Question", where), text(item, "Answer", where))]
        ]


def _asked(
    files: Snapshot, config: str, chosen: Callable[[str], bool] = lambda person: True
) -> Iterator[list[Example]]:
    """The questions of an evaluation config about the chosen people, row by row."""
    general, blank = config == "Retain_Set", 0
    for where, row in files.rows(config, ["ID", *_TASK_COLUMNS], either=["image", "images"]):
        person = "" if general else _person(row["ID"])
        if not chosen(person):
            continue
        values = [row.get("image"), *nested(row.get("images"), "images", where)]
        pictures = [data for value in values if (data := snapshot.picture(value, where)) is not None]
        asked, examples = {"image": 0, "text": 0}, []
        for task, kind, item in _questions(row, where):
            if not str(item.get("Question") or "").strip():
                blank += 1
                continue
            question = text(item, "Question", where)
            options: tuple[str, ...] = ()
            if task == "classification":
                options, answer = _options(item, where)
            else:
                answer = text(item, "Ground_Truth", where)
            if task == "cloze":
                question = cloze_prompt(question)
            image, image_id = None, ""
            if kind == "image":
                if not pictures:
                    raise UserError(f"A question about a picture, but no picture, in {where}.")
                number = asked["image"] % len(pictures)
                image, image_id = pictures[number], f"{where.row}/{number}"
            name = f"{where.row}/{kind}/{asked[kind]}"
            asked[kind] += 1
            examples.append(Example(name, person, image, image_id, question, answer, options, task))
        yield examples
    if blank:
        logging.warning("%d items of %s have no question and are left out.", blank, config)


def _questions(row: dict, where: Where) -> Iterator[tuple[str, str, dict]]:
    """(task, "image" | "text", item) for every question of a row."""
    classification = nested(row["Classification_Task"], "Classification_Task", where) or {}
    for key, kind in (("Image_Textual_Questions", "image"), ("Pure_Text_Questions", "text")):
        for item in nested(classification.get(key), key, where):
            yield "classification", kind, item
    for column, task in (("Generation_Task", "generation"), ("Mask_Task", "cloze")):
        for item in nested(row[column], column, where):
            kind = {"Image_Textual": "image", "Pure_Text": "text"}.get(item.get("Type"))
            if kind is None:
                raise UserError(f"{column} has the unknown Type {item.get('Type')!r} in {where}.")
            yield task, kind, item


def _options(item: dict, where: Where) -> tuple[tuple[str, ...], str]:
    """The option texts and the right one among them; letters without a text (null) are left out."""
    options = nested(item.get("Options"), "Options", where) or {}
    options = {letter: str(value) for letter, value in options.items() if value is not None}
    letter = str(item.get("Correct_Answer")).strip()
    if letter in options:
        return tuple(options.values()), options[letter]
    if letter in options.values():  # some rows give the option's text
        return tuple(options.values()), letter
    raise UserError(f"Correct_Answer {letter!r} is none of the options {some(options)} in {where}.")


def _person(row_id: Any) -> str:
    """Row IDs come as "093", 93 or 93.0; IDs like "R001" mark general questions, about nobody."""
    name = str(int(row_id)) if isinstance(row_id, float) else str(row_id).strip()
    if name.startswith("R"):
        return ""
    return name.zfill(3) if name.isdigit() else name
