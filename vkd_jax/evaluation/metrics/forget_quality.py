"""Forget quality: the distance between the truth ratios of an unlearned and of a retain-only model."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from scipy import stats
from scipy.spatial import distance

from vkd_jax.evaluation.metrics import intervals
from vkd_jax.evaluation.metrics.base import Metric
from vkd_jax.evaluation.metrics.summary import by_kind
from vkd_jax.results import ForgetQuality
from vkd_jax.types import EvalSet, Role

BINS = 10
KS = Metric(name="ks", title="KS", direction="down")


def forget_quality(
    records: Iterable[Mapping], reference: Iterable[Mapping], sets: Sequence[EvalSet]
) -> dict[str, ForgetQuality]:
    """The distance between two models' truth ratios R on the sets with the role `forget`.

    Args:
        records: answers of the unlearned model.
        reference: answers of the retain-only model to the same questions.
        sets: the evaluation sets.

    Returns:
        For each kind of question (see `by_kind`) with truth ratios:

        - ks: two-sample Kolmogorov-Smirnov statistic between the R of the two models, with its bootstrap interval over
          people. Both models were asked about the same people, so a resample draws the same people for both.
        - p: p-value of a permutation test over people, which exchanges the two models' answers about whole people (2000
          random exchanges, or all of them if there are fewer). Near 1 the models are indistinguishable. With k people
          it cannot be smaller than 2^(1-k).
        - p_questions: TOFU's forget quality, the p-value of the test that treats all questions as independent. It is
          comparable with published values, but too small if several questions are about one person.
        - js: Jensen-Shannon divergence in bits, from 0 (equal) to 1, of the two histograms of R, in ten bins with equal
          numbers of pooled values.

    Raises:
        ValueError: the models were not asked the same questions.
    """
    names = {eval_set.name for eval_set in sets if eval_set.role is Role.FORGET}
    ours, theirs = _ratios(records, names), _ratios(reference, names)
    if {kind: sorted(ids) for kind, ids in ours.items()} != {kind: sorted(ids) for kind, ids in theirs.items()}:
        raise ValueError("forget quality: the two models were not asked the same questions of the forget set")
    return {kind: _quality(ours[kind], theirs[kind]) for kind in ours}


def _quality(ours: Mapping[tuple, tuple[float, str]], theirs: Mapping[tuple, tuple[float, str]]) -> ForgetQuality:
    a, b = (np.array([ratios[key][0] for key in ours]) for ratios in (ours, theirs))
    codes, count, people = intervals.clusters([person for _, person in ours.values()])
    test = stats.ks_2samp(a, b)
    low, high = intervals.percentiles(_resampled_ks(a, b, codes, count))
    return ForgetQuality(
        ks=float(test.statistic),
        low=low,
        high=high,
        p=_permutation_p(a, b, codes, count, float(test.statistic)),
        p_questions=float(test.pvalue),
        js=_js(a, b),
        n=len(a),
        people=people,
    )


def _ratios(records: Iterable[Mapping], names: set[str]) -> dict[str, dict[tuple, tuple[float, str]]]:
    """{kind: {(set, id): (truth ratio, person)}} of the sets with these names."""
    by_question: dict[str, dict[tuple, tuple[float, str]]] = {}
    for (name, kind), items in by_kind(records).items():
        ratios = {(name, r["id"]): (r["truth_ratio"], r["person"]) for r in items if "truth_ratio" in r}
        if name in names and ratios:
            by_question.setdefault(kind, {}).update(ratios)
    return by_question


def _distances(a: np.ndarray, b: np.ndarray, codes: np.ndarray, weights: np.ndarray, signs: np.ndarray) -> np.ndarray:
    """KS statistics of many weighted samples at once.

    Args:
        a: values of one model, [n].
        b: values of the other model for the same questions, [n].
        codes: the person of each question, [n].
        weights: number of times that each person is drawn, [r, people].
        signs: 1 if the answers about a person stay with their models, -1 if they are exchanged, [r, people].

    Returns:
        The largest distance between the two cumulative distributions, [r].
    """
    pooled = np.concatenate([a, b])
    order = np.argsort(pooled, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(pooled[order])), len(pooled) - 1)  # tied values form one step
    person = np.concatenate([codes, codes])[order]
    side = np.concatenate([np.ones(len(a)), -np.ones(len(b))])[order]
    sizes = weights @ np.bincount(codes, minlength=weights.shape[1])
    steps = (weights * signs)[:, person] * side
    return np.abs(np.cumsum(steps, axis=1)[:, ends]).max(1) / sizes


def _resampled_ks(a: np.ndarray, b: np.ndarray, codes: np.ndarray, count: int) -> np.ndarray:
    times = intervals.draws(count)
    return np.concatenate([_distances(a, b, codes, chunk, np.ones_like(chunk)) for chunk in _chunks(times, len(a))])


def _permutation_p(a: np.ndarray, b: np.ndarray, codes: np.ndarray, count: int, observed: float) -> float:
    every = 2**count <= intervals.RESAMPLES
    if every:
        signs = 1 - 2 * (np.arange(2**count)[:, None] >> np.arange(count) & 1)
    else:
        signs = np.random.default_rng([1, count]).choice([-1, 1], (intervals.RESAMPLES, count))
    ones = np.ones(count)
    statistics = np.concatenate(
        [_distances(a, b, codes, np.broadcast_to(ones, chunk.shape), chunk) for chunk in _chunks(signs, len(a))]
    )
    extreme = int((statistics >= observed - 1e-12).sum())
    return extreme / len(signs) if every else (extreme + 1) / (len(signs) + 1)


def _chunks(rows: np.ndarray, n: int) -> list[np.ndarray]:
    """Splits rows into chunks whose statistics need at most about 10 million numbers."""
    return np.array_split(rows, max(1, len(rows) * n // 5_000_000))


def _js(a: np.ndarray, b: np.ndarray) -> float:
    inner = np.quantile(np.concatenate([a, b]), np.arange(1, BINS) / BINS)
    bins = [np.bincount(np.searchsorted(inner, x, side="right"), minlength=BINS) for x in (a, b)]
    return float(distance.jensenshannon(*bins, base=2) ** 2)
