"""Modality-aligned metrics: of a fact that is asked with an image and in text alone.

Those of UMU-Bench are for benchmarks that publish pairs of questions (`Example.pair`):

    AccF    share of pairs that are wrong in both modalities, of the people to forget
    AccR    share of pairs that are right in both, of the people to retain
    RLF     mean of (a^2 + b^2) / (a + b), a and b being the two ROUGE-Ls (F), of the people to forget
    RLR     mean of 2 a b / (a + b), of the people to retain

RLF and RLR are 0 where a and b are; in RLF the larger of the two dominates. A pair counts once, in the figures of the
question with the image.

Other benchmarks publish no pairs. There a fact is a person, a task and an answer, and each question with an image is
paired with all text-only questions of its set about its fact. These two metrics are ours:

    both_wrong    share of such questions that are answered wrongly, and whose text-only questions all are, too, of the
                  people to forget
    both_right    share of those that are answered correctly, and whose text-only questions all are, too, of the people
                  to retain

They are computed with `data.forgets=both`, which asks for a fact to go in both modalities.
"""

from collections.abc import Callable, Mapping

from vkd_jax.evaluation.metrics.base import Metric
from vkd_jax.evaluation.metrics.words import ROUGE_L
from vkd_jax.types import Role

_CHOSEN = ("classification", "cloze")
_ASKED = (*_CHOSEN, "generation")


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


def _aligned(right: bool) -> Callable[[Mapping], float | None]:
    def value(record: Mapping) -> float | None:
        if not record.get("aligned"):
            return None
        return float(all(bool(correct) is right for correct in (record["correct"], *record["aligned"])))

    return value


def _overlap(combine: Callable[[float, float], float]) -> Callable[[Mapping], float | None]:
    def value(record: Mapping) -> float | None:
        return combine(ROUGE_L.value(record), ROUGE_L.value(record["partner"])) if "partner" in record else None

    return value


ACC_F = Metric("acc_f", "AccF (UMU-Bench)", "up", "%", _CHOSEN, (Role.FORGET,), _both(False))
ACC_R = Metric("acc_r", "AccR (UMU-Bench)", "up", "%", _CHOSEN, (Role.RETAIN, Role.GENERAL), _both(True))
RLF = Metric("rlf", "RLF (UMU-Bench)", "down", "", ("generation",), (Role.FORGET,), _overlap(dominant))
RLR = Metric("rlr", "RLR (UMU-Bench)", "up", "", ("generation",), (Role.RETAIN, Role.GENERAL), _overlap(harmonic))
BOTH_WRONG = Metric(
    "both_wrong", "wrong with an image and in text (ours)", "up", "%", _ASKED, (Role.FORGET,), _aligned(False)
)
BOTH_RIGHT = Metric(
    "both_right", "right with an image and in text (ours)", "up", "%", _ASKED, (Role.RETAIN,), _aligned(True)
)
