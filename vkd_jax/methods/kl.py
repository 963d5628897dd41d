"""KL minimisation: gradient difference that also keeps the whole distribution over the next token.

    L = -weight_forget * min(CE(forget), cap) + weight_retain * CE(retain) + weight_kl * KL(vanilla || theta)(retain)

KL is averaged over the answer tokens. The vanilla model's distributions are computed anew at each step, since those of
a whole set, a vocabulary wide at each token, are too large to hold.

Published (MLLMU-Bench, arXiv 2410.22108): all weights 1 and no bound (cap = inf), learning rate 1e-5 to 3e-5 for
LLaVA-1.5-7B, batches of 4, one epoch; its code sums KL over all tokens of a row. TOFU's KL minimisation has no CE on
the retain set: weight_retain = 0.

Reference: Maini et al., "TOFU: A Task of Fictitious Unlearning for LLMs", arXiv 2401.06121.
"""

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp

from vkd_jax.config.fields import setting
from vkd_jax.methods import base, losses
from vkd_jax.methods.scope import Scope


@dataclasses.dataclass(frozen=True)
class KL(Scope):
    """Bounded ascent on the forget set; descent, and no move away from the vanilla model, on the retain set."""

    weight_forget: float = setting(1.0, "Weight of the loss on the forget set.", minimum=0)
    weight_retain: float = setting(1.0, "Weight of the loss on the retain set.", minimum=0)
    weight_kl: float = setting(1.0, "Weight of the divergence from the vanilla model on the retain set.", minimum=0)
    cap: float = setting(6.0, "Cross-entropy at which ascent stops, in nats per token.", above=0)

    def teachers(self) -> Mapping[str, base.TeacherFn]:
        """The vanilla model's logits of the retain batch."""
        return {"retain": _teach} if self.weight_kl else {}

    def losses(self) -> Mapping[str, base.LossFn]:
        """One stream ascends, the other stays where it was."""
        retain = self._retain if self.weight_kl else base.descent_loss("retain", self.weight_retain)
        return {"forget": base.ascent_loss(self.weight_forget, self.cap), "retain": retain}

    def _retain(self, model, batch):
        logits, _ = base.answer_logits(model, batch)
        ce = losses.answer_cross_entropy(logits, batch.targets, batch.target_mask)
        kl = losses.kl_divergence(batch.cached["vanilla"], logits, batch.target_mask)
        loss = jnp.mean(self.weight_retain * ce + self.weight_kl * kl)
        return loss, base.mean_metrics(retain_ce=ce, retain_kl=kl)


def _teach(model, batch):
    return {"vanilla": base.answer_logits(model, batch)[0]}
