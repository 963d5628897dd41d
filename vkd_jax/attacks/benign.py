"""Benign fine-tuning: training on data without any forgotten person, and then asking about the forget set.

An owner who adapts an unlearned model to another task is not an attacker, but may still recover the forgotten knowledge
by moving weights in directions that unlearning hid. Training uses no question about a forgotten person, so any accuracy
above that of the retain-only model after the same training comes from the model itself.

Reference: Łucki et al., "An adversarial perspective on machine unlearning for AI safety", arXiv 2409.18025, which
fine-tunes on unrelated data. Other code scores names on the training task's own images, or lacks a retain-only model.
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import numpy as np
from absl import logging

from vkd_jax.attacks import base
from vkd_jax.attacks.base import Records, Subject
from vkd_jax.attacks.finetuning import Finetuning, finetune, rows_of
from vkd_jax.attacks.lessons import labeled, recoveries
from vkd_jax.config.fields import setting
from vkd_jax.results import UNCHANGED, AttackCell
from vkd_jax.types import Diverged, NotFinite, Role, UserError


@dataclasses.dataclass(frozen=True)
class Benign(Finetuning):
    """Fine-tunes each set of weights on questions about nobody, or about retained people."""

    SECTION: ClassVar[str] = "attacks.benign"
    data: tuple[str, ...] = setting(
        ("general", "retain"),
        "Roles of the evaluation sets whose questions with an image are trained on, each in its own attempt.",
        choices=("general", "retain"),
    )
    steps: int = setting(50, "Training steps of each attempt.", minimum=1, maximum=10**8)

    TITLE: ClassVar[str] = "Benign fine-tuning: training on unrelated data"
    ABOUT: ClassVar[str] = (
        "The model is fine-tuned on general questions or on questions about the people to retain, and never on the "
        "people to forget, who are then asked about. An accuracy that rises above that of the retain-only model after "
        "the same training means that unlearning hid knowledge instead of erasing it."
    )
    METRIC: ClassVar[str] = "accuracy"
    VARIANTS: ClassVar[Mapping[str, str]] = {
        UNCHANGED: "before the attack",
        "general": "general questions",
        "retain": "questions about retained people",
    }

    def run(self, subject: Subject) -> Records:
        """The answers before the attack and after each training.

        Raises:
            UserError: the training diverged.
        """
        sets = base.questions(subject, Role.FORGET, Role.FORGET_HOLDOUT)
        records = [base.attack_record(UNCHANGED, r) for r in subject.unattacked(sets)]
        model = dataclasses.replace(subject.model, params=base.merged(subject.model.params))
        data = {
            role: [e for name in subject.with_role(Role(role)) for e in subject.asked.get(name, ()) if e.image]
            for role in self.data
        }
        roles = [role for role, examples in data.items() for _ in examples]
        if not roles:
            return records
        encoded = model.encode([e for examples in data.values() for e in examples])  # one shape for all attempts
        for attacker in self.attackers:
            for role in dict.fromkeys(roles):
                rows = np.flatnonzero(np.array(roles) == role)
                settings = self.training(self.steps, self.learning_rate)
                try:
                    selected = rows_of(encoded, rows)
                    attacked = finetune(model, attacker, selected, settings, subject.seed, section=self.SECTION)
                    answers = subject.ask_sets(attacked, sets)
                except (Diverged, NotFinite) as error:  # in a step, or after the last one
                    raise UserError(
                        f"attacks.benign: training diverged ({error}); lower attacks.benign.learning_rate."
                    ) from error
                accuracy = np.mean([r["correct"] for r in answers])
                logging.info("%s, benign %s on %s: accuracy %.3f", subject.name, attacker, role, accuracy)
                fields = dict(attacker=attacker, steps=self.steps, batch_size=self.batch_size)
                records += labeled(
                    subject, answers, (), variant=role, learning_rate=self.learning_rate, **fields
                )  # fmt: skip
        return records

    def summarize(self, records: Mapping[str, Records]) -> list[AttackCell]:
        """The accuracy after each training, and the recovery."""
        return recoveries(records)
