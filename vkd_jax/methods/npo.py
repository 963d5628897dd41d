"""Negative preference optimization (NPO): ascent that fades, row by row, as the answer becomes unlikely.

    L = weight_forget * -(2 / beta) log sigmoid(-beta (log p(forget) - log p_ref(forget))) + weight_retain * CE(retain)

log p is the log-probability of a row's whole answer, the sum over its tokens, and the loss is the mean over the rows of
the batch. The reference is the vanilla model, as in the paper; its log-probabilities are computed once.

Published: beta 0.4 in MLLMU-Bench (arXiv 2410.22108), whose code uses a model fine-tuned on the retain set as the
reference, the batch's mean token loss as log p, and no retain term (weight_retain = 0); learning rate 1e-5 to 3e-5 for
LLaVA-1.5-7B, batches of 4, one epoch. Other publications use beta from 0.1 (the paper) to 0.9.

Reference: Zhang et al., "Negative Preference Optimization: From Catastrophic Collapse to Effective Unlearning", arXiv
2404.05868. With the retain term it is their NPO + RT.
"""

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp

from vkd_jax.config.fields import setting
from vkd_jax.data.encoding import EncodedSet
from vkd_jax.methods import base, losses
from vkd_jax.methods.scope import Unlearning


@dataclasses.dataclass(frozen=True)
class NPO(Unlearning):
    """Negative preference optimization on the forget set, descent on the retain set."""

    weight_forget: float = setting(1.0, "Weight of the loss on the forget set.", minimum=0)
    weight_retain: float = setting(1.0, "Weight of the loss on the retain set.", minimum=0)
    beta: float = setting(
        0.4, "Inverse temperature, per nat; the larger it is, the sooner ascent on a row fades.", above=0
    )

    def prepare_forget(self, context: base.Context, stream: str) -> EncodedSet:
        """Caches each forget answer's log-probability under the vanilla model."""
        forget, spec = context.sets[stream], self.cache_spec(stream, {}, context.model_config)
        return base.with_cache(forget, spec, {"reference": base.reference_log_probs(context, forget)})

    def cache_spec(self, stream, taps, model_config) -> base.CacheSpec:
        """Describes the reference log-probability of each row that is forgotten."""
        del taps, model_config
        return base.CacheSpec(per_example=base.REFERENCE_SPEC if stream in base.FORGET_STREAMS else {})

    def image_losses(self) -> Mapping[str, base.LossFn]:
        """Returns NPO on the forget set and descent on the retain set."""
        return {"forget": self._forget_loss, "retain": base.descent_loss("retain", self.weight_retain)}

    def _forget_loss(self, model, batch):
        logits, _ = base.answer_logits(model, batch)
        ce = losses.answer_cross_entropy(logits, batch.targets, batch.target_mask)
        npo = base.npo_of_logits(logits, batch, self.beta)
        return self.weight_forget * jnp.mean(npo), base.mean_metrics(forget_ce=ce, forget_npo=npo)
