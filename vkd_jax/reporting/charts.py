"""Geometry of the inline SVG charts of report.html; the template draws what these functions return.

Coordinates are those of a view box of `WIDTH` by `HEIGHT`.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from matplotlib.ticker import MaxNLocator

from vkd_jax.reporting.curves import Panel
from vkd_jax.reporting.finished_run import Run
from vkd_jax.reporting.names import MODELS
from vkd_jax.results import Summary
from vkd_jax.types import Role

WIDTH, HEIGHT = 460, 300
LEFT, RIGHT, TOP, BOTTOM = 46, 444, 12, 256  # edges of the axes
FRAME = {"width": WIDTH, "height": HEIGHT, "left": LEFT, "right": RIGHT, "top": TOP, "bottom": BOTTOM}


class _Scale:
    """Maps figures to coordinates, linearly.

    Args:
        values: the figures that the axis must show.
        start: coordinate of the smallest.
        end: coordinate of the largest.
        fixed: whether the axis ends at the smallest and the largest value, and not at round numbers.
    """

    def __init__(self, values: Iterable[float], start: float, end: float, fixed: bool = False):
        values = list(values)
        ticks = [float(x) for x in MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]).tick_values(min(values), max(values))]
        self._low, self._high = (min(values), max(values)) if fixed else (ticks[0], ticks[-1])
        self._start, self._end = start, end
        self.ticks = [self.tick(x) for x in ticks if self._low <= x <= self._high]

    def tick(self, value: float) -> dict[str, Any]:
        return {"at": self.at(value), "text": f"{value:g}".replace("-", "−")}

    def at(self, value: float) -> float:
        share = (value - self._low) / ((self._high - self._low) or 1.0)
        return round(self._start + share * (self._end - self._start), 1)


class _SymLogScale(_Scale):
    """Maps figures to coordinates: linearly from 0 to `linear_to`, and logarithmically beyond; each value is a tick."""

    def __init__(self, values: Sequence[float], start: float, end: float, linear_to: float):
        self._linear_to = linear_to
        super().__init__([self._decades(value) for value in values], start, end, fixed=True)
        self.ticks = [self.tick(value) for value in values]

    def _decades(self, value: float) -> float:
        ratio = value / self._linear_to
        return ratio if ratio <= 1 else 1 + math.log10(ratio)

    def at(self, value: float) -> float:
        return super().at(self._decades(value))


def curve(panel: Panel) -> dict[str, Any]:
    """A line chart: axes, lines with their intervals as bands, and the table of its points."""
    points = [point for line in panel.lines for point in line.points]
    xs = sorted({point.x for point in points})
    ys = [y for point in points for y in (point.y, point.low, point.high) if y is not None]
    x = _SymLogScale(xs, LEFT, RIGHT, panel.linear_to) if panel.linear_to else _Scale(xs, LEFT, RIGHT, fixed=True)
    y = _Scale([0, 100] if panel.percent else ys, BOTTOM, TOP, fixed=panel.percent)
    by_x = [{point.x: point for point in line.points} for line in panel.lines]
    return {
        "frame": FRAME,
        "title": panel.title,
        "x_title": panel.x_title,
        "y_title": panel.y_title,
        "x_ticks": x.ticks,
        "y_ticks": y.ticks,
        "stops": [x.at(value) for value in xs],
        "lines": [
            {
                "name": line.name if line.name in MODELS else f"term-{number}",
                "title": line.title,
                "path": _path((x.at(point.x), y.at(point.y)) for point in line.points),
                "band": _band(line.points, x, y),
                "points": [(x.at(point.x), y.at(point.y)) for point in line.points],
            }
            for number, line in enumerate(panel.lines)
        ],
        "rows": [[f"{value:g}", *(_text(points.get(value), panel.percent) for points in by_x)] for value in xs],
    }


def planes(run: Run) -> list[dict[str, Any]]:
    """Accuracy on the forget set (horizontal) against accuracy on the retain set (vertical), by modality."""
    pairs = ((Role.FORGET, Role.RETAIN, False), (Role.FORGET_HOLDOUT, Role.RETAIN_HOLDOUT, True))
    x, y = _Scale((0, 100), LEFT, RIGHT, fixed=True), _Scale((0, 100), BOTTOM, TOP, fixed=True)
    panels = []
    for kind, title in (("vqa", "With image"), ("qa", "Text only")):
        marks = []
        for forget, retain, hollow in pairs if kind == "vqa" else pairs[:1]:
            sets = run.set_of(forget), run.set_of(retain)
            for model in run.models if all(sets) else ():
                across, up = (run.results.summary(model, eval_set.name, kind) for eval_set in sets)
                if across and up:
                    marks.append(_plane_mark(model, across, up, hollow, x, y))
        forget_set = run.set_of(Role.FORGET)
        chance = run.results.chance.get(forget_set.name, {}).get(kind) if forget_set else None
        if marks:
            panels.append(
                {
                    "frame": FRAME,
                    "title": title,
                    "x_title": "accuracy on the forget set (%)",
                    "y_title": "accuracy on the retain set (%)",
                    "x_ticks": x.ticks,
                    "y_ticks": y.ticks,
                    "marks": marks,
                    "chance": None if chance is None else x.at(100 * chance),
                }
            )
    return panels


def _plane_mark(model: str, across: Summary, up: Summary, hollow: bool, x: _Scale, y: _Scale) -> Mapping[str, Any]:
    return {
        "model": model,
        "title": MODELS[model] + (", other images" if hollow else ""),
        "hollow": hollow,
        "at": (x.at(100 * across.accuracy), y.at(100 * up.accuracy)),
        "across": (x.at(100 * across.low), x.at(100 * across.high)),
        "up": (y.at(100 * up.low), y.at(100 * up.high)),
        "accuracies": (across, up),
    }


def _path(points: Iterable[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x} {y}" for x, y in points)


def _band(points: Sequence[Any], x: _Scale, y: _Scale) -> str | None:
    if not points or any(point.low is None for point in points):
        return None
    low = [(x.at(point.x), y.at(point.low)) for point in points]
    return _path([*low, *((x.at(point.x), y.at(point.high)) for point in reversed(points))]) + "Z"


def _text(point: Any, percent: bool) -> str:
    if point is None:
        return "–"
    if percent:
        return f"{point.y:.1f} % ({point.low:.1f} to {point.high:.1f})"
    return f"{point.y:.4g}".replace("-", "−")
