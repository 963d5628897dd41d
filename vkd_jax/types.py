"""Data types that packages exchange, and the error that users see."""

import contextlib
import dataclasses
import enum
import hashlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from vkd_jax import messages

Array = jax.Array | np.ndarray
Params = Mapping[str, jax.Array]  # {"vision_tower/blocks/0/attn/q/kernel": array, ...}


class UserError(Exception):
    """Invalid input. The message says what is wrong and what to do; commands exit with status 2.

    `str` of the error is one line without control characters, see `messages.sentence`; `message` is the whole message.
    """

    @property
    def message(self) -> str:
        """The message as it was given, of any length."""
        return super().__str__()

    def __str__(self) -> str:
        return messages.sentence(self.message)

    def at(self, location: str) -> "UserError":
        """The same error with a location before its message; see `located`."""
        return type(self)(f"{location}: {self.message}")


class Missing(UserError):
    """Data or a model that the config names is not there, or not any longer."""


class NotFinite(UserError):
    """Weights, features or scores of a model are not finite, too large or all equal: no figure is made of them."""


@contextlib.contextmanager
def located(location: str) -> Iterator[None]:
    """Context manager that puts a row, a file or a flag before the message of a `UserError`.

    Example:
        >>> with located("--config.eval.prompts"):
        ...     raise UserError("there is no file prompts.json.")
        Traceback (most recent call last):
        vkd_jax.types.UserError: --config.eval.prompts: there is no file prompts.json.
    """
    try:
        yield
    except UserError as error:
        raise error.at(location) from error


PATH = (str, os.PathLike)  # the types of a path; see `check_argument`


def check_argument(name: str, value: Any, kinds: type | tuple[type, ...], expected: str) -> None:
    """Checks the type of an argument of a public function. A Boolean is no number.

    Args:
        name: name of the argument.
        value: what was given.
        kinds: the allowed types.
        expected: the allowed values in words.

    Raises:
        UserError: the argument has another type.

    Example:
        >>> check_argument("question", None, str, "a text")
        Traceback (most recent call last):
        vkd_jax.types.UserError: question: None is not allowed. Give a text.
    """
    if not isinstance(value, kinds) or isinstance(value, bool):
        kind = "" if value is None else f" of type {type(value).__name__}"
        raise UserError(f"{name}: {repr(value):.60}{kind} is not allowed. Give {expected}.")


class Diverged(Exception):
    """Training made a loss or a weight NaN or infinite; commands exit with status 1."""


@dataclasses.dataclass(frozen=True)
class Example:
    """One question with its answer, before tokenization and image processing."""

    id: str  # unique within a set, e.g. "007/image/2"
    person: str  # the person that it is about; "" for no person
    image: bytes | None  # encoded image (PNG, JPEG, ...); None for a text-only question
    image_id: str  # identifies the image, which several questions may share; "" without an image
    question: str
    answer: str
    options: tuple[str, ...] = ()  # option texts of a classification question, including `answer`
    task: str = "classification"  # classification | generation | cloze | chat | suite
    paraphrase: str = ""  # paraphrased answer, if the benchmark has one
    perturbed: tuple[str, ...] = ()  # wrong answers with the same wording, if the benchmark has them
    keywords: tuple[str, ...] = ()  # phrases that a right open answer contains, if the benchmark has them
    pair: str = ""  # the fact, if the set asks for it twice: with an image and in text alone
    rule: str = ""  # the published rule that judges the answer, such as "fiubench"; see `metrics.base.rule_of`
    # The file and the line in messages, if the id does not name them. It is no part of the data, which may be moved.
    location: str = dataclasses.field(default="", compare=False)

    @property
    def label(self) -> str:
        """The question in messages: its file and line or its id, and the beginning of its text to search for."""
        text = self.question if len(self.question) <= 40 else f"{self.question[:40]}..."
        return f"{self.location or f'row {self.id}'} ({text!r})"

    @property
    def fields(self) -> dict[str, Any]:
        """The fields that are data, by name; `image` as bytes."""
        return {name: value for name, value in vars(self).items() if name != "location"}

    @property
    def modality(self) -> str:
        """`vqa` for a question with an image, `qa` for a text-only question."""
        return "qa" if self.image is None else "vqa"


@dataclasses.dataclass(frozen=True)
class SuiteQuestion(Example):
    """A question of a standard suite of general ability, with what the suite's own scoring needs.

    The question is the whole prompt. The options are texts; their letters are in the prompt.
    """

    suite: str = ""  # a key of `registry.SUITES`
    group: str = ""  # questions of one group, such as those about one image, are drawn and resampled together
    category: str = ""  # the suite's category of the question
    references: tuple[str, ...] = ()  # the answers of several people
    rotation: int = 0  # 0 for the question itself; 1, 2, ... for its copies with the options in another order


def person_digest(person: str) -> str:
    """The SHA-256 of what the data calls a person: cards, certificates and ledgers name nobody."""
    return hashlib.sha256(person.encode()).hexdigest()


class Role(enum.StrEnum):
    """What an evaluation set measures. Metrics, tuning, tables and attacks ask for roles, never for set names."""

    FORGET = "forget"  # the people to forget, on the images that unlearning trains on
    FORGET_HOLDOUT = "forget_holdout"  # the people to forget, on images that unlearning does not see
    RETAIN = "retain"  # the people to retain, on the images that unlearning trains on
    RETAIN_HOLDOUT = "retain_holdout"  # the people to retain, on other images
    RETAIN_FACTS = "retain_facts"  # what must stay known about the people to forget
    GENERAL = "general"  # general ability, nothing about these people

    @property
    def forgets(self) -> bool:
        """Whether the set asks for what is to be forgotten."""
        return self in (Role.FORGET, Role.FORGET_HOLDOUT)


@dataclasses.dataclass(frozen=True)
class EvalSet:
    """One evaluation set of a benchmark.

    Args:
        name: the key of the set in results.json and in the answers, e.g. "retain_test".
        role: what the set measures; one of `Role`.
        title: name in the report, e.g. "people to retain, other images".
        short: name in tables and plots, e.g. "retain test".
        text_role: what its text-only questions measure; None for the role of the set, except that a set of people to
            forget keeps what is known of them in text. `benchmarks.eval_sets` sets it.

    Raises:
        ValueError: the role is unknown.

    Example:
        >>> EvalSet("test", "forget_holdout", "people to forget, other images", "test").role.forgets
        True
    """

    name: str
    role: Role
    title: str
    short: str
    text_role: Role | None = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self):
        object.__setattr__(self, "role", Role(self.role))

    def role_of(self, kind: str) -> Role:
        """What the questions of one kind measure.

        Args:
            kind: a kind of question, such as "vqa" or "generation_qa" (see `metrics.summary.by_kind`).

        Example:
            >>> EvalSet("forget", "forget", "people to forget", "forget").role_of("cloze_qa")
            <Role.RETAIN_FACTS: 'retain_facts'>
        """
        if "vqa" in kind:
            return self.role
        return self.text_role or (Role.RETAIN_FACTS if self.role.forgets else self.role)
