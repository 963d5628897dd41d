"""Gradient ascent on the forget set; nothing protects the retain set.

    L = -min(CE(forget), cap)

The original has no bound, which is cap = inf. Cross-entropy has no maximum, and unbounded ascent destroys the whole
model, so every method of this package that ascends stops at `cap` nats per token, row by row.

Published for LLaVA-1.5-7B (MLLMU-Bench, arXiv 2410.22108): learning rate 1e-5 to 3e-5, batches of 4, one epoch.

Reference: Jang et al., "Knowledge Unlearning for Mitigating Privacy Risks in Language Models", arXiv 2210.01504.
"""

import dataclasses
from collections.abc import Mapping

from vkd_jax.config.fields import setting
from vkd_jax.methods import base
from vkd_jax.methods.scope import Unlearning


@dataclasses.dataclass(frozen=True)
class GradAscent(Unlearning):
    """Bounded gradient ascent on the forget set alone."""

    cap: float = setting(
        6.0, "Cross-entropy at which ascent stops, in nats per token; inf for no bound.", above=0, infinity=True
    )

    def image_losses(self) -> Mapping[str, base.LossFn]:
        """Returns ascent on the forget set."""
        return {"forget": base.ascent_loss(1.0, self.cap)}
