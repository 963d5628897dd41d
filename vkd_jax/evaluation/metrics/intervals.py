"""95 % intervals that resample people, not questions.

The answers to questions about one person are correlated, so an interval over questions would be too narrow. Each
resample draws people with replacement, each with all questions about them (cluster bootstrap, 2000 resamples, seeded).
A question about no person is its own cluster, so sets about no person are resampled by question; their figures have
`people` = 0. The questions of a standard suite are resampled by `Group`, such as an image; they have `people` = 0, too.

Reference: Field and Welsh (2007), Bootstrapping clustered data.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from vkd_jax.results import Figure

RESAMPLES = 2000
_Z = 1.959963984540054  # 97.5 % quantile of the normal distribution


class Group(NamedTuple):
    """The group by which the questions of a standard suite are resampled, such as their image."""

    name: str


Cluster = str | Group  # the person that a question is about, "" for no person, or the group of a suite


def cluster_of(record: Mapping) -> Cluster:
    """The cluster of a record of the answers."""
    return Group(record["group"]) if record.get("group") else record["person"]


def clusters(people: Sequence[Cluster]) -> tuple[np.ndarray, int, int]:
    """Groups questions by person or group.

    Args:
        people: the cluster of each question.

    Returns:
        (codes, count, named): the cluster of each question, int [n]; the number of clusters; the number of people.
    """
    keys = [("person", person) if person else ("question", i) for i, person in enumerate(people)]
    index = {key: code for code, key in enumerate(dict.fromkeys(keys))}
    codes = np.array([index[key] for key in keys], np.int64)
    return codes, len(index), len({person for person in people if person and isinstance(person, str)})


@functools.lru_cache(maxsize=8)  # consecutive figures are often of one set
def draws(count: int, seed: int = 0) -> np.ndarray:
    """Number of times that each cluster is drawn in each resample: float [RESAMPLES, count]."""
    times = np.random.default_rng([seed, count]).multinomial(count, np.full(count, 1 / count), RESAMPLES)
    return times.astype(float)


def resampled_means(values: np.ndarray, codes: np.ndarray, count: int, seed: int = 0) -> np.ndarray:
    """The mean of each resample: float [RESAMPLES], NaN if none of the drawn clusters has a value."""
    times = draws(count, seed)
    sums, sizes = (np.bincount(codes, weights, count) for weights in (values, None))
    with np.errstate(invalid="ignore", divide="ignore"):
        return (times @ sums) / (times @ sizes)


def percentiles(resampled: np.ndarray) -> tuple[float, float]:
    """The 2.5 % and 97.5 % percentiles of resampled figures."""
    low, high = np.nanpercentile(resampled, [2.5, 97.5])
    return float(low), float(high)


def mean(values: Sequence[float], people: Sequence[Cluster]) -> Figure:
    """The mean of at least one value, with its interval.

    Args:
        values: one per question.
        people: the person that each question is about, "" for no person.

    Example:
        >>> mean([1.0, 1.0, 0.0], ["ann", "ann", "bob"])
        Figure(mean=0.6666666666666666, low=0.0, high=1.0, n=3, people=2)
    """
    values = np.asarray(values, float)
    codes, count, named = clusters(people)
    low, high = percentiles(resampled_means(values, codes, count))
    return Figure(float(values.mean()), low, high, len(values), named)


def proportion(correct: Sequence[bool], people: Sequence[Cluster]) -> Figure:
    """The share of correct answers, with its interval.

    If every person has the same share of correct answers, for example 0 % or 100 %, all resamples agree and the
    bootstrap interval has no width. The result is then the Wilson interval for one answer per cluster.

    Args:
        correct: one per question.
        people: the person that each question is about, "" for no person.
    """
    figure = mean(correct, people)
    if figure.low < figure.high:
        return figure
    low, high = wilson(figure.mean, clusters(people)[1])
    return Figure(figure.mean, low, high, figure.n, figure.people)


def ratio(pairs: Sequence[tuple[float, float]], people: Sequence[Cluster]) -> Figure:
    """The ratio of two sums, with its interval; 0 if the denominator is 0.

    Args:
        pairs: numerator and denominator of each question.
        people: the cluster of each question.

    Example:
        >>> ratio([(1, 2), (1, 1), (0, 1)], ["ann", "ann", "bob"]).mean
        0.5
    """
    values = np.asarray(pairs, float)
    codes, count, named = clusters(people)
    times = draws(count)
    tops, bottoms = (times @ np.bincount(codes, column, count) for column in values.T)
    low, high = percentiles(np.divide(tops, bottoms, out=np.zeros_like(tops), where=bottoms > 0))
    top, bottom = values.sum(0)
    return Figure(float(top / bottom) if bottom else 0.0, low, high, len(values), named)


def all_correct(correct: Sequence[bool], people: Sequence[Cluster]) -> Figure:
    """The share of clusters whose questions are all answered correctly, with its interval; `n` counts clusters."""
    codes, count, named = clusters(people)
    whole = np.bincount(codes, ~np.asarray(correct, bool), count) == 0
    figure = proportion(whole, [""] * count)
    return Figure(figure.mean, figure.low, figure.high, count, named)


def wilson(share: float, n: float) -> tuple[float, float]:
    """95 % Wilson score interval of a proportion.

    It stays inside [0, 1], and has a positive width at 0 % and at 100 %.

    Args:
        share: between 0 and 1.
        n: number of independent observations, at least 1.

    Returns:
        (low, high).

    Raises:
        ValueError: the share or the number is outside its range.

    Reference: Wilson (1927), Probable inference, the law of succession, and statistical inference.
    """
    if not 0 <= share <= 1 or n < 1:
        raise ValueError(f"a share of {share} of {n} observations is impossible")
    center = (share + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    margin = _Z / (1 + _Z**2 / n) * np.sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2))
    return float(max(0.0, center - margin)), float(min(1.0, center + margin))


def auc(members: Mapping[str, Sequence[float]], others: Mapping[str, Sequence[float]]) -> Figure:
    """Area under the ROC curve: how often a member's score is above another's, ties counting half.

    It is the Mann-Whitney statistic over the number of pairs. The interval resamples people, members and others each
    among their own.

    Args:
        members: the scores of each person, at least one of each.
        others: the same.

    Reference: Hanley and McNeil (1982), The meaning and use of the area under a ROC curve.
    """
    a, b = (np.concatenate([np.asarray(scores, float) for scores in group.values()]) for group in (members, others))
    wins = (a[:, None] > b) + 0.5 * (a[:, None] == b)
    drawn_a, drawn_b = (
        np.repeat(draws(len(group), seed), [len(scores) for scores in group.values()], axis=1)
        for seed, group in enumerate((members, others))
    )
    low, high = percentiles(((drawn_a @ wins) * drawn_b).sum(1) / (drawn_a.sum(1) * drawn_b.sum(1)))
    return Figure(float(wins.mean()), low, high, len(a) + len(b), len(members) + len(others))
