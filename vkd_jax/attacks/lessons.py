"""The questions that an attacker trains on, those that are evaluated after the attack, and recovery.

    recovery = (A_after - A_before) / (A_vanilla - A_before)

over the questions that the attacker was *not* given the answers of. A_before and A_after are the accuracies of the
attacked model before and after the attack, and A_vanilla is that of the vanilla model.
"""

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from vkd_jax.attacks import base
from vkd_jax.attacks.base import Records, Subject
from vkd_jax.data.batching import rng
from vkd_jax.results import UNCHANGED, AttackCell
from vkd_jax.types import Example, Role


@dataclasses.dataclass(frozen=True)
class Lesson:
    """The forget questions whose answers an attacker has."""

    unit: str  # of the share: questions, people or images
    share: float
    rows: np.ndarray  # int [n], rows of `Subject.forgets`
    people: frozenset[str] = frozenset()  # of whom the attacker has all questions, if the share counts people


def lessons(
    forgets: Sequence[Example],
    seed: int,
    *,
    questions: Iterable[float] = (),
    people: Iterable[float] = (),
    images: Iterable[float] = (),
) -> list[Lesson]:
    """The lesson of each share of the questions, of the people, and of each person's images."""
    results = [Lesson("questions", share, attacker_rows(share, len(forgets), seed)) for share in questions]
    names = sorted({e.person for e in forgets if e.person})
    for share in people if len(names) > 1 else ():
        chosen = frozenset(names[i] for i in attacker_rows(share, len(names), seed)[: len(names) - 1])
        rows = np.array([i for i, e in enumerate(forgets) if e.person in chosen])
        results.append(Lesson("people", share, rows, chosen))
    for share in images:
        shown = set()
        for person in names:
            ids = sorted({e.image_id for e in forgets if e.person == person})
            shown |= {ids[i] for i in attacker_rows(share, len(ids), seed)[: len(ids) - 1]}
        if shown:
            results.append(Lesson("images", share, np.array([i for i, e in enumerate(forgets) if e.image_id in shown])))
    return results


def attacker_rows(share: float, count: int, seed: int) -> np.ndarray:
    """Sorted indices of the questions, people or images that an attacker has: at least one, nested over shares."""
    return np.sort(rng(seed, "relearn").permutation(count)[: max(1, round(share * count))])


def labeled(
    subject: Subject,
    answers: Records,
    rows: Iterable[int],
    people: Collection[str] = (),
    variant: str = "",
    **fields: Any,
) -> Records:
    """Records of one attempt, with flags for questions, and for people, that the attacker was given the answers of.

    Args:
        subject: the attacked model.
        answers: records of `Subject.ask_sets`.
        rows: the forget questions that the attacker trained on.
        people: the people whose questions are all among these.
        variant: of the attempt.
        **fields: that describe the attempt.
    """
    known = {(subject.forgets[i].image_id, subject.forgets[i].question) for i in rows}
    forget_sets = subject.with_role(Role.FORGET)
    records = []
    for record in answers:
        trained_on = record["set"] in forget_sets and (record["image_id"], record["question"]) in known
        flags = dict(taught=not trained_on and record["person"] in people, trained_on=trained_on)
        records.append(base.attack_record(variant, record, **fields, **flags))
    return records


def recoveries(records: Mapping[str, Records]) -> list[AttackCell]:
    """Accuracies on the questions that an attacker was not given the answers of, with what the attempt recovered.

    The cells of an attempt also have the accuracy before it on the same questions, and the recovery, which is None if
    the vanilla model is not better than the model before the attack. `learned` of a cell is the accuracy on the
    attacker's own share, or None if the evaluation asks none of its questions.

    Args:
        records: of each model; those of the variant `UNCHANGED` are before the attack.
    """
    verdicts = {
        model: {(r["set"], r["id"]): r["correct"] for r in items if r["variant"] == UNCHANGED}
        for model, items in records.items()
    }
    asked = {model: [r for r in rs if not r.get("trained_on")] for model, rs in records.items()}
    cells = base.accuracy(asked)
    learned = base.accuracy({model: [r for r in rs if r.get("trained_on")] for model, rs in records.items()})
    trained_on = {(cell.model, cell.key): cell.mean for cell in learned}
    items = [items for model in asked.values() for _, items in base.grouped(model)]  # in the order of the cells
    return [
        cell if cell.variant == UNCHANGED else _recovered(cell, group, verdicts, trained_on)
        for cell, group in zip(cells, items, strict=True)
    ]


def _recovered(cell: AttackCell, items: Records, verdicts: Mapping, trained_on: Mapping) -> AttackCell:
    """The cell of these records with `before`, `recovery` and `learned`."""
    before, vanilla = (
        float(np.mean([verdicts[name][r["set"], r["id"]] for r in items])) if name in verdicts else None
        for name in (cell.model, "vanilla")
    )
    known = None if cell.taught else trained_on.get((cell.model, cell.key))
    return dataclasses.replace(cell, before=before, recovery=recovery(cell.mean, before, vanilla), learned=known)


def recovery(after: float, before: float, vanilla: float | None) -> float | None:
    """The share of the lost accuracy that an attack recovered; None if no accuracy was lost."""
    if vanilla is None or vanilla <= before:
        return None
    return (after - before) / (vanilla - before)
