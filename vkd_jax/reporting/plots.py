"""The pictures of the report: functions from numbers to PNG bytes that leave no drawing state behind."""

import contextlib
import dataclasses
import io
import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image

BLUE, ORANGE, GREEN, GREY, INK = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#767676",
    "#222222",
)  # safe for the colour-blind
LINES = (BLUE, ORANGE, GREEN, "#CC79A7", "#56B4E9", "#E69F00")
STYLE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 10,
    "text.color": INK,
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
ATTACKERS = {  # the weights that a relearning attacker trains
    "visual": "the visual weights",
    "lora": "adapters of the language model",
    "all": "all weights",
}


@dataclasses.dataclass(frozen=True)
class Look:
    """How a model is drawn, and what it is called for somebody new to this."""

    label: str
    marker: str
    size: float
    colour: str


LOOKS = {  # drawn in this order: "after" is the smaller, so that both show where they coincide
    "vanilla": Look("before", "o", 12, GREY),
    "unlearned": Look("after", "o", 8, BLUE),
    "retain_only": Look("never knew them", "*", 14, GREEN),
}


@dataclasses.dataclass(frozen=True)
class Card:
    """One portrait with a question, the true answer, and what the model says before and after."""

    image: bytes | None  # encoded picture; None draws an empty frame
    title: str
    question: str
    truth: str
    before: tuple[str, bool]  # what was said, and whether it is right
    after: tuple[str, bool]


def loss_curves(rows: Sequence[Mapping[str, float]]) -> bytes:
    """One panel per training stream: its loss, bold, and the terms that it is made of.

    Args:
        rows: logged steps, {"step", "forget_loss", "forget_ce", "retain_loss", ...}; a stream is what stands
            before "_loss", and its terms share that prefix. At least one stream.
    """
    names = list(dict.fromkeys(name for row in rows for name in row))
    streams = [name.removesuffix("_loss") for name in names if name.endswith("_loss")]
    with drawing(4.8 * len(streams), 3.4) as (figure, png):
        margins = margins_of(figure, left=0.6, right=0.15, bottom=0.5, top=0.35)
        panels = figure.subplots(1, len(streams), squeeze=False, gridspec_kw=margins)[0]
        for axes, stream in zip(panels, streams, strict=True):
            total = f"{stream}_loss"
            terms = [name for name in names if name.startswith(f"{stream}_") and name != total]
            for name, colour in zip([total, *terms], [INK, *LINES], strict=False):
                points = [(row["step"], row[name]) for row in rows if name in row]
                width = 2.4 if name == total else 1.3
                axes.plot(*zip(*points, strict=True), label=name, color=colour, linewidth=width, marker=".")
            axes.set(title=f"{stream} stream", xlabel="step")
            axes.legend(fontsize=9)
    return png.getvalue()


def forget_against_retain(models: Mapping[str, Mapping], chance: Mapping[str, float]) -> bytes:
    """Right answers about the people to forget (across) against those about the people to keep (up).

    On the left with a picture, on the right in text alone. Filled marks: the pictures that were used; hollow
    marks: other pictures of the same people; whiskers: 95 % intervals; arrows lead from before to after.

    Args:
        models: {"vanilla" | "unlearned" | "retain_only": {set: {"vqa" | "qa": summary}}}.
        chance: the share of right answers about the people to forget that guessing gives, {"vqa", "qa"}.
    """
    used, others = ("forget", "retain"), ("test", "retain_test")
    with drawing(9.6, 5.5) as (figure, png):
        margins = margins_of(figure, left=0.6, right=0.15, bottom=0.95, top=0.35)
        picture, text = figure.subplots(1, 2, gridspec_kw=margins)
        for axes, kind in ((picture, "vqa"), (text, "qa")):
            if kind in chance:
                axes.axvline(100 * chance[kind], color=ORANGE, linestyle="--", linewidth=1.2)
                axes.text(100 * chance[kind] + 1.5, 1, "guessing", color=ORANGE, fontsize=9, va="bottom")
            axes.set(xlim=(-4, 104), ylim=(-4, 104))
            axes.set(xlabel="right about the people to forget (%)", ylabel="right about the people to keep (%)")
        _marks(picture, models, "vqa", others, filled=False)
        _marks(picture, models, "vqa", used, filled=True)
        _marks(text, models, "qa", used, filled=True)
        picture.set_title("Shown a picture")
        text.set_title("Asked in text alone")
        keys = [_key(look, label=look.label) for name, look in LOOKS.items() if name in models]
        keys.append(_key(LOOKS["vanilla"], label="other pictures of the same people", markerfacecolor="white"))
        figure.legend(handles=keys, loc="lower center", ncols=len(keys))
    return png.getvalue()


def relearning_curves(summary: Mapping[str, Mapping[str, Mapping]]) -> bytes:
    """One panel an attacker: right answers to forgotten questions that were not taught again, by the share that was.

    A line a model, with its 95 % interval as a band.

    Args:
        summary: {variant: {"vanilla" | "unlearned" | "retain_only": {"mean", "low", "high"}}}. Only the cells with
            "attacker", "share" and a "set" of "forget" are drawn, and those of the variant "before" or "unchanged",
            where nothing was taught yet.

    Returns:
        b"" where nothing was taught again.
    """
    cells = [(model, cell) for by_model in summary.values() for model, cell in by_model.items()]
    cells = [(model, cell) for model, cell in cells if cell.get("set") == "forget" and "share" in cell]
    attackers = list(dict.fromkeys(cell["attacker"] for _, cell in cells))
    if not attackers:
        return b""
    untaught = summary.get("before") or summary.get("unchanged") or {}
    looks = {name: look for name, look in LOOKS.items() if any(model == name for model, _ in cells)}
    with drawing(4.8 * len(attackers), 4.0) as (figure, png):
        margins = margins_of(figure, left=0.6, right=0.15, bottom=0.95, top=0.35)
        panels = figure.subplots(1, len(attackers), squeeze=False, sharey=True, gridspec_kw=margins)[0]
        for axes, attacker in zip(panels, attackers, strict=True):
            for name, look in looks.items():
                mine = {c["share"]: c for model, c in cells if model == name and c["attacker"] == attacker}
                if name in untaught:
                    mine[0.0] = untaught[name]
                shares = sorted(mine)
                mean, low, high = ([100 * mine[share][key] for share in shares] for key in ("mean", "low", "high"))
                across = [100 * share for share in shares]
                axes.fill_between(across, low, high, color=look.colour, alpha=0.15, linewidth=0)
                axes.plot(across, mean, color=look.colour, marker=look.marker, markersize=look.size / 1.6, linewidth=2)
            title = f"fine-tuning {ATTACKERS.get(attacker, attacker)}"
            axes.set(title=title, xlabel="forgotten questions taught again (%)", ylim=(-4, 104))
        panels[0].set_ylabel("other forgotten questions right (%)")
        keys = [_key(look, label=look.label) for look in looks.values()]
        figure.legend(handles=keys, loc="lower center", ncols=len(keys))
    return png.getvalue()


def portrait_sheet(rows: Mapping[str, Sequence[Card]]) -> bytes:
    """Rows of portraits under a heading each, with question, truth, and the answers before and after."""
    columns = max(4, *(len(cards) for cards in rows.values()))
    wide, side, heading, words = (
        1.9,
        1.6,
        0.62,
        1.2,
    )  # inches: a card, its picture, what is above and below it
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
                axes.set_title(card.title, fontsize=9, fontweight="normal", color=GREY, pad=3, parse_math=False)
                for number, (line, colour) in enumerate(_words(card)):
                    place = (left + side / 2) / width, (top - side - 0.06 - 0.18 * number) / height
                    figure.text(*place, line, color=colour, fontsize=9, ha="center", va="top", parse_math=False)
            top -= side + words
    return png.getvalue()


@contextlib.contextmanager
def drawing(width: float, height: float) -> Iterator[tuple[Figure, io.BytesIO]]:
    """A figure in the fixed style, whatever matplotlibrc says, and the buffer that it is saved to."""
    with matplotlib.style.context(["default", STYLE]):
        figure, png = Figure(figsize=(width, height), dpi=DPI), io.BytesIO()
        FigureCanvasAgg(figure)
        yield figure, png
        figure.savefig(png, format="png", metadata={"Software": None})  # no version in the bytes


def margins_of(figure: Figure, left: float, right: float, bottom: float, top: float) -> dict[str, float]:
    """Inches around the panels as the fractions that matplotlib wants."""
    width, height = figure.get_size_inches()
    return {
        "left": left / width,
        "right": 1 - right / width,
        "bottom": bottom / height,
        "top": 1 - top / height,
    }


def _marks(axes: Axes, models: Mapping, kind: str, sets: tuple[str, str], filled: bool) -> None:
    """One mark a model at (accuracy on the first set, accuracy on the second), and the arrow between two."""
    places = {}
    for model, look in LOOKS.items():
        across, up = (models.get(model, {}).get(name, {}).get(kind) for name in sets)
        if not across or not up:
            continue
        places[model] = (100 * across["accuracy"], 100 * up["accuracy"])
        axes.errorbar(
            *places[model],
            xerr=_whiskers(across),
            yerr=_whiskers(up),
            **_appearance(look) | ({} if filled else {"markerfacecolor": "white", "alpha": 0.7}),
        )
    if {"vanilla", "unlearned"} <= places.keys() and math.dist(places["vanilla"], places["unlearned"]) > 6:
        arrow = {"arrowstyle": "->", "color": GREY, "shrinkA": 8, "shrinkB": 8}
        axes.annotate("", xy=places["unlearned"], xytext=places["vanilla"], arrowprops=arrow)


def _whiskers(summary: Mapping) -> list[list[float]]:
    return [[100 * abs(summary["accuracy"] - summary[end])] for end in ("low", "high")]


def _appearance(look: Look) -> dict[str, Any]:
    return {
        "marker": look.marker,
        "markersize": look.size,
        "color": look.colour,
        "elinewidth": 1.0,
        "capsize": 2,
    }


def _key(look: Look, **more) -> Line2D:
    """A legend's entry."""
    return Line2D([], [], marker=look.marker, markersize=9, color=look.colour, linestyle="none", **more)


def _pixels(image: bytes | None) -> np.ndarray:
    if image is None:
        return np.full((8, 8, 3), 235, np.uint8)
    with Image.open(io.BytesIO(image)) as picture:
        return np.asarray(picture.convert("RGB"))


def _words(card: Card) -> list[tuple[str, str]]:
    """The lines under a portrait, each with its colour."""
    lines = [(line, GREY) for line in textwrap.wrap(card.question, 26, max_lines=3, placeholder=" …")]
    lines.append((_short(f"truth: {card.truth}"), INK))
    for name, (said, right) in (("before", card.before), ("after", card.after)):
        lines.append((f"{_short(f'{name}: {said}')} {'✓' if right else '✗'}", BLUE if right else ORANGE))
    return lines


def _short(text: str) -> str:
    return textwrap.shorten(text, 25, placeholder=" …")
