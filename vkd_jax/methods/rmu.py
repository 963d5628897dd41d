"""Representation misdirection: the language model's hidden states are led astray on the forget set.

    L = |h_l(theta, forget) - c u|^2 + alpha * |h_l(theta, retain) - h_l(vanilla, retain)|^2

h_l is what comes out of the l-th block of the language model, and |.|^2 the mean over a row's real tokens (question,
picture and answer) and over channels. u is a unit vector, one for all, drawn uniformly from [0, 1) in each channel and
scaled to length 1. c is `steering_coefficient` times the median length of the vanilla model's h_l on the forget set.
Blocks after the l-th are never run, and they, the final norm and the head keep their bits: they would have no gradient,
yet weight decay would move them.

Published for Zephyr-7B, of 32 blocks: c 6.5 itself, alpha 1200, l the block of index 7, learning rate 5e-5, 150 batches
of 4; the released code's defaults are c 20 and alpha 100, and other models have had c 300. What counts is c beside the
length of the hidden states, of which each model and layer has its own; hence our unit (Huu-Tien et al., arXiv
2408.06223, make c follow that length, too). The paper trains one matrix of each of the blocks of index 5 to 7; what
trains here is the method's scope, up to block l.

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
from vkd_jax.methods.scope import Scope
from vkd_jax.models.base import bind
from vkd_jax.runtime import multihost
from vkd_jax.types import UserError

AFTER_BLOCKS = ("language_model/norm/", "language_model/head/")  # what stands behind the last block


@dataclasses.dataclass(frozen=True)
class RMU(Scope):
    """Towards a random direction on the forget set, towards the vanilla model on the retain set."""

    mask_scope: ClassVar[str] = "both"
    layer: int = setting(
        -1, "Block l of the language model, counted from 1; -1 is a quarter of the blocks, as the published 8th of 32."
    )
    steering_coefficient: float = setting(
        1.0, "Length c of the target, in median lengths of the vanilla model's hidden states.", above=0
    )
    alpha: float = setting(100.0, "Weight of the retain term.", above=0)

    def layers(self, model_config: Any) -> int:
        """How many blocks of the language model are run.

        Raises:
            UserError: the model has no such block.
        """
        blocks = model_config.text.layers
        if self.layer not in (-1, *range(1, blocks + 1)):
            raise UserError(
                f"method.layer={self.layer!r}: the language model has blocks 1 to {blocks}; -1 chooses one."
            )
        return max(blocks // 4, 1) if self.layer == -1 else self.layer

    def trainable(self, paths: Iterable[str], model_config: Any) -> list[str]:
        """The paths of the weights that train: none of what stands behind the blocks."""
        self.layers(model_config)  # asked for early, so that a wrong one is refused early
        return [path for path in super().trainable(paths, model_config) if not path.startswith(AFTER_BLOCKS)]

    def prepare(self, context: base.Context) -> base.Prepared:
        """Draws the direction, and masks the blocks that are not run."""
        forget, config = context.sets["forget"], context.model_config.text
        layers = self.layers(context.model_config)
        direction = rng(context.seed, "rmu/direction").random(config.width)
        c = self.steering_coefficient * median_norm(context, layers)
        target = np.float32(c * direction / np.linalg.norm(direction))
        spec = self.cache_spec("forget", {}, context.model_config)
        forget = base.with_cache(forget, spec, {"target": np.broadcast_to(target, (len(forget), len(target)))})

        def moves(path: str) -> np.ndarray:
            if not path.startswith("language_model/blocks/"):
                return np.array(True)
            # One value a layer, which broadcasts: a mask of full size would take a quarter of the weights' memory.
            return np.expand_dims(np.arange(config.layers) < layers, tuple(range(1, context.params[path].ndim)))

        return base.Prepared(
            sets={**context.sets, "forget": forget},
            mask={path: moves(path) for path in self.trainable(context.params, context.model_config)},
            teachers=self.teachers(),
        )

    def teachers(self) -> Mapping[str, base.TeacherFn]:
        """The vanilla model's hidden states of the retain batch."""
        return {"retain": self._teach}

    def mask_shape(self, path, shape, model_config) -> tuple[int, ...]:
        """One value a layer of the language model, one for any other weight."""
        del model_config
        return (shape[0], *[1] * (len(shape) - 1)) if path.startswith("language_model/blocks/") else ()

    def cache_spec(self, stream, taps, model_config) -> base.CacheSpec:
        """The direction, for each row of the forget set."""
        del taps
        target = jax.ShapeDtypeStruct((model_config.text.width,), jnp.float32)
        return base.CacheSpec(per_example={"target": target}) if stream == "forget" else base.CacheSpec()

    def losses(self) -> Mapping[str, base.LossFn]:
        """One stream is led astray, the other stays where it was."""
        return {"forget": self._loss("forget", 1.0), "retain": self._loss("retain", self.alpha)}

    def _teach(self, model, batch):
        return {"target": self._hidden(model, batch)}

    def _hidden(self, model, batch):
        return base.hidden_states(model, batch, self.layers(model.config))

    def _loss(self, name: str, weight: float) -> base.LossFn:
        def loss(model, batch):
            hidden = self._hidden(model, batch)
            target = batch.cached["target"]
            target = target[:, None] if target.ndim == 2 else target  # one for all tokens, or one for each
            distance = losses.relative_squared_distance(hidden, target, 1.0, batch.mask)
            return weight * jnp.mean(distance), base.mean_metrics(**{f"{name}_distance": distance})

        return loss


def median_norm(context: base.Context, layers: int, batch_size: int = 32) -> float:
    """The median over the forget set's tokens of |h|; a mean would follow the few whose states are huge."""
    encoded = context.sets["forget"]

    @jax.jit
    def lengths(params, batch):
        hidden = base.hidden_states(bind(context.graphdef, params), batch, layers)
        return jnp.linalg.norm(hidden.astype(jnp.float32), axis=-1)

    found = []
    for rows in padded_rows(len(encoded), batch_size):
        batch, count = encoded.batch(rows), len(np.unique(rows))
        found.append(multihost.gather(lengths(context.params, batch))[:count][batch.mask[:count]])
    return float(np.median(np.concatenate(found)))
