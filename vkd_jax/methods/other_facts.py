"""Other facts about the people to forget, which are retained while some facts about them are forgotten.

    L_other_facts = weight * CE(answer | image of a person to forget, question about another fact)

The stream has the same images as the forget set. It is apart from the retain set, whose people serve as the targets,
look-alikes and teacher's features of a forgotten face.
"""

import dataclasses
from typing import ClassVar

from vkd_jax.methods.kept_stream import KeptStream


@dataclasses.dataclass(frozen=True)
class OtherFacts(KeptStream):
    """Other facts about the people to forget, those that `data.forget_facts` does not name, as a further stream."""

    SECTION: ClassVar[str] = "method.other_facts"
    STREAM: ClassVar[str] = "other_facts"
