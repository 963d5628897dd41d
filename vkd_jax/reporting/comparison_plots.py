"""Plots of a comparison: functions from the result of `comparison.collect` to PNG bytes."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes

from vkd_jax.reporting import comparison, names, plots
from vkd_jax.results import STRONGEST
from vkd_jax.types import EvalSet, Role

MARKERS = "osD^v<>PXph8"


def pareto(results: Mapping[str, Any]) -> bytes:
    """Plots accuracy on the forget set (horizontal) against accuracy that must be kept (vertical), in two panels.

    The left panel has the smallest accuracy of all sets that must be kept, with an image; the right panel has the
    text-only accuracy on the forget set, whether that is kept or forgotten. Whiskers are 95 % intervals. The
    retain-only model marks the ideal.
    """
    sets, kinds = comparison.sets_of(results), comparison.kinds_in(results["rows"][0])
    forget, *_ = comparison.forgotten_keys(sets, kinds)
    kept = comparison.kept_image_keys(sets, kinds)
    named = [*comparison.kept_text_keys(sets, kinds), *comparison.forgotten_keys(sets, kinds)]
    texts = [(s, kind) for s, kind in named if s.role is Role.FORGET and "vqa" not in kind][-1:]
    with plots.drawing(11.0, 5.2) as (figure, png):
        margins = plots.margins_of(figure, left=0.6, right=0.15, bottom=1.35, top=0.35)
        image, text = figure.subplots(1, 2, gridspec_kw=margins)
        _points(image, results, forget, kept)
        image.set(ylabel=f"smallest of {', '.join(names.short_name(*key) for key in kept)} (%)", title="with image")
        _points(text, results, forget, texts)
        text.set(ylabel=f"{', '.join(names.short_name(*key) for key in texts)} (%)", title="text only")
        chance = results["meta"]["chance"].get(forget[0].name, {}).get(forget[1])
        for axes in (image, text):
            axes.set(xlabel=f"{names.short_name(*forget)} (%)", xlim=(-4, 104))
            if chance:
                axes.axvline(100 * chance, color=plots.ORANGE, linestyle="--", linewidth=1.2)
        handles, labels = image.get_legend_handles_labels()
        figure.legend(handles, labels, loc="lower center", ncols=6, fontsize=9)
    return png.getvalue()


def relearning(results: Mapping[str, Any]) -> bytes:
    """Plots accuracy on the forget questions that were not relearned, with one panel per attacker.

    The horizontal axis has the share of the questions that was relearned; if all attackers relearned the same share,
    and were asked after several numbers of steps, it has these. The area is what the retain-only model learns.

    Returns b"" if no attack relearned questions.
    """
    sets, kinds = comparison.sets_of(results), comparison.kinds_in(results["rows"][0])
    forget, kind = comparison.forgotten_keys(sets, kinds)[0]
    every = [(row, cell) for row in results["rows"] for cells in row["attacks"].values() for cell in cells]
    every = [(row, cell) for row, cell in every if cell["set"] == forget.name and cell.get("unit") == "questions"]
    by_steps = [(row, cell) for row, cell in every if cell.get("variant") == STRONGEST and "steps" in cell]
    uses_steps = len({cell["share"] for _, cell in every}) == 1 < len({cell["steps"] for _, cell in by_steps})
    curves: dict[str, dict[str, dict[float, Mapping]]] = {}
    for row, cell in by_steps if uses_steps else (pair for pair in every if pair not in by_steps):
        points = curves.setdefault(cell["attacker"], {}).setdefault(row["label"], {})
        points[cell["steps"] if uses_steps else 100 * cell["share"]] = cell
    if not curves:
        return b""
    looks = _looks(results)
    with plots.drawing(5.5 * len(curves), 5.2) as (figure, png):
        margins = plots.margins_of(figure, left=0.6, right=0.15, bottom=1.35, top=0.35)
        panels = figure.subplots(1, len(curves), squeeze=False, sharey=True, gridspec_kw=margins)[0]
        for axes, (attacker, lines) in zip(panels, curves.items(), strict=True):
            for row in (row for row in results["rows"] if row["label"] in lines):
                points = {0: row["sets"][f"{forget.name}/{kind}"]} | lines[row["label"]]
                places = sorted(points)
                means = [100 * points[place]["mean"] for place in places]
                if uses_steps:
                    axes.set_xticks(range(len(places)), map(str, places))
                    places = range(len(places))
                axes.plot(places, means, label=row["label"], **looks[row["label"]])
                if row["name"] == "retain_only":
                    axes.fill_between(places, means, color=plots.GREY, alpha=0.15, linewidth=0)
            axes.set(title=f"fine-tuning {names.attacker(attacker)}", ylim=(-4, 104))
            axes.set_xlabel("steps of the attacker" if uses_steps else "forget questions relearned (%)")
        panels[0].set_ylabel("accuracy on the other forget questions (%)")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="lower center", ncols=6, fontsize=9)
    return png.getvalue()


def _points(
    axes: Axes, results: Mapping[str, Any], forget: tuple[EvalSet, str], kept: Sequence[tuple[EvalSet, str]]
) -> None:
    """Draws one marker per row: its accuracy on `forget` against its smallest accuracy on `kept`."""
    looks = _looks(results)
    for row in results["rows"]:
        across, *others = (row["sets"].get(f"{eval_set.name}/{kind}") for eval_set, kind in (forget, *kept))
        up = min((cell for cell in others if cell), key=lambda cell: cell["mean"], default=None)
        if across and up:
            whiskers = {
                f"{axis}err": [[100 * (cell["mean"] - cell["low"])], [100 * (cell["high"] - cell["mean"])]]
                for axis, cell in (("x", across), ("y", up))
            }
            point = 100 * across["mean"], 100 * up["mean"]
            axes.errorbar(*point, **whiskers, **looks[row["label"]], elinewidth=1.0, capsize=2, label=row["label"])


def _looks(results: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The color and marker of each row: models without a method are gray, and the marker of VKD is larger."""
    looks = {}
    for number, row in enumerate(results["rows"]):
        color = plots.LINES[number % len(plots.LINES)] if "method" in row else plots.GREY
        size = 10 if row.get("method") == "vkd" else 7
        looks[row["label"]] = {"color": color, "marker": MARKERS[number % len(MARKERS)], "markersize": size}
    return looks
