"""A further training stream whose answers are retained.

L = weight * CE(answer | image, question)
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from vkd_jax.config.fields import Section, setting
from vkd_jax.methods import base


@dataclasses.dataclass(frozen=True)
class KeptStream(Section):
    """A training stream beside those to forget and to retain, in a section of its own."""

    STREAM: ClassVar[str]

    weight: float = setting(0.0, "Weight of the stream's cross-entropy; 0 trains without the stream.", minimum=0)

    def losses(self) -> Mapping[str, base.LossFn]:
        """Returns the loss of the stream, or {} without it."""
        return {self.STREAM: base.descent_loss(self.STREAM, self.weight)} if self.weight else {}
