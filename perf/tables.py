"""Markdown tables of the results that the scripts of this folder measure.

python perf/tables.py README.md docs/*.md [--check]     renders (or checks) the tables between the markers of pages

A marker is `<!-- perf: docs/results/FILE.json NAME -->` (see vkd_jax/reporting/markers.py). FILE.json was written by a
script of this folder with --json, and NAME is one of TABLES below. Exit status: 0 on success, 1 if a table is stale
(--check), 2 on bad input.
"""

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that the script runs from a clone that is not installed

from vkd_jax.reporting import markers
from vkd_jax.reporting.markdown import numeric_table
from vkd_jax.reporting.tables import short_commit


def steps(results: Mapping[str, Any]) -> str:
    """Times and memory of training steps, from perf/step_time.py."""
    lines = []
    median, step_bytes = results["median"]["vkd"], results["bytes"]
    for name, times in results["seconds"].items():
        memory = f"{step_bytes[name] / 2**20:,.0f}" if name in step_bytes else "–"
        ratio = f"{median / results['median'][name]:.2f}" if name != "vkd" else ""
        if name in step_bytes and ratio:
            ratio += f", {step_bytes['vkd'] / step_bytes[name]:.2f} of the memory"
        lines.append([name, *_seconds(times), memory, ratio])
    rows = " + ".join(f"{count} {name}" for name, count in results["rows"].items())
    return numeric_table(["step", "seconds", "min", "max", "MiB", "VKD relative to it"], lines) + (
        f"\n\nA LLaVA with {results['parameters'] / 1e6:,.0f} M parameters, of which VKD trains "
        f"{results['trainable'] / 1e6:,.0f} M, in {results['dtype']}; batches of {rows} examples of "
        f"{results['tokens']} tokens. Medians of {len(times)} steps. MiB: memory per step, from the compiler. "
        f"{_source(results)}"
    )


def answers(results: Mapping[str, Any]) -> str:
    """Times of answering questions, from perf/answers.py."""
    heads = ["", "seconds", "min", "max", "questions/s", "new tokens/s", "time relative to PyTorch"]
    lines = []
    for name, times in results["seconds"].items():
        tokens = results["new_tokens_a_second"].get(name)
        ratio = results["ratio_to_pytorch"].get(name)
        questions = f"{results['questions_a_second'][name]:.1f}"
        cells = [questions, "–" if tokens is None else f"{tokens:.0f}", "" if ratio is None else f"{ratio:.2f}"]
        lines.append([name, *_seconds(times), *cells])
    return numeric_table(heads, lines) + (
        f"\n\nA LLaVA with {results['parameters'] / 1e6:,.0f} M parameters; {results['questions']} questions about "
        f"{results['pictures']} images of {results['image_tokens']} tokens, in batches of {results['batch']}; "
        f"{results['new_tokens']} tokens generated, {results['options']} options per question. Medians of "
        f"{len(times)} rounds. {_source(results)}"
    )


def levels(results: Mapping[str, Any]) -> str:
    """Times of methods to reach the same level of forgetting, from perf/forget_level.py."""
    heads = ["method", "steps", "forget VQA ↓", "retain VQA ↑", "preparation, s", "step, s", "all steps, s"]
    lines = []
    for row in results["rows"]:
        cells = [row["steps"], *(f"{100 * row[name]:.1f}" for name in ("forget", "retain"))]
        seconds = [f"{row['prepare_seconds']:.1f}", f"{row['step_seconds']:.3f}", f"{row['train_seconds']:.1f}"]
        lines.append([row["method"], *map(str, cells), *seconds])
    grad_diff, *vkd_runs = results["rows"]
    as_forgetful = [row for row in vkd_runs if row["forget"] <= grad_diff["forget"]]
    verdict = "None of these VKD runs forgets as much as GradDiff on all weights."
    if as_forgetful:
        shortest = min(as_forgetful, key=lambda row: row["steps"])
        totals = [row["train_seconds"] + row["prepare_seconds"] for row in (shortest, grad_diff)]
        verdict = (
            f"VKD forgets as much as GradDiff on all weights after {shortest['steps']} steps, in "
            f"{shortest['train_seconds'] / grad_diff['train_seconds']:.2f} of its training time, or "
            f"{totals[0] / totals[1]:.2f} with preparation."
        )
    about = f"Accuracy in %, with {grad_diff['questions']} questions about the forget set; one seed. Preparation"
    about += " includes compilation; the time of all steps is the median time of a step times the number of steps."
    return f"{numeric_table(heads, lines)}\n\n{verdict} {about} {_source(results)}"


def quantization(results: Mapping[str, Any]) -> str:
    """Fidelity and size of quantized language models, from perf/quantization.py."""
    lines = []
    for row in results["rows"]:
        cells = [f"{row['cosine']:.5f}", f"{row['kl']:.2e}", f"{row['top1']:.4f}"]
        lines.append([row["quantize"] or "float32", *cells, f"{row['bytes']:,}", f"{row['share']:.3f}"])
    heads = ["weights", "cosine", "KL, nats", "top-1", "bytes", "relative size"]
    about = f"{results['model']}: {results['questions']} questions, {results['answer_tokens']} answer tokens. "
    return f"{numeric_table(heads, lines)}\n\n{about}{_source(results)}"


def _source(results: Mapping[str, Any]) -> str:
    """The hardware, versions, commit and command of a measurement."""
    device = results["device"]
    if device == "cpu":
        processor = results.get("processor", "")  # older files lack it
        device = f"{results['cores']} cores" + (processor and f" ({processor})")
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    return f"On {device}, {versions}; commit {short_commit(results)}; `{results['command']}`"


def _seconds(times: Sequence[float]) -> list[str]:
    return [f"{value:.3f}" for value in (statistics.median(times), min(times), max(times))]


def loading(results: Mapping[str, Any]) -> str:
    """Times of loading a model with the check for NaN and infinity and without it, from perf/loading.py."""
    lines = [[name, *_seconds(times)] for name, times in results["seconds"].items()]
    return numeric_table(["", "seconds", "min", "max"], lines) + (
        f"\n\nThe check costs {100 * results['cost']:.1f} % of the time. A LLaVA of {results['bytes'] / 1e9:.2f} GB in "
        f"{results['dtype']}, in the page cache. Medians of {len(results['seconds']['without'])} "
        f"loads, in seconds of the processor. {_source(results)}"
    )


def host_memory(results: Mapping[str, Any]) -> str:
    """Memory of the host with recomputed teacher features, from perf/host_memory.py."""
    lines = [[f"{name}", f"{peak / 2**30:.2f}"] for name, peak in results["peaks"].items()]
    cached = {name: results["images"] * results["values"] * size / 2**30 for name, size in (("bf", 2), ("f", 4))}
    return numeric_table(["peak of the process after", "GiB"], lines) + (
        f"\n\n{results['images']:,} retain images, whose files have {results['image_bytes'] / 2**30:.2f} GiB, with one "
        f"question each; weights of {results['weights'] / 2**30:.2f} GiB in float32. Cached features would need "
        f"{cached['bf']:,.0f} GiB in bfloat16 and {cached['f']:,.0f} GiB in float32. {_source(results)}"
    )


TABLES: markers.Tables = {
    "host_memory": host_memory,
    "steps": steps,
    "answers": answers,
    "levels": levels,
    "quantization": quantization,
    "loading": loading,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Renders or checks the tables in Markdown pages."""
    parser = argparse.ArgumentParser(prog="python perf/tables.py", description=main.__doc__)
    parser.add_argument("pages", nargs="+", type=Path, help="Markdown files with markers")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a table is stale")
    options = parser.parse_args(arguments)
    return markers.refresh(options.pages, TABLES, "perf", "python perf/tables.py", options.check)


if __name__ == "__main__":
    sys.exit(main())
