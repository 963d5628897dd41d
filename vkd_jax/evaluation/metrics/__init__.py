"""Metrics, one file per family. To add one, write a `Metric` in a file and add a line to `METRICS`.

Report, tables and plots take a metric's title, unit and arrow from here. A metric first scores one record of the
answers; `summary` then averages the scores, with an interval over people (see `intervals`). Model utility and forget
quality are metrics of whole models.
"""

import functools
import importlib
from collections.abc import Mapping

from vkd_jax import messages
from vkd_jax.evaluation.metrics.base import Metric
from vkd_jax.types import UserError

_HERE = "vkd_jax.evaluation.metrics"

METRICS: dict[str, str] = {
    "accuracy": f"{_HERE}.correctness:ACCURACY",
    "no_letter": f"{_HERE}.correctness:NO_LETTER",
    "rouge_l": f"{_HERE}.words:ROUGE_L",
    "rouge_l_recall": f"{_HERE}.words:ROUGE_L_RECALL",
    "bleu": f"{_HERE}.words:BLEU",
    "probability": f"{_HERE}.likelihoods:PROBABILITY",
    "truth_score": f"{_HERE}.likelihoods:TRUTH_SCORE",
    "vqa_accuracy": f"{_HERE}.suites:VQA_ACCURACY",
    "vizwiz_unanswerable_f1": f"{_HERE}.suites:VIZWIZ_UNANSWERABLE_F1",
    "gqa_accuracy": f"{_HERE}.suites:GQA_ACCURACY",
    "scienceqa_accuracy": f"{_HERE}.suites:SCIENCEQA_ACCURACY",
    "mmbench_vanilla": f"{_HERE}.suites:MMBENCH_VANILLA",
    "mmbench_circular": f"{_HERE}.suites:MMBENCH_CIRCULAR",
    "pope_accuracy": f"{_HERE}.suites:POPE_ACCURACY",
    "pope_precision": f"{_HERE}.suites:POPE_PRECISION",
    "pope_recall": f"{_HERE}.suites:POPE_RECALL",
    "pope_f1": f"{_HERE}.suites:POPE_F1",
    "pope_yes_ratio": f"{_HERE}.suites:POPE_YES_RATIO",
    "pope_no_verdict": f"{_HERE}.suites:POPE_NO_VERDICT",
    "mme_score": f"{_HERE}.suites:MME_SCORE",
    "mme_accuracy": f"{_HERE}.suites:MME_ACCURACY",
    "mme_accuracy_plus": f"{_HERE}.suites:MME_ACCURACY_PLUS",
    "mmvet_match": f"{_HERE}.suites:MMVET_MATCH",
    "mmvet_score": f"{_HERE}.judge:MMVET_SCORE",
    "judge": f"{_HERE}.judge:JUDGE",
    "truth_ratio_forget": f"{_HERE}.likelihoods:TRUTH_RATIO_FORGET",
    "probability_retain": f"{_HERE}.likelihoods:PROBABILITY_RETAIN",
    "em": f"{_HERE}.keywords:EM",
    "ape": f"{_HERE}.keywords:APE",
    "efficacy": f"{_HERE}.keywords:EFFICACY",
    "generality": f"{_HERE}.keywords:GENERALITY",
    "specificity": f"{_HERE}.keywords:SPECIFICITY",
    "fluency": f"{_HERE}.keywords:FLUENCY",
    "rr": f"{_HERE}.refusals:RR",
    "sarr": f"{_HERE}.refusals:SARR",
    "asr": f"{_HERE}.refusals:ASR",
    "rouge_l_precision": f"{_HERE}.refusals:ROUGE_L_PRECISION",
    "offside_score": f"{_HERE}.words:OFFSIDE_SCORE",
    "acc_f": f"{_HERE}.pairs:ACC_F",
    "acc_r": f"{_HERE}.pairs:ACC_R",
    "rlf": f"{_HERE}.pairs:RLF",
    "rlr": f"{_HERE}.pairs:RLR",
    "both_wrong": f"{_HERE}.pairs:BOTH_WRONG",
    "both_right": f"{_HERE}.pairs:BOTH_RIGHT",
    "ks": f"{_HERE}.forget_quality:KS",
    "utility": f"{_HERE}.utility:UTILITY",
    "auc": f"{_HERE}.attack_metrics:AUC",
    "recovery": f"{_HERE}.attack_metrics:RECOVERY",
}


def get(name: str) -> Metric:
    """Returns a metric by its name; only its module is imported.

    Raises:
        UserError: the name is unknown.
    """
    if name not in METRICS:
        raise UserError(f"Unknown metric {name!r}. Available: {messages.choices(METRICS)}.")
    return _load(METRICS[name])


def stored_values(record: Mapping) -> dict[str, float]:
    """The metric values that a record of the answers stores; they are computed when the answer is judged."""
    stored = (metric for metric in map(get, METRICS) if metric.stored)
    return {metric.name: value for metric in stored if (value := metric.value(record)) is not None}


@functools.cache
def _load(target: str) -> Metric:
    module, attribute = target.split(":")
    return getattr(importlib.import_module(module), attribute)
