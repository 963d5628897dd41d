"""The leak across modalities: does the model still say in text what it no longer says of a picture?

Nothing is asked anew: the questions of text alone about the people to forget stand among the evaluation's answers.
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from vkd_jax.attacks import base
from vkd_jax.attacks.base import Records, Subject
from vkd_jax.config.fields import Section
from vkd_jax.config.schema import RunConfig
from vkd_jax.evaluation.metrics.summary import by_kind
from vkd_jax.results import AttackCell
from vkd_jax.types import Role


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
    METRIC: ClassVar[str] = "accuracy"
    VARIANTS: ClassVar[Mapping[str, str]] = {  # by kind of question
        "qa": "choosing",
        "cloze_qa": "filling in a blank",
        "generation_qa": "answering freely",
    }

    def check(self, config: RunConfig) -> None:
        """Nothing can be wrong."""

    def run(self, subject: Subject) -> Records:
        """A record of each answer to a question of text alone about the people to forget, by the first protocol."""
        answers = by_kind(subject.answers)
        return [
            {"variant": kind, **{key: item[key] for key in ("set", "id", "person", "correct")}}
            for kind in self.VARIANTS
            for name in subject.with_role(Role.FORGET, Role.FORGET_HOLDOUT)
            for item in answers.get((name, kind), ())
        ]

    def summarize(self, records: Mapping[str, Records]) -> list[AttackCell]:
        """The share of correct answers of every kind of question, over all sets about the people to forget."""
        return base.accuracy(records, by_set=False)
