"""Ascent on the forget set, and where it stops.

    bound=cap      L = -min(CE, cap)        the ascent has a gradient of zero beyond `cap` nats per token
    bound=others      L = h(CE - b_i)       each row ends where a model that does not know the person would be
    bound=look_alike

with the Huber loss h(d) = d^2 / 2 if |d| <= 1 nat, and |d| - 1/2 otherwise. Its gradient vanishes at the bound, so that
rows that have arrived there do not compete with the retain set, as those of |d| do. b_i is the cross-entropy that the
vanilla model gives to the answer of row i if it is shown other images x_ij,

    b_i = min(-log mean_j p(answer_i | question_i, x_ij) / tokens_i, cap),

those of random people of the retain set (others), or of the one who looks most alike (look_alike, see
`feature_targets.look_alikes`). Without such a target, ascent teaches avoidance of the correct answer, which reveals
that the person was forgotten: a model that never met a person sometimes guesses the answer.

The original methods have no bound (cap = inf). Cross-entropy has no maximum, and unbounded ascent destroys the model.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.special

from vkd_jax.config.fields import setting
from vkd_jax.data.batching import rng
from vkd_jax.data.encoding import Batch, EncodedSet
from vkd_jax.methods import base, feature_targets, losses
from vkd_jax.methods.scope import Unlearning

BOUNDS = ("cap", "others", "look_alike")
BOUND_SPEC = {"bound": jax.ShapeDtypeStruct((), jnp.float32)}


@dataclasses.dataclass(frozen=True)
class Ascent(Unlearning):
    """A method that ascends on the cross-entropy of the forget set: the hyperparameters that all of these share."""

    cap: float = setting(
        6.0, "Cross-entropy at which ascent stops, in nats per token; inf for no bound.", above=0, infinity=True
    )
    bound: str = setting(
        "cap",
        "Where ascent stops: at 'cap', or at the cross-entropy of the answer if the model is shown 'others', or the "
        "'look_alike' of the person.",
        choices=BOUNDS,
    )
    bound_images: int = setting(16, "Largest number of such images per question.", minimum=1)

    def ascent(self, ce: jax.Array, batch: Batch) -> jax.Array:
        """Computes the loss of each row from its cross-entropy: [b]."""
        if "bound" not in batch.cached:
            return losses.bounded_ascent(ce, self.cap)
        return optax.losses.huber_loss(ce, batch.cached["bound"], delta=1.0)

    def ascent_loss(self, weight: float) -> base.LossFn:
        """Returns the loss weight * mean(ascent(CE)) of the forget stream."""

        def loss(model, batch):
            ce = base.cross_entropy(model, batch)
            return weight * jnp.mean(self.ascent(ce, batch)), base.mean_metrics(forget_ce=ce)

        return loss

    def prepare_forget(self, context: base.Context, stream: str) -> EncodedSet:
        """Caches the bound of each row of the forget set, if it is not the same for all; that of text is `cap`."""
        spec = self.cache_spec(stream, {}, context.model_config)
        return base.with_cache(context.sets[stream], spec, self.bounds(context) if spec.per_example else {})

    def cache_spec(self, stream, taps, model_config) -> base.CacheSpec:
        """Describes the bound of each row of the forget set."""
        del taps, model_config
        return base.CacheSpec(per_example=BOUND_SPEC if stream == "forget" and self.bound != "cap" else {})

    def bounds(self, context: base.Context) -> Mapping[str, np.ndarray]:
        """Computes the cached bounds b_i of the forget set, {} if all are `cap`."""
        if self.bound == "cap":
            return {}
        forget = context.sets["forget"].examples
        images = list({e.image_id: e for e in context.sets["retain"].examples}.values())
        candidates = {feature_targets.person_of(e): images for e in forget}
        if self.bound == "look_alike":
            look_alikes = feature_targets.look_alikes(context)
            candidates = {
                person: [e for e in images if feature_targets.person_of(e) == other]
                for person, other in look_alikes.items()
            }
        draw, rows, owners = rng(context.seed, "ascent/bounds"), [], []
        for i, example in enumerate(forget):
            others = candidates[feature_targets.person_of(example)]
            for j in draw.permutation(len(others))[: self.bound_images]:
                rows.append(dataclasses.replace(example, image=others[j].image, image_id=others[j].image_id))
                owners.append(i)
        encoded = context.encode(rows)
        log_probs, owners = base.reference_log_probs(context, encoded), np.array(owners)
        bounds = [
            -(scipy.special.logsumexp(log_probs[owners == i]) - np.log(np.sum(owners == i))) / tokens
            for i, tokens in enumerate(context.sets["forget"].target_mask.sum(-1))
        ]
        return {"bound": np.minimum(bounds, self.cap).astype(np.float32)}
