"""KL minimization: gradient difference that also preserves the next-token distributions of the retain set.

    L = -weight_forget * min(CE(forget), cap) + weight_retain * CE(retain) + weight_kl * KL(vanilla || theta)(retain)

KL is averaged over the answer tokens. The vanilla model's distributions are computed at each step, because those of a
whole set (one value per answer token and vocabulary entry) do not fit in memory.

Published (MLLMU-Bench, arXiv 2410.22108): all weights 1 and no bound (cap = inf), learning rate 1e-5 to 3e-5 for
LLaVA-1.5-7B, batches of 4, one epoch; its code sums KL over all tokens of a row. TOFU's KL minimization has no CE on
the retain set: weight_retain = 0.

Reference: Maini et al., "TOFU: A Task of Fictitious Unlearning for LLMs", arXiv 2401.06121.
"""

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp

from vkd_jax.config.fields import setting
from vkd_jax.methods import base, losses
from vkd_jax.methods.ascent import Ascent


@dataclasses.dataclass(frozen=True)
class KL(Ascent):
    """Bounded ascent on the forget set; descent and KL from the vanilla model on the retain set."""

    weight_forget: float = setting(1.0, "Weight of the loss on the forget set.", minimum=0)
    weight_retain: float = setting(1.0, "Weight of the loss on the retain set.", minimum=0)
    weight_kl: float = setting(1.0, "Weight of the divergence from the vanilla model on the retain set.", minimum=0)

    def teachers(self) -> Mapping[str, base.TeacherFn]:
        """Also returns the vanilla model's logits on the retain batch."""
        retain = {"retain": base.vanilla_logits} if self.weight_kl else {}
        return {**super().teachers(), **retain}

    def image_losses(self) -> Mapping[str, base.LossFn]:
        """Returns ascent on the forget set, and descent with the KL term on the retain set."""
        retain = self._retain_loss if self.weight_kl else base.descent_loss("retain", self.weight_retain)
        return {"forget": self.ascent_loss(self.weight_forget), "retain": retain}

    def _retain_loss(self, model, batch):
        """Computes weight_retain * CE + weight_kl * KL."""
        logits, _ = base.answer_logits(model, batch)
        ce = losses.answer_cross_entropy(logits, batch.targets, batch.target_mask)
        kl = losses.kl_divergence(batch.cached["vanilla"], logits, batch.target_mask)
        loss = jnp.mean(self.weight_retain * ce + self.weight_kl * kl)
        return loss, base.mean_metrics(retain_ce=ce, retain_kl=kl)
