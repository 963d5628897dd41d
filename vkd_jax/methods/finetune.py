"""Supervised fine-tuning: how a base model becomes the vanilla one, and what a relearning attacker does."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp

from vkd_jax.methods import base


@dataclasses.dataclass(frozen=True)
class Finetune:
    """CE(answer | question, picture) + weight_text * CE(answer | question), answer tokens only."""

    train: str = "all"
    blocks: int = -1
    weight_text: float = 1.0
    mask_scope: str = "none"

    def trainable(self, paths: Iterable[str], model_config: Any) -> list[str]:
        """All weights, or the visual ones."""
        return base.trainable_paths(paths, model_config, self.train, self.blocks)

    def prepare(self, context: base.Context) -> base.Prepared:
        """Nothing to prepare."""
        return base.Prepared(sets=context.sets)

    def losses(self) -> Mapping[str, base.LossFn]:
        """Questions with a picture and text-only questions are two streams, each of its own fixed shape."""
        return {"image": self._loss("image", 1.0), "text": self._loss("text", self.weight_text)}

    def _loss(self, name: str, weight: float) -> base.LossFn:
        def loss(model, batch):
            ce = jnp.mean(base.cross_entropy(model, batch))
            return weight * ce, {f"{name}_ce": ce}

        return loss
