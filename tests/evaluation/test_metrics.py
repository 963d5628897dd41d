"""Judging, counting and comparing answers: values worked out by hand, then the libraries that papers used."""

import json
import math
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from vkd_jax.evaluation import metrics

LN = math.log


def test_wilson_by_hand():
    # z = 1.959964; centre (p + z^2/2n) / (1 + z^2/n), half width z sqrt(p(1-p)/n + z^2/4n^2) / (1 + z^2/n).
    z, p, n = 1.959964, 0.3, 10
    centre, shrink = p + z * z / (2 * n), 1 + z * z / n
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = metrics.wilson(3, 10)
    assert low == pytest.approx((centre - half) / shrink, abs=1e-6) == pytest.approx(0.1078, abs=1e-4)
    assert high == pytest.approx((centre + half) / shrink, abs=1e-6) == pytest.approx(0.6032, abs=1e-4)


def test_wilson_leaves_doubt_at_both_ends():
    assert metrics.wilson(0, 10) == pytest.approx((0.0, 0.27753), abs=1e-4)
    assert metrics.wilson(10, 10) == pytest.approx((1 - 0.27753, 1.0), abs=1e-4)


@pytest.mark.parametrize(("correct", "n"), [(1, 0), (3, 2), (-1, 2)])
def test_wilson_refuses_impossible_counts(correct, n):
    with pytest.raises(ValueError):
        metrics.wilson(correct, n)


def test_summarise():
    low, high = metrics.wilson(3, 4)
    items = [{"correct": True}, {"correct": False}, {"correct": True}, {"correct": True}]
    assert metrics.summarise(items) == {"accuracy": 0.75, "correct": 3, "n": 4, "low": low, "high": high}
    assert metrics.summarise(iter(items)) == metrics.summarise(items)


def test_summarise_needs_items():
    with pytest.raises(ValueError, match="without questions"):
        metrics.summarise([])


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("b)", "B"),
        (" d.", "D"),
        ("(A)", "A"),
        ("A: baker", "A"),
        ("a", "A"),
        ("A Baker", "A"),
        ("B baker", "B"),
        ("**C**: a baker", "C"),
        ("A is correct", "A"),
        ("A\n\nThe person is a baker.", "A"),
        ("A.\nB is wrong", "A"),
        ("The answer is C", "C"),
        ("the answer is a", "A"),
        ("Answer: D. foo", "D"),
        ("Answer: **B**", "B"),
        ("A possible answer is B", "B"),
        ("It is a man; option C.", "C"),
        ("I would say (d), the pilot", "D"),
        ("Option A", "A"),
        ("It's B because of the hat", "B"),
        ("The portrait shows the baker [C].", "C"),
    ],
)
def test_first_letter_finds_the_choice(text, letter):
    assert metrics.first_letter(text) == letter


@pytest.mark.parametrize(
    "text",
    [
        "",
        "  \n",
        "E",
        "A person with a hat",
        "a baker",
        "It is a dog",
        "The answer is a baker",
        "Because of the hat",
        "Dog",
        "B.A. in arts",
        "A-frame",
        "I don't know",
        "D'Arcy",
        "C'est la vie",
        "Madrid",
        "vitamin C",
        "The answer is not B",
        "AB",
    ],
)
def test_first_letter_is_none_without_a_choice(text):
    assert metrics.first_letter(text) is None


def test_first_letter_knows_as_many_letters_as_there_are_options():
    assert metrics.first_letter("E", 6) == "E" and metrics.first_letter("The answer is (f)", 6) == "F"
    assert metrics.first_letter("E", 4) is metrics.first_letter("G: nobody", 6) is metrics.first_letter(None) is None
    assert metrics.first_letter("C", 2) is None and metrics.first_letter("B", 2) == "B"
    assert metrics.first_letter("I think it is H", 9) == "H"  # a pronoun, even where I is an option
    assert metrics.first_letter("I", 9) == metrics.first_letter("i: the pilot", 9) == "I"


@pytest.mark.parametrize(
    ("prediction", "truth", "right"),
    [
        ("She lives in Port Varda.", "port varda", True),
        ("PILOT", "Pilot ", True),
        ("Port", "Port Varda", False),
        ("", "Pilot", False),
        (None, "Pilot", False),
        ("copilot", "pilot", True),  # a substring, as the benchmark defines it
    ],
)
def test_cloze_correct(prediction, truth, right):
    assert metrics.cloze_correct(prediction, truth) is right


def test_cloze_needs_a_truth():
    with pytest.raises(ValueError, match="empty ground truth"):
        metrics.cloze_correct("anything", " ")


def test_rouge_by_hand():
    # Stemmed: "she works as a baker in varda" against "a baker work at varda"; the longest common subsequence is
    # a, baker, varda: recall 3 of 5, precision 3 of 7, F = 2 * 3 / (5 + 7).
    got = metrics.rouge_l("She works as a baker in Varda.", "A baker, working at Varda")
    assert got == pytest.approx({"rouge_l": 6 / 12, "rouge_l_recall": 3 / 5})
    assert metrics.rouge_l("works", "work") == dict.fromkeys(got, 1.0)
    assert metrics.rouge_l("baker", "a baker") == pytest.approx({"rouge_l": 2 / 3, "rouge_l_recall": 1 / 2})


def test_bleu_by_hand():
    # Matches of 1 to 4 words: 4 of 5, 3 of 4, 2 of 3, 1 of 2; as long as the truth, so without a brevity penalty.
    assert metrics.bleu("she is a baker today", "she is a baker now") == pytest.approx((4 * 3 * 2 / 120) ** 0.25)
    # 2 of 2 words, 1 of 1 pair, and .1 of 1 for want of longer ones; shorter by 3, so exp(1 - 5 / 2).
    assert metrics.bleu("a baker", "she is a baker now") == pytest.approx((0.1 * 0.1) ** 0.25 * math.exp(-1.5))
    assert metrics.bleu("baker", "baker") == pytest.approx(0.1**0.75)
    assert metrics.bleu("she is a baker now", "she is a baker now") == pytest.approx(1)
    assert metrics.bleu("Baker", "baker") == 0


@pytest.mark.parametrize("nothing", ["", " ", None, "...", "\n"])
def test_an_empty_prediction_scores_nothing(nothing):
    assert metrics.rouge_l(nothing, "a baker") == {"rouge_l": 0.0, "rouge_l_recall": 0.0}
    assert metrics.bleu(nothing, "a baker") == 0


def test_likelihood_by_hand():
    assert metrics.likelihood(LN(4)) == pytest.approx({"answer_nll": LN(4), "probability": 0.25})
    # Wrong answers of ln 8 and ln 2 a token average to ln 4; the paraphrase has ln 2: exp(ln 4 - ln 2) = 2.
    got = metrics.likelihood(LN(3), [LN(8), LN(2)], LN(2))
    assert got["truth_ratio"] == pytest.approx(2) and got["paraphrase_nll"] == LN(2)
    assert got["perturbed_nll"] == [LN(8), LN(2)] and got["probability"] == pytest.approx(1 / 3)
    assert metrics.likelihood(LN(3), [LN(9)])["truth_ratio"] == pytest.approx(3)  # no paraphrase: the answer itself
    extreme = [metrics.likelihood(a, [b])["truth_ratio"] for a, b in ((0.0, 1e6), (1e6, 0.0))]
    assert json.loads(json.dumps(extreme)) == [math.exp(700), math.exp(-700)]
    assert [metrics.truth_score(x) for x in (0.5, 1, 4, *extreme)] == [0, 0, 0.75, 1, 0]


def test_a_mean_with_its_interval():
    # Two values, 0 and 1: a resample has the mean 0, 1/2 or 1 with chances 1/4, 1/2, 1/4.
    assert metrics.mean([0, 1]) == {"mean": 0.5, "low": 0.0, "high": 1.0, "n": 2}
    values = np.random.default_rng(0).gamma(2, size=80)
    got = metrics.mean(values)
    assert got == metrics.mean(list(values))  # always the same draws
    theirs = stats.bootstrap((values,), np.mean, n_resamples=20000, method="percentile", rng=1).confidence_interval
    assert [got["low"], got["high"]] == pytest.approx(list(theirs), abs=0.02)
    assert got["mean"] == values.mean() and got["low"] < got["mean"] < got["high"]


@pytest.mark.parametrize("values", [[3.0], [0.0] * 7, [0.25] * 3])
def test_degenerate_means_have_no_width(values):
    assert metrics.mean(values) == {"mean": values[0], "low": values[0], "high": values[0], "n": len(values)}


def test_area_under_the_curve_by_hand():
    # 1 and 2 against 1 and 0: a tie, won, won, won.
    got = metrics.auc({"a": [1.0, 2.0]}, {"b": [1.0, 0.0]})
    assert got == {"mean": 3.5 / 4, "low": 3.5 / 4, "high": 3.5 / 4, "n": 4}  # of one group each nothing is drawn
    assert metrics.auc({"a": [1.0], "b": [1.0]}, {"c": [1.0]})["mean"] == 0.5
    # One group of three won against one of one lost: drawn are 1, 3/4 and 0, with chances 1/4, 1/2, 1/4.
    got = metrics.auc({"a": [2.0] * 3, "b": [0.0]}, {"c": [1.0]})
    assert got == {"mean": 0.75, "low": 0.0, "high": 1.0, "n": 5}


def test_area_is_that_of_mann_and_whitney_and_its_interval_a_bootstraps():
    rng = np.random.default_rng(0)
    a, b = rng.normal(0.5, size=60).round(1), rng.normal(size=80).round(1)  # rounded, so that there are ties
    got = metrics.auc({i: [x] for i, x in enumerate(a)}, {i: [x] for i, x in enumerate(b)})
    assert got["mean"] == pytest.approx(stats.mannwhitneyu(a, b).statistic / (60 * 80))
    assert got == metrics.auc({i: [x] for i, x in enumerate(a)}, {i: [x] for i, x in enumerate(b)})

    def area(x, y, axis):
        return stats.mannwhitneyu(x, y, axis=axis).statistic / (60 * 80)

    theirs = stats.bootstrap((a, b), area, n_resamples=5000, method="percentile", rng=1).confidence_interval
    assert [got["low"], got["high"]] == pytest.approx(list(theirs), abs=0.01)


def record(number=0, part="retain", task="classification", modality="vqa", protocol="options", **more):
    base = {"id": str(number), "set": part, "task": task, "modality": modality, "protocol": protocol}
    options = ["a", "b"] if task == "classification" else []
    return base | {"options": options, "correct": True} | more


def test_a_summary_averages_what_was_measured():
    items = [
        record(0, truth_ratio=4.0, probability=0.5, correct=False),
        record(1, truth_ratio=0.5, probability=1.0),
        record(2, probability=0.0),
    ]
    got = metrics.summarise(items)
    assert (got["correct"], got["n"]) == (2, 3)
    assert (got["truth_score"]["mean"], got["truth_score"]["n"]) == (0.375, 2)  # (.75 + 0) / 2, each item first
    assert (got["probability"]["mean"], got["probability"]["n"]) == (0.5, 3)
    assert not {"rouge_l", "bleu"} & set(got)


def test_kinds_of_two_protocols_are_kept_apart():
    def kinds(*protocols):
        return sorted(kind for _, kind in metrics.by_kind([record(protocol=p) for p in protocols]))

    assert kinds("options", "letter") == ["vqa", "vqa_letter"]
    assert kinds("letter", "options") == ["vqa", "vqa_options"]
    assert kinds("letter", "letter") == ["vqa"]
    free = record(task="generation", modality="qa", protocol="generation")
    assert set(metrics.by_kind([free, record(), free])) == {("retain", "generation_qa"), ("retain", "vqa")}


def forget(ratios, **more):
    return [record(i, "forget", truth_ratio=ratio, **more) for i, ratio in enumerate(ratios)]


def test_forget_quality_by_hand():
    # Everything of one model lies below everything of the other: the statistic is 1, and among C(6, 3) = 20 equally
    # likely orders two are as extreme. They fall into other bins: one bit.
    got = metrics.forget_quality(forget([0.1, 0.2, 0.3]), forget([8.0, 9.0, 10.0]))
    assert got == {"vqa": pytest.approx({"ks": 1.0, "p": 2 / 20, "js": 1.0, "n": 3})}
    same = metrics.forget_quality(forget([0.1, 2.0, 30.0]), forget([0.1, 2.0, 30.0]))
    assert same == {"vqa": pytest.approx({"ks": 0.0, "p": 1.0, "js": 0.0, "n": 3})}
    # Half of one model's ratios in one bin, half in another, all of the reference's in the first:
    # m = (3/4, 1/4), js = (KL((1/2, 1/2) | m) + KL((1, 0) | m)) / 2 in bits.
    js = (0.5 * np.log2(0.5 / 0.75) + 0.5 * np.log2(0.5 / 0.25) + np.log2(1 / 0.75)) / 2
    assert metrics.forget_quality(forget([0.1, 9.0]), forget([0.1, 0.1]))["vqa"]["js"] == pytest.approx(js)


def test_divergence_does_not_depend_on_the_scale_of_the_ratios():
    """Of long answers that differ in a word all ratios are near 1, which bins of fixed width would not tell apart."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=40), rng.normal(1.0, size=40)
    wide, narrow = (metrics.forget_quality(forget(np.exp(s * a)), forget(np.exp(s * b)))["vqa"] for s in (1.0, 0.01))
    assert narrow == pytest.approx(wide) and 0.1 < wide["js"] < 0.9


def test_forget_quality_compares_the_forget_set_alone_kind_by_kind():
    others = [record(i, "retain", truth_ratio=99.0) for i in range(9)]
    texts = [record(i, "forget", modality="qa", truth_ratio=float(i + 1)) for i in range(5)]
    ours, theirs = forget([1.0, 2.0]) + texts + others, forget([3.0, 4.0]) + texts
    got = metrics.forget_quality(ours, theirs)
    assert set(got) == {"vqa", "qa"} and got["qa"]["p"] == 1 and got["qa"]["n"] == 5 and got["vqa"]["ks"] == 1
    letters = [record(i, "forget", protocol="letter") for i in range(2)]  # the second record of a question has none
    assert metrics.forget_quality(ours + letters, theirs) == got
    assert metrics.forget_quality([], []) == {} == metrics.forget_quality(others, others)
    with pytest.raises(ValueError, match="not asked the same questions"):
        metrics.forget_quality(ours, forget([1.0, 2.0, 3.0]))


def test_forget_quality_is_tofus():
    """Losses as an evaluation of TOFU leaves them, and its own few lines."""
    rng = np.random.default_rng(0)
    losses = [(rng.gamma(2, size=60), rng.gamma(3, size=(60, 5))) for _ in range(2)]
    ratios = [np.exp(perturbed.mean(axis=-1) - paraphrase) for paraphrase, perturbed in losses]
    ours = [
        forget([metrics.likelihood(9.0, list(w), p)["truth_ratio"] for p, w in zip(*pair, strict=True)])
        for pair in losses
    ]
    theirs = stats.ks_2samp(*ratios)
    got = metrics.forget_quality(*ours)["vqa"]
    assert 0 < got["p"] < 1 and [got["p"], got["ks"]] == pytest.approx([theirs.pvalue, theirs.statistic])
    # Not per item, it would be another number: one loss for the whole set.
    assert np.exp(losses[0][1].mean() - losses[0][0]) != pytest.approx(ratios[0])


def test_model_utility_by_hand():
    # Options: p = 1/2 against 1/4 and 1/4 is 1/2, p = 1/4 against 1/4 and 1/2 is 1/4; truth scores 1/2 and 0.
    choices = [
        record(0, **metrics.likelihood(LN(2), [LN(4), LN(4)]), correct=True),
        record(1, **metrics.likelihood(LN(4), [LN(4), LN(2)]), correct=False),
    ]
    free = [
        record(i, "real", "generation", "qa", "generation", **metrics.likelihood(LN(x)), rouge_l_recall=recall)
        for i, (x, recall) in enumerate([(2, 1.0), (1, 0.5)])
    ]
    ignored = [record(7, part, **metrics.likelihood(0.0), correct=False) for part in ("forget", "test")]
    second = [record(0, protocol="letter", correct=False)]
    got = metrics.model_utility([ignored[0], *choices, *second, *free, ignored[1]])
    parts = {
        "retain/probability": (1 / 2 + 1 / 4) / 2,
        "retain/truth_score": 1 / 4,
        "retain/accuracy": 1 / 2,
        "real/probability": (1 / 2 + 1) / 2,
        "real/rouge_l_recall": 3 / 4,
    }
    assert {name: x["mean"] for name, x in got["components"].items()} == pytest.approx(parts)
    assert got["components"]["real/rouge_l_recall"]["n"] == 2
    assert got["value"] == pytest.approx(5 / sum(1 / x for x in parts.values()))
    assert got["low"] == 0 < got["value"] < got["high"]  # a resample of the first question alone, of the second
    with pytest.raises(ValueError, match="not to be forgotten"):
        metrics.model_utility(ignored)


def test_model_utility_is_tofus():
    """Three sets' losses, and TOFU's own lines: `get_model_utility` without its forget set."""
    rng = np.random.default_rng(1)
    records, parts = [], []
    for part, options in (("retain", 0), ("real_faces", 5), ("real_world", 5)):
        truth, wrong, recall = rng.gamma(1, size=30), rng.gamma(3, size=(30, 5)), rng.random(30)
        for i in range(30):
            nll = metrics.likelihood(truth[i], list(wrong[i]))
            item = record(i, part, "generation", "qa", "generation", **nll, rouge_l_recall=recall[i])
            records.append(item | {"options": list("abcdef"[: options + 1]) if options else []})
        p = np.exp(-truth)
        if options:
            p = p / np.concatenate([p[:, None], np.exp(-wrong)], axis=1).sum(-1)
        ratio = np.exp(wrong.mean(axis=-1) - truth)
        parts += [p.mean(), recall.mean(), np.maximum(0, 1 - 1 / ratio).mean()]
    got = metrics.model_utility(records)
    ours = {name: x["mean"] for name, x in got["components"].items() if not name.endswith("accuracy")}
    assert sorted(ours.values()) == pytest.approx(sorted(parts))
    everything = [*parts, *(x["mean"] for name, x in got["components"].items() if name.endswith("accuracy"))]
    assert got["value"] == pytest.approx(stats.hmean(everything))
    assert got["low"] < got["value"] < got["high"]
    assert got == metrics.model_utility(records)


def test_a_model_that_knows_nothing_has_no_utility():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = metrics.model_utility([record(i, **metrics.likelihood(2000.0, [1.0]), correct=False) for i in range(3)])
    assert (got["value"], got["low"], got["high"]) == (0, 0, 0)


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
def test_rouge_and_bleu_are_the_libraries(prediction, truth):
    import re

    from nltk.stem.porter import PorterStemmer
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
    from rouge_score import rouge_scorer

    theirs = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True).score(truth, prediction)["rougeL"]
    got = metrics.rouge_l(prediction, truth)
    assert got == {"rouge_l": theirs.fmeasure, "rouge_l_recall": theirs.recall}
    stem = PorterStemmer().stem
    words = [[stem(w) if len(w) > 3 else w for w in re.findall("[a-z0-9]+", x.lower())] for x in (truth, prediction)]
    common = longest_common(*words)
    assert got["rouge_l_recall"] == pytest.approx(common / len(words[0]))
    assert got["rouge_l"] == pytest.approx(2 * common / (len(words[0]) + len(words[1])))
    smoothing = SmoothingFunction().method1  # as MLLMU-Bench calls it
    expected = sentence_bleu([truth.split()], prediction.split(), smoothing_function=smoothing)
    assert metrics.bleu(prediction, truth) == pytest.approx(expected)


def test_importing_is_quick_and_silent():
    """nltk takes seconds, and nobody waits for it who asks no open question."""
    code = "import sys, vkd_jax.evaluation.metrics; print(any(name in sys.modules for name in ('nltk', 'rouge_score')))"
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("False\n", "")
