"""A stream of the people of earlier requests, so that training on new people does not recover them.

    L_replay = weight * (max(0, c_i - CE(theta; x_i, q_i, y_i)) + D(h(theta, x_i), t_i))

x_i are cached features: the output of the last vision block that never trains, from which the rest of the model
computes exactly what it would compute from the image. c_i is the answer's cross-entropy, and t_i the output h of the
projector, both cached under the model that the person's own request produced. The first term is positive only if an
answer becomes more likely again, and the second one penalizes changes of the projected features. D is the mean squared
error relative to the mean square of t_i.

Retained people also have a fixed reference: the teacher of the retain set is the model before the first request, not
the one before this request (`Context.vanilla_params`).

The stream trains on no image. The cached features are personal data nevertheless: see `vkd_jax.runs.features`.
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp

from vkd_jax.config.fields import Section, setting
from vkd_jax.methods import base, losses
from vkd_jax.models.base import VisualTokens

STREAM = "earlier"
TAP = "projector"  # whose features are kept
HIDDEN = "vision/"  # prefix of the name of the cached input, which `base.encode_images` reads


@dataclasses.dataclass(frozen=True)
class Replay(Section):
    """Cached features of people whom earlier requests have forgotten, as a further training stream."""

    SECTION: ClassVar[str] = "method.replay"

    weight: float = setting(0.0, "Weight of the loss on people of earlier requests; 0 trains without them.", minimum=0)
    copies: int = setting(4, "Augmented copies of each image whose features are cached beside the image's.", minimum=0)

    def losses(self) -> Mapping[str, base.LossFn]:
        """Returns the loss of the stream, or {} without it."""
        return {STREAM: self._loss} if self.weight else {}

    def _loss(self, model, batch):
        features, taps = base.encode_images(model, batch)
        cached, projected = batch.cached, taps[TAP]
        distance = losses.relative_squared_distance(
            projected.values, cached["target"], cached["scale"], projected.valid
        )
        logits = base.logits_of_features(model, batch, features)
        ce = losses.answer_cross_entropy(logits, batch.targets, batch.target_mask)
        loss = self.weight * (jnp.maximum(cached["ce"] - ce, 0.0) + distance)
        return jnp.mean(loss), base.mean_metrics(earlier_ce=ce, earlier_distance=distance)


def cache_spec(taps: Mapping[str, VisualTokens]) -> base.CacheSpec:
    """Describes the arrays that the loss reads, beside the output of a vision block; see `Method.cache_spec`."""
    target = taps[TAP].values
    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    return base.CacheSpec(
        {"target": jax.ShapeDtypeStruct(target.shape[1:], target.dtype), "scale": scalar}, {"ce": scalar}
    )
