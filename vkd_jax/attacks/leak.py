"""Leak across modalities: knowledge that the model no longer shows about an image, but still shows in text.

The attack asks no questions of its own: it reads the evaluation's answers to text-only questions about the people to
forget.
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
    """Text-only questions that name the people to forget."""

    SECTION: ClassVar[str] = "attacks.leak"
    TITLE: ClassVar[str] = "Leak: text-only questions that name the person"
    ABOUT: ClassVar[str] = (
        "The questions name the people to forget and show no image, so no face has to be recognized. A method that "
        "erases visual knowledge, such as VKD, keeps textual knowledge on purpose: its accuracy should equal that of "
        "the vanilla model. A method that trains all weights may erase textual knowledge, too. With "
        "`data.forgets=both` nothing about the people should remain, and the accuracy should equal that of the "
        "retain-only model."
    )
    METRIC: ClassVar[str] = "accuracy"
    VARIANTS: ClassVar[Mapping[str, str]] = {  # by kind of question
        "qa": "multiple choice",
        "cloze_qa": "fill in the blank",
        "generation_qa": "open answer",
    }

    def check(self, config: RunConfig) -> None:
        """There are no settings to validate."""

    def run(self, subject: Subject) -> Records:
        """One record per answer to a text-only question about the people to forget, under the first protocol."""
        answers = by_kind(subject.answers)
        return [
            {"variant": kind, **{key: item[key] for key in ("set", "id", "person", "correct")}}
            for kind in self.VARIANTS
            for name in subject.with_role(Role.FORGET, Role.FORGET_HOLDOUT)
            for item in answers.get((name, kind), ())
        ]

    def summarize(self, records: Mapping[str, Records]) -> list[AttackCell]:
        """The accuracy on each kind of question, over all sets about the people to forget."""
        return base.accuracy(records, by_set=False)
