"""Quantization: does forgotten knowledge come back when the weights are quantized to few bits?

A method that hides knowledge by small weight changes may lose these changes if the old and the new weight round to the
same value. All weight matrices are rounded (see `vkd_jax.models.quantize.round_param`); the model computes in its own
dtype.

Reference: Zhang et al., "Catastrophic failure of LLM unlearning via quantization", arXiv 2410.16454.
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
    """Quantizes all weight matrices in each of several formats."""

    SECTION: ClassVar[str] = "attacks.quantize"
    bits: tuple[str, ...] = setting(
        ("int8", "int4:64"),
        "Formats, each as for model.quantize.",
        pattern=r"int[84](:[1-9]\d*)?",
        expected="int8 or int4, optionally with a group size as in int4:64",
    )

    TITLE: ClassVar[str] = "Quantization: weights rounded to few bits"
    ABOUT: ClassVar[str] = (
        "All weight matrices of the vision tower, the projector and the language model are quantized to 8 or 4 bits, "
        "except those that config.model.quantize has already quantized. An accuracy on the forget set above that of "
        "the unchanged model means that unlearning hid knowledge instead of erasing it. The accuracy on the retain set "
        "shows what quantization itself costs."
    )
    METRIC: ClassVar[str] = "accuracy"
    VARIANTS: ClassVar[Mapping[str, str]] = {}

    def check(self, config: RunConfig) -> None:
        """All valid settings can run."""

    def run(self, subject: Subject) -> Records:
        """The answers of the unchanged model and of each quantized copy."""
        sets = base.questions(subject, Role.FORGET, Role.FORGET_HOLDOUT, Role.RETAIN)
        model = dataclasses.replace(subject.model, params=base.merged(subject.model.params))
        if count := sum(isinstance(value, quantize.QArray) for value in model.params.values()):
            logging.info("%s: %d weights are already quantized and stay as they are", subject.name, count)
        records = [base.attack_record(UNCHANGED, r) for r in subject.unattacked(sets)]
        for text in self.bits:
            answers = subject.ask_sets(self.rounded(model, text), sets)
            records += [base.attack_record(text, r) for r in answers]
        return records

    def rounded(self, model: ModelBundle, text: str) -> ModelBundle:
        """The model with weights rounded to a format such as "int4:64".

        Raises:
            UserError: the number of channels of a weight is not a multiple of the group size.
        """
        quantization = quantize.parse(text)
        try:
            params = {path: quantize.round_param(path, value, quantization) for path, value in model.params.items()}
        except UserError as error:
            raise UserError(f"attacks.quantize.bits: {text} does not fit this model ({error})") from error
        return dataclasses.replace(model, params=params)

    def summarize(self, records: Mapping[str, Records]) -> list[AttackCell]:
        """The accuracy of each format on each set."""
        return base.accuracy(records)
