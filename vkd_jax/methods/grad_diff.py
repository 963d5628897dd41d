"""Gradient difference: ascent on the forget set, descent on the retain set.

    L = -weight_forget * min(CE(forget), cap) + weight_retain * CE(retain)

Published for LLaVA-1.5-7B (MLLMU-Bench, arXiv 2410.22108): both weights 1 and no bound (cap = inf), learning rate 1e-5
to 3e-5, batches of 4, one epoch.

Reference: Liu et al., "Continual Learning and Private Unlearning", arXiv 2203.12817.
"""

import dataclasses
from collections.abc import Mapping

from vkd_jax.config.fields import setting
from vkd_jax.methods import base
from vkd_jax.methods.ascent import Ascent


@dataclasses.dataclass(frozen=True)
class GradDiff(Ascent):
    """Bounded gradient ascent on the forget set, descent on the retain set."""

    weight_forget: float = setting(1.0, "Weight of the loss on the forget set.", minimum=0)
    weight_retain: float = setting(1.0, "Weight of the loss on the retain set.", minimum=0)

    def image_losses(self) -> Mapping[str, base.LossFn]:
        """Returns ascent on the forget set and descent on the retain set."""
        return {
            "forget": self.ascent_loss(self.weight_forget),
            "retain": base.descent_loss("retain", self.weight_retain),
        }
