"""Markdown tables of comparisons and of plans.

python -m vkd_jax.reporting.tables README.md [--check]     renders (or checks) the tables between the markers of a page
python -m vkd_jax.reporting.tables RUN [RUN ...]           prints the table of some finished runs of vkd_jax.main

A marker is `<!-- table: docs/results/FILE.json NAME -->` (see vkd_jax/reporting/markers.py). FILE.json is a
comparison.json, a requests.json, several of these by title, or what vkd_jax.plan wrote with --json, and NAME is one of
TABLES below. Tables of timings are rendered by perf/tables.py. Exit status: 0 on success, 1 if a table is stale
(--check), 2 on bad input.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vkd_jax import messages
from vkd_jax.config import command_line
from vkd_jax.reporting import comparison, markers, names, requests_page
from vkd_jax.reporting.markdown import code, escape, numeric_table, row_of
from vkd_jax.results import ATTEMPT_FIELDS, STRONGEST, AttackCell
from vkd_jax.types import Role, UserError

# Scores of membership inference in tables, by variant of the attack.
MEMBERSHIP = {"loss": "loss", "grad_norm": "gradient"}


def headline(results: Mapping[str, Any]) -> str:
    """The table for a front page: accuracy on questions with an image, recovery, and whether the method keeps."""
    columns = [
        (eval_set, kind)
        for eval_set, kind in _columns(results, comparison.forgotten_keys, comparison.kept_image_keys)
        if eval_set.role is not Role.RETAIN_HOLDOUT
    ]
    attackers = _attackers(results["rows"])
    heads = [names.heading(*key) for key in columns]
    heads += [names.metric_heading("recovery", attacker) for attacker in attackers]
    lines = [row_of(["method", "trains", *heads, "keeps"]), row_of(["---", "---", *["---:"] * len(heads), "---"])]
    for row in results["rows"]:
        cells = _accuracy_cells(row, columns) + _recovery_cells(row, attackers)
        lines.append(row_of([row["label"], row.get("train", "–"), *cells, _keeps(row, results)]))
    notes = [_accuracy_note(results, columns), _recovery_note(attackers), _keeps_note(results), _origin(results)]
    return "\n".join([*lines, "", " ".join(filter(None, notes))])


def keeping(results: Mapping[str, Any]) -> str:
    """Accuracy on forgotten and retained sets, with one row per method."""
    rows = results["rows"]
    columns = _columns(results, comparison.forgotten_keys, comparison.kept_image_keys, comparison.kept_text_keys)
    attackers = _attackers(rows)
    compared = any(run["ks"] is not None for row in rows for run in row["runs"])  # with a retain-only model
    heads = [names.heading(*key) for key in columns]
    heads += [names.metric_heading("ks")] * compared
    heads += [names.metric_heading("recovery", attacker) for attacker in attackers]
    lines = [row_of(["method", "trains", *heads, "keeps", "seconds", "MiB"])]
    lines += [row_of(["---", "---", *["---:"] * len(heads), "---", "---:", "---:"])]
    for row in rows:
        cells = _accuracy_cells(row, columns)
        cells += [_mean([run["ks"] for run in row["runs"]], 2)] * compared
        cells += _recovery_cells(row, attackers)
        seconds = _mean([run.get("seconds") for run in row["runs"]], 0)
        memory = _mean([run["bytes"] / 2**20 for run in row["runs"] if run.get("bytes")], 1)
        lines.append(row_of([row["label"], row.get("train", "–"), *cells, _keeps(row, results), seconds, memory]))
    distance = "KS: distance between the truth ratios of this and of the retain-only model (Kolmogorov-Smirnov)."
    notes = [
        _accuracy_note(results, columns),
        distance * compared,
        _recovery_note(attackers),
        _keeps_note(results),
        "Seconds: preparation and training, mean over seeds. MiB: memory of a training step, by the compiler.",
        _origin(results),
    ]
    return "\n".join([*lines, "", " ".join(filter(None, notes))])


def _columns(results: Mapping[str, Any], *choices: Callable[..., comparison.Keys]) -> comparison.Keys:
    """The sets with a kind of question each that some functions of `comparison` choose, each once."""
    sets, kinds = comparison.sets_of(results), comparison.kinds_in(results["rows"][0])
    return list(dict.fromkeys(key for choose in choices for key in choose(sets, kinds)))


def _attackers(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The relearning attackers, each with the share of the questions that is nearest to 20 %."""
    shares: dict[str, set[float]] = {}
    for item in (item for row in rows for run in row["runs"] for item in run["recovery"]):
        if item["recovery"] is not None:
            shares.setdefault(item["attacker"], set()).add(item["share"])
    wanted = names.RELEARNED_SHARE
    return {attacker: min(sorted(tried), key=lambda share: abs(share - wanted)) for attacker, tried in shares.items()}


def _accuracy_cells(row: Mapping[str, Any], columns: comparison.Keys) -> list[str]:
    return [_share(row["sets"].get(f"{eval_set.name}/{kind}")) for eval_set, kind in columns]


def _recovery_cells(row: Mapping[str, Any], attackers: Mapping[str, float]) -> list[str]:
    """The mean recovery of a method under each attacker, over its runs."""
    items = [item for run in row["runs"] for item in run["recovery"]]
    return [
        _mean([item["recovery"] for item in items if (item["attacker"], item["share"]) == attempt], 2)
        for attempt in attackers.items()
    ]


def _keeps(row: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    if "method" not in row:
        return "–"
    return "yes" if comparison.keeps(row, results["rows"][0], comparison.sets_of(results)) else "no"


def attacks(results: Mapping[str, Any]) -> str:
    """Accuracy under attack, with one row for each attempt and one column for each method."""
    rows, sets = [row for row in results["rows"] if row["attacks"]], comparison.sets_of(results)
    table: dict[str, dict[str, Mapping]] = {}
    for row in rows:
        for attack, cells in row["attacks"].items():
            variants = results["meta"]["attacks"][attack]["variants"]
            for cell in cells:
                fields = {name: cell[name] for name in ("set", *ATTEMPT_FIELDS) if name in cell}
                tried = names.attempt(AttackCell(model=row["name"], mean=0.0, n=0, **fields), variants, sets)
                table.setdefault(f"{attack}: {tried}", {})[row["name"]] = cell
    lines = [[tried, *(_share(cells.get(row["name"])) for row in rows)] for tried, cells in table.items()]
    return numeric_table(["attack", *(row["label"] for row in rows)], lines)


def resisting(results: Mapping[str, Any]) -> str:
    """Recovery by relearning with several budgets, and membership inference, with one row per method."""
    rows = [row for row in results["rows"] if row["attacks"].get("relearn")]
    columns = _columns(results, comparison.forgotten_keys, comparison.kept_image_keys)
    cells = {row["name"]: _strongest_cells(row, columns[0][0].name) for row in rows}
    budgets = list(dict.fromkeys(key for row in rows if "method" in row for key in cells[row["name"]]))
    budgets.sort(key=lambda budget: (budget[0] != "questions", budget))
    heads = [names.heading(*key) for key in columns] + [names.metric_heading("ks")]
    heads += [names.metric_heading("auc", score) for score in MEMBERSHIP.values()]
    heads += [f"{attacker}, {f'{steps} steps' if steps else unit} ↓" for unit, _, attacker, steps in budgets]
    lines = [row_of(["method", "trains", *heads]), row_of(["---", "---", *["---:"] * len(heads)])]
    for row in rows:
        values = [*_accuracy_cells(row, columns), _mean([run["ks"] for run in row["runs"]], 2)]
        values += [_mean([_membership(row, variant)], 2) for variant in MEMBERSHIP]
        values += [_share(cells[row["name"]].get(budget)) for budget in budgets]
        lines.append(row_of([row["label"], row.get("train", "–"), *values]))
    taught = " or ".join(f"{100 * share:g} % of the {unit}" for unit, share in dict.fromkeys(b[:2] for b in budgets))
    notes = [
        _accuracy_note(results, columns),
        "KS: distance between the truth ratios of this and the retain-only model. AUC: membership inference by "
        "the loss and by the norm of the gradient.",
        "Last columns: accuracy (%) on the other questions about the forget set once an attacker who trains the visual "
        f"or all weights relearned {taught}, at the learning rate, and for people the number of steps, that succeeds "
        "most on each model. The retain-only model shows what any model learns so.",
        _origin(results),
    ]
    return "\n".join([*lines, "", " ".join(notes)])


def _strongest_cells(row: Mapping[str, Any], forget_set: str) -> dict[tuple[str, float, str, int], Mapping[str, Any]]:
    """The strongest cells of relearning by unit, share, attacker and steps.

    Each unit has the share that is nearest to `names.RELEARNED_SHARE`. Questions have all numbers of steps, and
    people the most successful one, whose steps are 0 here.
    """
    strongest = [cell for cell in row["attacks"]["relearn"] if cell.get("variant") == STRONGEST]
    cells = [cell for cell in strongest if cell["set"] == forget_set and not cell.get("taught")]
    cells = [cell for cell in cells if (cell["unit"] == "questions") == ("steps" in cell)]
    shares = {cell["unit"]: cell["share"] for cell in sorted(cells, key=_distance_of_share, reverse=True)}
    return {
        (cell["unit"], cell["share"], cell["attacker"], cell.get("steps", 0)): cell
        for cell in cells
        if cell["share"] == shares[cell["unit"]]
    }


def _distance_of_share(cell: Mapping[str, Any]) -> float:
    return abs(cell["share"] - names.RELEARNED_SHARE)


def _membership(row: Mapping[str, Any], variant: str) -> float | None:
    """The area under the curve of membership inference by one score; None if it was not made."""
    cells = row["attacks"].get("membership", ())
    return next((cell["mean"] for cell in cells if cell.get("variant") == variant), None)


def tuning(results: Mapping[str, Any]) -> str:
    """The settings that each method was tuned with, on people who are not in the other tables."""
    measures = {"forgot": "forgot ↓", "relearned": "relearned ↓", "kept": "kept ↑"}
    if not any("relearned" in trial for row in results["rows"] for trial in row.get("trials", ())):
        del measures["relearned"]
    lines = [
        row_of(["method", "settings", *measures.values(), ""]),
        row_of(["---", "---", *("---:" for _ in measures), "---"]),
    ]
    for row in results["rows"]:
        chosen = comparison.best(row.get("trials", ()))
        for trial in row.get("trials", ()):
            cells = [*(_percent(trial.get(name)) for name in measures), "chosen" if trial is chosen else ""]
            lines.append(row_of([row["label"], code(trial["settings"], in_table=True), *cells]))
    return "\n".join(lines)


def plans(results: Sequence[Mapping[str, Any]]) -> str:
    """What a training step requires on TPUs, with one row for each model and slice."""
    heads = ["model", "slice", "weights in", "fsdp × tensor", "batch size", "GiB per chip", "fits", "TFLOP per step"]
    heads += ["ms at least", "bound by", "ms by cycles", "examples/s", "chip-hours", "GiB sent per step"]
    lines = [row_of(heads), row_of([*["---"] * 5, "---:", "---", *["---:"] * 2, "---", *["---:"] * 4])]
    for row in results:
        name = [row["model_name"], row["slice"]]
        if "error" in row:
            lines.append(row_of([*name, *["–"] * 4, f"no: {row['error']}", *["–"] * 7]))
            continue
        step = next(iter(row["steps"].values()))
        usable, total = row["usable_gib"], step["total"]
        fits = "yes" if step["fits"] else f"no, {total / 2**30 - usable:.2f} too much" if total else "no"
        sent = sum(collective["bytes"] for collective in step["compiler"]["collectives"].values())
        speed = ["–"] * 6
        if step["fits"]:
            each = _seconds_per_example(row)
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
        lines.append(row_of([*name, *cells, *speed]))
    known = [row for row in results if "error" not in row]
    commits = ", ".join(sorted({short_commit(row) for row in results}))
    examples = ", ".join(sorted({f"{row['run']['examples']:,}" for row in known}))
    tokens = ", ".join(f"{name} {n}" for name, n in {row["model_name"]: row["tokens"] for row in known}.items())
    compiling = sum(step["compiler"]["seconds"] for row in known for step in row["steps"].values())
    versions = ", ".join(sorted({" ".join(item) for row in known for item in row["versions"].items()}))
    return "\n".join(lines) + (
        f"\n\nTokens per example: {escape(tokens)}. "
        f"Chip-hours are those of training on {examples} examples, as in 300 steps of 8 + 8. "
        "They and the examples per second follow from the longer of the two times; loading, preparing and evaluating "
        "are not included. "
        f"Compiled in {compiling / 60:.0f} minutes by {escape(versions)}; commit {escape(commits)}."
    )


def chip_hours(results: Sequence[Mapping[str, Any]]) -> str:
    """The chip-hours of training on each slice, from `plans`, with one row for each model."""
    rows = {(row["model_name"], row["slice"]): row for row in results}
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


def _seconds_per_example(row: Mapping[str, Any]) -> float:
    """Seconds of training, by the longer of the least time and of the compiler's cycles."""
    step = next(iter(row["steps"].values()))
    return max(step["seconds_at_least"], step["seconds_by_cycles"]) / sum(row["rows"].values())


def _chip_hours(row: Mapping[str, Any]) -> float:
    return _seconds_per_example(row) * row["run"]["examples"] * row["chips"] / 3600


def contributions(shares: Mapping[str, float]) -> str:
    """Contributions to a difference that round to more than 0.0 %, the largest saving first."""
    order = sorted(shares.items(), key=lambda share: share[1])
    return ", ".join(f"{name} {100 * share:+.1f} %" for name, share in order if abs(share) >= 5e-4)


def _of_comparison(table: Callable[[Any], str]) -> Callable[[Any], str]:
    """A table of a comparison whose figures are checked first."""

    def render(results: Mapping[str, Any]) -> str:
        comparison.check(results)
        return table(results)

    return render


TABLES: Mapping[str, Callable[[Any], str]] = {
    "headline": _of_comparison(headline),
    "keeping": _of_comparison(keeping),
    "attacks": _of_comparison(attacks),
    "resisting": _of_comparison(resisting),
    "tuning": _of_comparison(tuning),
    "plans": plans,
    "chip_hours": chip_hours,
    "requests": requests_page.table,
    "request_goals": requests_page.goals,
}


def document(results: Mapping[str, Any]) -> str:
    """A page with all tables of a comparison."""
    parts = ["# Methods compared", keeping(results)]
    if any(row["attacks"] for row in results["rows"]):
        parts += ["## Under attack", attacks(results)]
    if any(row.get("trials") for row in results["rows"]):
        parts += ["## How each method was tuned", tuning(results)]
    if results["failures"]:
        failed = (f"- {escape(name)}: {escape(why)}" for name, why in results["failures"].items())
        parts += ["## What failed", "\n".join(failed)]
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
        return command_line.bad_input(error)
    return markers.refresh(pages, TABLES, "table", "python -m vkd_jax.reporting.tables", options.check)


def _accuracy_note(results: Mapping[str, Any], columns: comparison.Keys) -> str:
    """Protocol, intervals, seeds, numbers of questions and chance."""
    first = results["rows"][0]
    cells = [(eval_set, kind, first["sets"][f"{eval_set.name}/{kind}"]) for eval_set, kind in columns]
    counts = "; ".join(f"{escape(names.short_name(eval_set, kind))} {_count(cell)}" for eval_set, kind, cell in cells)
    resampled = "people" if any(cell.get("people") for _, _, cell in cells) else "questions"
    seeds = max(len(row["runs"]) for row in results["rows"])
    eval_set, kind = _columns(results, comparison.forgotten_keys)[0]
    chance = results["meta"]["chance"].get(eval_set.name, {}).get(kind)
    return (
        f"Accuracy (%) under the protocol {code(results['meta']['protocol'])}, with 95 % bootstrap intervals over "
        f"{resampled} and seeds ({seeds} seed{'s' * (seeds > 1)}). Questions: {counts}."
        + (f" Chance is {100 * chance:.0f} on the forget set." if chance else "")
    )


def _recovery_note(attackers: Mapping[str, float]) -> str:
    if not attackers:
        return ""
    shares = ", ".join(f"{100 * share:g} %" for share in sorted(set(attackers.values())))
    trained = " or ".join(f"{escape(names.attacker(name))} ({escape(name)})" for name in attackers)
    return (
        f"Recovery: share of the lost accuracy that comes back when an attacker relearns {shares} of the forget "
        f"questions, training {trained}."
    )


def _keeps_note(results: Mapping[str, Any]) -> str:
    images, texts = (
        "; ".join(escape(names.short_name(*key)) for key in _columns(results, choose))
        for choose in (comparison.kept_image_keys, comparison.kept_text_keys)
    )
    return (
        f"Keeps: at least {100 * comparison.KEEP:.0f} % of the vanilla model's accuracy on each of {images}"
        + (f", and at least the lower end of the vanilla model's interval on each of {texts}" if texts else "")
        + "."
    )


def _origin(results: Mapping[str, Any]) -> str:
    commits = ", ".join(commit[:7] for commit in results["meta"]["commits"])
    return f"Commit {escape(commits)}; {code(results['meta']['command'])}"


def _count(cell: Mapping[str, Any]) -> str:
    """The number of questions, and of the people that they are about."""
    return f"{cell['n']} about {messages.people(cell['people'])}" if cell.get("people") else str(cell["n"])


def short_commit(results: Mapping[str, Any]) -> str:
    """The first seven digits of the commit of some results, and whether the clone had changes."""
    head, _, changes = results["commit"].partition("+")
    return head[:7] + (changes and " with changes")


def _share(cell: Mapping[str, float] | None) -> str:
    """A share in percent with its interval."""
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
