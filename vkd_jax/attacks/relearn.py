"""Relearning: an attacker fine-tunes the model on a share of the forget set, and the rest of the forget set is asked.

    recovery = (A_after - A_before) / (A_vanilla - A_before)

over the forget questions that the attacker did *not* train on: other questions about the same people or, if the share
counts people, the questions about the other people. A_before and A_after are the accuracies of the attacked model
before and after the attack, and A_vanilla is that of the vanilla model. A recovery of 0 means that nothing came back
beyond the questions that were trained on, and 1 that everything did. The model also generalizes from the attacker's
share: the same attack on the retain-only model shows by how much.

Shares are prefixes of one random order, so a larger share contains the smaller ones. All attempts have the same budget:
steps, batch size and learning rate, with a new Adam optimizer.

References: Hu et al., "Jogging the memory of unlearned models through targeted relearning attacks", arXiv 2406.13356;
Lynch et al., arXiv 2402.16835.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from absl import logging

from vkd_jax.attacks import base
from vkd_jax.attacks.base import Records, Subject
from vkd_jax.checkpoints.bundle import ModelBundle
from vkd_jax.config.fields import FieldError, Section, setting
from vkd_jax.config.schema import RunConfig
from vkd_jax.config.training import TrainConfig
from vkd_jax.data.augment import REPEATED_FIELDS
from vkd_jax.data.batching import rng
from vkd_jax.data.encoding import EncodedSet
from vkd_jax.methods.base import Prepared
from vkd_jax.methods.finetune import Finetune
from vkd_jax.methods.scope import TRAIN_SCOPES
from vkd_jax.results import UNCHANGED, AttackCell
from vkd_jax.runtime.mesh import make_mesh, shards
from vkd_jax.training import loop
from vkd_jax.types import Diverged, Role, UserError


@dataclasses.dataclass(frozen=True)
class Relearn(Section):
    """Fine-tunes each set of weights on each share of the forget set."""

    SECTION: ClassVar[str] = "attacks.relearn"
    attackers: tuple[str, ...] = setting(
        ("visual", "all"), "Weights that each attacker trains, as for `method.train`.", choices=TRAIN_SCOPES
    )
    shares: tuple[float, ...] = setting(
        (0.05, 0.1, 0.2, 0.5), "Shares of the forget questions with an image that are trained on.", above=0, below=1
    )
    people: tuple[float, ...] = setting(
        (0.5,),
        "Shares of the people to forget whose questions are all trained on; the other people are asked about.",
        above=0,
        below=1,
    )
    steps: int = setting(25, "Training steps of each attempt.", minimum=1)
    batch_size: int = setting(16, "Examples per step.", minimum=1)
    learning_rate: float = setting(3e-4, "Constant learning rate.", above=0)

    TITLE: ClassVar[str] = "Relearning: fine-tuning on a share of the forget set"
    ABOUT: ClassVar[str] = (
        "An attacker fine-tunes some or all weights on a share of the questions about the people to forget, or on all "
        "questions about a share of these people. The model is then asked the *other* questions, or those about the "
        "*other* people. Recovery is the share of the lost accuracy that comes back. Compare it with the accuracy of "
        "the retain-only model after the same attack, which includes what any model learns from the attacker's share."
    )
    METRIC: ClassVar[str] = "accuracy"
    VARIANTS: ClassVar[Mapping[str, str]] = {UNCHANGED: "before the attack"}

    def check(self, config: RunConfig) -> None:
        """Validates the attackers and the batch size against the run.

        Raises:
            UserError: an attacker cannot train a quantized model, or the mesh does not divide the batch size.
        """
        if "all" in self.attackers and config.model.quantize:
            raise self.error(
                "attackers",
                "'all' cannot train the language model, which model.quantize quantizes. Give ('visual',) or "
                "('visual', 'lora'), or leave model.quantize empty.",
            )
        try:
            self.training.rows("image", shards(make_mesh(**dataclasses.asdict(config.mesh))))
        except FieldError as error:
            raise self.error("batch_size", error.problem) from None

    def run(self, subject: Subject) -> Records:
        """The answers before the attack and after each attempt."""
        sets = base.questions(subject, Role.FORGET, Role.FORGET_HOLDOUT)
        records = [base.attack_record(UNCHANGED, r) for r in subject.unattacked(sets)]
        model = dataclasses.replace(subject.model, params=base.merged(subject.model.params))
        encoded = model.encode(subject.forgets)
        people = sorted({e.person for e in subject.forgets if e.person})
        attempts = [("questions", share) for share in self.shares]
        attempts += [("people", share) for share in self.people if len(people) > 1]
        for attacker in self.attackers:
            for unit, share in attempts:
                if unit == "questions":
                    trained_people, rows = set(), self.rows(share, len(encoded), subject.seed)
                else:
                    chosen = self.rows(share, len(people), subject.seed)[: len(people) - 1]
                    trained_people = {people[i] for i in chosen}
                    rows = np.array([i for i, e in enumerate(subject.forgets) if e.person in trained_people])
                after = subject.ask_sets(self.attacked(model, attacker, rows_of(encoded, rows), subject.seed), sets)
                budget = dict(steps=self.steps, batch_size=self.batch_size, learning_rate=self.learning_rate)
                fields = dict(attacker=attacker, **budget, share=share, unit=unit)
                answers = self._labeled(subject, after, rows, trained_people, fields)
                others = [r["correct"] for r in answers if not r["taught"] and not r["trained_on"]]
                logging.info(
                    "%s, relearning %s with %g %% of the %s: accuracy %.3f (n=%d)",
                    *(subject.name, attacker, 100 * share, unit, np.mean(others or [0]), len(others)),
                )
                records += answers
        return records

    def _labeled(
        self, subject: Subject, answers: Records, rows: np.ndarray, people: set[str], fields: Mapping[str, Any]
    ) -> Records:
        """Records of one attempt, with flags for questions, and for people, that the attacker trained on."""
        known = {(subject.forgets[i].image_id, subject.forgets[i].question) for i in rows}
        forget_sets = subject.with_role(Role.FORGET)
        records = []
        for record in answers:
            trained_on = record["set"] in forget_sets and (record["image_id"], record["question"]) in known
            flags = dict(taught=not trained_on and record["person"] in people, trained_on=trained_on)
            records.append(base.attack_record("", record, **fields, **flags))
        return records

    def rows(self, share: float, count: int, seed: int) -> np.ndarray:
        """Sorted indices of the questions, or people, that the attacker has: at least one, nested over shares."""
        return np.sort(rng(seed, "relearn").permutation(count)[: max(1, round(share * count))])

    def attacked(self, model: ModelBundle, attacker: str, encoded: EncodedSet, seed: int) -> ModelBundle:
        """Fine-tunes a copy of the model.

        Raises:
            UserError: the loss became NaN or infinite.
        """
        method = Finetune(train=attacker)
        model = model.prepare_for(method, seed=seed)
        try:
            trained = loop.fit(
                model,
                method,
                Prepared(sets={"image": encoded}),
                self.training,
                seed=seed,
                folder=None,  # no checkpoints: an attempt takes seconds, and an interrupted one starts over
            )
        except Diverged as error:
            raise UserError(
                f"attacks.relearn: the {attacker} attack diverged ({error}); lower attacks.relearn.learning_rate."
            ) from error
        return dataclasses.replace(model, params={**model.params, **trained})

    def summarize(self, records: Mapping[str, Records]) -> list[AttackCell]:
        """Accuracies; the cells of an attempt also have the accuracy before it on the same questions, and the recovery.

        `learned` of a cell is the accuracy on the attacker's own share, or None if the evaluation asks none of its
        questions. The recovery is None if the vanilla model is not better than the model before the attack.
        """
        verdicts = {
            model: {(r["set"], r["id"]): r["correct"] for r in items if r["variant"] == UNCHANGED}
            for model, items in records.items()
        }
        cells = base.accuracy({model: [r for r in rs if not r.get("trained_on")] for model, rs in records.items()})
        learned = base.accuracy({model: [r for r in rs if r.get("trained_on")] for model, rs in records.items()})
        trained_on = {(cell.model, cell.key): cell.mean for cell in learned}
        return [
            cell if cell.variant == UNCHANGED else self._recovered(cell, records, verdicts, trained_on)
            for cell in cells
        ]

    def _recovered(self, cell: AttackCell, records: Mapping, verdicts: Mapping, trained_on: Mapping) -> AttackCell:
        """The cell with `before`, `recovery` and `learned`."""
        items = [
            record
            for fields, group in base.grouped(records[cell.model])
            if all(getattr(cell, name) == value for name, value in fields.items())
            for record in group
            if not record["trained_on"]
        ]
        before, vanilla = (
            float(np.mean([verdicts[name][r["set"], r["id"]] for r in items])) if name in verdicts else None
            for name in (cell.model, "vanilla")
        )
        known = None if cell.taught else trained_on.get((cell.model, cell.key))
        return dataclasses.replace(cell, before=before, recovery=recovery(cell.mean, before, vanilla), learned=known)

    @property
    def training(self) -> TrainConfig:
        """Settings of an attacker's training loop."""
        return TrainConfig(
            steps=self.steps,
            batch_size={"image": self.batch_size},
            learning_rate=self.learning_rate,
            schedule="constant",
            warmup_steps=0,
            weight_decay=0.0,
            log_every=self.steps,
            checkpoint_every=self.steps,
        )


def recovery(after: float, before: float, vanilla: float | None) -> float | None:
    """The share of the lost accuracy that an attack recovered; None if no accuracy was lost."""
    if vanilla is None or vanilla <= before:
        return None
    return (after - before) / (vanilla - before)


def rows_of(encoded: EncodedSet, rows: np.ndarray) -> EncodedSet:
    """Selects rows of a set without caches. Sequence lengths and images stay, so that no program is compiled again."""
    fields = {name: getattr(encoded, name) for name in (*REPEATED_FIELDS, "image_rows")}
    return dataclasses.replace(
        encoded,
        examples=tuple(encoded.examples[i] for i in rows),
        **{name: None if value is None else value[rows] for name, value in fields.items()},
    )
