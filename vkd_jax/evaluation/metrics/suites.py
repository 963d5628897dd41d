"""Scoring of the standard suites of general ability: when an answer is correct, and the suites' published metrics.

`correct` judges each answer; its mean is the accuracy that counts where other sets of general ability count. The
metrics follow the rules that the suites publish, unless `SuiteMetric.upstream` is False; docs/general_ability.md
compares both.
"""

import dataclasses
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from vkd_jax.benchmarks.general.short_answer import true_words
from vkd_jax.benchmarks.names import plain_name, text_key
from vkd_jax.evaluation.metrics import intervals
from vkd_jax.evaluation.metrics.base import Metric
from vkd_jax.evaluation.metrics.correctness import LETTERS
from vkd_jax.evaluation.metrics.vqa import normalize, vqa_accuracy
from vkd_jax.results import Figure

VQA_SUITES = ("vqav2", "vizwiz", "textvqa")
ENOUGH = 0.5  # VQA accuracy of an answer that counts as correct: with ten people, two of them gave it
UNANSWERABLE = "unanswerable"

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_YES_OR_NO = re.compile(r"\b(?:yes|no)\b", re.IGNORECASE)
# A letter alone, or with the marks that lists of options have.
_LETTER_FORMS = ("{}", "{}.", "{},", "{}:", "{})", "{}).", "({})", "({}).", ":{}", ":{},", ":{}.", ":{})", ":{}).")


# ---- Verdicts of single answers ----


def first_yes_or_no(text: str) -> str | None:
    """The first "yes" or "no" in an answer; None without one.

    Example:
        >>> first_yes_or_no("Yes, there is no doubt.")
        'yes'
    """
    match = _YES_OR_NO.search(text)
    return match[0].lower() if match else None


def pope_verdict(text: str) -> str:
    """POPE's reading of an answer: "no" if its first sentence has the word No, no or not; else "yes"."""
    words = text.partition(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def mme_verdict(text: str) -> str | None:
    """MME's reading of an answer: yes or no within its first four characters; None without either."""
    text = text.lower().strip().replace(".", "")
    if text in ("y", "n"):
        return {"y": "yes", "n": "no"}[text]
    return next((word for word in ("yes", "no") if word in text[:4]), None)


def same_words(text: str, truth: str) -> bool:
    """Whether two answers agree but for case, punctuation and surrounding white space."""
    texts = (plain_name(plain_name(each).lower().translate(_NO_PUNCTUATION)) for each in (text, truth))
    return len(set(texts)) == 1


def scienceqa_letter(text: str) -> str | None:
    """The letter of an answer that is one, or that starts with one and a period; else None."""
    text = text.strip()
    return text[0] if text and text[0] in LETTERS and text[1:2] in ("", ".") else None


def mmbench_letter(text: str, options: Sequence[str]) -> str | None:
    """The option letter of an answer by the rules that MMBench applies before it asks a language model.

    The only option letter that is a word of the answer, alone or with marks as in "(B)." ("A" in an answer of more than
    three words may be an article and decides nothing); else the only option whose text is in the answer.

    Returns:
        The letter; None if the rules do not decide, where MMBench asks a language model.
    """
    words, letters = text.split(), LETTERS[: len(options)]
    for form in _LETTER_FORMS:
        present = [letter for letter in letters if form.format(letter) in words]
        article = form == "{}" and "A" in present and len(words) > 3
        if len(present) == 1 and not article:
            return present[0]
    named = [letter for letter, option in zip(letters, options, strict=True) if option.lower() in text.lower()]
    return named[0] if len(named) == 1 else None


def mmvet_match(text: str, truth: str) -> bool:
    """Whether an answer contains, for one alternative of the truth (<OR>), all of its elements (<AND>)."""
    text = text_key(text)
    return any(all(text_key(part) in text for part in parts) for parts in true_words(truth))


def _right_option(letter: str | None, record: Mapping) -> bool:
    return letter in [le for le, text in zip(LETTERS, record["options"], strict=False) if text == record["answer"]]


RULES: Mapping[str, Callable[[str, Mapping], bool]] = {
    "pope": lambda text, record: first_yes_or_no(text) == record["answer"],
    "mme": lambda text, record: mme_verdict(text) == record["answer"],
    "gqa": lambda text, record: same_words(text, record["answer"]),
    "scienceqa": lambda text, record: _right_option(scienceqa_letter(text), record),
    "mmbench": lambda text, record: _right_option(mmbench_letter(text, record["options"]), record),
    "mmvet": lambda text, record: mmvet_match(text, record["answer"]),
    **dict.fromkeys(VQA_SUITES, lambda text, record: vqa_accuracy(text, record["references"]) > ENOUGH),
}


def correct(record: Mapping) -> bool:
    """Whether the answer of a record is correct by the rule of its suite."""
    return RULES[record["suite"]](record["prediction"] or "", record)


# ---- Metrics ----


@dataclasses.dataclass(frozen=True)
class SuiteMetric(Metric):
    """A metric of some standard suites.

    Args:
        suites: the suites that it applies to, keys of `registry.SUITES`.
        upstream: whether the suites define it; False for a rule of this package.
        note: the rule, as a sentence for the report.
    """

    suites: tuple[str, ...] = ()
    upstream: bool = True
    note: str = ""

    def value(self, record: Mapping) -> Any:
        """The value of a record of one of the suites; None for other records."""
        return super().value(record) if record.get("suite") in self.suites else None


def _metric(name: str, title: str, item: Callable[[Mapping], Any], note: str, **fields: Any) -> SuiteMetric:
    defaults = dict(direction="up", unit="%", tasks=("suite",), in_report=False, aggregate=intervals.proportion)
    return SuiteMetric(name=name, title=title, item=item, note=note, **defaults | fields)


def _is_correct(record: Mapping) -> float:
    return float(record["correct"])


def _f1(said: bool, true: bool) -> tuple[int, int]:
    """The contribution of one answer to numerator and denominator of F1 = 2 TP / (2 TP + FP + FN)."""
    return 2 * (said and true), int(said) + int(true)


def _pope(record: Mapping) -> tuple[bool, bool]:
    return pope_verdict(record["prediction"] or "") == "yes", record["answer"] == "yes"


def _unanswerable(record: Mapping) -> tuple[int, int]:
    most_common = Counter(map(normalize, record["references"])).most_common(1)[0][0]
    return _f1(normalize(record["prediction"] or "") == UNANSWERABLE, most_common == UNANSWERABLE)


def mme_score(values: Sequence[tuple[str, bool]], people: Sequence[intervals.Cluster]) -> Figure:
    """The score of MME: the sum over categories of accuracy and accuracy+, both in percent and as means over images.

    The interval resamples the images of each category. `n` counts images.

    Args:
        values: category of each question, and whether its answer is correct.
        people: the image of each question.
    """
    images: dict[str, dict[intervals.Cluster, list[bool]]] = {}
    for (category, is_correct), image in zip(values, people, strict=True):
        images.setdefault(category, {}).setdefault(image, []).append(is_correct)
    score, resampled, count = 0.0, np.zeros(intervals.RESAMPLES), 0
    for number, answers in enumerate(images.values()):
        points = np.array([100 * (np.mean(answer) + all(answer)) for answer in answers.values()])
        score += float(points.mean())
        resampled += intervals.resampled_means(points, np.arange(len(points)), len(points), seed=number)
        count += len(points)
    return Figure(score, *intervals.percentiles(resampled), count)


VQA_ACCURACY = _metric(
    "vqa_accuracy",
    "VQA accuracy",
    lambda record: vqa_accuracy(record["prediction"] or "", record["references"]),
    "min(1, people who agree / 3), averaged over the subsets that leave one person out, after normalization",
    suites=VQA_SUITES,
    stored=True,
)
VIZWIZ_UNANSWERABLE_F1 = _metric(
    "vizwiz_unanswerable_f1",
    "F1 of unanswerable",
    _unanswerable,
    'F1 of the answer "unanswerable"; a question is unanswerable if most people said so',
    suites=("vizwiz",),
    upstream=False,
    aggregate=intervals.ratio,
)
GQA_ACCURACY = _metric(
    "gqa_accuracy",
    "accuracy",
    _is_correct,
    "the answer equals the truth but for case and punctuation",
    suites=("gqa",),
)
SCIENCEQA_ACCURACY = _metric(
    "scienceqa_accuracy",
    "accuracy",
    _is_correct,
    "the answer is the option letter, or starts with it and a period",
    suites=("scienceqa",),
)
MMBENCH_VANILLA = _metric(
    "mmbench_vanilla",
    "accuracy, one pass",
    lambda record: None if record["rotation"] else float(record["correct"]),
    "the answer names one option by letter or text; where MMBench would ask a language model, the answer is wrong",
    suites=("mmbench",),
)
MMBENCH_CIRCULAR = _metric(
    "mmbench_circular",
    "accuracy, circular",
    lambda record: bool(record["correct"]),
    "all copies of a question with rotated options are answered correctly; otherwise as in one pass",
    suites=("mmbench",),
    aggregate=intervals.all_correct,
)
_POPE_NOTE = '"no" if the first sentence has the word no or not, else "yes", whatever the answer says'
POPE_ACCURACY = _metric(
    "pope_accuracy",
    "accuracy",
    lambda record: float(len(set(_pope(record))) == 1),
    _POPE_NOTE,
    suites=("pope",),
)
POPE_PRECISION = _metric(
    "pope_precision",
    "precision",
    lambda record: (int(all(_pope(record))), int(_pope(record)[0])),
    _POPE_NOTE,
    suites=("pope",),
    aggregate=intervals.ratio,
)
POPE_RECALL = _metric(
    "pope_recall",
    "recall",
    lambda record: (int(all(_pope(record))), int(_pope(record)[1])),
    _POPE_NOTE,
    suites=("pope",),
    aggregate=intervals.ratio,
)
POPE_F1 = _metric(
    "pope_f1", "F1", lambda record: _f1(*_pope(record)), _POPE_NOTE, suites=("pope",), aggregate=intervals.ratio
)
POPE_YES_RATIO = _metric(
    "pope_yes_ratio",
    "yes ratio",
    lambda record: float(_pope(record)[0]),
    _POPE_NOTE,
    suites=("pope",),
    direction="half",
)
POPE_NO_VERDICT = _metric(
    "pope_no_verdict",
    "answers without yes or no",
    lambda record: float(first_yes_or_no(record["prediction"] or "") is None),
    "such answers are wrong in the tables of accuracy, and yes by POPE's rule unless they have the word not",
    suites=("pope",),
    direction="down",
    upstream=False,
)
MME_SCORE = _metric(
    "mme_score",
    "score",
    lambda record: (record["category"], bool(record["correct"])),
    "sum over the subtasks of accuracy and accuracy+, both in percent",
    suites=("mme",),
    unit="",
    aggregate=mme_score,
)
MME_ACCURACY = _metric(
    "mme_accuracy", "accuracy", _is_correct, "yes or no within the first four characters", suites=("mme",)
)
MME_ACCURACY_PLUS = _metric(
    "mme_accuracy_plus",
    "accuracy+",
    lambda record: bool(record["correct"]),
    "share of images with both questions answered correctly",
    suites=("mme",),
    aggregate=intervals.all_correct,
)
MMVET_MATCH = _metric(
    "mmvet_match",
    "answers with the true words",
    _is_correct,
    "the answer contains the true words; MM-Vet's score needs a language model as judge: config.eval.judge",
    suites=("mmvet",),
    upstream=False,
)
