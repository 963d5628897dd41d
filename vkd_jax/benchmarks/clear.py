"""CLEAR: the published data set, or the synthetic people in the same layout.

Set        | configs                                  | questions about
forget     | forgetNN, forgetNN_perturbed; +tofu      | the people to forget: caption and name of an image; text only
retain     | retain_perturbed; retain(100-NN)+tofu    | all other people: the same questions
real_faces | real_faces                               | the names of real people; `person` is ""
real_world | real_world                               | general ability; `person` is ""
finetune_forget, finetune_retain | forgetNN+tofu, retain(100-NN)+tofu | the same people; trains the vanilla model

A caption question has one of CLEAR's nine wordings, drawn by the row's name (fine-tuning has one for each published
epoch); its paraphrase and wrong captions are those of the row's counterpart in the _perturbed config. A name question
has one wording; its options are the wrong names of the counterpart, with the correct one at an index drawn by the row's
name. A row with a question is text-only; its person is the one that the text names, or "".

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

from vkd_jax.benchmarks import parquet
from vkd_jax.benchmarks.names import answer_key, check_apart, plain_name, text_key
from vkd_jax.benchmarks.parquet import Snapshot
from vkd_jax.benchmarks.rows import EncodedImage, Row
from vkd_jax.benchmarks.set_checks import refuse_most
from vkd_jax.config.fields import setting
from vkd_jax.types import EvalSet, Example, Role

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
# Its options are names. A wording that fine-tuning does not use would test the language model instead.
NAME_QUESTION = CAPTION_QUESTIONS[0]
FACE_QUESTION = "Who is this person?"  # about real people, who are not in the fine-tuning set
EPOCHS = 3  # of the published fine-tuning
ROWS = {  # as published; for retain99 only a rounded number is known
    "full": 3768, "full+tofu": 7768, "real_faces": 151, "real_world": 367, "retain_perturbed": 395,
    "forget01": 35, "forget05": 188, "forget10": 379, "retain95": 3580, "retain90": 3389,
    "forget01_perturbed": 35, "forget05_perturbed": 188, "forget10_perturbed": 378,
    "forget01+tofu": 75, "forget05+tofu": 388, "forget10+tofu": 779, "retain95+tofu": 7380, "retain90+tofu": 6989,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Clear(parquet.PublishedBenchmark):
    """CLEAR."""

    forget: int = setting(10, "Percent of the people in the forget set.", choices=FORGET_RATIOS)

    TITLE: ClassVar[str] = "CLEAR"
    # Unlearning trains on the fine-tuning rows, since the evaluation has fewer.
    UNLEARN: ClassVar[Mapping[str, str]] = dict(forget="finetune_forget", retain="finetune_retain")
    EVAL_SETS: ClassVar[tuple[EvalSet, ...]] = (
        EvalSet("forget", Role.FORGET, "people to forget", "forget"),
        EvalSet("retain", Role.RETAIN, "people to retain", "retain"),
        EvalSet("real_faces", Role.GENERAL, "other people, known from elsewhere", "real faces"),
        EvalSet("real_world", Role.GENERAL, "the world at large, nothing about people", "real world"),
    )
    RECIPE: ClassVar[dict[str, Any]] = dict(
        # One epoch here is three published ones: each image comes with three questions.
        lora_rank=8,
        lora_alpha=32.0,
        lora_dropout=0.0,
        learning_rate=1e-5,
        batch_size=8,
        epochs=1,
    )

    @property
    def label(self) -> str:
        """The name of the benchmark with the forget ratio."""
        return f"clear-forget{self.forget}"

    @contextlib.contextmanager
    def rows(self, part: str) -> Iterator[dict[str, Iterator[list[Example]]]]:
        """Context manager that opens the sets of a part.

        Raises:
            UserError: a config, shard or column is missing, a file or image is corrupt, the forget set is
                empty, people are in both the forget and the retain set, a row is about somebody of the other one, or
                most rows of a _perturbed config are about others.
        """
        forget, retain = self._names()
        with self.open_snapshot(part) as files:
            forgotten, retained = _people(files, forget), _people(files, retain)
            of_forget, of_retain = _Names(forgotten, retained, retain), _Names(retained, forgotten, forget)
            if part == "finetune":
                yield {
                    "finetune_forget": _finetune(files, f"{forget}+tofu", of_forget),
                    "finetune_retain": _finetune(files, f"{retain}+tofu", of_retain),
                }
                return
            parquet.check_row_counts(files, self.source, ROWS)
            everybody = _people(files, "full") if files.has("full") else None
            parquet.check_people(self.source, (forget, forgotten), (retain, retained), everybody)
            counterparts = _counterparts(files, forget)
            _check_perturbed(files, self.source, (forget, forgotten), (retain, retained))
            yield {
                "forget": itertools.chain(
                    _captions(files, forget, counterparts), _texts(files, f"{forget}+tofu", of_forget)
                ),
                "retain": itertools.chain(
                    _captions(files, "retain_perturbed"), _texts(files, f"{retain}+tofu", of_retain)
                ),
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

    def _write_synthetic(self, folder: str, configs: tuple[str, ...]) -> None:
        from vkd_jax.benchmarks.synthetic import clear_writer  # only without a source

        clear_writer.write_snapshot(folder, configs, self.population)


class _Names:
    """Finds the people of a set in its rows.

    Args:
        names: the people of the set.
        others: those of the other set, about whom no row of this one may be.
        other_config: the config that has them, for messages.
    """

    def __init__(self, names: Iterable[str], others: Iterable[str], other_config: str):
        self._others, self._config = frozenset(others), other_config
        self._known = {text_key(name): name for name in (*names, *self._others)}
        longest_first = sorted(map(re.escape, self._known), key=len, reverse=True)
        self._pattern = re.compile(rf"(?<!\w)(?:{'|'.join(longest_first)})(?!\w)")

    def person(self, row: Row, *fields: str) -> str:
        """The first person of the set whom the fields of a row name; "" if they name no known person.

        Raises:
            UserError: they name people of the other set alone.
        """
        named = [
            (field, self._known[match[0]])
            for field in (fields if self._known else ())
            for match in self._pattern.finditer(text_key(row.optional_text(field)))
        ]
        for _, person in named:
            if person not in self._others:
                return person
        if named:
            field, person = named[0]
            raise row.error(field, f"is about {person!a}, who is in {self._config}")
        return ""


def _row_rng(row: Row) -> np.random.Generator:
    """The random generator of a row, seeded by its name."""
    return np.random.default_rng(zlib.crc32(row.name.encode()))


def _people(files: Snapshot, config: str) -> set[str]:
    return set(_person_of_each_row(files, config))


def _person_of_each_row(files: Snapshot, config: str) -> list[str]:
    """The people of the rows of a config, without those that name nobody."""
    return list(filter(None, (plain_name(row.optional_text("name")) for row in files.rows(config, ["name"]))))


def _check_perturbed(files: Snapshot, source: str, forget: tuple[str, set[str]], retain: tuple[str, set[str]]) -> None:
    """Checks that the _perturbed configs, which the evaluation reads, are about the people of their side.

    Args:
        files: the snapshot.
        source: its source, for messages.
        forget: the config of the forget set, and its people; forgetNN_perturbed must have all of them.
        retain: the config of the retain set, and its people; retain_perturbed has some of them.

    Raises:
        UserError: one of them has a person of the other side, or most of its rows are about others.
    """
    perturbed = f"{forget[0]}_perturbed"
    for config, (name, own), others in (("retain_perturbed", retain, forget), (perturbed, forget, retain)):
        asked = _person_of_each_row(files, config)
        check_apart(others, (f"{config} of {source}", set(asked)))
        parquet.check_same_people((config, asked), (name, sorted(own)))
    parquet.check_same_people((forget[0], _person_of_each_row(files, forget[0])), (perturbed, asked))


class _Repeats:
    """Finds images that a config shows twice with one caption.

    The wordings of caption questions are drawn by row, so that `set_checks` does not recognize them.

    Args:
        config: the config.
    """

    def __init__(self, config: str):
        self._config, self._first, self._found = config, {}, []

    def add(self, row: Row, image: EncodedImage, caption: str) -> None:
        """Adds a row."""
        first = self._first.setdefault((image.pixels, text_key(caption)), row.name)
        self._found += [(first, row.name)] if first != row.name else []

    def check(self) -> None:
        """Refuses a config of which more than half is there twice, and warns of less.

        Raises:
            UserError: it is.
        """
        refuse_most(self._found, len(self._first), f"images of {self._config} are there twice with one caption")


def _choice(answer: str, wrong: Iterable[str], row: Row, column: str) -> tuple[str, ...]:
    """The wrong options of a column without duplicates, with the answer at a random index."""
    others: dict[str, str] = {}
    for option in wrong:
        others.setdefault(answer_key(option), option)
    others.pop(answer_key(answer), None)
    if not others:
        raise row.error(column, f"has nothing but the answer {answer!r}")
    place = int(_row_rng(row).integers(len(others) + 1))
    options = list(others.values())
    return (*options[:place], answer, *options[place:])


def _counterparts(files: Snapshot, forget: str) -> dict[int, Row]:
    """Maps the index of each row of the plain config to its counterpart in the _perturbed config.

    A counterpart has the same name and caption. The remaining rows of a name are paired in order if both configs have
    the same number of them.
    """
    perturbed = f"{forget}_perturbed"
    wanted = ["name", "paraphrased_caption", "perturbed_captions", "perturbed_names"]
    plain = [_name_and_caption(row) for row in files.rows(forget, ["name", "caption"])]
    by_caption: dict[tuple[str, str], list[tuple[int, Row]]] = collections.defaultdict(list)
    for number, row in enumerate(files.rows(perturbed, wanted, optional=["caption"])):
        by_caption[_name_and_caption(row)].append((number, row))
    matches: dict[int, Row] = {}
    lone: dict[str, list[int]] = collections.defaultdict(list)
    for number, key in enumerate(plain):
        if same := by_caption.get(key):
            matches[number] = same.pop(0)[1]
        else:
            lone[key[0]].append(number)
    left: dict[str, list[tuple[int, Row]]] = collections.defaultdict(list)
    for (name, _), rows in by_caption.items():
        left[name] += rows
    for name, numbers in lone.items():
        rows = [row for _, row in sorted(left[name], key=lambda numbered: numbered[0])]
        if len(rows) == len(numbers):
            matches |= dict(zip(numbers, rows, strict=True))
    if lacking := len(plain) - len(matches):
        logging.warning(
            "%d of %d rows of %s have no counterpart in %s; their questions have no wrong answers.",
            *(lacking, len(plain), forget, perturbed),
        )
    return matches


def _name_and_caption(row: Row) -> tuple[str, str]:
    return text_key(row.optional_text("name")), text_key(row.optional_text("caption"))


def _captions(files: Snapshot, config: str, counterparts: dict[int, Row] | None = None) -> Iterator[list[Example]]:
    """A caption question and a name question for each image.

    Without `counterparts`, the rows have the columns of the _perturbed config themselves.
    """
    extra_columns = ["paraphrased_caption", "perturbed_captions", "perturbed_names"] if counterparts is None else []
    incomplete, repeats = 0, _Repeats(config)
    for number, row in enumerate(files.rows(config, ["image", "caption", "name", *extra_columns])):
        image, text = row.image("image"), row.optional_text("caption")
        if image is None or not text:
            incomplete += 1
            continue
        repeats.add(row, image, text)
        name, shown = row.identifier("name"), (image, f"{row.name}/0")
        more = row if counterparts is None else counterparts.get(number, Row({}, row.location))
        caption = Example(
            f"{row.name}/image/0", name, *shown, _caption_question(row), text,
            task="generation",
            paraphrase=more.optional_text("paraphrased_caption"),
            perturbed=tuple(more.texts("perturbed_captions", skip_blank=True)),
        )  # fmt: skip
        examples = [caption]
        if wrong := more.texts("perturbed_names", skip_blank=True):
            options = _choice(name, wrong, row, "perturbed_names")
            examples.append(Example(f"{row.name}/image/1", name, *shown, NAME_QUESTION, name, options))
        yield examples
    repeats.check()
    _warn_incomplete(incomplete, config)


def _caption_question(row: Row) -> str:
    return str(_row_rng(row).choice(CAPTION_QUESTIONS))


def _warn_incomplete(incomplete: int, config: str) -> None:
    if incomplete:
        logging.warning("%d rows of %s have no image or no caption and are skipped.", incomplete, config)


def _texts(files: Snapshot, config: str, known: _Names) -> Iterator[list[Example]]:
    """The text-only questions of a +tofu config."""
    for row in files.rows(config, ["question", "answer"]):
        if row.optional_text("question"):
            yield [_text_example(row, known, "generation")]


def _text_example(row: Row, known: _Names, task: str) -> Example:
    question, answer = row.text("question"), row.words("answer")
    person = known.person(row, "question", "answer")
    return Example(f"{row.name}/text/0", person, None, "", question, answer, task=task)


def _finetune(files: Snapshot, config: str, known: _Names) -> Iterator[list[Example]]:
    """The captions and questions of a +tofu config as `chat` examples, in order.

    CLEAR draws the wording of a caption question in every epoch; here each image has one question per epoch.
    """
    incomplete, repeats = 0, _Repeats(config)
    for row in files.rows(config, ["image", "caption", "question", "answer"], optional=["name"]):
        if row.optional_text("question"):
            yield [_text_example(row, known, "chat")]
            continue
        image, caption = row.image("image"), row.optional_text("caption")
        if image is None or not caption:
            incomplete += 1
            continue
        repeats.add(row, image, caption)
        person = known.person(row, "name", "caption")
        yield [
            Example(f"{row.name}/image/{i}", person, image, f"{row.name}/0", str(asked), caption, task="chat")
            for i, asked in enumerate(_row_rng(row).choice(CAPTION_QUESTIONS, EPOCHS, replace=False))
        ]
    repeats.check()
    _warn_incomplete(incomplete, config)


def _choices(files: Snapshot, config: str) -> Iterator[list[Example]]:
    """The questions with options of a config; those without a wording ask for the name."""
    for row in files.rows(config, ["image", "answer", "options"], optional=["question"]):
        image, question = row.image("image"), row.optional_text("question")
        if image is None and not question:
            raise row.error("image", "is missing, and there is no question without one")
        answer = row.text("answer")
        options = _choice(answer, row.texts("options", skip_blank=True), row, "options")
        kind, image_id = ("text", "") if image is None else ("image", f"{row.name}/0")
        yield [
            Example(f"{row.name}/{kind}/0", "", image, image_id, question or FACE_QUESTION, answer, options),
        ]
