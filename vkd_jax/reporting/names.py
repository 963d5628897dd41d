"""Titles of models, attackers, sets and attempts, from the fields that results carry.

Titles of metrics are in `evaluation.metrics`, those of sets in `EvalSet`, and those of the kinds of questions in
`finished_run.KINDS`.
"""

from collections.abc import Iterable, Mapping, Sequence

from vkd_jax.evaluation import metrics
from vkd_jax.results import STRONGEST, AttackCell
from vkd_jax.types import EvalSet, Role

MODELS = {"vanilla": "vanilla", "unlearned": "unlearned", "retain_only": "retain-only"}  # in the order of the report
MODEL_NOTES = {"vanilla": "before unlearning", "unlearned": "after unlearning", "retain_only": "never saw the people"}
ATTACKERS = {  # the weights that a relearning attacker trains
    "visual": "the visual weights",
    "lora": "adapters of the language model",
    "visual+lora": "vision tower, projector, and adapters of the language model",
    "all": "all weights",
    "soft_tokens": "soft tokens before each image",
}
RELEARNED_SHARE = 0.2  # of the forget set that an attacker relearns; summaries show the attempt with the nearest share
MODALITIES = {"vqa": "with image", "qa": "text only"}
TASKS = {"": "", "generation": ", open", "cloze": ", cloze", "suite": ""}


def heading(eval_set: EvalSet, kind: str, metric: str = "accuracy") -> str:
    """The column heading of one kind of question of a set, with the arrow of the metric.

    Example:
        >>> heading(EvalSet("real", "general", "general ability", "real"), "generation_qa")
        'real QA, open ↑'
    """
    return f"{short_name(eval_set, kind)} {metrics.get(metric).arrow(eval_set.role_of(kind))}"


def short_name(eval_set: EvalSet, kind: str) -> str:
    """The short title of a set and a kind of question, without an arrow.

    Example:
        >>> short_name(EvalSet("test", "forget_holdout", "people to forget, other images", "test"), "vqa")
        'test VQA'
    """
    task, _, rest = kind.rpartition("_") if kind.endswith("qa") else ("", "", kind)
    modality, _, protocol = rest.partition("_")
    protocol = protocol and f", {protocol}"
    return f"{eval_set.short} {modality.upper()}{TASKS.get(task, f', {task}')}{protocol}"


def metric_heading(name: str, detail: str = "") -> str:
    """The column heading of a metric of whole models, with its arrow.

    Example:
        >>> metric_heading("recovery", "all")
        'recovery, all ↓'
    """
    metric = metrics.get(name)
    return f"{metric.title}{detail and f', {detail}'} {metric.arrow()}"


def attacker(name: str) -> str:
    """The title of a relearning attacker, by what it trains."""
    return ATTACKERS.get(name, name)


def several_budgets(cells: Iterable[AttackCell]) -> bool:
    """Whether the attackers of these cells have different budgets, so that titles have to tell them."""
    budgets = {(cell.steps, cell.learning_rate) for cell in cells if cell.attacker and cell.variant != STRONGEST}
    return len(budgets) > 1


def attempt(cell: AttackCell, variants: Mapping[str, str], sets: Sequence[EvalSet], budget: bool = False) -> str:
    """The title of one attempt of an attack: what was tried, and on which set of questions.

    Args:
        cell: one figure of the attack.
        variants: the titles of the attack's variants.
        sets: the evaluation sets. The forget set is not named.
        budget: whether to tell the attacker's steps and learning rate.

    Example:
        >>> forget = EvalSet("forget", "forget", "people to forget", "forget")
        >>> attempt(AttackCell("vanilla", "forget", 0.5, 4, attacker="all", share=0.25, unit="questions"), {}, [forget])
        'fine-tuning all weights on 25 % of the questions'
    """
    words = [variants.get(cell.variant, cell.variant)] if cell.variant else []
    share = "" if cell.share is None else f"{100 * cell.share:g} % of the {cell.unit or 'questions'}"
    if cell.attacker:
        words.append(f"fine-tuning {attacker(cell.attacker)}" + (share and f" on {share}"))
    elif share:
        words.append(f"the attacker knows {share}")
    if cell.steps and (budget or cell.variant == STRONGEST):
        words.append(f"{cell.steps} steps" + (f" at {cell.learning_rate:g}" if cell.learning_rate else ""))
    eval_set = next((s for s in sets if s.name == cell.set), None)
    if eval_set and eval_set.role is not Role.FORGET:
        words.append(eval_set.title)
    if cell.taught:
        words.append("people whom the attacker trained on")
    return "; ".join(words)
