"""Two models that answer the same questions, and a relearning attack on the second one."""

import dataclasses
import io
import queue
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from vkd_jax import ask
from vkd_jax.attacks.base import merged
from vkd_jax.attacks.finetuning import Finetuning, finetune
from vkd_jax.benchmarks.names import plain_name
from vkd_jax.checkpoints.bundle import ModelBundle
from vkd_jax.evaluation.inference import Answerer
from vkd_jax.runtime.mesh import make_mesh
from vkd_jax.types import Example, UserError, check_argument

MOST_STEPS = 100  # of the attack
REPORTS = 10  # answers during an attack, the one before it not counted


@dataclasses.dataclass(frozen=True)
class Answer:
    """An answer by greedy decoding, and its tokens with their probabilities; the last one ends the sequence.

    There are no tokens for an empty answer, and for one that does not fit into the model's context with them.
    """

    text: str
    tokens: tuple[tuple[str, float], ...]


@dataclasses.dataclass(frozen=True)
class Attempt:
    """What the attacked model says after some steps of training, and the probability that it gives the right answer."""

    step: int
    answer: Answer
    right: float


@dataclasses.dataclass(frozen=True)
class Session:
    """The models before and after unlearning."""

    before: Answerer
    after: Answerer

    @classmethod
    def load(cls, before: str | Path, after: str | Path) -> "Session":
        """Loads two models: folders, ids on the hub, or names of shipped models.

        Raises:
            UserError: a model cannot be read.
        """
        return cls(ask.load(before), ask.load(after, mesh=make_mesh()))  # training needs a mesh

    def ask(self, question: str, image: Image.Image | None = None) -> tuple[Answer, Answer]:
        """Asks both models.

        Args:
            question: the question.
            image: the image that it is about; None for a text-only question.

        Raises:
            UserError: there is no question, it is too long for a model, or an argument has another type.
        """
        _check_types(question=question, image=image)
        if not plain_name(question):
            raise UserError("Write a question.")
        return answer(self.before, question, image), answer(self.after, question, image)

    def relearn(self, question: str, right: str, image: Image.Image, steps: int) -> Iterator[Attempt]:
        """Fine-tunes a copy of the model after unlearning on one question, and yields its answers on the way.

        The attacker trains the visual weights with the settings of the relearning attack. The model itself is not
        changed.

        Args:
            question: the question.
            right: the answer to learn.
            image: the image that the question is about.
            steps: number of training steps, at most `MOST_STEPS`.

        Yields:
            The attempts, from step 0 to the last one.

        Raises:
            UserError: there is no question, image or answer, the number of steps is out of range, or an argument has
                another type.
            Diverged: the loss became NaN or infinite.
        """
        _check_types(question=question, right=right, image=image)
        check_argument("steps", steps, (int, np.integer), f"a whole number from 1 to {MOST_STEPS}")
        if image is None or not plain_name(question) or not plain_name(right):
            raise UserError("The attack needs an image, a question and the right answer.")
        if not 1 <= steps <= MOST_STEPS:
            raise UserError(f"steps={steps}: give 1 to {MOST_STEPS}.")
        stream = io.BytesIO()
        image.convert("RGB").save(stream, "PNG")
        example = Example("0", "", stream.getvalue(), "image", question, right)
        bundle = dataclasses.replace(self.after.bundle, params=merged(self.after.bundle.params))
        yield attempt(0, self.after, example, image)
        at = sorted({max(1, round(steps * number / REPORTS)) for number in range(1, REPORTS + 1)})
        yield from _trained(bundle, example, steps, at, image)


def _check_types(image: Image.Image | None, **texts: str) -> None:
    check_argument("image", image, (Image.Image, type(None)), "a PIL image or None")
    for name, text in texts.items():
        check_argument(name, text, str, "a text")


def answer(model: Answerer, question: str, image: Image.Image | None) -> Answer:
    """Asks one model, and scores the tokens of what it writes."""
    encoded = None if image is None else model.encode_images([image])
    (text,) = model.generate([question], encoded)
    if not text:
        return Answer("", ())
    ids = model.processor.encode(question, text, encoded.blank_images(0) if encoded else ())[1]
    try:
        (scores,) = model.score_tokens([question], [text], encoded)
    except UserError:  # the text may have more tokens than were generated, and exceed the model's context
        return Answer(text, ())
    names = [model.processor.tokenizer.decode([number]) for number in ids]
    return Answer(text, tuple(zip(names, np.exp(scores.log_probs).tolist(), strict=True)))


def attempt(step: int, model: Answerer, example: Example, image: Image.Image) -> Attempt:
    """Asks an attacked model the question that it was taught."""
    scores = model.score([example.question], [[example.answer]], model.encode_images([image]))
    return Attempt(step, answer(model, example.question, image), float(np.exp(scores.log_probs[0, 0])))


def _trained(bundle: ModelBundle, example: Example, steps: int, at: list[int], image: Image.Image) -> Iterator[Attempt]:
    """Trains in a thread, and yields the attempt after each of the steps `at`."""
    results: queue.SimpleQueue[Attempt | Exception | None] = queue.SimpleQueue()

    def report(step: int, model: ModelBundle) -> None:
        results.put(attempt(step, Answerer(model, batch_size=1), example, image))

    def train() -> None:
        settings = Finetuning(attackers=("visual",), batch_size=1)
        observers = {step: lambda model, step=step: report(step, model) for step in at}
        try:
            training = settings.training(steps, settings.learning_rate)
            finetune(bundle, "visual", bundle.encode([example]), training, 0, observers)
        except Exception as error:  # raised again where the answers are read
            results.put(error)
        results.put(None)

    threading.Thread(target=train, daemon=True).start()
    while (result := results.get()) is not None:
        if isinstance(result, Exception):
            raise result
        yield result
