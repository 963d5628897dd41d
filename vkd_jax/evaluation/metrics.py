"""How an answer is judged and how answers are counted: pure functions of texts, numbers and records.

Each question is judged alone first, and leaves a record; only then are records counted, averaged and compared:

    nll          = -log p(answer and end of sequence | question, picture) / number of tokens
    probability  = exp(-nll of the answer)
    truth ratio  = exp(mean over wrong answers of their nll - nll of the paraphrased answer)

A truth ratio above 1 says that the model prefers the truth. It is defined, as the probability, the forget quality and
the model utility are, by TOFU (Maini et al., arXiv 2401.06121, and `aggregate_eval_stat.py` of its code).
"""

import functools
import math
import re
import string
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from scipy import stats
from scipy.spatial import distance

LETTERS = string.ascii_uppercase  # of the options, in order
MEANS = ("rouge_l", "rouge_l_recall", "bleu", "probability", "truth_score")  # what a summary averages, where it is
UNLEARNED = ("forget", "test")  # the sets that no utility is expected of
RESAMPLES = 2000
BINS = 10
_LARGEST = 700.0  # exp of more is not a number any more

_VERDICTS = {"is", "was", "because", "since", "as", "and", "or"}  # "A is right", "A because ..."
_NEXT_WORD = re.compile(r"\s+(\w+)")


@functools.cache
def _choice(options: int) -> re.Pattern:
    """Where an answer may name its option: at its start, after a word that announces it, or in brackets.

    The letter stands alone: nothing of a word touches it ("Cat", "D'Arcy", "B.A.", "A-frame").
    """
    return re.compile(
        rf"""(?: ^\W* | \b(?:answer|option|choice|letter|is|it['’]s|be|choose|pick|select|say)\b\W* | [(\[] )
            (?<![\w'’.-]) ([a-{LETTERS[options - 1].lower()}]) (?![\w'’-]|\.\w)""",
        re.IGNORECASE | re.VERBOSE,
    )


def first_letter(text: str | None, options: int = 4) -> str | None:
    """The option letter that an answer in free text chooses.

    A letter that opens the answer decides ("B", "b)", "**C**: a baker"); else the first one in brackets or
    after a word that announces it ("The answer is C", "I would say (D)"). The article "a", the pronoun "I" and letters
    inside words and abbreviations are not choices.

    Args:
        text: the answer.
        options: how many options the question has; with four, "E" chooses nothing.

    Returns:
        "A", "B", ...; None if the answer chooses nothing, which counts as wrong.
    """
    text = text or ""
    for match in _choice(options).finditer(text):
        letter, word = match[1], _NEXT_WORD.match(text, match.end())
        article = letter in "aA" and word and word[1] not in _VERDICTS
        if article and (letter == "a" or not word[1][0].isupper()):
            continue  # "a man", "A tall man"; but "A Baker" is option A
        if letter in "iI" and word and word[1] != "is":
            continue  # "I think"
        return letter.upper()
    return None


def cloze_correct(prediction: str | None, truth: str) -> bool:
    """Whether the blank was filled right: the lower-cased truth is a substring of the lower-cased prediction.

    Raises:
        ValueError: an empty truth would be found in every prediction.
    """
    if not truth.strip():
        raise ValueError("a cloze question with an empty ground truth cannot be judged")
    return truth.strip().lower() in (prediction or "").lower()


def rouge_l(prediction: str | None, truth: str) -> dict[str, float]:
    """ROUGE-L of the `rouge-score` package with Porter stemming: the longest common subsequence of words.

    Words are runs of a-z and 0-9 of the lower-cased texts: other alphabets do not count, and an accent splits a word.
    MLLMU-Bench reports the F measure, TOFU the recall.

    Returns:
        {"rouge_l": F, "rouge_l_recall": recall}, between 0 and 1; both 0 for an empty prediction.

    Reference: Lin (2004), ROUGE: a package for automatic evaluation of summaries.
    """
    score = _scorer().score(truth, prediction or "")["rougeL"]
    return {"rouge_l": float(score.fmeasure), "rouge_l_recall": float(score.recall)}


@functools.cache
def _scorer():
    from rouge_score import rouge_scorer  # loads all of nltk, which takes seconds

    return rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)


def bleu(prediction: str | None, truth: str) -> float:
    """Smoothed sentence BLEU-4, as MLLMU-Bench computes it.

    nltk's `sentence_bleu` of the texts split at white space, case and punctuation kept, with smoothing method 1 of Chen
    and Cherry (2014): an n-gram precision without a match counts .1 matches. So a right answer of fewer than four words
    stays below 1 (one word: .1 ** .75 = .18).

    Returns:
        Between 0 and 1; 0 for an empty prediction.
    """
    from nltk.translate import bleu_score  # slow to import

    smoothing = bleu_score.SmoothingFunction().method1
    return float(bleu_score.sentence_bleu([truth.split()], (prediction or "").split(), smoothing_function=smoothing))


def likelihood(answer: float, wrong: Sequence[float] = (), paraphrase: float | None = None) -> dict:
    """What the likelihoods of one question say.

    Args:
        answer: nll of the answer, in nats a token.
        wrong: nll of each wrong answer.
        paraphrase: nll of the answer in other words; None takes the answer's own.

    Returns:
        {"answer_nll", "probability"}, and with wrong answers {"paraphrase_nll", "perturbed_nll", "truth_ratio"}. The
        ratio is kept between exp(-700) and exp(700).
    """
    record = {"answer_nll": float(answer), "probability": math.exp(-answer)}
    if len(wrong):
        paraphrase = float(answer if paraphrase is None else paraphrase)
        exponent = sum(wrong) / len(wrong) - paraphrase
        record |= {
            "paraphrase_nll": paraphrase,
            "perturbed_nll": [float(x) for x in wrong],
            "truth_ratio": math.exp(min(max(exponent, -_LARGEST), _LARGEST)),
        }
    return record


def truth_score(truth_ratio: float) -> float:
    """max(0, 1 - 1 / truth ratio): 0 where the model prefers the wrong answers, towards 1 where it knows the truth."""
    return max(0.0, 1 - 1 / truth_ratio)


def wilson(correct: int, n: int) -> tuple[float, float]:
    """95 % Wilson score interval of a proportion.

    It stays inside [0, 1] and is honest at 0 and at n right answers, where the normal approximation says that
    there is no doubt at all.

    Args:
        correct: number of right answers, 0 <= correct <= n.
        n: number of questions, at least 1.

    Returns:
        (low, high), shares between 0 and 1.

    Raises:
        ValueError: if n < 1 or correct is outside [0, n].

    Reference: Wilson (1927), Probable inference, the law of succession, and statistical inference.
    """
    if not (n >= 1 and 0 <= correct <= n):  # SciPy 1.18 returns NaN
        raise ValueError(f"{correct} correct answers of {n} questions: expected n >= 1 and 0 <= correct <= n.")
    interval = stats.binomtest(correct, n).proportion_ci(confidence_level=0.95, method="wilson")
    return float(interval.low), float(interval.high)


def mean(values: Sequence[float]) -> dict[str, float | int]:
    """The mean of at least one value, with its 95 % percentile bootstrap interval (2000 resamples, always the same).

    Returns:
        {"mean", "low", "high", "n"}.

    Reference: Efron (1979), Bootstrap methods: another look at the jackknife.
    """
    values = np.asarray(values, float)
    low, high = np.percentile(values[_draws(len(values))].mean(1), [2.5, 97.5])
    return {"mean": float(values.mean()), "low": float(low), "high": float(high), "n": len(values)}


def auc(members: Mapping[str, Sequence[float]], others: Mapping[str, Sequence[float]]) -> dict[str, float | int]:
    """The area under the ROC curve: how often a member's score is above another's, ties counting half.

    It is the Mann-Whitney statistic over the number of pairs. The interval is a 95 % percentile bootstrap (2000
    resamples, always the same) that draws whole groups, members and others each among their own: scores of one person
    are alike, and an interval over single scores would promise more than a handful of people can tell.

    Args:
        members: the scores of each group, at least one of each.
        others: the same.

    Returns:
        {"mean", "low", "high", "n"}, the last the number of scores.

    References: Hanley and McNeil (1982), The meaning and use of the area under a ROC curve; Field and Welsh (2007),
    Bootstrapping clustered data.
    """
    a, b = (np.concatenate([np.asarray(scores, float) for scores in part.values()]) for part in (members, others))
    wins = (a[:, None] > b) + 0.5 * (a[:, None] == b)
    drawn_a, drawn_b = (
        np.repeat(_counts(len(part), seed), [len(scores) for scores in part.values()], axis=1)
        for seed, part in enumerate((members, others))
    )
    areas = ((drawn_a @ wins) * drawn_b).sum(1) / (drawn_a.sum(1) * drawn_b.sum(1))
    low, high = np.percentile(areas, [2.5, 97.5])
    return {"mean": float(wins.mean()), "low": float(low), "high": float(high), "n": len(a) + len(b)}


def _counts(n: int, seed: int) -> np.ndarray:
    """How often each of n groups is drawn in each resample: [RESAMPLES, n]."""
    rows = np.arange(RESAMPLES)[:, None]
    return np.bincount((_draws(n, seed) + n * rows).ravel(), minlength=RESAMPLES * n).reshape(RESAMPLES, n)


@functools.lru_cache(maxsize=4)  # metrics of one set follow one another
def _draws(n: int, seed: int = 0) -> np.ndarray:
    """Rows to average in each resample: int [RESAMPLES, n]."""
    return np.random.default_rng([seed, n]).integers(0, n, (RESAMPLES, n), np.int32)


def summarise(items: Iterable[Mapping]) -> dict:
    """Count the right answers of judged items, and average what else was measured.

    Args:
        items: records with a boolean `correct`.

    Returns:
        {"accuracy": correct / n, "correct", "n", "low", "high"}, the last two the 95 % Wilson interval; and, where any
        item has it, "rouge_l", "rouge_l_recall", "bleu", "probability" and "truth_score": see `mean`.

    Raises:
        ValueError: without items there is no accuracy.
    """
    items = list(items)
    verdicts = [bool(item["correct"]) for item in items]
    if not verdicts:
        raise ValueError("no items to summarise: a set without questions has no accuracy")
    correct, n = sum(verdicts), len(verdicts)
    low, high = wilson(correct, n)
    summary = {"accuracy": correct / n, "correct": correct, "n": n, "low": low, "high": high}
    scored = [item | _truth_score(item) for item in map(dict, items)]
    for name in MEANS:
        if values := [item[name] for item in scored if name in item]:
            summary[name] = mean(values)
    return summary


def _truth_score(item: Mapping) -> dict[str, float]:
    return {"truth_score": truth_score(item["truth_ratio"])} if "truth_ratio" in item else {}


def by_kind(records: Iterable[Mapping]) -> dict[tuple[str, str], list[Mapping]]:
    """Records by set and kind of question, in their order.

    The kind is "vqa" or "qa" for questions with options, "cloze_vqa", "generation_qa", ... for others. Where questions
    with options were asked by two protocols, the kind of the second one names it: "vqa_letter".
    """
    records = list(records)
    first = _first_protocol(records)
    groups: dict[tuple[str, str], list[Mapping]] = {}
    for record in records:
        kind = record["modality"]
        if record["task"] != "classification":
            kind = f"{record['task']}_{kind}"
        elif record.get("protocol") != first:
            kind = f"{kind}_{record['protocol']}"
        groups.setdefault((record["set"], kind), []).append(record)
    return groups


def _first_protocol(records: Iterable[Mapping]) -> str | None:
    return next((r.get("protocol") for r in records if r["task"] == "classification"), None)


def forget_quality(records: Iterable[Mapping], reference: Iterable[Mapping]) -> dict[str, dict]:
    """How alike two models' truth ratios of the forget set are: an unlearned model's and a retain-only model's.

    Args:
        records: of the unlearned model.
        reference: of the model that never learned the forget set, asked the same questions.

    Returns:
        For each kind of question (see `by_kind`) with truth ratios: {"ks", "p", "js", "n"}.
        ks, p: statistic and p-value of the two-sample Kolmogorov-Smirnov test between the two models' truth ratios R,
        an item each. p is TOFU's forget quality: near 1 the two cannot be told apart, near 0 the model still knows the
        people, or avoids them more than one that never met them.
        js: Jensen-Shannon divergence in bits, from 0 (alike) to 1, of the two histograms of R, in ten bins that share
            the items of both models equally.
        n: number of items.

    Raises:
        ValueError: the models were not asked the same questions.
    """
    ours, theirs = _forget_ratios(records), _forget_ratios(reference)
    if {kind: sorted(ids) for kind, ids in ours.items()} != {kind: sorted(ids) for kind, ids in theirs.items()}:
        raise ValueError("forget quality: the two models were not asked the same questions of the forget set")
    found = {}
    for kind in ours:
        a, b = (np.array([ratios[kind][name] for name in ours[kind]]) for ratios in (ours, theirs))
        test = stats.ks_2samp(a, b)
        found[kind] = {"ks": float(test.statistic), "p": float(test.pvalue), "js": _js(a, b), "n": len(a)}
    return found


def _forget_ratios(records: Iterable[Mapping]) -> dict[str, dict[str, float]]:
    """{kind: {id: truth ratio}} of the forget set."""
    found: dict[str, dict[str, float]] = {}
    for (part, kind), items in by_kind(records).items():
        ratios = {item["id"]: item["truth_ratio"] for item in items if "truth_ratio" in item}
        if part == "forget" and ratios:
            found[kind] = ratios
    return found


def _js(a: np.ndarray, b: np.ndarray) -> float:
    inner = np.quantile(np.concatenate([a, b]), np.arange(1, BINS) / BINS)
    bins = [np.bincount(np.searchsorted(inner, x, side="right"), minlength=BINS) for x in (a, b)]
    return float(distance.jensenshannon(*bins, base=2) ** 2)


def utility(record: Mapping) -> dict[str, float]:
    """What one record says of a model's usefulness; each part only where it was measured.

    - probability: of the answer, exp(-nll). For a question with options it is p(right) / sum of p over the right answer
      and the wrong ones, each p = exp(-nll), as TOFU does for real authors: guessing gives 1 / options.
    - rouge_l_recall
    - truth_score: see there.
    - accuracy: 1 or 0, for a question with options.
    """
    found = {}
    if "probability" in record:
        found["probability"] = record["probability"]
        if record["options"] and "perturbed_nll" in record:
            right, wrong = record["probability"], [math.exp(-x) for x in record["perturbed_nll"]]
            found["probability"] = right / max(right + sum(wrong), math.exp(-_LARGEST))
    if "rouge_l_recall" in record:
        found["rouge_l_recall"] = record["rouge_l_recall"]
    found |= _truth_score(record)
    if record["options"]:
        found["accuracy"] = float(record["correct"])
    return found


def model_utility(records: Iterable[Mapping]) -> dict:
    """The harmonic mean of what the model is still good at, after TOFU.

    A component is the mean of one part of `utility` over one set, of all sets but "forget" and "test" (the forgotten
    people on other pictures): TOFU's answer probability, ROUGE-L recall and truth score of each set, and the accuracy
    of questions with options, which TOFU has not. Parts that a set lacks are left out. Of two protocols, the first
    counts.

    Returns:
        {"value", "low", "high", "components": {"retain/probability": {"mean", "n"}, ..}}. The interval is a 95 %
        percentile bootstrap over questions, drawn anew within each set and kind of question.

    Raises:
        ValueError: no set but those to be forgotten was asked.
    """
    records = list(records)
    first = _first_protocol(records)
    strata: dict[tuple[str, ...], list[dict[str, float]]] = {}
    for record in records:
        if record["set"] in UNLEARNED or (record["task"] == "classification" and record.get("protocol") != first):
            continue
        parts = utility(record)
        strata.setdefault((record["set"], record["task"], record["modality"], *parts), []).append(parts)
    totals: dict[str, np.ndarray] = {}  # of a component: its sum, then that of each resample
    counts: dict[str, int] = {}
    for number, ((part, _, _, *names), items) in enumerate(sorted(strata.items())):
        draws = _draws(len(items), seed=number + 1)
        for name in names:
            values, component = np.array([item[name] for item in items]), f"{part}/{name}"
            totals[component] = totals.get(component, 0) + np.append(values.sum(), values[draws].sum(1))
            counts[component] = counts.get(component, 0) + len(items)
    if not totals:
        raise ValueError("no items to summarise: model utility needs a set that is not to be forgotten")
    components = {name: totals[name] / counts[name] for name in sorted(totals)}
    value, *resampled = stats.hmean(np.stack(list(components.values())), axis=0)
    low, high = np.percentile(resampled, [2.5, 97.5])
    return {
        "value": float(value),
        "low": float(low),
        "high": float(high),
        "components": {name: {"mean": float(x[0]), "n": counts[name]} for name, x in components.items()},
    }
