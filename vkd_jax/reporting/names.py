"""Names for people: column headings, and what an attack tried. Results carry fields; only this module words them."""

from collections.abc import Mapping, Sequence

from vkd_jax.evaluation import metrics
from vkd_jax.results import AttackCell
from vkd_jax.types import EvalSet, Role

TASKS = {"": "", "generation": ", open", "cloze": ", cloze"}


def heading(eval_set: EvalSet, kind: str, metric: str = "accuracy") -> str:
    """The column heading of one kind of question of a set, with the arrow of the metric.

    Example:
        >>> heading(EvalSet("real", "general", "general ability", "real"), "generation_qa")
        'real QA, open ↑'
    """
    return f"{short_name(eval_set, kind)} {metrics.get(metric).arrow(eval_set.role, kind)}"


def short_name(eval_set: EvalSet, kind: str) -> str:
    """A set and a kind of question without an arrow, e.g. "retain test VQA"."""
    task, _, rest = kind.rpartition("_") if kind.endswith("qa") else ("", "", kind)
    modality, _, protocol = rest.partition("_")
    protocol = protocol and f", {protocol}"
    return f"{eval_set.short} {modality.upper()}{TASKS.get(task, f', {task}')}{protocol}"


def attempt(cell: AttackCell, variants: Mapping[str, str], sets: Sequence[EvalSet]) -> str:
    """What an attack tried, and whom it was asked about.

    Args:
        cell: one figure of the attack.
        variants: the titles of the attack's variants.
        sets: the evaluation sets. The forget set goes unnamed.

    Example:
        >>> forget = EvalSet("forget", "forget", "people to forget", "forget")
        >>> attempt(AttackCell("vanilla", "forget", 0.5, 4, attacker="all", share=0.25, unit="questions"), {}, [forget])
        'all 25 %'
    """
    words = [variants.get(cell.variant, cell.variant)] if cell.variant else []
    if cell.attacker and cell.share is not None:
        words.append(f"{cell.attacker} {100 * cell.share:g} %{' of the people' if cell.unit == 'people' else ''}")
    asked = next((s for s in sets if s.name == cell.set), None)
    if asked and asked.role is not Role.FORGET:
        words.append(asked.short)
    if cell.taught:
        words.append("people who were taught")
    return ", ".join(words)
