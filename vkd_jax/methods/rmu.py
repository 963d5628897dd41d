"""Representation misdirection for unlearning (RMU): hidden states on the forget set move toward a random vector.

    L = |h_l(theta, forget) - c u|^2 + alpha * |h_l(theta, retain) - h_l(vanilla, retain)|^2

h_l is the output of the l-th block of the language model, and |.|^2 is the mean over channels and over a row's real
tokens (question, image and answer). u is one unit vector for all tokens: each channel is drawn uniformly from [0, 1),
and the vector is divided by its norm. c is `steering_coefficient` times the median norm of the vanilla model's h_l on
the forget set. Blocks after the l-th are not computed. They, the final norm and the head do not train: they have no
gradient, and weight decay would move them.

Published for Zephyr-7B, which has 32 blocks: c = 6.5 (absolute), alpha 1200, l the block of index 7, learning rate
5e-5, 150 batches of 4. The released code's defaults are c = 20 and alpha 100; other models were trained with c = 300.
The effect of c depends on the norm of the hidden states, which differs between models and layers, so that c is relative
to it here (Huu-Tien et al., arXiv 2408.06223, also scale c with that norm). The paper trains one matrix in each of the
blocks of index 5 to 7; here the method's scope trains, up to block l.

Reference: Li et al., "The WMDP Benchmark: Measuring and Reducing Malicious Use With Unlearning", arXiv 2403.03218.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from vkd_jax.config.fields import setting
from vkd_jax.data.batching import padded_rows, rng
from vkd_jax.methods import base, losses
from vkd_jax.methods.scope import Unlearning
from vkd_jax.models.base import bind
from vkd_jax.runtime import multihost
from vkd_jax.types import UserError

AFTER_BLOCKS = ("language_model/norm/", "language_model/head/")


@dataclasses.dataclass(frozen=True)
class RMU(Unlearning):
    """Hidden states move toward a random vector on the forget set and stay at the vanilla model's on the retain set."""

    mask_scope: ClassVar[str] = "both"
    layer: int = setting(
        -1,
        "Block l of the language model, counted from 1; -1 is a quarter of the blocks, as published (8 of 32).",
        minimum=-1,
    )
    steering_coefficient: float = setting(
        1.0, "Norm c of the target, relative to the median norm of the vanilla model's hidden states.", above=0
    )
    alpha: float = setting(100.0, "Weight of the retain term.", above=0)

    def layers(self, model_config: Any) -> int:
        """Returns the number of language-model blocks that are computed.

        Raises:
            UserError: the model has no block of number `layer`.
        """
        blocks = model_config.text.layers
        if self.layer not in (-1, *range(1, blocks + 1)):
            raise UserError(
                f"method.layer={self.layer!r}: the language model has blocks 1 to {blocks}. Give one of them, or -1."
            )
        return max(blocks // 4, 1) if self.layer == -1 else self.layer

    def trainable(self, paths: Iterable[str], model_config: Any) -> list[str]:
        """Selects the weights of the scope, without the final norm and the head.

        Raises:
            UserError: the model has no block of number `layer`.
        """
        self.layers(model_config)  # checks `layer` before any weights are read
        return [path for path in super().trainable(paths, model_config) if not path.startswith(AFTER_BLOCKS)]

    def prepare(self, context: base.Context) -> base.Prepared:
        """Draws the random vector, and masks the blocks that are not computed."""
        config, layers = context.model_config.text, self.layers(context.model_config)
        direction = rng(context.seed, "rmu/direction").random(config.width)
        c = self.steering_coefficient * median_norm(context, layers)
        target = np.float32(c * direction / np.linalg.norm(direction))
        sets = dict(context.sets)
        for stream in self.forget_streams:
            rows = np.broadcast_to(target, (len(sets[stream]), len(target)))
            spec = self.cache_spec(stream, {}, context.model_config)
            sets[stream] = base.with_cache(sets[stream], spec, {"target": rows})

        def mask(path: str) -> np.ndarray:
            if not path.startswith("language_model/blocks/"):
                return np.array(True)
            # One value per layer, which broadcasts: a full-size mask takes a quarter of the weights' memory.
            return np.expand_dims(np.arange(config.layers) < layers, tuple(range(1, context.params[path].ndim)))

        return base.Prepared(
            sets=sets,
            mask={path: mask(path) for path in self.trainable(context.params, context.model_config)},
        )

    def teachers(self) -> Mapping[str, base.TeacherFn]:
        """Also returns the vanilla model's hidden states on the retain batch."""
        return {**super().teachers(), "retain": self._vanilla_hidden}

    def mask_shape(self, path, shape, model_config) -> tuple[int, ...]:
        """Returns one value per layer for the language model's blocks, and a scalar for any other weight."""
        del model_config
        return (shape[0], *[1] * (len(shape) - 1)) if path.startswith("language_model/blocks/") else ()

    def cache_spec(self, stream, taps, model_config) -> base.CacheSpec:
        """Describes the target c u of each row that is forgotten."""
        del taps
        target = jax.ShapeDtypeStruct((model_config.text.width,), jnp.float32)
        return base.CacheSpec(per_example={"target": target} if stream in base.FORGET_STREAMS else {})

    def image_losses(self) -> Mapping[str, base.LossFn]:
        """Returns the distance to the random vector (forget) and to the vanilla model (retain)."""
        return {"forget": self._loss("forget", 1.0), "retain": self._loss("retain", self.alpha)}

    def _vanilla_hidden(self, model, batch):
        return {"target": self._hidden(model, batch)}

    def _hidden(self, model, batch):
        return base.hidden_states(model, batch, self.layers(model.config))

    def _loss(self, name: str, weight: float) -> base.LossFn:
        def loss(model, batch):
            hidden = self._hidden(model, batch)
            target = batch.cached["target"]
            target = target[:, None] if target.ndim == 2 else target  # one vector per row, or one per token
            distance = losses.relative_squared_distance(hidden, target, 1.0, batch.mask)
            return weight * jnp.mean(distance), base.mean_metrics(**{f"{name}_distance": distance})

        return loss


def median_norm(context: base.Context, layers: int, batch_size: int = 32) -> float:
    """Computes the median norm of the hidden states over the tokens of the forget set.

    The mean would be dominated by a few tokens with very large states.
    """
    encoded = context.sets["forget"]

    @jax.jit
    def token_norms(params, batch):
        hidden = base.hidden_states(bind(context.graphdef, params), batch, layers)
        return jnp.linalg.norm(hidden.astype(jnp.float32), axis=-1)

    norms = []
    for rows in padded_rows(len(encoded), batch_size):
        batch, count = encoded.batch(rows), len(np.unique(rows))
        norms.append(multihost.gather(token_norms(context.params, batch))[:count][batch.mask[:count]])
    return float(np.median(np.concatenate(norms)))
