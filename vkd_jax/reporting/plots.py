"""Plots of the report: functions from figures to PNG bytes that leave no matplotlib state behind."""

import contextlib
import dataclasses
import io
import math
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image

from vkd_jax.reporting import curves, names
from vkd_jax.reporting.markdown import plain
from vkd_jax.results import AttackCell, Summary
from vkd_jax.types import Role

BLUE, ORANGE, GREEN, GREY, INK = "#0072B2", "#D55E00", "#009E73", "#767676", "#222222"  # color-blind safe
LINES = (BLUE, ORANGE, GREEN, "#CC79A7", "#56B4E9", "#E69F00")
STYLE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 10,
    "text.color": INK,
    "text.parse_math": False,  # "$" in names and texts is no formula
    "axes.edgecolor": GREY,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "legend.frameon": False,
}
DPI = 150


@dataclasses.dataclass(frozen=True)
class Look:
    """Marker of a model."""

    marker: str
    size: float
    color: str


LOOKS = {  # drawn in this order: the unlearned model is smaller, so that both show where they coincide
    "vanilla": Look("o", 12, GREY),
    "unlearned": Look("o", 8, BLUE),
    "retain_only": Look("*", 14, GREEN),
}


@dataclasses.dataclass(frozen=True)
class Card:
    """One portrait with a question, the true answer, and the answers of the vanilla and the unlearned model."""

    image: bytes | None  # encoded; None draws an empty frame
    title: str
    question: str
    truth: str
    vanilla: tuple[str, bool]  # the answer, and whether it is correct
    unlearned: tuple[str, bool]


def loss_curves(rows: Sequence[Mapping[str, float]]) -> bytes:
    """Plots one panel per training stream: its loss, bold, and the terms of that loss.

    Args:
        rows: logged steps, {"step", "forget_loss", "forget_ce", "retain_loss", ...}; the prefix of a name
            that ends with "_loss" is a stream, and its terms share that prefix. At least one stream.
    """
    streams = curves.losses(rows)
    with _panels(len(streams), bottom=1.1) as (_, png, panels):
        for axes, panel in zip(panels, streams, strict=True):
            for line, color in zip(panel.lines, [INK, *LINES], strict=False):
                points = [(point.x, point.y) for point in line.points]
                width = 2.4 if line is panel.lines[0] else 1.3
                axes.plot(*zip(*points, strict=True), label=line.title, color=color, linewidth=width, marker=".")
            axes.set(title=panel.title, xlabel=panel.x_title, ylabel=panel.y_title)
            axes.legend(fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=3)
    return png.getvalue()


def forget_against_retain(
    models: Mapping[str, Mapping], set_names: Mapping[Role, str], chance: Mapping[str, float]
) -> bytes:
    """Plots accuracy on the forget set (horizontal) against accuracy on the retain set (vertical).

    The left panel has questions with an image, the right one text-only questions. Filled markers are the forget and
    the retain set, hollow ones their holdouts with other images; whiskers are 95 % intervals; arrows lead from the
    vanilla to the unlearned model.

    Args:
        models: {"vanilla" | "unlearned" | "retain_only": {set: {"vqa" | "qa": summary}}}.
        set_names: the set of each role; a missing holdout is not drawn.
        chance: accuracy of guessing on the forget set, {"vqa", "qa"}.
    """
    roles = (Role.FORGET, Role.RETAIN), (Role.FORGET_HOLDOUT, Role.RETAIN_HOLDOUT)
    sets, holdouts = ([set_names.get(role, "") for role in pair] for pair in roles)
    with drawing(9.6, 5.5) as (figure, png):
        margins = margins_of(figure, left=0.6, right=0.15, bottom=0.95, top=0.35)
        image, text = figure.subplots(1, 2, gridspec_kw=margins)
        for axes, kind in ((image, "vqa"), (text, "qa")):
            if kind in chance:
                axes.axvline(100 * chance[kind], color=ORANGE, linestyle="--", linewidth=1.2)
                axes.text(100 * chance[kind] + 1.5, 1, "chance", color=ORANGE, fontsize=9, va="bottom")
            axes.set(xlim=(-4, 104), ylim=(-4, 104))
            axes.set(xlabel="accuracy on the forget set (%)", ylabel="accuracy on the retain set (%)")
        hollow = _marks(image, models, "vqa", holdouts, filled=False)
        _marks(image, models, "vqa", sets, filled=True)
        _marks(text, models, "qa", sets, filled=True)
        image.set_title("With image")
        text.set_title("Text only")
        keys = [_key(look, label=names.MODELS[name]) for name, look in LOOKS.items() if name in models]
        if hollow:
            keys.append(
                _key(LOOKS["vanilla"], label="holdout: other images of the same people", markerfacecolor="white")
            )
        figure.legend(handles=keys, loc="lower center", ncols=len(keys))
    return png.getvalue()


def relearning_curves(cells: Sequence[AttackCell], forget: Sequence[str]) -> bytes | None:
    """Plots accuracy on the rest of the forget set by the share that was relearned: one panel for each attacker.

    Each model is a line with its 95 % interval as a band. The first point is the accuracy before the attack.

    Args:
        cells: all cells of the attack.
        forget: names of the sets with the role forget.

    Returns:
        None if no cell has a share.
    """
    attackers = curves.relearning(cells, forget)
    if not attackers:
        return None
    with _panels(len(attackers), bottom=0.95, sharey=True) as (figure, png, panels):
        for axes, panel in zip(panels, attackers, strict=True):
            for line in panel.lines:
                look = LOOKS[line.name]
                across, mean, low, high = (
                    [getattr(point, name) for point in line.points] for name in ("x", "y", "low", "high")
                )
                axes.fill_between(across, low, high, color=look.color, alpha=0.15, linewidth=0)
                axes.plot(across, mean, color=look.color, marker=look.marker, markersize=look.size / 1.6, linewidth=2)
            axes.set(title=panel.title, xlabel=panel.x_title, ylim=(-4, 104))
        panels[0].set_ylabel(attackers[0].y_title)
        keys = [_key(LOOKS[line.name], label=line.title) for line in attackers[0].lines]
        figure.legend(handles=keys, loc="lower center", ncols=len(keys))
    return png.getvalue()


def budget_curves(cells: Sequence[AttackCell], forget: Sequence[str]) -> bytes | None:
    """Plots accuracy on the rest of the forget set by the attacker's steps: one panel for each attacker.

    At each number of steps a model has its most successful learning rate. The retain-only model, which is the control,
    is a band, its 95 % interval over people; the unlearned model is a line with such intervals as whiskers.

    Args:
        cells: all cells of the attack.
        forget: names of the sets with the role forget.

    Returns:
        None if the attacker has one number of steps.
    """
    attackers = curves.budgets(cells, forget)
    if not attackers:
        return None
    with _panels(len(attackers), bottom=0.95, sharey=True) as (figure, png, panels):
        for axes, panel in zip(panels, attackers, strict=True):
            for line in panel.lines:
                _budget_curve(axes, line, LOOKS[line.name], band=line.name == "retain_only")
            axes.set(title=panel.title, xlabel=panel.x_title, ylim=(-4, 104))
            axes.set_xscale("symlog", linthresh=panel.linear_to)
            ticks = sorted({0, *(point.x for line in panel.lines for point in line.points)})
            axes.set_xlim(-0.1 * panel.linear_to, 1.3 * ticks[-1])
            axes.set_xticks(ticks, map(str, ticks), minor=False)
            axes.minorticks_off()
        panels[0].set_ylabel(attackers[0].y_title)
        keys = [_key(LOOKS[line.name], label=line.title) for line in attackers[0].lines]
        for key, line in zip(keys, attackers[0].lines, strict=True):
            if line.name == "retain_only":
                key.set(marker="", linestyle="--")  # as its line is drawn
        figure.legend(handles=keys, loc="lower center", ncols=len(keys))
    return png.getvalue()


def _budget_curve(axes: Axes, line: curves.Line, look: Look, band: bool) -> None:
    """Draws the accuracy of one model by the number of steps, with its interval as a band or as whiskers."""
    steps, mean, low, high = (
        np.array([getattr(point, name) for point in line.points]) for name in ("x", "y", "low", "high")
    )
    if band:
        axes.fill_between(steps, low, high, color=look.color, alpha=0.2, linewidth=0)
        axes.plot(steps, mean, color=look.color, linestyle="--", linewidth=1.5)
    else:
        axes.errorbar(steps, mean, yerr=np.abs([mean - low, high - mean]), linewidth=2, **_appearance(look))


def portrait_sheet(rows: Mapping[str, Sequence[Card]]) -> bytes:
    """Draws rows of portraits under a heading each, with question, true answer, and the answers of both models."""
    columns = max(4, *(len(cards) for cards in rows.values()))
    wide, side, heading, words = 1.9, 1.6, 0.62, 1.2  # inches: a card, its image, the space above and below it
    width, height = wide * columns, (heading + side + words) * len(rows)
    with drawing(width, height) as (figure, png):
        top = height
        for title, cards in rows.items():
            figure.text(0.15 / width, (top - 0.1) / height, title, fontsize=11, fontweight="bold", va="top")
            top -= heading
            for column, card in enumerate(cards):
                left = wide * column + (wide - side) / 2
                axes = figure.add_axes((left / width, (top - side) / height, side / width, side / height))
                axes.imshow(_pixels(card.image))
                axes.set_axis_off()
                axes.set_title(_short(card.title), fontsize=9, fontweight="normal", color=GREY, pad=3)
                for number, (line, color) in enumerate(_words(card)):
                    x, y = (left + side / 2) / width, (top - side - 0.06 - 0.18 * number) / height
                    figure.text(x, y, line, color=color, fontsize=9, ha="center", va="top")
            top -= side + words
    return png.getvalue()


@contextlib.contextmanager
def drawing(width: float, height: float) -> Iterator[tuple[Figure, io.BytesIO]]:
    """Context manager: a figure in the fixed style, independent of matplotlibrc, and the buffer that it is saved to."""
    with matplotlib.style.context(["default", STYLE]):
        figure, png = Figure(figsize=(width, height), dpi=DPI), io.BytesIO()
        FigureCanvasAgg(figure)
        yield figure, png
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph")  # the font lacks some alphabets, and draws boxes for them
            figure.savefig(png, format="png", metadata={"Software": None})  # no version in the bytes


@contextlib.contextmanager
def _panels(count: int, bottom: float, **options: Any) -> Iterator[tuple[Figure, io.BytesIO, Sequence[Axes]]]:
    """Context manager: a `drawing` of panels beside each other; `bottom` inches below them are for the legend."""
    with drawing(4.8 * count, 4.0) as (figure, png):
        margins = margins_of(figure, left=0.6, right=0.15, bottom=bottom, top=0.35)
        yield figure, png, figure.subplots(1, count, squeeze=False, gridspec_kw=margins, **options)[0]


def margins_of(figure: Figure, left: float, right: float, bottom: float, top: float) -> dict[str, float]:
    """Converts margins in inches to the fractions that matplotlib takes."""
    width, height = figure.get_size_inches()
    return {
        "left": left / width,
        "right": 1 - right / width,
        "bottom": bottom / height,
        "top": 1 - top / height,
    }


def _marks(axes: Axes, models: Mapping, kind: str, sets: Sequence[str], filled: bool) -> bool:
    """Draws each model at (accuracy on the first set, accuracy on the second); returns whether any was drawn."""
    points = {}
    for model, look in LOOKS.items():
        across, up = (models.get(model, {}).get(name, {}).get(kind) for name in sets)
        if not across or not up:
            continue
        points[model] = (100 * across.accuracy, 100 * up.accuracy)
        axes.errorbar(
            *points[model],
            xerr=_whiskers(across),
            yerr=_whiskers(up),
            **_appearance(look) | ({} if filled else {"markerfacecolor": "white", "alpha": 0.7}),
        )
    if {"vanilla", "unlearned"} <= points.keys() and math.dist(points["vanilla"], points["unlearned"]) > 6:
        arrow = {"arrowstyle": "->", "color": GREY, "shrinkA": 8, "shrinkB": 8}
        axes.annotate("", xy=points["unlearned"], xytext=points["vanilla"], arrowprops=arrow)
    return bool(points)


def _whiskers(summary: Summary) -> list[list[float]]:
    return [[100 * abs(summary.accuracy - end)] for end in (summary.low, summary.high)]


def _appearance(look: Look) -> dict[str, Any]:
    return {
        "marker": look.marker,
        "markersize": look.size,
        "color": look.color,
        "elinewidth": 1.0,
        "capsize": 2,
    }


def _key(look: Look, **more) -> Line2D:
    """Legend entry of a model."""
    return Line2D([], [], marker=look.marker, markersize=9, color=look.color, linestyle="none", **more)


def _pixels(image: bytes | None) -> np.ndarray:
    if image is None:
        return np.full((8, 8, 3), 235, np.uint8)
    with Image.open(io.BytesIO(image)) as opened:
        return np.asarray(opened.convert("RGB"))


def _words(card: Card) -> list[tuple[str, str]]:
    """The lines under a portrait, each with its color."""
    lines = [(line, GREY) for line in textwrap.wrap(plain(card.question), 26, max_lines=3, placeholder=" …")]
    lines.append((_short(f"truth: {card.truth}"), INK))
    for model in ("vanilla", "unlearned"):
        answer, correct = getattr(card, model)
        lines.append(
            (f"{_short(f'{names.MODELS[model]}: {answer}')} {'✓' if correct else '✗'}", BLUE if correct else ORANGE)
        )
    return lines


def _short(text: str) -> str:
    return textwrap.shorten(plain(text), 27, placeholder=" …")
