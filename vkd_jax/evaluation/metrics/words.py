"""Metrics of the overlap between an open answer and the true answer: ROUGE-L and BLEU."""

import functools
from collections.abc import Callable, Mapping

from vkd_jax.benchmarks.names import plain_name
from vkd_jax.evaluation.metrics.base import Metric, counted_text, rule_of


def rouge_l(prediction: str | None, truth: str) -> dict[str, float]:
    """ROUGE-L of the `rouge-score` package with Porter stemming: the longest common subsequence of words.

    Words are sequences of a-z and 0-9 in the lower-cased texts: other alphabets are ignored, and an accent splits a
    word. MLLMU-Bench reports the F measure, TOFU the recall.

    Returns:
        {"rouge_l": F, "rouge_l_recall": recall}, between 0 and 1; both 0 for an empty prediction.

    Reference: Lin (2004), ROUGE: a package for automatic evaluation of summaries.
    """
    score = _scorer("rougeL").score(truth, prediction or "")["rougeL"]
    return {"rouge_l": float(score.fmeasure), "rouge_l_recall": float(score.recall)}


@functools.cache
def _scorer(*kinds: str):
    from rouge_score import rouge_scorer  # imports all of nltk, which takes seconds

    return rouge_scorer.RougeScorer(list(kinds), use_stemmer=True)


def rouge_l_precision(prediction: str | None, truth: str) -> float:
    """Precision of `rouge_l`: the share of the prediction's words that are in the longest common subsequence."""
    return float(_scorer("rougeL").score(truth, prediction or "")["rougeL"].precision)


def bleu(prediction: str | None, truth: str) -> float:
    """Smoothed sentence BLEU-4, as MLLMU-Bench computes it.

    `sentence_bleu` of nltk on whitespace-separated, case-sensitive tokens, with smoothing method 1 of Chen and Cherry
    (2014): an n-gram precision without a match counts 0.1 matches. A correct answer of fewer than four words therefore
    scores below 1 (one word: 0.1 ** 0.75 = 0.18).

    Returns:
        Between 0 and 1; 0 for an empty prediction.
    """
    from nltk.translate import bleu_score  # slow to import

    smoothing = bleu_score.SmoothingFunction().method1
    return float(bleu_score.sentence_bleu([truth.split()], (prediction or "").split(), smoothing_function=smoothing))


def offside_score(prediction: str, truth: str) -> float:
    """The overall score of OFFSIDE: the mean of BLEU and the F measures of ROUGE-1, ROUGE-2 and ROUGE-L.

    BLEU is that of `bleu` on lower-cased tokens of nltk's word tokenizer, to which a text is one sentence here.
    """
    from nltk.tokenize import NLTKWordTokenizer
    from nltk.translate import bleu_score

    tokens = NLTKWordTokenizer().tokenize
    smoothing = bleu_score.SmoothingFunction().method1
    bleu4 = bleu_score.sentence_bleu([tokens(truth.lower())], tokens(prediction.lower()), smoothing_function=smoothing)
    scores = _scorer("rouge1", "rouge2", "rougeL").score(truth, prediction)
    return (float(bleu4) + sum(float(score.fmeasure) for score in scores.values())) / 4


@functools.lru_cache(maxsize=4096)
def _rouge(prediction: str, truth: str) -> dict[str, float]:
    return rouge_l(prediction, truth)


def _texts(record: Mapping) -> tuple[str, str]:
    return plain_name(counted_text(record)), plain_name(record["answer"])


def _of_texts(name: str, title: str, item: Callable[[Mapping], float]) -> Metric:
    """A metric of all open answers."""
    return Metric(name=name, title=title, direction="by_role", tasks=("generation", "chat"), item=item, stored=True)


ROUGE_L = _of_texts("rouge_l", "ROUGE-L (F)", lambda record: _rouge(*_texts(record))["rouge_l"])
ROUGE_L_RECALL = _of_texts(
    "rouge_l_recall", "ROUGE-L (recall)", lambda record: _rouge(*_texts(record))["rouge_l_recall"]
)
BLEU = _of_texts("bleu", "BLEU", lambda record: bleu(*_texts(record)))
OFFSIDE_SCORE = Metric(
    name="offside_score",
    title="overall score (OFFSIDE)",
    direction="by_role",
    tasks=("generation",),
    item=lambda record: offside_score(*_texts(record)) if rule_of(record)[0] == "offside" else None,
    stored=True,
)
