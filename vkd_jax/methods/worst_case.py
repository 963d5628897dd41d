"""Worst-case forgetting: the forget loss is also evaluated at the weights that a relearning attacker would reach.

    theta_0     = theta
    theta_{k+1} = theta_k - (radius / K) d(grad A(theta_k)),   k < K
    g_forget    = grad L_f(theta) + weight * grad L_f(theta_K)

A is the loss that an attacker minimizes (`Unlearning.attack_loss`), by default the cross-entropy of the forget batch.
d(g) is sign(g), whose steps resemble Adam's, or g / |g|. theta_K is treated as a constant: the gradient is first-order,
as in sharpness-aware minimization. Training thus minimizes the forget loss both at theta and where an attacker's first
steps lead. Each training step costs K + 1 further passes over the forget batch, and none over the other streams.

Reference: Foret et al., "Sharpness-Aware Minimization for Efficiently Improving Generalization", arXiv 2010.01412; Fan
et al., "Towards LLM Unlearning Resilient to Relearning Attacks", arXiv 2502.05374, take the same step for language
models.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax

from vkd_jax.config.fields import Section, setting
from vkd_jax.data.encoding import Batch
from vkd_jax.types import Params

DIRECTIONS = ("sign", "gradient")
TRAINED = "trained"  # the attacker moves the weights that the method trains


@dataclasses.dataclass(frozen=True)
class WorstCase(Section):
    """Worst-case forgetting: the forget loss is also taken where a simulated attacker would move the weights."""

    SECTION: ClassVar[str] = "method.worst_case"

    radius: float = setting(
        0.0,
        "How far the simulated attacker moves: the change of each weight with direction=sign, the norm of the change "
        "with direction=gradient. 0 trains without worst-case forgetting.",
        minimum=0,
    )
    steps: int = setting(
        1, "Steps K of the simulated attacker, each with one more pass over the forget batch.", minimum=1
    )
    direction: str = setting(
        "sign",
        "Direction of a step: the sign of the gradient, or the gradient divided by its norm.",
        choices=DIRECTIONS,
    )
    weight: float = setting(1.0, "Weight of the forget loss at the attacked weights.", above=0)
    moves: str = setting(
        TRAINED,
        "Weights that the simulated attacker moves: those that train, or a scope as for method.train.",
        choices=(TRAINED, "all", "visual", "lora", "visual+lora"),
    )


@dataclasses.dataclass(frozen=True)
class Adversary:
    """The simulated attacker of one method and model."""

    settings: WorstCase
    loss: Callable[[Any, Batch], jax.Array]  # A: (model, batch) -> scalar
    paths: tuple[str, ...]  # the weights that it moves, trainable or frozen

    def attack(self, weights: Params, gradient: Callable[[Params], Params]) -> Params:
        """Computes theta_K, the weights after the attack.

        Args:
            weights: the weights of `paths`; each keeps its dtype.
            gradient: the gradient of `loss` with respect to them.
        """
        length = self.settings.radius / self.settings.steps

        def move(theta: Params, _: None) -> tuple[Params, None]:
            direction = self._direction(gradient(theta))
            return jax.tree.map(lambda x, d: (x - length * d).astype(x.dtype), theta, direction), None

        return jax.lax.scan(move, weights, length=self.settings.steps)[0]

    def _direction(self, gradient: Params) -> Params:
        if self.settings.direction == "sign":
            return jax.tree.map(jnp.sign, gradient)
        norm = optax.tree.norm(gradient)
        scale = jnp.where(norm > 0, 1 / jnp.where(norm > 0, norm, 1), 0)  # a gradient of zero has no direction
        return jax.tree.map(lambda g: scale * g, gradient)
