"""The data that flows between the parts, and the one error that a user is meant to read."""

import dataclasses
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
