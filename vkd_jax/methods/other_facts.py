"""Other facts about the people to forget, which are retained while some facts about them are forgotten.

    L_other_facts = weight * CE(answer | image of a person to forget, question about another fact)

The stream has the same images as the forget set. It is apart from the retain set, whose people serve as the targets,
look-alikes and teacher's features of a forgotten face.
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from vkd_jax.config.fields import Section, setting
from vkd_jax.methods import base

STREAM = "other_facts"


@dataclasses.dataclass(frozen=True)
class OtherFacts(Section):
    """Other facts about the people to forget as a further training stream, with `data.forget_facts`."""

    SECTION: ClassVar[str] = "method.other_facts"

    weight: float = setting(
        0.0, "Weight of the cross-entropy of the facts that `data.forget_facts` does not name.", minimum=0
    )

    def losses(self) -> Mapping[str, base.LossFn]:
        """Returns the loss of the stream, or {} without it."""
        return {STREAM: base.descent_loss(STREAM, self.weight)} if self.weight else {}
