"""Ascent on the forget set, and where it stops.

    bound=cap      L = -min(CE, cap)        the ascent has a gradient of zero beyond `cap` nats per token
    bound=others   L = |CE - b_i|           each row ends where a model that does not know the person would be

With bound=others, b_i is what the vanilla model gives to the answer of row i for people it does know, but of whom it is
not the answer: with p_ij its probability if it is shown the image of another person j of the retain set,

    b_i = min(-log mean_j p_ij / tokens_i, cap)

This is the cross-entropy of the answer among the people whom the model keeps. Without such a target, ascent ends in an
avoidance of the correct answer, which gives away that the person was forgotten: a model that never met somebody guesses
the answer now and then.

The original methods have no bound (cap = inf). Cross-entropy has no maximum, and unbounded ascent destroys the model.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special

from vkd_jax.config.fields import setting
from vkd_jax.data.batching import rng
from vkd_jax.data.encoding import Batch
from vkd_jax.methods import base, losses
from vkd_jax.methods.scope import Unlearning

BOUNDS = ("cap", "others")
BOUND_SPEC = {"bound": jax.ShapeDtypeStruct((), jnp.float32)}


@dataclasses.dataclass(frozen=True)
class Ascent(Unlearning):
    """A method that ascends on the cross-entropy of the forget set: the hyperparameters that all of these share."""

    cap: float = setting(
        6.0, "Cross-entropy at which ascent stops, in nats per token; inf for no bound.", above=0, infinity=True
    )
    bound: str = setting(
        "cap", "Where ascent stops: at 'cap', or at the cross-entropy of the answer among 'others'.", choices=BOUNDS
    )
    bound_people: int = setting(16, "With bound=others, number of images of other people per question.", minimum=1)

    def ascent(self, ce: jax.Array, batch: Batch) -> jax.Array:
        """Computes the loss of each row from its cross-entropy: [b]."""
        if self.bound == "cap":
            return losses.bounded_ascent(ce, self.cap)
        return jnp.abs(ce - batch.cached["bound"])

    def ascent_loss(self, weight: float) -> base.LossFn:
        """Returns the loss weight * mean(ascent(CE)) of the forget stream."""

        def loss(model, batch):
            ce = base.cross_entropy(model, batch)
            return weight * jnp.mean(self.ascent(ce, batch)), base.mean_metrics(forget_ce=ce)

        return loss

    def prepare(self, context: base.Context) -> base.Prepared:
        """Caches the bound of each row of the forget set, if it is not the same for all."""
        forget = context.sets["forget"]
        spec = self.cache_spec("forget", {}, context.model_config)
        return base.Prepared(sets={**context.sets, "forget": base.with_cache(forget, spec, self.bounds(context))})

    def cache_spec(self, stream, taps, model_config) -> base.CacheSpec:
        """Describes the bound of each row of the forget set."""
        del taps, model_config
        return base.CacheSpec(per_example=BOUND_SPEC if stream == "forget" and self.bound == "others" else {})

    def bounds(self, context: base.Context) -> Mapping[str, np.ndarray]:
        """Computes the cached bounds b_i of the forget set, {} if all are `cap`."""
        if self.bound == "cap":
            return {}
        forget = context.sets["forget"].examples
        images = list({e.image_id: e for e in context.sets["retain"].examples}.values())
        draw, people = rng(context.seed, "ascent/others"), min(self.bound_people, len(images))
        shown = [images[i] for _ in forget for i in draw.choice(len(images), people, replace=False)]
        asked = [e for e in forget for _ in range(people)]
        rows = [
            dataclasses.replace(e, image=other.image, image_id=other.image_id)
            for e, other in zip(asked, shown, strict=True)
        ]
        encoded = context.encode(rows)
        log_probs = base.reference_log_probs(context, encoded).reshape(-1, people)
        tokens = encoded.target_mask.sum(-1).reshape(-1, people)[:, 0]
        log_mean = scipy.special.logsumexp(log_probs, axis=1) - np.log(people)
        return {"bound": np.minimum(-log_mean / tokens, self.cap).astype(np.float32)}
