"""Gradient difference, the plainest unlearning that keeps anything.

    L = -min(CE(forget), cap) + weight_retain * CE(retain)

Reference: Liu et al., "Continual Learning and Private Unlearning", arXiv 2203.12817.
"""

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp

from vkd_jax import losses
from vkd_jax.methods import base
from vkd_jax.methods.scope import Scope


@dataclasses.dataclass(frozen=True)
class GradDiff(Scope):
    """Bounded ascent on the forget set, descent on the retain set."""

    weight_forget: float = 1.0
    weight_retain: float = 1.0
    cap: float = 6.0  # nats; ascent stops there

    def prepare(self, context: base.Context) -> base.Prepared:
        """Nothing to prepare."""
        return base.Prepared(sets=context.sets)

    def losses(self) -> Mapping[str, base.LossFn]:
        """One stream ascends, the other descends."""
        return {"forget": self._forget, "retain": self._retain}

    def _forget(self, model, batch):
        ce = base.cross_entropy(model, batch)
        loss = jnp.mean(losses.bounded_ascent(ce, self.cap))
        return self.weight_forget * loss, base.mean_metrics(forget_ce=ce)

    def _retain(self, model, batch):
        ce = base.cross_entropy(model, batch)
        return self.weight_retain * jnp.mean(ce), base.mean_metrics(retain_ce=ce)
