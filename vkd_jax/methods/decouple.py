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
from typing import ClassVar

from vkd_jax.methods.kept_stream import KeptStream


@dataclasses.dataclass(frozen=True)
class Decouple(KeptStream):
    """Questions of the forget set about harmless images as a further training stream."""

    SECTION: ClassVar[str] = "method.decouple"
    STREAM: ClassVar[str] = "decouple"
