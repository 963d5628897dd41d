"""Metrics of the likelihood that a model gives to true and false answers.

    nll          = -log p(answer and end of sequence | question, image) / number of tokens
    probability  = exp(-nll of the answer)
    truth ratio  = exp(mean over wrong answers of their nll - nll of the paraphrased answer)

A truth ratio above 1 means that the model prefers the true answer. Definitions follow TOFU (Maini et al., arXiv
2401.06121, and `aggregate_eval_stat.py` of its code).
"""

import math
from collections.abc import Mapping, Sequence

from vkd_jax.evaluation.metrics.base import Metric, rule_of
from vkd_jax.types import Role

LARGEST = 700.0  # the largest exponent whose exp is a finite float


def likelihood(answer: float, wrong: Sequence[float] = (), paraphrase: float | None = None) -> dict:
    """The likelihood metrics of one question.

    Args:
        answer: nll of the answer, in nats per token.
        wrong: nll of each wrong answer.
        paraphrase: nll of the paraphrased answer; None for that of the answer.

    Returns:
        {"answer_nll", "probability"}, and with wrong answers {"paraphrase_nll", "perturbed_nll", "truth_ratio"}. The
        ratio is clipped to [exp(-700), exp(700)].
    """
    record = {"answer_nll": float(answer), "probability": math.exp(-answer)}
    if len(wrong):
        paraphrase = float(answer if paraphrase is None else paraphrase)
        exponent = sum(wrong) / len(wrong) - paraphrase
        record |= {
            "paraphrase_nll": paraphrase,
            "perturbed_nll": [float(x) for x in wrong],
            "truth_ratio": math.exp(min(max(exponent, -LARGEST), LARGEST)),
        }
    return record


def truth_score(truth_ratio: float) -> float:
    """max(0, 1 - 1 / truth ratio): 0 if the model prefers the wrong answers, near 1 if it knows the truth."""
    return max(0.0, 1 - 1 / truth_ratio)


def normalized_probability(probability: float, wrong: Sequence[float]) -> float:
    """p(answer) / sum of p over the answer and the wrong answers, each p = exp(-nll): at chance 1 / their number."""
    return probability / max(probability + sum(math.exp(-x) for x in wrong), math.exp(-LARGEST))


def _truth_ratio_forget(record: Mapping) -> float | None:
    if rule_of(record)[0] != "fiubench" or "truth_ratio" not in record:
        return None
    return min(record["truth_ratio"], 1 / record["truth_ratio"])


def _probability_retain(record: Mapping) -> float | None:
    if rule_of(record)[0] != "fiubench" or "perturbed_nll" not in record:
        return None
    return normalized_probability(record["probability"], record["perturbed_nll"])


def _truth_score(record: Mapping) -> float | None:
    return truth_score(record["truth_ratio"]) if "truth_ratio" in record else None


PROBABILITY = Metric(
    name="probability",
    title="probability of the answer per token",
    direction="by_role",
    item=lambda record: record.get("probability"),
)
TRUTH_SCORE = Metric(name="truth_score", title="truth score", direction="by_role", item=_truth_score, in_report=False)
TRUTH_RATIO_FORGET = Metric(
    name="truth_ratio_forget",
    title="truth ratio min(R, 1/R) (FIUBench)",
    direction="up",
    tasks=("generation",),
    roles=(Role.FORGET,),
    item=_truth_ratio_forget,
)
PROBABILITY_RETAIN = Metric(
    name="probability_retain",
    title="probability among the wrong answers (FIUBench)",
    direction="up",
    tasks=("generation",),
    roles=(Role.RETAIN,),
    item=_probability_retain,
)
