"""Tables of comparisons, plans and benchmarks, in Markdown.

python -m vkd_jax.reporting.tables README.md [--check]     writes (or checks) the tables between the markers of a page
python -m vkd_jax.reporting.tables RUN [RUN ...]           prints the table of some finished runs of vkd_jax.main

A marker is `<!-- table: docs/results/FILE.json NAME -->`, its end `<!-- /table -->`, its path that from the page;
FILE.json is a comparison.json, or what vkd_jax.plan or a program of benchmarks/ wrote by --json, and NAME one of
TABLES below. Exit status: 0 done, 1 a table is stale (--check), 2 bad input.
"""

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vkd_jax.reporting import comparison, page
from vkd_jax.runtime import files
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
_MARKER = re.compile(r"(<!-- table: (\S+) (\w+) -->\n).*?(<!-- /table -->)", re.DOTALL)


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
    return _numbers(["attack", *(row["label"] for row in rows)], lines)


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
    """What the step of unlearning takes on TPUs: one row a model and slice."""
    heads = ["model", "on", "held in", "fsdp × tensor", "rows a step", "GiB a chip", "fits", "TFLOP a step"]
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
    commits = ", ".join(sorted({_commit(row) for row in found}))
    examples = ", ".join(sorted({f"{row['run']['examples']:,}" for row in known}))
    tokens = ", ".join(f"{name} {n}" for name, n in {row["model_name"]: row["tokens"] for row in known}.items())
    compiling = sum(step["compiler"]["seconds"] for row in known for step in row["steps"].values())
    versions = ", ".join(sorted({" ".join(item) for row in known for item in row["versions"].items()}))
    return "\n".join(lines) + (
        f"\n\nTokens a row: {tokens}. Rows a second and chip-hours, those of training on {examples} rows as in 300 "
        "steps of 8 + 8, are by the longer of the two times; loading, preparing and measuring come on top. "
        f"Compiled in {compiling / 60:.0f} minutes by {versions}; commit {commits}."
    )


def chip_hours(found: Sequence[Mapping[str, Any]]) -> str:
    """What training takes at least on each slice, of `plans`: one row a model."""
    rows = {(row["model_name"], row["slice"]): row for row in found}
    slices = [*dict.fromkeys(name for _, name in rows)]
    models = dict.fromkeys(model for model, _ in rows)
    lines = [[model, *(_cost(rows.get((model, name))) for name in slices)] for model in models]
    return _numbers(["chip-hours", *slices], lines)


def _cost(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "–"
    if "error" in row:
        return "no"
    return f"{_chip_hours(row):.2f}" if next(iter(row["steps"].values()))["fits"] else "too large"


def _seconds_a_row(row: Mapping[str, Any]) -> float:
    """Of training, by the longer of what the chip's figures and the compiler's cycles say."""
    step = next(iter(row["steps"].values()))
    return max(step["seconds_at_least"], step["seconds_by_cycles"]) / sum(row["rows"].values())


def _chip_hours(row: Mapping[str, Any]) -> float:
    return _seconds_a_row(row) * row["run"]["examples"] * row["chips"] / 3600


def steps(found: Mapping[str, Any]) -> str:
    """What steps of training take, by turns: of perf/step_time.py."""
    lines = []
    own, held = found["median"]["vkd"], found["bytes"]
    for name, times in found["seconds"].items():
        memory = f"{held[name] / 2**20:,.0f}" if name in held else "–"
        ratio = f"{own / found['median'][name]:.2f}" if name != "vkd" else ""
        if name in held and ratio:
            ratio += f", {held['vkd'] / held[name]:.2f} of the memory"
        lines.append([name, *_seconds(times), memory, ratio])
    rows = " + ".join(f"{count} {name}" for name, count in found["rows"].items())
    return _numbers(["a step of", "seconds", "least", "most", "MiB", "ours to it"], lines) + (
        f"\n\nA LLaVA of {found['parameters'] / 1e6:,.0f} M parameters, of which VKD trains "
        f"{found['trainable'] / 1e6:,.0f} M, in {found['dtype']}; {rows} rows of {found['tokens']} tokens. Medians of "
        f"{len(times)} steps; MiB: what a step holds, by the compiler's account. {_where(found)}"
    )


def answers(found: Mapping[str, Any]) -> str:
    """What questions take to be answered, by turns: of perf/answers.py."""
    heads = ["", "seconds", "least", "most", "questions a second", "new tokens a second", "ours to PyTorch"]
    lines = []
    for name, times in found["seconds"].items():
        tokens = found["new_tokens_a_second"].get(name)
        ratio = found["ratio_to_pytorch"].get(name)
        each = f"{found['questions_a_second'][name]:.1f}"
        cells = [each, "–" if tokens is None else f"{tokens:.0f}", "" if ratio is None else f"{ratio:.2f}"]
        lines.append([name, *_seconds(times), *cells])
    return _numbers(heads, lines) + (
        f"\n\nA LLaVA of {found['parameters'] / 1e6:,.0f} M parameters; {found['questions']} questions about "
        f"{found['pictures']} pictures of {found['image_tokens']} tokens, {found['batch']} at a time; "
        f"{found['new_tokens']} tokens written, {found['options']} options a question. Medians of {len(times)} rounds. "
        f"{_where(found)}"
    )


def levels(found: Mapping[str, Any]) -> str:
    """How long methods take to forget as much: of perf/forget_level.py."""
    heads = ["method", "steps", "forget VQA ↓", "retain VQA ↑", "preparing, s", "a step, s", "all steps, s"]
    lines = []
    for row in found["rows"]:
        cells = [row["steps"], *(f"{100 * row[name]:.1f}" for name in ("forget", "retain"))]
        seconds = [f"{row['prepare_seconds']:.1f}", f"{row['step_seconds']:.3f}", f"{row['train_seconds']:.1f}"]
        lines.append([row["method"], *map(str, cells), *seconds])
    usual, *ours = found["rows"]
    enough = [row for row in ours if row["forget"] <= usual["forget"]]
    said = "None of these runs of VKD forgets as much as GradDiff on all weights."
    if enough:
        first = min(enough, key=lambda row: row["steps"])
        whole = [row["train_seconds"] + row["prepare_seconds"] for row in (first, usual)]
        said = (
            f"VKD forgets as much as GradDiff on all weights after {first['steps']} steps: "
            f"{first['train_seconds'] / usual['train_seconds']:.2f} of its time in steps, "
            f"{whole[0] / whole[1]:.2f} with preparing."
        )
    about = f"Right answers in per cent; {usual['questions']} questions about the people to forget, one seed. Preparing"
    about += " compiles, too; the seconds of steps are those of a median step."
    return f"{_numbers(heads, lines)}\n\n{said} {about} {_where(found)}"


def quantization(found: Mapping[str, Any]) -> str:
    """What a quantised language model costs: of perf/quantization.py."""
    lines = []
    for row in found["rows"]:
        cells = [f"{row['cosine']:.5f}", f"{row['kl']:.2e}", f"{row['top1']:.4f}"]
        lines.append([row["quantize"] or "float32", *cells, f"{row['bytes']:,}", f"{row['share']:.3f}"])
    heads = ["held in", "cosine", "KL, nats", "top-1", "bytes", "share"]
    about = f"{found['model']}: {found['questions']} questions, {found['answer_tokens']} answer tokens. "
    return f"{_numbers(heads, lines)}\n\n{about}{_where(found)}"


def bought(shares: Mapping[str, float]) -> str:
    """The parts that make a difference, the greatest saving first."""
    order = sorted(shares.items(), key=lambda share: share[1])
    return ", ".join(f"{name} {100 * share:+.1f} %" for name, share in order if abs(share) >= 5e-4)


TABLES: Mapping[str, Callable[[Any], str]] = {
    "keeping": keeping,
    "attacks": attacks,
    "tuning": tuning,
    "plans": plans,
    "chip_hours": chip_hours,
    "steps": steps,
    "answers": answers,
    "levels": levels,
    "quantization": quantization,
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


def fill(text: str, folder: Path) -> str:
    """A page with the tables between its markers made anew.

    Args:
        text: of the page.
        folder: where the markers' files are.

    Raises:
        UserError: a marker names no table, or a file that is not there.
    """

    def made(match: re.Match) -> str:
        start, file, name, end = match.groups()
        if name not in TABLES:
            raise UserError(f"a marker asks for the table {name!r}; there are {', '.join(TABLES)}.")
        try:
            found = json.loads((folder / file).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"a marker names {file}, which cannot be read: {error}") from error
        try:
            return f"{start}{TABLES[name](found)}\n{end}"
        except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
            raise UserError(f"a marker names {file}, which is nothing that the table {name!r} is made of.") from error

    if len(_MARKER.findall(text)) < text.count("<!-- table:"):
        raise UserError("a marker lacks its end, or its file or name.")
    return _MARKER.sub(made, text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Fills or checks pages, or prints the table of runs."""
    parser = argparse.ArgumentParser(prog="python -m vkd_jax.reporting.tables", description=main.__doc__)
    parser.add_argument("path", nargs="+", type=Path, help="Markdown files with markers, or folders of finished runs")
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if a table is stale")
    options = parser.parse_args(arguments)
    try:
        pages = [path for path in options.path if path.suffix == ".md"]
        if len(pages) < len(options.path):
            groups = comparison.by_label(path for path in options.path if path not in pages)
            first = next(iter(groups.values()))[0]
            print(keeping(comparison.collect({"controls": [first], **groups}, {}, {})))
        stale = [path for path in pages if not _fill(path, options.check)]
    except (UserError, OSError, UnicodeDecodeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for path in stale:
        print(f"{path} is stale: run python -m vkd_jax.reporting.tables {path}", file=sys.stderr)
    return 1 if stale else 0


def _fill(path: Path, check: bool) -> bool:
    """Makes the tables of a page; if they are only checked, whether they are what they should be."""
    text = path.read_text(encoding="utf-8")
    fresh = fill(text, path.parent)
    if check or fresh == text:
        return fresh == text
    files.write(path, fresh.encode())
    return True


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


def _numbers(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of a name and numbers a row."""
    return "\n".join(page.row(cells) for cells in (heads, ["---", *["---:"] * (len(heads) - 1)], *rows))


def _where(found: Mapping[str, Any]) -> str:
    """On what a benchmark ran, and how to run it again."""
    cores = found["device"]
    if cores == "cpu":
        processor = found.get("processor", "")  # older files do not say
        cores = f"{found['cores']} cores" + (processor and f" ({processor})")
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return f"On {cores}, {versions}; commit {_commit(found)}; `{found['command']}`"


def _commit(found: Mapping[str, Any]) -> str:
    head, _, changes = found["commit"].partition("+")
    return head[:7] + (changes and " with changes")


def _seconds(times: Sequence[float]) -> list[str]:
    return [f"{value:.3f}" for value in (statistics.median(times), min(times), max(times))]


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
