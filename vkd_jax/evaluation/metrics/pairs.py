"""Modality-aligned metrics of UMU-Bench: of a fact that is asked with an image and in text alone.

    AccF    share of pairs that are wrong in both modalities, of the people to forget
    AccR    share of pairs that are right in both, of the people to retain
    RLF     mean of (a^2 + b^2) / (a + b), a and b being the two ROUGE-Ls (F), of the people to forget
    RLR     mean of 2 a b / (a + b), of the people to retain

RLF and RLR are 0 where a and b are; in RLF the larger of the two dominates. A pair counts once, in the figures of the
question with the image.
"""

from collections.abc import Callable, Mapping

from vkd_jax.evaluation.metrics.base import Metric
from vkd_jax.evaluation.metrics.words import ROUGE_L
from vkd_jax.types import Role

_CHOSEN = ("classification", "cloze")


def dominant(a: float, b: float) -> float:
    """(a^2 + b^2) / (a + b), which is between the mean and the larger of the two; 0 if both are 0."""
    return (a * a + b * b) / (a + b) if a + b else 0.0


def harmonic(a: float, b: float) -> float:
    """2 a b / (a + b), the harmonic mean; 0 if both are 0."""
    return 2 * a * b / (a + b) if a + b else 0.0


def _both(right: bool) -> Callable[[Mapping], float | None]:
    def value(record: Mapping) -> float | None:
        if "partner" not in record:
            return None
        return float(bool(record["correct"]) is right and bool(record["partner"]["correct"]) is right)

    return value


def _overlap(combine: Callable[[float, float], float]) -> Callable[[Mapping], float | None]:
    def value(record: Mapping) -> float | None:
        return combine(ROUGE_L.value(record), ROUGE_L.value(record["partner"])) if "partner" in record else None

    return value


ACC_F = Metric("acc_f", "AccF (UMU-Bench)", "up", "%", _CHOSEN, (Role.FORGET,), _both(False))
ACC_R = Metric("acc_r", "AccR (UMU-Bench)", "up", "%", _CHOSEN, (Role.RETAIN, Role.GENERAL), _both(True))
RLF = Metric("rlf", "RLF (UMU-Bench)", "down", "", ("generation",), (Role.FORGET,), _overlap(dominant))
RLR = Metric("rlr", "RLR (UMU-Bench)", "up", "", ("generation",), (Role.RETAIN, Role.GENERAL), _overlap(harmonic))
