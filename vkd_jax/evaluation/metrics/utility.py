"""Model utility: what a model is still good at, after TOFU."""

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from scipy import stats

from vkd_jax.evaluation.metrics import intervals
from vkd_jax.evaluation.metrics.base import Metric
from vkd_jax.evaluation.metrics.likelihoods import LARGEST, truth_score
from vkd_jax.evaluation.metrics.summary import first_protocol
from vkd_jax.results import Component, Utility
from vkd_jax.types import EvalSet

UTILITY = Metric(name="utility", title="model utility", direction="up")


def components(record: Mapping) -> dict[str, float]:
    """What one record says of a model's usefulness; each component only where it was measured.

    - probability: of the answer, exp(-nll). For a question with options it is p(right) / sum of p over the right answer
      and the wrong ones, each p = exp(-nll), as TOFU does for real authors: chance gives 1 / options.
    - rouge_l_recall
    - truth_score: see `likelihoods.truth_score`.
    - accuracy: 1 or 0, for a question with options.
    """
    found = {}
    if "probability" in record:
        found["probability"] = record["probability"]
        if record["options"] and "perturbed_nll" in record:
            right, wrong = record["probability"], [math.exp(-x) for x in record["perturbed_nll"]]
            found["probability"] = right / max(right + sum(wrong), math.exp(-LARGEST))
    if "rouge_l_recall" in record:
        found["rouge_l_recall"] = record["rouge_l_recall"]
    if "truth_ratio" in record:
        found["truth_score"] = truth_score(record["truth_ratio"])
    if record["options"]:
        found["accuracy"] = float(record["correct"])
    return found


def model_utility(records: Iterable[Mapping], sets: Sequence[EvalSet]) -> Utility:
    """The harmonic mean of what the model is still good at, after TOFU.

    A component is the mean of one of `components` over one set, of all sets that do not ask about the people to
    forget: TOFU's answer probability, ROUGE-L recall and truth score of each set, and the accuracy of questions with
    options, which TOFU has not. Components that a set lacks are left out. Of two protocols, the first counts.

    Args:
        records: answers of the model.
        sets: the evaluation sets.

    Returns:
        The utility with its interval: in each resample, people are drawn anew within each set.

    Raises:
        ValueError: no set but those to be forgotten was asked.
    """
    records = list(records)
    first = first_protocol(records)
    asked: dict[str, list[Mapping]] = {eval_set.name: [] for eval_set in sets if not eval_set.role.forgets}
    for record in records:
        if record["set"] in asked and not (record["task"] == "classification" and record.get("protocol") != first):
            asked[record["set"]].append(record)
    means: dict[str, np.ndarray] = {}  # of a component: its mean, then that of each resample
    counts: dict[str, int] = {}
    for number, (name, items) in enumerate(sorted(asked.items())):
        scores = [components(item) for item in items]
        codes, count, _ = intervals.clusters([item["person"] for item in items])
        for measure in dict.fromkeys(measure for score in scores for measure in score):
            rows = [i for i, score in enumerate(scores) if measure in score]
            values = np.array([scores[i][measure] for i in rows])
            drawn = intervals.resampled_means(values, codes[rows], count, seed=number + 1)
            means[f"{name}/{measure}"] = np.append(values.mean(), drawn)
            counts[f"{name}/{measure}"] = len(rows)
    if not means:
        raise ValueError("no items to summarize: model utility needs a set that is not to be forgotten")
    names = sorted(means)
    value, *resampled = stats.hmean(np.stack([means[name] for name in names]), axis=0)
    low, high = intervals.percentiles(np.array(resampled))
    return Utility(float(value), low, high, {name: Component(float(means[name][0]), counts[name]) for name in names})
