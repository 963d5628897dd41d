"""Forget quality: how alike the truth ratios of an unlearned model and of a retain-only model are."""

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
        reference: answers of the model that never saw the forget set, to the same questions.
        sets: the evaluation sets.

    Returns:
        For each kind of question (see `by_kind`) with truth ratios:

        - ks: two-sample Kolmogorov-Smirnov statistic between the two models' R, with its bootstrap interval over
          people. Both models were asked about the same people, so that a resample draws them for both.
        - p: p-value of the permutation test that exchanges the two models' answers about whole people (2000 random
          exchanges, or all of them where there are fewer). Near 1 the models cannot be told apart. With k people it
          cannot fall below 2^(1-k).
        - p_questions: TOFU's forget quality, the p-value of the test that takes all questions for independent. It is
          comparable with published figures, and too small where one person is asked about several times.
        - js: Jensen-Shannon divergence in bits, from 0 (alike) to 1, of the two histograms of R, in ten bins that
          share the items of both models equally.

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
    found: dict[str, dict[tuple, tuple[float, str]]] = {}
    for (name, kind), items in by_kind(records).items():
        ratios = {(name, r["id"]): (r["truth_ratio"], r["person"]) for r in items if "truth_ratio" in r}
        if name in names and ratios:
            found.setdefault(kind, {}).update(ratios)
    return found


def _distances(a: np.ndarray, b: np.ndarray, codes: np.ndarray, weights: np.ndarray, signs: np.ndarray) -> np.ndarray:
    """KS statistics of many weighted samples at once.

    Args:
        a: values of one model, [n].
        b: values of the other model for the same questions, [n].
        codes: the person of each question, [n].
        weights: how often each person counts, [r, people].
        signs: 1 where a person's answers stay with their models, -1 where they are exchanged, [r, people].

    Returns:
        [r]: the largest distance between the two cumulative distributions.
    """
    pooled = np.concatenate([a, b])
    order = np.argsort(pooled, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(pooled[order])), len(pooled) - 1)  # ties step together
    person = np.concatenate([codes, codes])[order]
    side = np.concatenate([np.ones(len(a)), -np.ones(len(b))])[order]
    sizes = weights @ np.bincount(codes, minlength=weights.shape[1])
    steps = (weights * signs)[:, person] * side
    return np.abs(np.cumsum(steps, axis=1)[:, ends]).max(1) / sizes


def _resampled_ks(a: np.ndarray, b: np.ndarray, codes: np.ndarray, count: int) -> np.ndarray:
    times = intervals.draws(count)
    return np.concatenate([_distances(a, b, codes, part, np.ones_like(part)) for part in _chunks(times, len(a))])


def _permutation_p(a: np.ndarray, b: np.ndarray, codes: np.ndarray, count: int, observed: float) -> float:
    every = 2**count <= intervals.RESAMPLES
    if every:
        signs = 1 - 2 * (np.arange(2**count)[:, None] >> np.arange(count) & 1)
    else:
        signs = np.random.default_rng([1, count]).choice([-1, 1], (intervals.RESAMPLES, count))
    ones = np.ones(count)
    statistics = np.concatenate(
        [_distances(a, b, codes, np.broadcast_to(ones, part.shape), part) for part in _chunks(signs, len(a))]
    )
    extreme = int((statistics >= observed - 1e-12).sum())
    return extreme / len(signs) if every else (extreme + 1) / (len(signs) + 1)


def _chunks(rows: np.ndarray, n: int) -> list[np.ndarray]:
    """Rows in chunks whose statistics need at most some 10 million numbers."""
    return np.array_split(rows, max(1, len(rows) * n // 5_000_000))


def _js(a: np.ndarray, b: np.ndarray) -> float:
    inner = np.quantile(np.concatenate([a, b]), np.arange(1, BINS) / BINS)
    bins = [np.bincount(np.searchsorted(inner, x, side="right"), minlength=BINS) for x in (a, b)]
    return float(distance.jensenshannon(*bins, base=2) ** 2)
