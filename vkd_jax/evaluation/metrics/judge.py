"""Scores of a language model as judge, 0 to 1; see `vkd_jax.evaluation.judge`."""

from collections.abc import Mapping

from vkd_jax.evaluation.metrics.base import Metric
from vkd_jax.evaluation.metrics.suites import SuiteMetric


def is_graded(record: Mapping) -> bool:
    """Whether the judge's reply gave a record a score."""
    return "judge" in record or "asr" in record


JUDGE = Metric(
    "judge", "score of the judge", "by_role", unit="%", tasks=("generation",), item=lambda record: record.get("judge")
)
MMVET_SCORE = SuiteMetric(
    "mmvet_score",
    "score of the judge",
    "up",
    unit="%",
    tasks=("suite",),
    item=lambda record: record.get("judge"),
    in_report=False,
    suites=("mmvet",),
    upstream=False,
    note="mean score of a language model as judge; MM-Vet's own score if judge and prompt are MM-Vet's",
)
