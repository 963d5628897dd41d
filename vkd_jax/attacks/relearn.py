"""Relearning: an attacker fine-tunes the model on a share of the forget set and is evaluated on the rest of it.

The share may count questions, people or images; the others are asked, see `lessons`. A recovery of 0 means that nothing
came back beyond the questions that were trained on, and 1 that everything did. The model also generalizes from the
attacker's share: the same attack on the retain-only model shows by how much.

Shares are prefixes of one random order, so a larger share contains the smaller ones. All attempts have a new Adam
optimizer. With several `steps` or `rates`, each attempt is one run per rate that is asked after each number of steps.
The most successful of these budgets counts, for the retain-only model as for every other.

References: Hu et al., "Jogging the memory of unlearned models through targeted relearning attacks", arXiv 2406.13356;
Lynch et al., arXiv 2402.16835.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
from absl import logging

from vkd_jax.attacks import base
from vkd_jax.attacks.base import Records, Subject
from vkd_jax.attacks.finetuning import Finetuning, Observer, finetune, rows_of
from vkd_jax.attacks.lessons import Lesson, labeled, lessons, recoveries
from vkd_jax.checkpoints.bundle import ModelBundle
from vkd_jax.config.fields import setting
from vkd_jax.data.encoding import EncodedSet
from vkd_jax.evaluation import evaluate
from vkd_jax.results import STRONGEST, UNCHANGED, AttackCell
from vkd_jax.types import Diverged, Example, NotFinite, Role, UserError


@dataclasses.dataclass(frozen=True)
class Relearn(Finetuning):
    """Fine-tunes each set of weights on each share of the forget set."""

    SECTION: ClassVar[str] = "attacks.relearn"
    shares: tuple[float, ...] = setting(
        (0.05, 0.1, 0.2, 0.5), "Shares of the forget questions with an image that are trained on.", above=0, below=1
    )
    people: tuple[float, ...] = setting(
        (0.5,),
        "Shares of the people to forget whose questions are all trained on; the other people are asked about.",
        above=0,
        below=1,
    )
    images: tuple[float, ...] = setting(
        (),
        "Shares of each person's images whose questions are all trained on; the other images are asked about.",
        above=0,
        below=1,
    )
    steps: tuple[int, ...] = setting(
        (25,), "Numbers of training steps after which each attempt is asked.", minimum=1, nonempty=True
    )
    rates: tuple[float, ...] = setting(
        (1.0,), "Factors of learning_rate; each attempt is repeated with each of them.", above=0, nonempty=True
    )
    max_items: int = setting(
        0, "Questions of each set and kind that are asked after each budget, drawn once; 0 asks all.", minimum=0
    )

    TITLE: ClassVar[str] = "Relearning: fine-tuning on a share of the forget set"
    ABOUT: ClassVar[str] = (
        "An attacker fine-tunes some or all weights on a share of the questions about the people to forget, or on all "
        "questions about a share of these people or of their images. The model is then asked the *other* questions, or "
        "those about the *other* people or images. Recovery is the share of the lost accuracy that comes back. Compare "
        "it with the accuracy of the retain-only model after the same attack, which includes what any model learns "
        "from the attacker's share. If the attacker tries several numbers of steps and learning rates, the strongest "
        "budget counts, which is chosen for each model by the accuracy that is shown."
    )
    METRIC: ClassVar[str] = "accuracy"
    VARIANTS: ClassVar[Mapping[str, str]] = {
        UNCHANGED: "before the attack",
        STRONGEST: "the strongest budget",
    }

    def run(self, subject: Subject) -> Records:
        """The answers before the attack and after each attempt."""
        sets = {
            name: evaluate.sample(examples, self.max_items, subject.seed, name)
            for name, examples in base.questions(subject, Role.FORGET, Role.FORGET_HOLDOUT).items()
        }
        records = [base.attack_record(UNCHANGED, r) for r in subject.unattacked(sets)]
        model = dataclasses.replace(subject.model, params=base.merged(subject.model.params))
        encoded = model.encode(subject.forgets)
        units = dict(questions=self.shares, people=self.people, images=self.images)
        for attacker in self.attackers:
            for lesson in lessons(subject.forgets, subject.seed, **units):
                for factor in self.rates:
                    rate = float(f"{factor * self.learning_rate:.12g}")  # 10 * 3e-4 is 3e-3
                    records += self._attempt(subject, model, attacker, encoded, lesson, rate, sets)
        return records

    def _attempt(
        self,
        subject: Subject,
        model: ModelBundle,
        attacker: str,
        encoded: EncodedSet,
        lesson: Lesson,
        learning_rate: float,
        sets: Mapping[str, Sequence[Example]],
    ) -> Records:
        """The answers after each number of steps of one training run."""
        records = []

        def ask(steps: int, attacked: ModelBundle) -> None:
            answers = subject.ask_sets(attacked, sets)
            budget = dict(steps=steps, batch_size=self.batch_size, learning_rate=learning_rate)
            fields = dict(attacker=attacker, **budget, share=lesson.share, unit=lesson.unit)
            answers = labeled(subject, answers, lesson.rows, lesson.people, **fields)
            others = [r["correct"] for r in answers if not r["taught"] and not r["trained_on"]]
            logging.info(
                "%s, relearning %s with %g %% of the %s, %d steps at %g: accuracy %.3f (n=%d)",
                *(subject.name, attacker, 100 * lesson.share, lesson.unit, steps, learning_rate),
                *(np.mean(others or [0]), len(others)),
            )
            records.extend(answers)

        observers = {steps: functools.partial(ask, steps) for steps in self.steps}
        try:
            self.attacked(model, attacker, rows_of(encoded, lesson.rows), subject.seed, learning_rate, observers)
        except (Diverged, NotFinite) as error:  # in a step, or after the last one, when the model answers
            if len(self.rates) == 1:
                raise UserError(
                    f"attacks.relearn: the {attacker} attack diverged ({error}); lower attacks.relearn.learning_rate."
                ) from error
            logging.warning("relearning %s at the rate %g diverged: %s", attacker, learning_rate, error)
        return records

    def attacked(
        self,
        model: ModelBundle,
        attacker: str,
        encoded: EncodedSet,
        seed: int,
        learning_rate: float | None = None,
        observers: Mapping[int, Observer] = {},  # noqa: B006 (never written to)
    ) -> ModelBundle:
        """Fine-tunes a copy of the model for the largest number of steps; see `finetuning.finetune`."""
        settings = self.training(max(self.steps), learning_rate or self.learning_rate)
        return finetune(model, attacker, encoded, settings, seed, observers, section=self.SECTION)

    def summarize(self, records: Mapping[str, Records]) -> list[AttackCell]:
        """The accuracy, recovery and accuracy on the attacker's share of each attempt, and the strongest budgets."""
        cells = recoveries(records)
        return cells + strongest(cells)


def strongest(cells: Sequence[AttackCell]) -> list[AttackCell]:
    """The most successful budget of each attempt, for each number of steps and for all, if several were tried.

    Its learning rate is None, since it differs between the models, and its interval is that of the budget.
    """
    cells = [cell for cell in cells if cell.attacker]
    if len({(cell.steps, cell.learning_rate) for cell in cells}) < 2:
        return []
    best: dict[tuple, AttackCell] = {}
    for cell in cells:
        any_rate = dataclasses.replace(cell, variant=STRONGEST, learning_rate=None, correct=None)
        for budget in (any_rate, dataclasses.replace(any_rate, steps=None)):
            key = (cell.model, *budget.key)
            if key not in best or cell.mean > best[key].mean:
                best[key] = budget
    return list(best.values())
