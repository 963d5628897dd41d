"""The pictures of a comparison: functions from what `comparison.collect` found to PNG bytes."""

from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes

from vkd_jax.reporting import plots
from vkd_jax.reporting.plots import ATTACKERS

MARKERS = "osD^v<>PXph8"
KEPT = ("retain/vqa", "retain_test/vqa", "real/vqa")


def pareto(found: Mapping[str, Any]) -> bytes:
    """Right answers about the people to forget (across) against what is kept (up): one panel a way of looking.

    On the left pictures: forget VQA against the least of retain, retain test and real VQA. On the right what was
    forgotten against what text still tells of the same people. Whiskers: 95 % intervals. The best is where the
    retain-only model stands.
    """
    with plots.drawing(11.0, 5.2) as (figure, png):
        margins = plots.margins_of(figure, left=0.6, right=0.15, bottom=1.35, top=0.35)
        seen, said = figure.subplots(1, 2, gridspec_kw=margins)
        _points(seen, found, lambda sets: min((sets[n] for n in KEPT if n in sets), key=lambda cell: cell["mean"]))
        seen.set(ylabel="least of retain, retain test and real VQA (%)", title="shown pictures of others")
        _points(said, found, lambda sets: sets.get("forget/generation_qa") or sets.get("forget/qa"))
        said.set(ylabel="open text questions about them (%)", title="told their names")
        guessing = found["meta"]["chance"].get("forget", {}).get("vqa")
        for axes in (seen, said):
            axes.set(xlabel="right about the people to forget, shown them (%)", xlim=(-4, 104))
            if guessing:
                axes.axvline(100 * guessing, color=plots.ORANGE, linestyle="--", linewidth=1.2)
        handles, labels = seen.get_legend_handles_labels()
        figure.legend(handles, labels, loc="lower center", ncols=6, fontsize=9)
    return png.getvalue()


def relearning(found: Mapping[str, Any]) -> bytes:
    """One panel an attacker: right answers to forgotten questions that were not taught again, by the share that was.

    b"" where nobody attacked so.
    """
    curves: dict[str, dict[str, dict[float, Mapping]]] = {}
    for row in found["rows"]:
        for cell in row["attacks"].get("relearn", {}).values():
            if cell.get("set") == "forget" and "share" in cell:
                curves.setdefault(cell["attacker"], {}).setdefault(row["label"], {})[cell["share"]] = cell
    if not curves:
        return b""
    looks = _looks(found)
    with plots.drawing(5.5 * len(curves), 5.2) as (figure, png):
        margins = plots.margins_of(figure, left=0.6, right=0.15, bottom=1.35, top=0.35)
        panels = figure.subplots(1, len(curves), squeeze=False, sharey=True, gridspec_kw=margins)[0]
        for axes, (attacker, lines) in zip(panels, curves.items(), strict=True):
            for row in found["rows"]:
                if row["label"] in lines:
                    points = {0.0: row["sets"]["forget/vqa"]} | lines[row["label"]]
                    across = sorted(points)
                    means = [100 * points[share]["mean"] for share in across]
                    axes.plot([100 * share for share in across], means, label=row["label"], **looks[row["label"]])
            title = f"fine-tuning {ATTACKERS.get(attacker, attacker)}"
            axes.set(title=title, xlabel="forgotten questions taught again (%)", ylim=(-4, 104))
        panels[0].set_ylabel("other forgotten questions right (%)")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="lower center", ncols=6, fontsize=9)
    return png.getvalue()


def _points(axes: Axes, found: Mapping[str, Any], kept) -> None:
    looks = _looks(found)
    for row in found["rows"]:
        across, up = row["sets"].get("forget/vqa"), kept(row["sets"])
        if across and up:
            whiskers = {
                f"{axis}err": [[100 * (cell["mean"] - cell["low"])], [100 * (cell["high"] - cell["mean"])]]
                for axis, cell in (("x", across), ("y", up))
            }
            place = 100 * across["mean"], 100 * up["mean"]
            axes.errorbar(*place, **whiskers, **looks[row["label"]], elinewidth=1.0, capsize=2, label=row["label"])


def _looks(found: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """A colour and a mark for each row; the models that are not methods are grey, and VKD stands out."""
    looks = {}
    for number, row in enumerate(found["rows"]):
        colour = plots.LINES[number % len(plots.LINES)] if "method" in row else plots.GREY
        size = 10 if row.get("method") == "vkd" else 7
        looks[row["label"]] = {"color": colour, "marker": MARKERS[number % len(MARKERS)], "markersize": size}
    return looks
