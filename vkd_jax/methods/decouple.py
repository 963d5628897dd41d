"""Prompt decouple loss (PD): harmless images keep their answers to the questions of the forget set.

    L_decouple = weight * CE(safe answer | harmless image, question)

Each question of the stream is one of the forget set, with a harmless image in place of the unsafe one. Without the
stream a model learns to refuse the wording of a question, whatever the image shows.

Published with weight 0.5 for gradient ascent and gradient difference, whose weight_retain is then also 0.5, and with
weight 1 for KL and IDK (PO). Upstream uses the harmless image of each example of the forget batch; here the stream is
shuffled separately.

Reference: Chen et al., "SafeEraser: Enhancing Safety in Multimodal Large Language Models through Multimodal Machine
Unlearning", 2025 (arXiv:2502.12520).
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from vkd_jax.config.fields import Section, setting
from vkd_jax.methods import base

STREAM = "decouple"


@dataclasses.dataclass(frozen=True)
class Decouple(Section):
    """Questions of the forget set about harmless images as a further training stream."""

    SECTION: ClassVar[str] = "method.decouple"

    weight: float = setting(
        0.0, "Weight of the prompt decouple loss on harmless images; 0 trains without them.", minimum=0
    )

    def losses(self) -> Mapping[str, base.LossFn]:
        """Returns the loss of the stream, or {} without it."""
        return {STREAM: base.descent_loss(STREAM, self.weight)} if self.weight else {}
