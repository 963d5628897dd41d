"""The leak across modalities: does the model still say in text what it no longer says of a picture?

Nothing is asked anew: the questions of text alone about the people to forget stand among the evaluation's answers.
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import ml_collections

from vkd_jax.attacks import base
from vkd_jax.attacks.base import Records, Subject, Summary
from vkd_jax.config.fields import Section
from vkd_jax.evaluation import metrics
from vkd_jax.methods import Method

VARIANTS = {"qa": "choosing", "cloze_qa": "filling in a blank", "generation_qa": "answering freely"}  # by kind


@dataclasses.dataclass(frozen=True)
class Leak(Section):
    """The people to forget, by name."""

    SECTION: ClassVar[str] = "attacks.leak"
    TITLE: ClassVar[str] = "Leak: asked by name, without a picture"
    ABOUT: ClassVar[str] = (
        "The questions name the people to forget and show no picture, so that nobody has to be recognised. A method "
        "that erases who is in a picture, as VKD does, keeps what the model can say of a *name* on purpose, and should "
        "show the figures from before. A method that trains all weights may lose that knowledge, too."
    )
    UNIT: ClassVar[str] = "right answers"

    def check(self, config: ml_collections.ConfigDict, method: Method) -> None:
        """Nothing can be wrong."""

    def run(self, subject: Subject) -> Records:
        """A record of each answer to a question of text alone about the people to forget, by the first protocol."""
        answers = metrics.by_kind(subject.answers)
        return [
            {"variant": variant, **{key: item[key] for key in ("set", "id", "person", "correct")}}
            for kind, variant in VARIANTS.items()
            for part in metrics.UNLEARNED
            for item in answers.get((part, kind), ())
        ]

    def summarise(self, records: Mapping[str, Records]) -> Summary:
        """The share of right answers of every kind of question."""
        return base.accuracy(records)
