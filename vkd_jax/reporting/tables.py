"""Markdown tables of comparisons and of plans.

python -m vkd_jax.reporting.tables README.md [--check]     renders (or checks) the tables between the markers of a page
python -m vkd_jax.reporting.tables RUN [RUN ...]           prints the table of some finished runs of vkd_jax.main

A marker is `<!-- table: docs/results/FILE.json NAME -->` (see vkd_jax/reporting/markers.py). FILE.json is a
comparison.json or what vkd_jax.plan wrote with --json, and NAME is one of TABLES below. Tables of timings are rendered
by perf/tables.py. Exit status: 0 on success, 1 if a table is stale (--check), 2 on bad input.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vkd_jax.reporting import comparison, markers, page
from vkd_jax.types import UserError

SETS = {
    "forget/vqa": "forget VQA ↓",
    "test/vqa": "test VQA ↓",
    "retain/vqa": "retain VQA ↑",
    "retain_test/vqa": "retain test VQA ↑",
    "real/vqa": "real VQA ↑",
    "forget/qa": "forget QA ↑",
    "forget/generation_qa": "forget QA, open ↑",
    "retain/qa": "retain QA ↑",
}
RECOVERY = {"visual 20 %": "recovery, visual ↓", "all 20 %": "recovery, all ↓"}  # from relearning a fifth


def keeping(found: Mapping[str, Any]) -> str:
    """What is forgotten and what is kept: one row a method."""
    rows = found["rows"]
    columns = [name for name in SETS if any(name in row["sets"] for row in rows)]
    relearned = [name for name in RECOVERY if any(run["recovery"].get(name) for row in rows for run in row["runs"])]
    compared = any(run["ks"] is not None for row in rows for run in row["runs"])  # with a model that never met them
    numbers = [*(SETS[name] for name in columns), *["KS ↓"] * compared, *(RECOVERY[name] for name in relearned)]
    lines = [page.row(["method", "trains", *numbers, "keeps", "seconds", "MiB"])]
    lines += [page.row(["---", "---", *["---:"] * len(numbers), "---", "---:", "---:"])]
    before = rows[0]
    for row in rows:
        cells = [_share(row["sets"].get(name)) for name in columns]
        ks = [_mean([run["ks"] for run in row["runs"]], 2)] * compared
        back = [_mean([run["recovery"].get(name) for run in row["runs"]], 2) for name in relearned]
        seconds = _mean([run.get("seconds") for run in row["runs"]], 0)
        memory = _mean([run["bytes"] / 2**20 for run in row["runs"] if run.get("bytes")], 1)
        keeps = "–" if "method" not in row else "yes" if comparison.keeps(row, before) else "no"
        lines.append(page.row([row["label"], row.get("train", "–"), *cells, *ks, *back, keeps, seconds, memory]))
    return "\n".join([*lines, "", _caption(found, columns, compared)])


def attacks(found: Mapping[str, Any]) -> str:
    """What comes back under attack: one row a method."""
    rows = [row for row in found["rows"] if row["attacks"]]
    names = list(dict.fromkeys(f"{a}: {v}" for row in rows for a, variants in row["attacks"].items() for v in variants))
    lines = []
    for name in names:
        attack, variant = name.split(": ", 1)
        lines.append([name, *(_share(row["attacks"].get(attack, {}).get(variant)) for row in rows)])
    return numeric_table(["attack", *(row["label"] for row in rows)], lines)


def tuning(found: Mapping[str, Any]) -> str:
    """What every method was tried with, on people who are not reported."""
    lines = [
        page.row(["method", "settings", "forgot ↓", "kept ↑", ""]),
        page.row(["---", "---", "---:", "---:", "---"]),
    ]
    for row in found["rows"]:
        chosen = comparison.best(row.get("trials", ()))
        for trial in row.get("trials", ()):
            cells = [_percent(trial.get("forgot")), _percent(trial.get("kept")), "chosen" if trial is chosen else ""]
            lines.append(page.row([row["label"], f"`{trial['settings']}`", *cells]))
    return "\n".join(lines)


def plans(found: Sequence[Mapping[str, Any]]) -> str:
    """What a training step requires on TPUs: one row for each model and slice."""
    heads = ["model", "slice", "weights in", "fsdp × tensor", "rows a step", "GiB a chip", "fits", "TFLOP a step"]
    heads += ["ms at least", "bound by", "ms by cycles", "rows a second", "chip-hours", "GiB sent a step"]
    lines = [page.row(heads), page.row([*["---"] * 5, "---:", "---", *["---:"] * 2, "---", *["---:"] * 4])]
    for row in found:
        name = [row["model_name"], row["slice"]]
        if "error" in row:
            lines.append(page.row([*name, *["–"] * 4, f"no: {row['error']}", *["–"] * 7]))
            continue
        step = next(iter(row["steps"].values()))
        usable, total = row["usable_gib"], step["total"]
        fits = "yes" if step["fits"] else f"no, {total / 2**30 - usable:.2f} too much" if total else "no"
        sent = sum(collective["bytes"] for collective in step["compiler"]["collectives"].values())
        speed = ["–"] * 6
        if step["fits"]:
            each = _seconds_a_row(row)
            speed = [
                f"{1e3 * step['seconds_at_least']:,.1f}",
                step["bound"],
                f"{1e3 * step['seconds_by_cycles']:,.1f}",
                f"{1 / each:,.1f}",
                f"{_chip_hours(row):.2f}",
                f"{sent / 2**30:.2f}",
            ]
        cells = [
            row["quantize"] or row["dtype"],
            f"{row['mesh']['fsdp']} × {row['mesh']['tensor']}",
            " + ".join(map(str, row["rows"].values())),
            f"{total / 2**30:.2f} of {usable:.2f}" if total else "–",
            fits,
            f"{step['flops_total'] / 1e12:,.1f}",
        ]
        lines.append(page.row([*name, *cells, *speed]))
    known = [row for row in found if "error" not in row]
    commits = ", ".join(sorted({short_commit(row) for row in found}))
    examples = ", ".join(sorted({f"{row['run']['examples']:,}" for row in known}))
    tokens = ", ".join(f"{name} {n}" for name, n in {row["model_name"]: row["tokens"] for row in known}.items())
    compiling = sum(step["compiler"]["seconds"] for row in known for step in row["steps"].values())
    versions = ", ".join(sorted({" ".join(item) for row in known for item in row["versions"].items()}))
    return "\n".join(lines) + (
        f"\n\nTokens a row: {tokens}. Chip-hours are those of training on {examples} rows, as in 300 steps of 8 + 8. "
        "They and the rows a second follow from the longer of the two times; loading, preparing and evaluating are "
        "not included. "
        f"Compiled in {compiling / 60:.0f} minutes by {versions}; commit {commits}."
    )


def chip_hours(found: Sequence[Mapping[str, Any]]) -> str:
    """The least chip-hours of training on each slice, of `plans`: one row for each model."""
    rows = {(row["model_name"], row["slice"]): row for row in found}
    slices = [*dict.fromkeys(name for _, name in rows)]
    models = dict.fromkeys(model for model, _ in rows)
    lines = [[model, *(_cost(rows.get((model, name))) for name in slices)] for model in models]
    return numeric_table(["chip-hours", *slices], lines)


def _cost(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "–"
    if "error" in row:
        return "no"
    return f"{_chip_hours(row):.2f}" if next(iter(row["steps"].values()))["fits"] else "too large"


def _seconds_a_row(row: Mapping[str, Any]) -> float:
    """Seconds of training, by the longer of the least time and of the compiler's cycles."""
    step = next(iter(row["steps"].values()))
    return max(step["seconds_at_least"], step["seconds_by_cycles"]) / sum(row["rows"].values())


def _chip_hours(row: Mapping[str, Any]) -> float:
    return _seconds_a_row(row) * row["run"]["examples"] * row["chips"] / 3600


def contributions(shares: Mapping[str, float]) -> str:
    """Contributions to a difference that round to more than 0.0 %, the largest saving first."""
    order = sorted(shares.items(), key=lambda share: share[1])
    return ", ".join(f"{name} {100 * share:+.1f} %" for name, share in order if abs(share) >= 5e-4)


TABLES: Mapping[str, Callable[[Any], str]] = {
    "keeping": keeping,
    "attacks": attacks,
    "tuning": tuning,
    "plans": plans,
    "chip_hours": chip_hours,
}


def document(found: Mapping[str, Any]) -> str:
    """A page with all tables of a comparison."""
    parts = ["# Methods compared", keeping(found)]
    if any(row["attacks"] for row in found["rows"]):
        parts += ["## Under attack", attacks(found)]
    if any(row.get("trials") for row in found["rows"]):
        parts += ["## How each method was tuned", tuning(found)]
    if found["failures"]:
        parts += ["## What failed", "\n".join(f"- {name}: {why}" for name, why in found["failures"].items())]
    return "\n\n".join(parts) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Renders or checks the tables of pages, or prints the table of finished runs."""
    parser = argparse.ArgumentParser(prog="python -m vkd_jax.reporting.tables", description=main.__doc__)
    parser.add_argument("path", nargs="+", type=Path, help="Markdown files with markers, or folders of finished runs")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a table is stale")
    options = parser.parse_args(arguments)
    pages = [path for path in options.path if path.suffix == ".md"]
    try:
        if len(pages) < len(options.path):
            groups = comparison.by_label(path for path in options.path if path not in pages)
            first = next(iter(groups.values()))[0]
            print(keeping(comparison.collect({"controls": [first], **groups}, {}, {})))
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return markers.refresh(pages, TABLES, "table", "python -m vkd_jax.reporting.tables", options.check)


def _caption(found: Mapping[str, Any], columns: Sequence[str], compared: bool) -> str:
    first = found["rows"][0]["sets"]
    counts = ", ".join(f"{SETS[name][:-2]} {first[name]['n']}" for name in columns if name in first)
    seeds = max(len(row["runs"]) for row in found["rows"])
    guessing = found["meta"]["chance"].get("forget", {}).get("vqa")
    return (
        f"Right answers in per cent by the protocol `{found['meta']['protocol']}`, with 95 % bootstrap intervals over "
        f"questions and seeds ({seeds} seed{'s' * (seeds > 1)}; questions: {counts})"
        + (f"; guessing about the people to forget gives {100 * guessing:.0f}" if guessing else "")
        + ". "
        + "KS: distance of the truth ratios from those of the retain-only model (Kolmogorov-Smirnov). " * compared
        + "Recovery: the part of what was lost that came back when a fifth of it was taught again, to the visual "
        "weights or to all. "
        f"Keeps: at least {100 * comparison.KEEP:.0f} % of what the vanilla model gets right of retain, retain test "
        "and real VQA, and no less text QA than the interval of the vanilla model allows. Seconds: preparing and "
        "training, the mean over seeds. MiB: what a step holds, by the compiler's account. "
        f"Commit {', '.join(commit[:7] for commit in found['meta']['commits'])}; `{found['meta']['command']}`"
    )


def numeric_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose first column is text and whose other columns are numbers."""
    return "\n".join(page.row(cells) for cells in (heads, ["---", *["---:"] * (len(heads) - 1)], *rows))


def short_commit(found: Mapping[str, Any]) -> str:
    """The first seven digits of the commit of some results, and whether the clone had changes."""
    head, _, changes = found["commit"].partition("+")
    return head[:7] + (changes and " with changes")


def _share(cell: Mapping[str, float] | None) -> str:
    """A share in per cent with its interval."""
    if cell is None:
        return "–"
    if "low" not in cell:
        return _percent(cell["mean"])
    return f"{100 * cell['mean']:.1f} ({100 * cell['low']:.0f}–{100 * cell['high']:.0f})"


def _percent(share: float | None) -> str:
    return "failed" if share is None else f"{100 * share:.1f}"


def _mean(values: Sequence[float | None], digits: int) -> str:
    known = [value for value in values if value is not None]
    return f"{statistics.fmean(known):.{digits}f}" if known else "–"


if __name__ == "__main__":
    sys.exit(main())
