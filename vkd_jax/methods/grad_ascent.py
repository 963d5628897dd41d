"""Gradient ascent: the forget set's answers are made unlikely, and nothing is kept on purpose.

    L = -min(CE(forget), cap)

The original has no bound, which is cap = inf. Here ascent stops at `cap` nats a row, as in every method of this package
that ascends: the cross-entropy has no maximum, and without a bound the model is destroyed for everybody.

Published for LLaVA-1.5-7B (MLLMU-Bench, arXiv 2410.22108): learning rate 1e-5 to 3e-5, batches of 4, one epoch.

Reference: Jang et al., "Knowledge Unlearning for Mitigating Privacy Risks in Language Models", arXiv 2210.01504.
"""

import dataclasses
from collections.abc import Mapping

from vkd_jax.config.fields import setting
from vkd_jax.methods import base
from vkd_jax.methods.scope import Scope


@dataclasses.dataclass(frozen=True)
class GradAscent(Scope):
    """Bounded ascent on the forget set, and nothing else."""

    cap: float = setting(6.0, "Cross-entropy at which ascent stops, in nats per token.", above=0)

    def losses(self) -> Mapping[str, base.LossFn]:
        """One stream, which ascends."""
        return {"forget": base.ascent_loss(1.0, self.cap)}
