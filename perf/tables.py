"""Markdown tables of the timings that the programs of this folder measure.

python perf/tables.py README.md docs/*.md [--check]     renders (or checks) the tables between the markers of pages

A marker is `<!-- perf: docs/results/FILE.json NAME -->` (see vkd_jax/reporting/markers.py). FILE.json is what a program
of this folder wrote with --json, and NAME is one of TABLES below. Exit status: 0 on success, 1 if a table is stale
(--check), 2 on bad input.
"""

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # a clone need not be installed

from vkd_jax.reporting import markers
from vkd_jax.reporting.tables import numeric_table, short_commit


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
    return numeric_table(["a step of", "seconds", "least", "most", "MiB", "ours to it"], lines) + (
        f"\n\nA LLaVA of {found['parameters'] / 1e6:,.0f} M parameters, of which VKD trains "
        f"{found['trainable'] / 1e6:,.0f} M, in {found['dtype']}; {rows} rows of {found['tokens']} tokens. Medians of "
        f"{len(times)} steps; MiB: what a step holds, by the compiler's account. {_source(found)}"
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
    return numeric_table(heads, lines) + (
        f"\n\nA LLaVA of {found['parameters'] / 1e6:,.0f} M parameters; {found['questions']} questions about "
        f"{found['pictures']} pictures of {found['image_tokens']} tokens, {found['batch']} at a time; "
        f"{found['new_tokens']} tokens written, {found['options']} options a question. Medians of {len(times)} rounds. "
        f"{_source(found)}"
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
    return f"{numeric_table(heads, lines)}\n\n{said} {about} {_source(found)}"


def quantization(found: Mapping[str, Any]) -> str:
    """What a quantised language model costs: of perf/quantization.py."""
    lines = []
    for row in found["rows"]:
        cells = [f"{row['cosine']:.5f}", f"{row['kl']:.2e}", f"{row['top1']:.4f}"]
        lines.append([row["quantize"] or "float32", *cells, f"{row['bytes']:,}", f"{row['share']:.3f}"])
    heads = ["held in", "cosine", "KL, nats", "top-1", "bytes", "share"]
    about = f"{found['model']}: {found['questions']} questions, {found['answer_tokens']} answer tokens. "
    return f"{numeric_table(heads, lines)}\n\n{about}{_source(found)}"


def _source(found: Mapping[str, Any]) -> str:
    """On what a benchmark ran, and how to run it again."""
    cores = found["device"]
    if cores == "cpu":
        processor = found.get("processor", "")  # older files do not say
        cores = f"{found['cores']} cores" + (processor and f" ({processor})")
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return f"On {cores}, {versions}; commit {short_commit(found)}; `{found['command']}`"


def _seconds(times: Sequence[float]) -> list[str]:
    return [f"{value:.3f}" for value in (statistics.median(times), min(times), max(times))]


TABLES: markers.Tables = {
    "steps": steps,
    "answers": answers,
    "levels": levels,
    "quantization": quantization,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Renders or checks the tables of timings of some pages."""
    parser = argparse.ArgumentParser(prog="python perf/tables.py", description=main.__doc__)
    parser.add_argument("pages", nargs="+", type=Path, help="Markdown files with markers")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a table is stale")
    options = parser.parse_args(arguments)
    return markers.refresh(options.pages, TABLES, "perf", "python perf/tables.py", options.check)


if __name__ == "__main__":
    sys.exit(main())
