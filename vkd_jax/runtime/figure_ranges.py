"""Which figures of results are possible: the fields of `vkd_jax.results` by their names."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from vkd_jax.runtime.dataclass_json import FormatError

SHARES = {"accuracy", "ks", "p", "p_questions", "js"}  # fields that are in [0, 1]
COUNTS = {"n", "correct", "people", "one", "several", "changed", "tensors", "parameters", "of", "step_bytes"}
ROUNDING = 1e-6
ORDERED = (("low", "high"), ("correct", "n"), ("changed", "tensors"), ("parameters", "of"))  # smaller fields first


def check_ranges(value: Any, path: str = "") -> None:
    """Checks dataclasses, mappings and tuples of figures, at any depth.

    Args:
        value: one of them.
        path: where it is in its file, for errors.

    Raises:
        FormatError: a field is NaN or infinite, a share is outside [0, 1], a number is negative, there are more right
            answers than answers, or an accuracy is not their quotient.
    """
    if dataclasses.is_dataclass(value):
        value = vars(value)
        for name, number in value.items():
            if isinstance(number, float) and not math.isfinite(number):
                raise FormatError(f"{path}.{name} is {number!r}, expected a finite number")
            if name in COUNTS | SHARES and isinstance(number, int | float):
                _check_order(f"{path}.{name}", 0, number, 1 if name in SHARES else math.inf)
        for small, large in ORDERED:
            if value.get(small) is not None and value.get(large) is not None:
                _check_order(f"{path}.{small}", -math.inf, value[small], value[large])
        for name in ("accuracy", "mean"):  # of all answers, if their number is given
            if value.get(name) is not None and value.get("correct") is not None and value["n"]:
                share = value["correct"] / value["n"]
                _check_order(f"{path}.{name}", share, value[name], share)
    if isinstance(value, tuple):
        value = {str(index): item for index, item in enumerate(value)}
    if isinstance(value, Mapping):
        for name, item in value.items():
            check_ranges(item, f"{path}.{name}".lstrip("."))


def _check_order(path: str, low: float, value: float, high: float) -> None:
    if not low - ROUNDING <= value <= high + ROUNDING:
        bounds = [f"at least {low}"] * (low > -math.inf) + [f"at most {high}"] * (high < math.inf)
        bounds = [str(low)] if low == high else bounds
        raise FormatError(f"{path} is {value!r}, expected {' and '.join(bounds)}")
