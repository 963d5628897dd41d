"""Streams of text-only questions: one retains text knowledge while the language model trains, the other forgets it.

    L_text        = weight * CE(answer | question)     or     weight * KL(vanilla || theta)(answer | question)
    L_forget_text = weight * L_forget(answer | question)

The questions of the first are about the people of the forget set and of the retain set: visual unlearning removes who
is in an image, but not what the model says about a person who is named. KL is averaged over the answer tokens; the
vanilla model's distributions are computed at each step.

With `data.forgets=both` the people are forgotten in both modalities. The questions about the people to forget
then leave the first stream for the second, whose loss is that of the method on its forget set: bounded ascent for
methods that ascend, NPO, a refusal, or the distance to RMU's random vector. VKD has its forget loss of the output
there, because a question without an image has no features to distill. Bounds of the ascent that come from other images
do not apply, so that each row ends at `cap`.
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax.numpy as jnp

from vkd_jax.config.fields import Section, setting
from vkd_jax.methods import base, losses

STREAM = "text"
FORGET_STREAM = "forget_text"
TEXT_STREAMS = (STREAM, FORGET_STREAM)  # whose questions have no image
LOSSES = ("ce", "kl")


@dataclasses.dataclass(frozen=True)
class TextStream(Section):
    """Text-only questions as a further training stream."""

    SECTION: ClassVar[str] = "method.text"

    weight: float = setting(0.0, "Weight of the loss on text-only questions; 0 trains without them.", minimum=0)
    loss: str = setting("ce", "Cross-entropy of the answers, or KL divergence from the vanilla model.", choices=LOSSES)

    def losses(self) -> Mapping[str, base.LossFn]:
        """Returns the loss of the stream, or {} without it."""
        return {STREAM: self._loss} if self.weight else {}

    def teachers(self) -> Mapping[str, base.TeacherFn]:
        """Returns the vanilla model's logits, if the loss compares with them."""
        return {STREAM: base.vanilla_logits} if self.weight and self.loss == "kl" else {}

    def _loss(self, model, batch):
        logits, _ = base.answer_logits(model, batch)
        ce = losses.answer_cross_entropy(logits, batch.targets, batch.target_mask)
        metrics, loss = dict(text_ce=ce), ce
        if self.loss == "kl":
            loss = losses.kl_divergence(batch.cached["vanilla"], logits, batch.target_mask)
            metrics["text_kl"] = loss
        return self.weight * jnp.mean(loss), base.mean_metrics(**metrics)


@dataclasses.dataclass(frozen=True)
class ForgetText(Section):
    """Text-only questions about the people to forget as a further stream that is forgotten."""

    SECTION: ClassVar[str] = "method.forget_text"

    weight: float = setting(
        0.0,
        "Weight of the method's forget loss on text-only questions about the people to forget, for data.forgets=both; "
        "0 trains without them.",
        minimum=0,
    )

    def losses(self, loss: base.LossFn) -> Mapping[str, base.LossFn]:
        """Returns the weighted loss of the stream.

        Args:
            loss: the forget loss of the method.
        """

        def weighted(model, batch):
            value, metrics = loss(model, batch)
            return self.weight * value, {f"text_{name}": metric for name, metric in metrics.items()}

        return {FORGET_STREAM: weighted}
