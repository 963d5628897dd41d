"""Whether a model is the same in PyTorch and here, and the first stage at which it is not.

The stages of an answer are its prompt (token by token), the image features that replace the image tokens, the logits
after each token of the question and of PyTorch's answer, and the tokens of the answer. Distances are relative:

    features: rms(x - r) / rms(r)      logits: rms(x - r) / sd(r), with the standard deviation over the vocabulary

where r is PyTorch in float32, and the root mean square is taken over one question. In float32 a distance may be
`FLOAT32`. Two correct programs that add in different orders differ by 1e-6 to 1e-5 (small models in the architectures
of all families); docs/parity.md lists the differences of wrong ones. In bfloat16, whose rounding depends on the model,
a distance may be `BFLOAT16` times that of PyTorch's own bfloat16: its root mean square over the questions with an
image, or over those without one.

A token of the answer may differ if PyTorch's logits of the two tokens are closer than twice the largest difference of
the logits at that position: then rounding decides which one is larger. What follows it is not compared.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from vkd_jax.runtime import finite
from vkd_jax.verify.answers import Answer

FLOAT32 = 1e-3  # largest relative distance
EXACT = FLOAT32, FLOAT32  # of features and logits
BFLOAT16 = 2.0  # largest distance by that of PyTorch's bfloat16
STAGES = ("prompt", "features", "logits", "tokens")


@dataclasses.dataclass(frozen=True)
class Difference:
    """How far two answers to a question are apart."""

    size: str  # of the image
    prompt: int  # number of its tokens
    stage: str = ""  # the first one that differs; "" if none does
    features: float = 0.0  # relative distance; NaN without an image
    logits: float = math.nan  # relative distance
    limits: tuple[float, float] = EXACT  # of both
    largest: float = math.nan  # largest absolute difference of a logit
    kl: float = math.nan  # largest KL divergence of next-token distributions from PyTorch's, in nats
    equal: int = 0  # tokens of the answer that are equal
    compared: int = 0  # tokens of the answer that were compared
    tied: bool = False  # whether rounding decides the token after the equal ones


def check(answer: Answer) -> None:
    """Checks that distances from an answer are defined.

    Raises:
        NotFinite: features or logits are NaN or infinite, all features are zero, or all logits of a token are equal.
    """
    finite.check(answer.features, "The features of images in PyTorch")
    finite.check(answer.logits, "The logits in PyTorch")
    if answer.features.size and not answer.features.any():
        raise finite.error("The features of images in PyTorch")
    if not np.ptp(answer.logits, axis=-1).all():
        raise finite.error("The logits in PyTorch")


def limits(theirs: Sequence[Answer], exact: Sequence[Answer]) -> tuple[float, float]:
    """The largest distances of features and logits that are allowed in bfloat16.

    Args:
        theirs: answers of PyTorch in bfloat16, to questions that all have an image or all have none.
        exact: the answers of PyTorch in float32 to the same tokens.
    """
    distances = [_distances(x, reference) for x, reference in zip(theirs, exact, strict=True)]
    features, logits = (
        BFLOAT16 * math.sqrt(sum(x**2 for x in kind) / len(kind)) for kind in zip(*distances, strict=True)
    )
    return features, logits


def compare(
    size: str,
    ours: Answer | None,
    theirs: Answer,
    exact: Answer,
    limits: tuple[float, float] = EXACT,
) -> Difference:
    """Compares two answers.

    Args:
        size: size of the image, for the table.
        ours: the answer of this library; None if its prompt is another one than in PyTorch.
        theirs: the answer of PyTorch in the same dtype.
        exact: the answer of PyTorch in float32 to the same tokens.
        limits: largest distances of features and logits.
    """
    prompt = len(theirs.prompt)
    if ours is None:
        return Difference(size, prompt, "prompt")
    if ours.features.shape != theirs.features.shape:
        return Difference(size, prompt, "features", features=math.inf)
    features, logits = _distances(ours, exact)
    has_features = bool(ours.features.size)
    stage = "features" if has_features and not features <= limits[0] else "" if logits <= limits[1] else "logits"
    equal, tied = _tokens(ours, theirs)
    tied &= not stage  # of what differs by more than rounding no token is a tie
    unequal = equal < len(theirs.tokens) and not tied
    return Difference(
        size,
        prompt,
        stage or ("tokens" if unequal else ""),
        features,
        logits,
        limits,
        float(np.abs(ours.logits - theirs.logits).max()),
        _divergence(theirs.logits, ours.logits),
        equal,
        equal + unequal,
        tied,
    )


def _distances(x: Answer, exact: Answer) -> tuple[float, float]:
    """Relative distances of features and logits."""
    return _rms(x.features, exact.features), _rms(x.logits, exact.logits, centered=True)


def _rms(x: np.ndarray, reference: np.ndarray, centered: bool = False) -> float:
    """Relative distance of two arrays [n, d]; NaN if they are empty."""
    if not x.size:
        return math.nan
    x, reference = x.astype(np.float64), reference.astype(np.float64)
    scale = reference - reference.mean(-1, keepdims=True) if centered else reference
    return float(np.sqrt(((x - reference) ** 2).mean() / (scale**2).mean()))


def _divergence(reference: np.ndarray, logits: np.ndarray) -> float:
    """The largest KL divergence of a row of logits, in nats; NaN if one has no distribution."""

    def log_softmax(x: np.ndarray) -> np.ndarray:
        x = x.astype(np.float64)
        return x - np.logaddexp.reduce(x, -1, keepdims=True)

    with np.errstate(invalid="ignore"):
        p, q = log_softmax(reference), log_softmax(logits)
        return float((np.exp(p) * (p - q)).sum(-1).max())


def _tokens(ours: Answer, theirs: Answer) -> tuple[int, bool]:
    """The number of equal tokens at the beginning of two answers, and whether the next one is a tie."""
    unequal = np.flatnonzero(ours.tokens != theirs.tokens)
    if not len(unequal):
        return len(theirs.tokens), False
    first = int(unequal[0])
    row = first - len(theirs.tokens)  # of the logits that the token was chosen by
    reference, rounding = theirs.logits[row], np.abs(ours.logits[row] - theirs.logits[row]).max()
    gap = reference[theirs.tokens[first]] - reference[ours.tokens[first]]
    return first, bool(gap <= 2 * rounding)


def table(differences: Sequence[Difference]) -> str:
    """The differences as the rows of a table, one for each question."""
    header = ["image", "prompt", "features", "logits", "largest", "KL", "tokens"]
    rows = [header, *(_cells(difference) for difference in differences)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    return "\n".join("  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _cells(x: Difference) -> list[str]:
    numbers = [_number(value) for value in (x.features, x.logits, x.largest, x.kl)]
    tokens = "-" if math.isnan(x.kl) else f"{x.equal}/{x.compared}" + (" tie" if x.tied else "")
    return [x.size, f"{x.prompt}" if x.stage != "prompt" else "differs", *numbers, tokens]


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{max(value, 0.0):.1e}"


def verdict(differences: Sequence[Difference], dtype: str) -> tuple[bool, str]:
    """Whether all answers are the same, and a sentence that says so, with the limits."""
    if stages := [x.stage for x in differences if x.stage]:
        stage = min(stages, key=STAGES.index)
        worst = max((x for x in differences if x.stage == stage), key=lambda x: _excess(x, stage))
        count = f"in {len(stages)} of {len(differences)} questions"
        return False, f"not the same model in {dtype}: {_problem(worst, stage)} ({count})."
    compared, ties = sum(x.compared for x in differences), sum(x.tied for x in differences)
    tokens = f"all {compared} greedy tokens equal" + (f" ({ties} more are ties that rounding decides)" if ties else "")
    largest, kl = max(x.largest for x in differences), max(max(x.kl for x in differences), 0.0)
    return True, f"the same model in {dtype}: largest |logit difference| {largest:.1e}, KL {kl:.1e} nats, {tokens}."


def _excess(x: Difference, stage: str) -> float:
    return {"features": x.features / x.limits[0], "logits": x.logits / x.limits[1]}.get(stage, 0.0)


def _problem(x: Difference, stage: str) -> str:
    if stage == "prompt":
        return "the prompts have other tokens"
    if stage == "tokens":
        return f"greedy tokens differ after {x.equal} equal ones, although the logits agree"
    first = "the image features" if stage == "features" else "the logits (not the image features)"
    distance, limit = (x.features, x.limits[0]) if stage == "features" else (x.logits, x.limits[1])
    return f"{first} differ first, by {distance:.1e} of their size, where {limit:.1e} is allowed"
