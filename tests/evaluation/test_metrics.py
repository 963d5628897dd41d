"""Metrics: values worked out by hand, and comparisons with the libraries that papers use."""

import dataclasses
import json
import math
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from vkd_jax.evaluation.metrics import intervals, likelihoods, words
from vkd_jax.evaluation.metrics.forget_quality import forget_quality
from vkd_jax.evaluation.metrics.summary import by_kind, summarize
from vkd_jax.evaluation.metrics.utility import model_utility
from vkd_jax.results import Figure, Summary
from vkd_jax.types import EvalSet, Role

LN = math.log
SETS = [
    EvalSet(name, role, name, name)
    for name, role in (
        ("forget", Role.FORGET), ("test", Role.FORGET_HOLDOUT), ("retain", Role.RETAIN), ("real", Role.GENERAL),
        ("real_faces", Role.GENERAL), ("real_world", Role.GENERAL),
    )
]  # fmt: skip


def test_wilson_by_hand():
    # z = 1.959964; center (p + z^2/2n) / (1 + z^2/n), half width z sqrt(p(1-p)/n + z^2/4n^2) / (1 + z^2/n).
    z, p, n = 1.959964, 0.3, 10
    center, shrink = p + z * z / (2 * n), 1 + z * z / n
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = intervals.wilson(0.3, 10)
    assert low == pytest.approx((center - half) / shrink, abs=1e-6) == pytest.approx(0.1078, abs=1e-4)
    assert high == pytest.approx((center + half) / shrink, abs=1e-6) == pytest.approx(0.6032, abs=1e-4)
    theirs = stats.binomtest(3, 10).proportion_ci(confidence_level=0.95, method="wilson")
    assert (low, high) == pytest.approx((theirs.low, theirs.high))


def test_wilson_intervals_have_width_at_both_ends():
    assert intervals.wilson(0, 10) == pytest.approx((0.0, 0.27753), abs=1e-4)
    assert intervals.wilson(1, 10) == pytest.approx((1 - 0.27753, 1.0), abs=1e-4)


@pytest.mark.parametrize(("share", "n"), [(1, 0), (3 / 2, 2), (-1 / 2, 2)])
def test_wilson_rejects_impossible_counts(share, n):
    """Newer versions of SciPy return an interval for 3 correct answers of 2."""
    with pytest.raises(ValueError, match="impossible"):
        intervals.wilson(share, n)


def test_summarize():
    items = [record(i, person=person, correct=i != 1) for i, person in enumerate("aabb")]
    got = summarize(items)
    # Of two people with 1/2 and 2/2, a resample has 1/2, 3/4 or 1, with probabilities 1/4, 1/2, 1/4.
    assert got == Summary(accuracy=0.75, correct=3, n=4, low=0.5, high=1.0, people=2)
    assert summarize(iter(items)) == got


def test_intervals_resample_people_and_say_how_many():
    """Forty answers about two people are two observations, not forty."""
    correct = [True] * 20 + [False] * 20
    by_person = intervals.proportion(correct, ["a"] * 20 + ["b"] * 20)
    by_question = intervals.proportion(correct, [""] * 40)
    assert (by_person.low, by_person.high, by_person.people) == (0, 1, 2)
    assert 0.3 < by_question.low < 0.5 < by_question.high < 0.7 and by_question.people == 0
    assert by_person.mean == by_question.mean == 0.5 and by_person.n == by_question.n == 40
    # With 1/2 for each person, all resamples agree, and the result is the Wilson interval of two observations.
    same = intervals.proportion([True, False] * 2, ["a", "a", "b", "b"])
    assert (same.low, same.high) == intervals.wilson(0.5, 2)
    assert (intervals.proportion([True] * 9, ["a"] * 9).low, 1.0) == intervals.wilson(1, 1)


def test_summarize_needs_items():
    with pytest.raises(ValueError, match="without questions"):
        summarize([])


def test_rouge_by_hand():
    # Stemmed: "she works as a baker in varda" against "a baker work at varda"; the longest common subsequence is
    # a, baker, varda: recall 3 of 5, precision 3 of 7, F = 2 * 3 / (5 + 7).
    got = words.rouge_l("She works as a baker in Varda.", "A baker, working at Varda")
    assert got == pytest.approx({"rouge_l": 6 / 12, "rouge_l_recall": 3 / 5})
    assert words.rouge_l("works", "work") == dict.fromkeys(got, 1.0)
    assert words.rouge_l("baker", "a baker") == pytest.approx({"rouge_l": 2 / 3, "rouge_l_recall": 1 / 2})


def test_bleu_by_hand():
    # Matches of 1 to 4 words: 4 of 5, 3 of 4, 2 of 3, 1 of 2; as long as the truth, so without a brevity penalty.
    assert words.bleu("she is a baker today", "she is a baker now") == pytest.approx((4 * 3 * 2 / 120) ** 0.25)
    # 2 of 2 words, 1 of 1 pair, and 0.1 of 1 without longer ones; shorter by 3, so exp(1 - 5 / 2).
    assert words.bleu("a baker", "she is a baker now") == pytest.approx((0.1 * 0.1) ** 0.25 * math.exp(-1.5))
    assert words.bleu("baker", "baker") == pytest.approx(0.1**0.75)
    assert words.bleu("she is a baker now", "she is a baker now") == pytest.approx(1)
    assert words.bleu("Baker", "baker") == 0


@pytest.mark.parametrize("nothing", ["", " ", None, "...", "\n"])
def test_an_empty_prediction_scores_zero(nothing):
    assert words.rouge_l(nothing, "a baker") == {"rouge_l": 0.0, "rouge_l_recall": 0.0}
    assert words.bleu(nothing, "a baker") == 0


def test_likelihood_by_hand():
    assert likelihoods.likelihood(LN(4)) == pytest.approx({"answer_nll": LN(4), "probability": 0.25})
    # Wrong answers of ln 8 and ln 2 per token average to ln 4; the paraphrase has ln 2: exp(ln 4 - ln 2) = 2.
    got = likelihoods.likelihood(LN(3), [LN(8), LN(2)], LN(2))
    assert got["truth_ratio"] == pytest.approx(2) and got["paraphrase_nll"] == LN(2)
    assert got["perturbed_nll"] == [LN(8), LN(2)] and got["probability"] == pytest.approx(1 / 3)
    assert likelihoods.likelihood(LN(3), [LN(9)])["truth_ratio"] == pytest.approx(3)  # no paraphrase: the answer itself
    extreme = [likelihoods.likelihood(a, [b])["truth_ratio"] for a, b in ((0.0, 1e6), (1e6, 0.0))]
    assert json.loads(json.dumps(extreme)) == [math.exp(700), math.exp(-700)]
    assert [likelihoods.truth_score(x) for x in (0.5, 1, 4, *extreme)] == [0, 0, 0.75, 1, 0]


def test_a_mean_with_its_interval():
    # Two values, 0 and 1: a resample has the mean 0, 1/2 or 1 with probabilities 1/4, 1/2, 1/4.
    assert intervals.mean([0, 1], ["", ""]) == Figure(0.5, 0.0, 1.0, 2)
    values = np.random.default_rng(0).gamma(2, size=80)
    got = intervals.mean(values, [""] * 80)
    assert got == intervals.mean(list(values), [""] * 80)  # the draws are deterministic
    theirs = stats.bootstrap((values,), np.mean, n_resamples=20000, method="percentile", rng=1).confidence_interval
    assert [got.low, got.high] == pytest.approx(list(theirs), abs=0.02)
    assert got.mean == values.mean() and got.low < got.mean < got.high


@pytest.mark.parametrize("values", [[3.0], [0.0] * 7, [0.25] * 3])
def test_degenerate_means_have_no_width(values):
    assert intervals.mean(values, [""] * len(values)) == Figure(values[0], values[0], values[0], len(values))


def test_auc_by_hand():
    # 1 and 2 against 1 and 0: a tie, won, won, won.
    got = intervals.auc({"a": [1.0, 2.0]}, {"b": [1.0, 0.0]})
    assert got == Figure(3.5 / 4, 3.5 / 4, 3.5 / 4, 4, 2)  # with one group each, all resamples are equal
    assert intervals.auc({"a": [1.0], "b": [1.0]}, {"c": [1.0]}).mean == 0.5
    # One group of three won against one of one lost: drawn are 1, 3/4 and 0, with probabilities 1/4, 1/2, 1/4.
    got = intervals.auc({"a": [2.0] * 3, "b": [0.0]}, {"c": [1.0]})
    assert got == Figure(0.75, 0.0, 1.0, 5, 3)


def test_auc_matches_mann_whitney_and_its_interval_a_bootstrap():
    rng = np.random.default_rng(0)
    a, b = rng.normal(0.5, size=60).round(1), rng.normal(size=80).round(1)  # rounded, so that there are ties
    got = intervals.auc({i: [x] for i, x in enumerate(a)}, {i: [x] for i, x in enumerate(b)})
    assert got.mean == pytest.approx(stats.mannwhitneyu(a, b).statistic / (60 * 80))
    assert got == intervals.auc({i: [x] for i, x in enumerate(a)}, {i: [x] for i, x in enumerate(b)})

    def area(x, y, axis):
        return stats.mannwhitneyu(x, y, axis=axis).statistic / (60 * 80)

    theirs = stats.bootstrap((a, b), area, n_resamples=5000, method="percentile", rng=1).confidence_interval
    assert [got.low, got.high] == pytest.approx(list(theirs), abs=0.01)


def record(number=0, part="retain", task="classification", modality="vqa", protocol="options", **more):
    base = {"id": str(number), "set": part, "task": task, "modality": modality, "protocol": protocol, "person": ""}
    options = ["a", "b"] if task == "classification" else []
    return base | {"options": options, "correct": True} | more


def test_a_summary_averages_the_metrics_that_apply():
    items = [
        record(0, truth_ratio=4.0, probability=0.5, correct=False),
        record(1, truth_ratio=0.5, probability=1.0),
        record(2, probability=0.0),
    ]
    got = summarize(items)
    assert (got.correct, got.n) == (2, 3)
    truth_score, probability = got.metrics["truth_score"], got.metrics["probability"]
    assert (truth_score.mean, truth_score.n) == (0.375, 2)  # (0.75 + 0) / 2, the mean over items
    assert (probability.mean, probability.n) == (0.5, 3)
    assert set(got.metrics) == {"truth_score", "probability"}


def test_kinds_of_two_protocols_are_separate():
    def kinds(*protocols):
        return sorted(kind for _, kind in by_kind([record(protocol=p) for p in protocols]))

    assert kinds("options", "letter") == ["vqa", "vqa_letter"]
    assert kinds("letter", "options") == ["vqa", "vqa_options"]
    assert kinds("letter", "letter") == ["vqa"]
    free = record(task="generation", modality="qa", protocol="generation")
    assert set(by_kind([free, record(), free])) == {("retain", "generation_qa"), ("retain", "vqa")}


def forget(ratios, **more):
    return [record(i, "forget", truth_ratio=ratio, **more) for i, ratio in enumerate(ratios)]


def quality(records, reference):
    return forget_quality(records, reference, SETS)


def utility(records):
    return model_utility(records, SETS)


def test_forget_quality_by_hand():
    # All values of one model are below all values of the other: the statistic is 1, and two of C(6, 3) = 20 equally
    # likely orders are as extreme. The bins are disjoint, so the divergence is one bit. Two of the 2^3 ways to
    # exchange the models' answers are as extreme.
    got = quality(forget([0.1, 0.2, 0.3]), forget([8.0, 9.0, 10.0]))["vqa"]
    assert (got.ks, got.p, got.p_questions, got.js, got.n) == pytest.approx((1.0, 2 / 8, 2 / 20, 1.0, 3))
    assert (got.low, got.high, got.people) == (1.0, 1.0, 0)
    same = quality(forget([0.1, 2.0, 30.0]), forget([0.1, 2.0, 30.0]))["vqa"]
    assert (same.ks, same.p, same.p_questions, same.js, same.n) == pytest.approx((0.0, 1.0, 1.0, 0.0, 3))
    # Half of one model's ratios in one bin, half in another, all of the reference's in the first:
    # m = (3/4, 1/4), js = (KL((1/2, 1/2) | m) + KL((1, 0) | m)) / 2 in bits.
    js = (0.5 * np.log2(0.5 / 0.75) + 0.5 * np.log2(0.5 / 0.25) + np.log2(1 / 0.75)) / 2
    assert quality(forget([0.1, 9.0]), forget([0.1, 0.1]))["vqa"].js == pytest.approx(js)


def test_js_divergence_is_independent_of_the_scale_of_the_ratios():
    """Ratios of long answers that differ in a word are all near 1, which bins of fixed width would not separate."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=40), rng.normal(1.0, size=40)
    wide, narrow = (quality(forget(np.exp(s * a)), forget(np.exp(s * b)))["vqa"] for s in (1.0, 0.01))
    assert dataclasses.astuple(narrow) == pytest.approx(dataclasses.astuple(wide)) and 0.1 < wide.js < 0.9


def test_forget_quality_compares_the_forget_set_by_kind():
    others = [record(i, "retain", truth_ratio=99.0) for i in range(9)]
    texts = [record(i, "forget", modality="qa", truth_ratio=float(i + 1)) for i in range(5)]
    ours, theirs = forget([1.0, 2.0]) + texts + others, forget([3.0, 4.0]) + texts
    got = quality(ours, theirs)
    assert set(got) == {"vqa", "qa"} and got["qa"].p == 1 and got["qa"].n == 5 and got["vqa"].ks == 1
    letters = [record(i, "forget", protocol="letter") for i in range(2)]  # the second record of a question has none
    assert quality(ours + letters, theirs) == got
    assert quality([], []) == {} == quality(others, others)
    with pytest.raises(ValueError, match="not asked the same questions"):
        quality(ours, forget([1.0, 2.0, 3.0]))


def test_the_interval_of_ks_resamples_people():
    """Two people with twenty questions each: the interval spans from one person's distance to the other's."""
    ratios = np.random.default_rng(0).random(40)
    people = ["a"] * 20 + ["b"] * 20
    theirs = [r | {"person": person} for r, person in zip(forget(ratios), people, strict=True)]
    ours = [r | {"person": person} for r, person in zip(forget(ratios + np.repeat([0, 5], 20)), people, strict=True)]
    got = quality(ours, theirs)["vqa"]
    assert (got.ks, got.low, got.high, got.people) == (0.5, 0.0, 1.0, 2)
    assert got.p == 1.0 and got.p_questions < 1e-3  # two people cannot give a small p-value
    many = [f"{i // 2}" for i in range(40)]
    ours, theirs = ([r | {"person": many[i]} for i, r in enumerate(rows)] for rows in (ours, theirs))
    got = quality(ours, theirs)["vqa"]
    assert got == quality(ours, theirs)["vqa"] and got.people == 20 and 0 < got.low < 0.5 < got.high < 1


def test_forget_quality_matches_tofu():
    """Random losses in the format of TOFU, with the computation of its code."""
    rng = np.random.default_rng(0)
    losses = [(rng.gamma(2, size=60), rng.gamma(3, size=(60, 5))) for _ in range(2)]
    ratios = [np.exp(perturbed.mean(axis=-1) - paraphrase) for paraphrase, perturbed in losses]
    ours = [
        forget([likelihoods.likelihood(9.0, list(w), p)["truth_ratio"] for p, w in zip(*pair, strict=True)])
        for pair in losses
    ]
    theirs = stats.ks_2samp(*ratios)
    got = quality(*ours)["vqa"]
    assert 0 < got.p < 1 and [got.p_questions, got.ks] == pytest.approx([theirs.pvalue, theirs.statistic])
    # A ratio of the set's mean losses would differ from the ratios of items.
    assert np.exp(losses[0][1].mean() - losses[0][0]) != pytest.approx(ratios[0])


def test_model_utility_by_hand():
    # Options: p = 1/2 against 1/4 and 1/4 is 1/2, p = 1/4 against 1/4 and 1/2 is 1/4; truth scores 1/2 and 0.
    choices = [
        record(0, **likelihoods.likelihood(LN(2), [LN(4), LN(4)]), correct=True),
        record(1, **likelihoods.likelihood(LN(4), [LN(4), LN(2)]), correct=False),
    ]
    free = [
        record(i, "real", "generation", "qa", "generation", **likelihoods.likelihood(LN(x)), rouge_l_recall=recall)
        for i, (x, recall) in enumerate([(2, 1.0), (1, 0.5)])
    ]
    ignored = [record(7, part, **likelihoods.likelihood(0.0), correct=False) for part in ("forget", "test")]
    second = [record(0, protocol="letter", correct=False)]
    got = utility([ignored[0], *choices, *second, *free, ignored[1]])
    parts = {
        "retain/probability": (1 / 2 + 1 / 4) / 2,
        "retain/truth_score": 1 / 4,
        "retain/accuracy": 1 / 2,
        "real/probability": (1 / 2 + 1) / 2,
        "real/rouge_l_recall": 3 / 4,
    }
    assert {name: x.mean for name, x in got.components.items()} == pytest.approx(parts)
    assert got.components["real/rouge_l_recall"].n == 2
    assert got.value == pytest.approx(5 / sum(1 / x for x in parts.values()))
    assert got.low == 0 < got.value < got.high  # a resample may consist of one question
    with pytest.raises(ValueError, match="not to be forgotten"):
        utility(ignored)


def test_model_utility_matches_tofu():
    """Losses of three sets, with the computation of TOFU: `get_model_utility` without its forget set."""
    rng = np.random.default_rng(1)
    records, parts = [], []
    for part, options in (("retain", 0), ("real_faces", 5), ("real_world", 5)):
        truth, wrong, recall = rng.gamma(1, size=30), rng.gamma(3, size=(30, 5)), rng.random(30)
        for i in range(30):
            nll = likelihoods.likelihood(truth[i], list(wrong[i]))
            item = record(i, part, "generation", "qa", "generation", **nll, rouge_l_recall=recall[i])
            records.append(item | {"options": list("abcdef"[: options + 1]) if options else []})
        p = np.exp(-truth)
        if options:
            p = p / np.concatenate([p[:, None], np.exp(-wrong)], axis=1).sum(-1)
        ratio = np.exp(wrong.mean(axis=-1) - truth)
        parts += [p.mean(), recall.mean(), np.maximum(0, 1 - 1 / ratio).mean()]
    got = utility(records)
    ours = {name: x.mean for name, x in got.components.items() if not name.endswith("accuracy")}
    assert sorted(ours.values()) == pytest.approx(sorted(parts))
    everything = [*parts, *(x.mean for name, x in got.components.items() if name.endswith("accuracy"))]
    assert got.value == pytest.approx(stats.hmean(everything))
    assert got.low < got.value < got.high
    assert got == utility(records)


def test_a_model_without_knowledge_has_zero_utility():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = utility([record(i, **likelihoods.likelihood(2000.0, [1.0]), correct=False) for i in range(3)])
    assert (got.value, got.low, got.high) == (0, 0, 0)


TRUTHS = [
    "Mara Lindt works as a baker in Port Varda.",
    "She was born on 3 May 1987, in Überlingen; her parents were both teachers.",
    "The person in the picture is wearing round glasses and a dark green pullover.",
]
PREDICTIONS = [
    "Mara Lindt is working as the baker of Port Varda.",
    "Her parents were teachers and she was born in May.",
    "glasses",
    "The person in the picture is wearing glasses, a green pullover and round earrings, I believe.",
]


def longest_common(a, b):
    best = np.zeros((len(a) + 1, len(b) + 1), int)
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            best[i + 1, j + 1] = best[i, j] + 1 if x == y else max(best[i, j + 1], best[i + 1, j])
    return best[-1, -1]


@pytest.mark.parametrize("truth", TRUTHS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_rouge_and_bleu_match_their_libraries(prediction, truth):
    import re

    from nltk.stem.porter import PorterStemmer
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
    from rouge_score import rouge_scorer

    theirs = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True).score(truth, prediction)["rougeL"]
    got = words.rouge_l(prediction, truth)
    assert got == {"rouge_l": theirs.fmeasure, "rouge_l_recall": theirs.recall}
    stem = PorterStemmer().stem
    stems = [[stem(w) if len(w) > 3 else w for w in re.findall("[a-z0-9]+", x.lower())] for x in (truth, prediction)]
    common = longest_common(*stems)
    assert got["rouge_l_recall"] == pytest.approx(common / len(stems[0]))
    assert got["rouge_l"] == pytest.approx(2 * common / (len(stems[0]) + len(stems[1])))
    smoothing = SmoothingFunction().method1  # as MLLMU-Bench calls it
    expected = sentence_bleu([truth.split()], prediction.split(), smoothing_function=smoothing)
    assert words.bleu(prediction, truth) == pytest.approx(expected)


def test_importing_metrics_loads_no_slow_library():
    """nltk takes seconds to import, which only open questions need."""
    code = "import sys, vkd_jax.evaluation.metrics; print(any(name in sys.modules for name in ('nltk', 'rouge_score')))"
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("False\n", "")
