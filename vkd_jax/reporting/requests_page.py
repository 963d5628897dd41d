"""The page on sequential requests: requests.json, requests.md and requests.png of `vkd requests run`.

requests.json:

    meta        command, commit, versions, devices, time of the first run, and the last hash of the ledger
    start       figures of the model before the first request
    sequences   {"requests" | "naive" | "batch": [a row for each run: people, after (figures), text_identical,
                language_model_changed, seconds]}

Figures are {group: {"accuracy", "correct", "n", "chance"}} for the groups of `GROUPS`; chance is null for open
questions.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vkd_jax.evaluation.metrics import intervals
from vkd_jax.reporting import comparison, plots
from vkd_jax.reporting.markdown import code, escape, numeric_table
from vkd_jax.results import RunResults
from vkd_jax.runtime import files
from vkd_jax.types import Role

GROUPS = {  # title, roles, and the kinds of question, of which each set's first one counts
    "forgotten": ("everyone forgotten so far", (Role.FORGET,), ("vqa", "generation_vqa")),
    "forgotten_test": ("the same people, other images", (Role.FORGET_HOLDOUT,), ("vqa", "generation_vqa")),
    "retained": ("retained people", (Role.RETAIN,), ("vqa", "generation_vqa")),
    "retained_test": ("retained people, other images", (Role.RETAIN_HOLDOUT,), ("vqa", "generation_vqa")),
    "general": ("general ability", (Role.GENERAL,), ("vqa", "generation_vqa", "suite_vqa", "qa")),
    "text": ("text about them all", (Role.FORGET, Role.RETAIN), ("qa", "generation_qa")),
}
SEQUENCES = {
    "requests": "one after another",
    "naive": "naive repetition",
    "batch": "all at once",
}
FORGOTTEN = ("forgotten", "forgotten_test")
GOALS = (*FORGOTTEN, "retained", "retained_test", "general")  # the groups that have goals
MARGIN = 0.10  # the goals: at most chance + MARGIN on who is forgotten, at least `comparison.KEEP` of what is retained
JSON, PAGE, PLOT = "requests.json", "requests.md", "requests.png"


def figures(results: RunResults, model: str) -> dict[str, dict[str, Any]]:
    """The accuracy of a model on each of `GROUPS`, pooled over the sets of its roles.

    Args:
        results: results of the run of a request.
        model: "vanilla", the model before the request, or "unlearned".
    """
    groups = {}
    for group, (_, roles, kinds) in GROUPS.items():
        asked = []
        for eval_set in results.with_role(*roles):
            kind = next((k for k in kinds if results.summary(model, eval_set.name, k)), None)
            if kind:
                chance = results.chance.get(eval_set.name, {}).get("vqa" if kind.endswith("vqa") else "qa")
                open_answer = kind.startswith(("generation", "suite"))
                asked.append((results.summary(model, eval_set.name, kind), None if open_answer else chance))
        if asked:
            n, correct = sum(s.n for s, _ in asked), sum(s.correct for s, _ in asked)
            chances = [s.n * c for s, c in asked if c is not None]
            chance = sum(chances) / n if len(chances) == len(asked) else None
            groups[group] = {"accuracy": correct / n, "correct": correct, "n": n, "chance": chance}
    return groups


def figures_problem(values: Mapping[str, Any]) -> str:
    """What is wrong with the figures of a request, as a ledger that others wrote has them; "" if nothing is."""
    fields = {"text_identical": bool, "language_model_changed": int, "seconds": (int, float)}
    for name, kind in fields.items():
        if not _has_type(values.get(name), kind):
            return f"have no {name}"
    for side in ("before", "after"):
        if not isinstance(values.get(side), Mapping):
            return f"lack those {side} the request"
        for group, cell in values[side].items():
            if group not in GROUPS or not isinstance(cell, Mapping):
                return f"{side} the request have the group {group!r}, which is unknown or no object"
            shares = [cell.get("accuracy"), *([] if cell.get("chance") is None else [cell["chance"]])]
            counts_fit = all(_has_type(cell.get(name), int) and cell[name] >= 0 for name in ("correct", "n"))
            if not counts_fit or not all(_has_type(x, (int, float)) and 0 <= x <= 1 for x in shares):
                return f"{side} the request have no accuracy of {group!r}"
    return ""


def _has_type(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def sentence(group_figures: Mapping[str, Mapping[str, Any]]) -> str:
    """The figures of a model in one line of plain text."""
    return ", ".join(f"{GROUPS[name][0]} {_percent(x)}" for name, x in group_figures.items() if name != "text")


def write(folder: Path, collected: Mapping[str, Any]) -> None:
    """Writes requests.json, requests.png and requests.md into a folder."""
    files.write_bytes(folder / JSON, (json.dumps(collected, indent=1, ensure_ascii=False) + "\n").encode())
    if not collected["sequences"]["requests"]:
        return
    files.write_bytes(folder / PLOT, curve(collected))
    parts = [
        "# Requests, one after another",
        "\n".join(f"- {line}" for line in verdicts(collected)),
        f"![Accuracy after each request]({PLOT})",
        table(collected),
    ]
    files.write_bytes(folder / PAGE, ("\n\n".join(parts) + "\n").encode())


def verdicts(collected: Mapping[str, Any]) -> list[str]:
    """Whether the model that the last request left meets each goal, one sentence each, as Markdown."""
    start, after, sentences = collected["start"], collected["sequences"]["requests"][-1]["after"], []
    for group in GOALS:
        if goal := _goal(group, start, after):
            limit, met = goal
            before = "" if group in FORGOTTEN else f", from {_cell(start[group])}"
            words = f"{'at most' if group in FORGOTTEN else 'at least'} {100 * limit:.1f} %"
            verdict = "met" if met else "**missed**"
            sentences.append(f"{GROUPS[group][0]}: {_cell(after[group])}{before}; goal {words}: {verdict}.")
    identical = all(other["text_identical"] for other in collected["sequences"]["requests"])
    words = "identical, bit for bit" if identical else "not identical"
    sentences.append(f"Scores of questions without an image, before the first and after the last request: {words}.")
    return [line[0].upper() + line[1:] for line in sentences]


def goals(ledgers: Mapping[str, Mapping[str, Any]]) -> str:
    """One row for the last model of each sequence of several ledgers, with intervals and goals.

    Args:
        ledgers: the contents of each requests.json, by the title of its rows.
    """
    rows = []
    for title, collected in ledgers.items():
        start = collected["start"]
        for name, runs in collected["sequences"].items():
            if not runs:
                continue
            after = runs[-1]["after"]
            cells = [_goal_cell(group, start, after) for group in GOALS]
            identical = "yes" if all(row["text_identical"] for row in runs) else "no"
            rows.append([title if name == "requests" else f"{title}, {SEQUENCES[name]}", *cells, identical])
    heads = ["after the last request", *(GROUPS[group][0] for group in GOALS), "text identical"]
    note = (
        "Accuracy (%), its 95 % interval by Wilson's method, which takes questions as independent, and whether the "
        "goal is met."
    )
    return numeric_table(heads, rows) + "\n\n" + note


def _goal(group: str, start: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[float, bool] | None:
    """The limit of a group's accuracy after the last request, and whether it is met; None without a limit."""
    if group not in after or group not in start:
        return None
    if group in FORGOTTEN:
        if after[group]["chance"] is None:
            return None
        limit = after[group]["chance"] + MARGIN
        return limit, after[group]["accuracy"] <= limit
    limit = comparison.KEEP * start[group]["accuracy"]
    return limit, after[group]["accuracy"] >= limit


def _goal_cell(group: str, start: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """An accuracy with its interval and its goal."""
    if not (goal := _goal(group, start, after)):
        return _percent(after.get(group))
    low, high = intervals.wilson(after[group]["accuracy"], after[group]["n"])
    limit = f"{'≤' if group in FORGOTTEN else '≥'} {100 * goal[0]:.1f}"
    return f"{_percent(after[group])} ({100 * low:.1f} to {100 * high:.1f}), {'' if goal[1] else 'not '}{limit}"


def table(collected: Mapping[str, Any]) -> str:
    """One row for each model of the sequence, and one for the last model of each baseline."""
    sequences = collected["sequences"]
    shown = [("before the first request", 0, collected["start"], None)]
    people = 0
    for number, row in enumerate(sequences["requests"], 1):
        people += row["people"]
        shown.append((f"request {number}", people, row["after"], row))
    shown += [(SEQUENCES[x], people, rows[-1]["after"], rows[-1]) for x, rows in sequences.items() if x != "requests"]
    groups = [name for name in GROUPS if any(name in cells for _, _, cells, _ in shown)]
    heads = ["after", "people", *(GROUPS[name][0] for name in groups), "text identical", "seconds"]
    lines = []
    for title, count, cells, row in shown:
        last = ["–", "–"] if row is None else ["yes" if row["text_identical"] else "no", f"{row['seconds']:.0f}"]
        lines.append([title, str(count or "–"), *(_percent(cells.get(name)) for name in groups), *last])
    counts = "; ".join(f"{GROUPS[name][0]} {cells[name]['n']}" for _, _, cells, _ in shown[-1:] for name in groups)
    chance = shown[-1][2].get("forgotten", {}).get("chance")
    meta = collected["meta"]
    note = (
        f"Accuracy (%). Questions in the last row: {escape(counts)}."
        + (f" Chance is {100 * chance:.0f} on who is forgotten." if chance is not None else "")
        + " Text identical: whether the request left all scores of questions without an image as they were. Seconds: "
        f"the whole run, evaluation included. Commit {escape(str(meta['commit'])[:7])}; {code(meta['command'])}"
    )
    return numeric_table(heads, lines) + "\n\n" + note


def curve(collected: Mapping[str, Any]) -> bytes:
    """Plots the accuracy after each request as PNG: left on who is forgotten, right on what is kept."""
    sequences, start = collected["sequences"], collected["start"]
    looks = {"requests": ("-", 2.0), "naive": (":", 1.6), "batch": ("", 0.0)}
    panels = (("forgotten", "forgotten_test"), ("retained", "retained_test", "general"))
    with plots.drawing(11.0, 5.6) as (figure, png):
        margins = plots.margins_of(figure, left=0.6, right=0.15, bottom=1.95, top=0.35)
        drawn = figure.subplots(1, 2, sharey=True, gridspec_kw=margins)
        for axes, groups in zip(drawn, panels, strict=True):
            for group, color in zip(groups, plots.LINES, strict=False):
                for name, rows in sequences.items():
                    x, y = _points(rows, group, start if name != "batch" and groups == panels[1] else {})
                    x = [len(sequences["requests"])] * len(y) if name == "batch" else x
                    style, width = looks[name]
                    marker = {"batch": "D", "requests": ".", "naive": ""}[name]
                    label = f"{GROUPS[group][0]}: {SEQUENCES[name]}"
                    axes.plot(x, y, linestyle=style, linewidth=width, marker=marker, color=color, label=label)
            axes.set(xlabel="requests", ylim=(-4, 104))
            axes.xaxis.get_major_locator().set_params(integer=True)
        chance = sequences["requests"][-1]["after"].get("forgotten", {}).get("chance")
        if chance is not None:
            drawn[0].axhline(100 * chance, color=plots.GREY, linestyle="--", linewidth=1.2, label="chance")
        drawn[0].set(ylabel="accuracy (%)", title="who is forgotten")
        drawn[1].set(title="what is kept")
        for axes in drawn:
            axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.14))
    return png.getvalue()


def _points(rows: Sequence[Mapping[str, Any]], group: str, start: Mapping[str, Any]) -> tuple[list[int], list[float]]:
    cells = [start.get(group), *(row["after"].get(group) for row in rows)]
    found = [(i, 100 * cell["accuracy"]) for i, cell in enumerate(cells) if cell]
    return [i for i, _ in found], [y for _, y in found]


def _cell(cell: Mapping[str, Any]) -> str:
    return f"{_percent(cell)} % ({cell['correct']} of {cell['n']})"


def _percent(cell: Mapping[str, Any] | None) -> str:
    return "–" if cell is None else f"{100 * cell['accuracy']:.1f}"
