"""Quantisation: does what was forgotten come back when the weights are rounded to few bits?

A method that hides knowledge by small changes of the weights may lose these changes when both the old and the new value
round to the same number. All weight matrices are rounded, see `vkd_jax.models.quantize.round_param`, and the model
computes as before.

Reference: Zhang et al., "Catastrophic failure of LLM unlearning via quantization", arXiv 2410.16454
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from absl import logging

from vkd_jax.attacks import base
from vkd_jax.attacks.base import Records, Subject
from vkd_jax.checkpoints.bundle import ModelBundle
from vkd_jax.config.fields import Section, setting
from vkd_jax.config.schema import RunConfig
from vkd_jax.models import quantize
from vkd_jax.results import UNCHANGED, AttackCell
from vkd_jax.types import Role, UserError


@dataclasses.dataclass(frozen=True)
class Quantize(Section):
    """All weight matrices, in each of several roundings."""

    SECTION: ClassVar[str] = "attacks.quantize"
    bits: tuple[str, ...] = setting(
        ("int8", "int4:64"),
        "Roundings, each as model.quantize has it.",
        pattern=r"int[84](:[1-9]\d*)?",
        expected="int8 or int4, optionally with a group size as in int4:64",
    )

    TITLE: ClassVar[str] = "Quantisation: weights rounded to few bits"
    ABOUT: ClassVar[str] = (
        "All weight matrices of the vision tower, the projector and the language model are rounded to 8 or 4 bits; "
        "matrices that config.model.quantize rounded already stay as they are. Figures above those of the unrounded "
        "model say that unlearning hid what it should have erased; those on the people to keep say what the rounding "
        "itself costs."
    )
    METRIC: ClassVar[str] = "accuracy"
    VARIANTS: ClassVar[Mapping[str, str]] = {}

    def check(self, config: RunConfig) -> None:
        """Any settings can run."""

    def run(self, subject: Subject) -> Records:
        """The answers of the model as it is and of each rounded copy."""
        sets = base.questions(subject, Role.FORGET, Role.FORGET_HOLDOUT, Role.RETAIN)
        model = dataclasses.replace(subject.model, params=base.merged(subject.model.params))
        if kept := sum(isinstance(value, quantize.QArray) for value in model.params.values()):
            logging.info("%s: %d quantised weights stay as they are", subject.name, kept)
        records = [base.attack_record(UNCHANGED, r) for r in subject.unattacked(sets)]
        for text in self.bits:
            answers = subject.ask_sets(self.rounded(model, text), sets)
            records += [base.attack_record(text, r) for r in answers]
        return records

    def rounded(self, model: ModelBundle, text: str) -> ModelBundle:
        """The model with weights of that many bits.

        Raises:
            UserError: a width does not split into such groups.
        """
        how = quantize.parse(text)
        try:
            params = {path: quantize.round_param(path, value, how) for path, value in model.params.items()}
        except UserError as error:
            raise UserError(f"attacks.quantize.bits: {text} does not fit this model ({error})") from error
        return dataclasses.replace(model, params=params)

    def summarize(self, records: Mapping[str, Records]) -> list[AttackCell]:
        """The share of correct answers of every rounding and set."""
        return base.accuracy(records)
