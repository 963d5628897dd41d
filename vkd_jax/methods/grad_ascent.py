"""Gradient ascent on the forget set; nothing protects the retain set.

    L = -min(CE(forget), cap)

Every method of this package that ascends has this bound, row by row; see `methods.ascent`.

Published for LLaVA-1.5-7B (MLLMU-Bench, arXiv 2410.22108): learning rate 1e-5 to 3e-5, batches of 4, one epoch.

Reference: Jang et al., "Knowledge Unlearning for Mitigating Privacy Risks in Language Models", arXiv 2210.01504.
"""

import dataclasses
from collections.abc import Mapping

from vkd_jax.methods import base
from vkd_jax.methods.ascent import Ascent


@dataclasses.dataclass(frozen=True)
class GradAscent(Ascent):
    """Bounded gradient ascent on the forget set alone."""

    def image_losses(self) -> Mapping[str, base.LossFn]:
        """Returns ascent on the forget set."""
        return {"forget": self.ascent_loss(1.0)}
