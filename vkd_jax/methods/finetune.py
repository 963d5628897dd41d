"""Supervised fine-tuning: how a base model becomes the vanilla one, and what a relearning attacker does."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp

from vkd_jax.methods import base
from vkd_jax.types import UserError

TRAIN = ("all", "visual", "lora")


@dataclasses.dataclass(frozen=True)
class Finetune:
    """CE(answer | question, picture) + weight_text * CE(answer | question), answer tokens only."""

    train: str = "all"  # all | visual | lora: adapters on every kernel of the language model's blocks, nothing else
    blocks: int = -1  # with "visual": how many of the last vision blocks, -1 for the whole tower
    weight_text: float = 1.0
    lora_rank: int = 16
    lora_alpha: float = 16.0  # the adapters' output is scaled by lora_alpha / lora_rank
    lora_dropout: float = 0.05  # the share of an adapter's inputs that is dropped at each step
    mask_scope: str = "none"

    def __post_init__(self):
        rank, alpha, dropout = self.lora_rank, self.lora_alpha, self.lora_dropout
        if self.train not in TRAIN:
            raise UserError(f"method.train={self.train!r}: give one of {', '.join(TRAIN)}.")
        if not isinstance(rank, int) or rank < 1:
            raise UserError(f"method.lora_rank={rank!r}: give a whole number from 1.")
        if not 0 < alpha < math.inf:
            raise UserError(f"method.lora_alpha={alpha!r}: give a positive number.")
        if not 0 <= dropout < 1:
            raise UserError(f"method.lora_dropout={dropout!r}: give a share from 0 to below 1.")

    def trainable(self, paths: Iterable[str], model_config: Any) -> list[str]:
        """All weights, the visual ones, or the adapters."""
        return base.trainable_paths(paths, model_config, self.train, self.blocks)

    def prepare(self, context: base.Context) -> base.Prepared:
        """Nothing to prepare."""
        return base.Prepared(sets=context.sets)

    def losses(self) -> Mapping[str, base.LossFn]:
        """Questions with a picture and text-only questions are two streams, each of its own fixed shape.

        The loop takes those of them that have examples.
        """
        return {"image": self._loss("image", 1.0), "text": self._loss("text", self.weight_text)}

    def _loss(self, name: str, weight: float) -> base.LossFn:
        def loss(model, batch):
            ce = jnp.mean(base.cross_entropy(model, batch))
            return weight * ce, {f"{name}_ce": ce}

        return loss
