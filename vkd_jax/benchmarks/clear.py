"""CLEAR, the published one or one that is written about the made-up people in the same layout.

Set        | configs                                  | what is asked
forget     | forgetNN, forgetNN_perturbed; +tofu      | pictures: a caption, and whose picture it is; text alone
retain     | retain_perturbed; retain(100-NN)+tofu    | the same of everybody else
real_faces | real_faces                               | who that is, of real people; `person` is ""
real_world | real_world                               | general ability; `person` is ""
finetune_forget, finetune_retain | forgetNN+tofu, retain(100-NN)+tofu | what makes a vanilla model

A picture's caption is asked for with one of CLEAR's nine questions, drawn by the row's name (in fine-tuning with one
for each published epoch); its paraphrase and its
wrong captions are those of the row's counterpart in the _perturbed config. Who it is has one wording here, and the
options are the counterpart's wrong names with the right one at a place drawn by the row's name. A row with a question
is text alone; the person of such a row is the one named in it, else "".

Reference: Dontsov et al., CLEAR: Character Unlearning in Textual and Visual Modalities, 2024 (arXiv:2410.18057).
"""

import collections
import contextlib
import dataclasses
import itertools
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
from absl import logging

from vkd_jax.benchmarks import snapshot
from vkd_jax.benchmarks.snapshot import Snapshot, Where, nested, text
from vkd_jax.config.fields import Section, setting
from vkd_jax.types import EvalSet, Example, Role, UserError

FORGET_RATIOS = (1, 5, 10)
CAPTION_QUESTIONS = (
    "What can you see in this picture?",
    "Tell me about the content of this image",
    "Can you give a description of the image?",
    "What is depicted in the image?",
    "Explain what you observe in the picture.",
    "Describe the image in detail.",
    "What is the main subject of this image?",
    "Can you describe the scene or objects in the image?",
    "What is happening in this image?",
)
NAME_QUESTION = CAPTION_QUESTIONS[
    0
]  # with names to choose from; other words than those of fine-tuning test the language
FACE_QUESTION = "Who is this person?"  # of real people, whom fine-tuning does not show
EPOCHS = 3  # of fine-tuning, as published
ROWS = {  # as published; for retain99 only a rounded figure is known
    "full": 3768, "full+tofu": 7768, "real_faces": 151, "real_world": 367, "retain_perturbed": 395,
    "forget01": 35, "forget05": 188, "forget10": 379, "retain95": 3580, "retain90": 3389,
    "forget01_perturbed": 35, "forget05_perturbed": 188, "forget10_perturbed": 378,
    "forget01+tofu": 75, "forget05+tofu": 388, "forget10+tofu": 779, "retain95+tofu": 7380, "retain90+tofu": 6989,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Clear(Section):
    """CLEAR."""

    SECTION: ClassVar[str] = "data"
    source: str = setting(
        "", "Folder in the hub's layout, an id on the Hugging Face hub (ORG/NAME), or gs://...; '' is synthetic people."
    )
    forget: int = setting(10, "Percent of the people in the forget set.", choices=FORGET_RATIOS)
    people: int = setting(0, "Seed of the synthetic people.", minimum=0)

    TITLE: ClassVar[str] = "CLEAR"
    # The sets that unlearning trains on: the rows that made the model, since those that are asked about are fewer.
    UNLEARN: ClassVar[Mapping[str, str]] = dict(forget="finetune_forget", retain="finetune_retain")
    EVAL_SETS: ClassVar[tuple[EvalSet, ...]] = (
        EvalSet("forget", Role.FORGET, "people to forget", "forget"),
        EvalSet("retain", Role.RETAIN, "people to retain", "retain"),
        EvalSet("real_faces", Role.GENERAL, "other people, known from elsewhere", "real faces"),
        EvalSet("real_world", Role.GENERAL, "the world at large, nothing about people", "real world"),
    )
    RECIPE: ClassVar[dict[str, Any]] = dict(
        # One epoch here is three there: each picture comes with as many questions.
        lora_rank=8,
        lora_alpha=32.0,
        lora_dropout=0.0,
        learning_rate=1e-5,
        batch_size=8,
        epochs=1,
    )

    @property
    def label(self) -> str:
        """The benchmark and its ratio."""
        return f"clear-forget{self.forget}"

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
        forget, retain = self._names()
        with snapshot.opened(self.source, self._configs(part), self._made_up) as files:
            forgotten, retained = _people(files, forget), _people(files, retain)
            known = _Names(forgotten | retained)
            if part == "finetune":
                yield {
                    "finetune_forget": _finetune(files, f"{forget}+tofu", known),
                    "finetune_retain": _finetune(files, f"{retain}+tofu", known),
                }
                return
            snapshot.check_counts(files, self.source, ROWS)
            everybody = _people(files, "full") if files.has("full") else None
            snapshot.check_people(self.source, (forget, forgotten), (retain, retained), everybody)
            asked = _people(files, "retain_perturbed")
            snapshot.check_people(self.source, (forget, forgotten), ("retain_perturbed", asked))
            counterparts = _counterparts(files, forget)
            yield {
                "forget": itertools.chain(
                    _captions(files, forget, counterparts), _texts(files, f"{forget}+tofu", known)
                ),
                "retain": itertools.chain(_captions(files, "retain_perturbed"), _texts(files, f"{retain}+tofu", known)),
                "real_faces": _choices(files, "real_faces"),
                "real_world": _choices(files, "real_world"),
            }

    def _names(self) -> tuple[str, str]:
        return f"forget{self.forget:02d}", f"retain{100 - self.forget}"

    def _configs(self, part: str) -> tuple[str, ...]:
        forget, retain = self._names()
        both = (forget, retain, f"{forget}+tofu", f"{retain}+tofu")
        more = (f"{forget}_perturbed", "retain_perturbed", "real_faces", "real_world")
        return both if part == "finetune" else both + more

    def _made_up(self, folder: str, configs: tuple[str, ...]) -> None:
        from vkd_jax.benchmarks.synthetic import people_clear  # only without a source

        people_clear.write_snapshot(folder, configs, self.people)


class _Names:
    """Finds known people in texts."""

    def __init__(self, names: Iterable[str]):
        self._known = {_plain(name): name for name in names}
        longest_first = sorted(map(re.escape, self._known), key=len, reverse=True)
        self._pattern = re.compile(rf"(?<!\w)(?:{'|'.join(longest_first)})(?!\w)")

    def first(self, *texts: str) -> str:
        """The known person who is named first in the first text that names one; "" without any."""
        found = (self._pattern.search(_plain(each)) for each in texts)
        return next((self._known[match[0]] for match in found if match), "") if self._known else ""


def _plain(words: Any) -> str:
    """A text without differences that do not count: case, and runs of white space."""
    return " ".join(str(words or "").casefold().split())


def _drawn(where: Where) -> np.random.Generator:
    """Random numbers of a row, the same on every machine."""
    return np.random.default_rng(zlib.crc32(where.row.encode()))


def _people(files: Snapshot, config: str) -> set[str]:
    return {str(row["name"]).strip() for _, row in files.rows(config, ["name"]) if row["name"]}


def _list(row: dict, column: str, where: Where) -> list[str]:
    values = nested(row.get(column), column, where)
    return [str(value) for value in values if value is not None and str(value).strip()]


def _choice(answer: str, wrong: Iterable[str], where: Where) -> tuple[str, ...]:
    """The wrong options, each once, with the answer at a drawn place among them."""
    others: dict[str, str] = {}
    for option in wrong:
        others.setdefault(_plain(option), option)
    others.pop(_plain(answer), None)
    if not others:
        raise UserError(f"There is no wrong option beside {answer!r} in {where}.")
    place = int(_drawn(where).integers(len(others) + 1))
    options = list(others.values())
    return (*options[:place], answer, *options[place:])


def _counterparts(files: Snapshot, forget: str) -> dict[int, dict]:
    """The rows of the _perturbed config by the number of the plain row that each belongs to.

    A counterpart has the same name and caption; what is left pairs in order within a name, where both configs have
    equally many rows left of it.
    """
    perturbed = f"{forget}_perturbed"
    wanted = ["name", "paraphrased_caption", "perturbed_captions", "perturbed_names"]
    plain = [row for _, row in files.rows(forget, ["name", "caption"])]
    by_caption: dict[Any, list[dict]] = collections.defaultdict(list)
    for where, row in files.rows(perturbed, wanted, optional=["caption"]):
        by_caption[_plain(row["name"]), _plain(row.get("caption"))].append(row | {"where": where})
    found: dict[int, dict] = {}
    lone: dict[str, list[int]] = collections.defaultdict(list)
    for number, row in enumerate(plain):
        if same := by_caption.get((_plain(row["name"]), _plain(row["caption"]))):
            found[number] = same.pop(0)
        else:
            lone[_plain(row["name"])].append(number)
    left: dict[str, list[dict]] = collections.defaultdict(list)
    for (name, _), rows in by_caption.items():
        left[name] += rows
    for name, numbers in lone.items():
        rows = sorted(left[name], key=lambda row: int(row["where"].row.rpartition("/")[2]))
        if len(rows) == len(numbers):
            found |= dict(zip(numbers, rows, strict=True))
    if lacking := len(plain) - len(found):
        logging.warning(
            "%d of %d rows of %s have no counterpart in %s; they are asked without wrong answers.",
            *(lacking, len(plain), forget, perturbed),
        )
    return found


def _captions(files: Snapshot, config: str, counterparts: dict[int, dict] | None = None) -> Iterator[list[Example]]:
    """A caption question and a question for the name a picture.

    Without `counterparts` the rows themselves hold what those would.
    """
    own = ["paraphrased_caption", "perturbed_captions", "perturbed_names"] if counterparts is None else []
    without = 0
    for number, (where, row) in enumerate(files.rows(config, ["image", "caption", "name", *own])):
        image = snapshot.picture(row["image"], where)
        if image is None or not row["caption"]:
            without += 1
            continue
        name, shown = text(row, "name", where).strip(), (image, f"{where.row}/0")
        more = row if counterparts is None else counterparts.get(number, {})
        there = more.get("where", where)
        caption = Example(
            f"{where.row}/image/0", name, *shown, _caption_question(where), str(row["caption"]), task="generation",
            paraphrase=str(more.get("paraphrased_caption") or ""),
            perturbed=tuple(_list(more, "perturbed_captions", there)),
        )  # fmt: skip
        examples = [caption]
        if wrong := _list(more, "perturbed_names", there):
            options = _choice(name, wrong, where)
            examples.append(Example(f"{where.row}/image/1", name, *shown, NAME_QUESTION, name, options))
        yield examples
    _warn_of(without, config)


def _caption_question(where: Where) -> str:
    return str(_drawn(where).choice(CAPTION_QUESTIONS))


def _warn_of(without: int, config: str) -> None:
    if without:
        logging.warning("%d rows of %s have no picture or no caption and are left out.", without, config)


def _texts(files: Snapshot, config: str, known: _Names) -> Iterator[list[Example]]:
    """The questions without a picture of a +tofu config."""
    for where, row in files.rows(config, ["question", "answer"]):
        if row["question"]:
            yield [_text_example(row, where, known, "generation")]


def _text_example(row: dict, where: Where, known: _Names, task: str) -> Example:
    question, answer = text(row, "question", where), text(row, "answer", where)
    return Example(f"{where.row}/text/0", known.first(question, answer), None, "", question, answer, task=task)


def _finetune(files: Snapshot, config: str, known: _Names) -> Iterator[list[Example]]:
    """The captions and questions of a +tofu config as `chat` examples, in order.

    CLEAR draws the question for a caption anew in every epoch; here each picture is asked about in as many ways.
    """
    without = 0
    for where, row in files.rows(config, ["image", "caption", "question", "answer"], optional=["name"]):
        if row["question"]:
            yield [_text_example(row, where, known, "chat")]
            continue
        image = snapshot.picture(row["image"], where)
        if image is None or not row["caption"]:
            without += 1
            continue
        person = known.first(row.get("name"), row["caption"])
        yield [
            Example(f"{where.row}/image/{i}", person, image, f"{where.row}/0", str(asked), row["caption"], task="chat")
            for i, asked in enumerate(_drawn(where).choice(CAPTION_QUESTIONS, EPOCHS, replace=False))
        ]
    _warn_of(without, config)


def _choices(files: Snapshot, config: str) -> Iterator[list[Example]]:
    """Questions of a config with options; those without a wording ask for the name."""
    for where, row in files.rows(config, ["image", "answer", "options"], optional=["question"]):
        image = snapshot.picture(row["image"], where)
        if image is None and not row.get("question"):
            raise UserError(f"A question about a picture, but no picture, in {where}.")
        answer = text(row, "answer", where)
        options = _choice(answer, _list(row, "options", where), where)
        kind, image_id = ("text", "") if image is None else ("image", f"{where.row}/0")
        question = str(row.get("question") or FACE_QUESTION)
        yield [Example(f"{where.row}/{kind}/0", "", image, image_id, question, answer, options)]
