"""Model utility, after TOFU: the performance of a model on everything but the people to forget."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from scipy import stats

from vkd_jax.evaluation.metrics import intervals
from vkd_jax.evaluation.metrics.base import Metric, rule_of
from vkd_jax.evaluation.metrics.keywords import EM
from vkd_jax.evaluation.metrics.likelihoods import normalized_probability, truth_score
from vkd_jax.evaluation.metrics.summary import first_protocol
from vkd_jax.results import Component, Utility
from vkd_jax.types import EvalSet

UTILITY = Metric(name="utility", title="model utility", direction="up")


def components(record: Mapping) -> dict[str, float]:
    """The components of model utility that one record has.

    - probability: of the answer, exp(-nll). For a question with options it is p(correct) / sum of p over the correct
      and the wrong answers, each p = exp(-nll), as TOFU does for real authors: at chance it is 1 / options.
    - rouge_l_recall
    - truth_score: see `likelihoods.truth_score`.
    - accuracy: 1 or 0, for a question with options or of a standard suite.
    - em: keyword EM, for questions of FIUBench, whose probability is that among the wrong answers, too.
    """
    values = {}
    if "probability" in record:
        values["probability"] = record["probability"]
        among_wrong = record["options"] or rule_of(record)[0] == "fiubench"
        if among_wrong and "perturbed_nll" in record:
            values["probability"] = normalized_probability(record["probability"], record["perturbed_nll"])
    if "rouge_l_recall" in record:
        values["rouge_l_recall"] = record["rouge_l_recall"]
    if "truth_ratio" in record:
        values["truth_score"] = truth_score(record["truth_ratio"])
    if record["options"] or "suite" in record:
        values["accuracy"] = float(record["correct"])
    if (matches := EM.value(record)) is not None:
        values["em"] = matches
    return values


def model_utility(records: Iterable[Mapping], sets: Sequence[EvalSet]) -> Utility:
    """The harmonic mean of components, after TOFU.

    A component is the mean of one of `components` over one set. The sets are those that do not ask about the people to
    forget. TOFU has the answer probability, ROUGE-L recall and truth score of each set; the accuracy on questions with
    options is added. Components that a set lacks are left out. Of several protocols, the first counts.

    Args:
        records: answers of the model.
        sets: the evaluation sets.

    Returns:
        The utility with its interval: each resample draws people within each set.

    Raises:
        ValueError: no set without people to forget was asked.
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
        codes, count, _ = intervals.clusters([intervals.cluster_of(item) for item in items])
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
