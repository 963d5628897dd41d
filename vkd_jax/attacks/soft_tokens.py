"""Soft tokens: learned embeddings beside the tokens of each image, with all weights frozen.

The language model reads k learned vectors S before the features of the image, in place of k more image tokens:

    min_S mean CE(answer | S, features(image), question)    over the attacker's share of the forget questions

by Adam at a constant rate. S has k * width numbers, is the same for every image, and no weight changes, so it holds few
facts of its own: correct answers to other questions come from the weights. S starts at the mean of the features
plus noise of their standard deviation.

References: visual prompt recovery (ForgetGate) learns ten such tokens for vision transformers. The embedding-space
attack of Schwinn et al., arXiv 2402.09063, learns a suffix for each question from its own answer, so that it is scored
on what it was given.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging

from vkd_jax.attacks import base
from vkd_jax.attacks.base import Records, Subject
from vkd_jax.attacks.finetuning import rows_of
from vkd_jax.attacks.lessons import Lesson, labeled, lessons, recoveries
from vkd_jax.config.fields import Section, setting
from vkd_jax.config.schema import RunConfig
from vkd_jax.data.batching import rng
from vkd_jax.data.encoding import Batch, EncodedSet
from vkd_jax.data.sampler import Sampler
from vkd_jax.evaluation.encoded_images import with_soft_tokens
from vkd_jax.evaluation.inference import Answerer
from vkd_jax.methods import losses
from vkd_jax.methods.base import logits_of_features
from vkd_jax.models.base import VisualTokens, bind
from vkd_jax.results import UNCHANGED, AttackCell
from vkd_jax.runtime import finite, multihost
from vkd_jax.runtime.mesh import replicated, shard_rows, shards
from vkd_jax.types import Params, Role

ATTACKER = "soft_tokens"


@dataclasses.dataclass(frozen=True)
class SoftTokens(Section):
    """Learned embeddings before the features of each image; no weight changes."""

    SECTION: ClassVar[str] = "attacks.soft_tokens"
    tokens: int = setting(8, "Number of embeddings.", minimum=1, maximum=4096)
    shares: tuple[float, ...] = setting(
        (0.2,), "Shares of the forget questions with an image that are trained on.", above=0, below=1
    )
    people: tuple[float, ...] = setting(
        (0.5,),
        "Shares of the people to forget whose questions are all trained on; the other people are asked about.",
        above=0,
        below=1,
    )
    steps: int = setting(100, "Training steps of each attempt.", minimum=1, maximum=10**8)
    batch_size: int = setting(16, "Examples per step, rounded up to a multiple of the devices.", minimum=1)
    learning_rate: float = setting(1e-2, "Constant learning rate.", above=0, maximum=1e3)

    TITLE: ClassVar[str] = "Soft tokens: learned embeddings beside the image"
    ABOUT: ClassVar[str] = (
        "An attacker changes no weight and learns a few embeddings, which the language model reads before the features "
        "of every image, from a share of the questions about the people to forget. The model is then asked the *other* "
        "questions, or those about the *other* people, with the same embeddings. Compare the accuracy with that of the "
        "retain-only model with embeddings of its own."
    )
    METRIC: ClassVar[str] = "accuracy"
    VARIANTS: ClassVar[Mapping[str, str]] = {UNCHANGED: "without soft tokens"}

    def check(self, config: RunConfig) -> None:
        """All valid settings can run."""

    def run(self, subject: Subject) -> Records:
        """The answers without the embeddings and with those of each lesson."""
        sets = base.questions(subject, Role.FORGET, Role.FORGET_HOLDOUT)
        records = [base.attack_record(UNCHANGED, r) for r in subject.unattacked(sets)]
        encoded = self.encode(subject)  # one shape for all lessons
        for lesson in lessons(subject.forgets, subject.seed, questions=self.shares, people=self.people):
            learned = self.learn(subject, rows_of(encoded, lesson.rows))
            answers = subject.ask_sets(subject.model, sets, soft_tokens=learned)
            records += self._records(subject, answers, lesson)
        return records

    def summarize(self, records: Mapping[str, Records]) -> list[AttackCell]:
        """The accuracy with the embeddings of each lesson, and the recovery."""
        return recoveries(records)

    def _records(self, subject: Subject, answers: Records, lesson: Lesson) -> Records:
        fields = dict(attacker=ATTACKER, steps=self.steps, batch_size=self.batch_size, share=lesson.share)
        rate = dict(learning_rate=self.learning_rate, unit=lesson.unit)
        records = labeled(subject, answers, lesson.rows, lesson.people, **fields, **rate)
        others = [r["correct"] for r in records if not r["taught"] and not r["trained_on"]]
        share = f"{100 * lesson.share:g} % of the {lesson.unit}"
        logging.info(
            "%s, soft tokens from %s: accuracy %.3f (n=%d)", subject.name, share, np.mean(others or [0]), len(others)
        )
        return records

    def encode(self, subject: Subject) -> EncodedSet:
        """The forget questions with room for the embeddings, and the features of their images."""
        model = dataclasses.replace(subject.model, processor=subject.model.processor.with_soft_tokens(self.tokens))
        encoded = model.encode(subject.forgets)
        images = {e.image_id: e.image for e in subject.forgets}  # in the order of `encoded.images`
        answerer = Answerer(subject.model, batch_size=subject.config.eval.batch_size)
        features = answerer.encode_images(list(images.values()), list(images)).features
        return dataclasses.replace(encoded, per_image={"values": features.values, "coords": features.coords})

    def learn(self, subject: Subject, encoded: EncodedSet) -> np.ndarray:
        """Learns the embeddings from some rows of `encode`: float32 [tokens, width].

        Raises:
            NotFinite: training diverged.
            UserError: no embedding changed, so that nothing was attacked.
        """
        mesh = subject.model.mesh
        multiple = 1 if mesh is None else shards(mesh)
        rows = -(-self.batch_size // multiple) * multiple
        sampler = Sampler(encoded, rows, seed=subject.seed, name=ATTACKER)
        shown = np.unique(encoded.image_rows)
        features = VisualTokens(*(encoded.per_image[name][shown] for name in ("values", "coords")))
        valid = features.values[features.valid].astype(np.float32)
        noise = rng(subject.seed, ATTACKER).standard_normal((self.tokens, valid.shape[-1]))
        state = initial(jnp.asarray(valid.mean(0) + noise * valid.std(0), jnp.float32))
        start = multihost.gather(state[0])
        for number in range(self.steps):
            batch = dataclasses.replace(sampler[number], images=None)
            if mesh is not None:
                # The state is put anew in each step: another sharding than before would compile the program again.
                batch, state = shard_rows(mesh, batch), jax.device_put(state, replicated(mesh))
            state = step(subject.model.graphdef, subject.model.params, state, batch, self.learning_rate)
        learned = multihost.gather(state[0])
        finite.check(learned, "The embeddings of attacks.soft_tokens")
        if np.array_equal(learned, start):
            raise self.error(
                "learning_rate",
                f"{self.steps} steps at {self.learning_rate:g} changed no embedding, so that nothing was attacked. "
                "Give a larger rate.",
            )
        return learned


def initial(soft_tokens: jax.Array) -> tuple[jax.Array, optax.OptState]:
    """The state before the first step: the embeddings, and the state of Adam."""
    return soft_tokens, optax.scale_by_adam().init(soft_tokens)


@functools.partial(jax.jit, static_argnums=0)
def step(
    graphdef: Any, params: Params, state: tuple[jax.Array, optax.OptState], batch: Batch, rate: float
) -> tuple[jax.Array, optax.OptState]:
    """One step of Adam on the embeddings; the cached features of a batch are those of its images."""
    soft_tokens, opt_state = state
    grads = jax.grad(loss)(soft_tokens, graphdef, params, batch)
    updates, opt_state = optax.scale_by_adam().update(grads, opt_state)
    return soft_tokens - rate * updates, opt_state


def loss(soft_tokens: jax.Array, graphdef: Any, params: Params, batch: Batch) -> jax.Array:
    """The mean cross-entropy of the answers with the embeddings before the features of each image: scalar."""
    features = VisualTokens(batch.cached["values"], batch.cached["coords"])
    logits = logits_of_features(bind(graphdef, params), batch, with_soft_tokens(features, soft_tokens))
    return jnp.mean(losses.answer_cross_entropy(logits, batch.targets, batch.target_mask))
