"""Data types that flow between the packages, and the one error that users are meant to read."""

import dataclasses
import enum
from collections.abc import Mapping

import jax
import numpy as np

Array = jax.Array | np.ndarray
Params = Mapping[str, jax.Array]  # {"vision_tower/blocks/0/attn/q/kernel": array, ...}


class UserError(Exception):
    """Bad input, told in one sentence that says what is wrong and what to do; exit status 2."""


@dataclasses.dataclass(frozen=True)
class Example:
    """One question with its answer, before any tokenizer or image processor has seen it."""

    id: str  # unique within a set, e.g. "007/image/2"
    person: str  # whose knowledge it asks for; "" for questions about nobody
    image: bytes | None  # an encoded picture (PNG, JPEG, ...); None for a text-only question
    image_id: str  # names the picture, since several questions share one; "" without a picture
    question: str
    answer: str
    options: tuple[str, ...] = ()  # the option texts of a classification question, `answer` among them
    task: str = "classification"  # classification | generation | cloze | chat
    paraphrase: str = ""  # the answer in other words, where a benchmark has it
    perturbed: tuple[str, ...] = ()  # wrong answers in the same words, where a benchmark has them

    @property
    def modality(self) -> str:
        """`vqa` when the question shows a picture, `qa` when it is text alone."""
        return "qa" if self.image is None else "vqa"


class Role(enum.StrEnum):
    """What an evaluation set measures. Forgetting, tuning, tables and attacks ask for roles, never for set names."""

    FORGET = "forget"  # the people to forget, on the images that unlearning trains on
    FORGET_HOLDOUT = "forget_holdout"  # the people to forget, on images that unlearning does not see
    RETAIN = "retain"  # the people to retain, on the images that unlearning trains on
    RETAIN_HOLDOUT = "retain_holdout"  # the people to retain, on other images
    GENERAL = "general"  # general ability, nothing about these people

    @property
    def forgets(self) -> bool:
        """Whether the set asks about the people to forget."""
        return self in (Role.FORGET, Role.FORGET_HOLDOUT)


@dataclasses.dataclass(frozen=True)
class EvalSet:
    """One evaluation set of a benchmark.

    Args:
        name: the key of the set in results.json and in the answers, e.g. "retain_test".
        role: what the set measures; one of `Role`.
        title: name in the report, e.g. "people to retain, other images".
        short: name in tables and charts, e.g. "retain test".

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

    def __post_init__(self):
        object.__setattr__(self, "role", Role(self.role))
