"""python -m vkd_jax.plan --config configs/llava.py:7b --topology v5e:2x2 [--json FILE]

Compiles the step of unlearning that the config describes for TPUs that are not there, and says what it takes: bytes a
chip by part, FLOPs, bytes sent between chips, the least time that follows from the chip's published figures, and
whether it fits. Beside it stands the step that trains all weights by GradDiff, the usual baseline, and what of its time
and memory the first one takes. No array is made and nothing is downloaded; libtpu, which holds the compiler, is needed:
pip install 'vkd_jax[tpu]'.

python -m vkd_jax.plan --config configs/plans.py --json docs/results/plans.json

makes one row after the other of the table in docs/planner.md. A row is written as soon as it is known, and an
interrupted command goes on where it stood. A program that was compiled once is not compiled again (planner/aot.py).

Topologies: v5e:1x1, v5e:2x2, v5e:4x4, v5e:8x8, v5e:16x16, v4:2x2x1, v5p:2x2x1, v6e:1x1, v6e:2x4, and others that the
compiler knows. Exit status: 0 done, 2 bad input (one sentence says what).
"""

import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from absl import app, flags

from vkd_jax import methods
from vkd_jax.config import command_line
from vkd_jax.models import quantize
from vkd_jax.planner import aot, blueprint, flops
from vkd_jax.planner.blueprint import Blueprint, Lengths
from vkd_jax.planner.chips import CHIPS, Chip, devices
from vkd_jax.reporting import tables
from vkd_jax.runtime import files, provenance
from vkd_jax.runtime.mesh import make_mesh
from vkd_jax.types import UserError

GIB = 2**30


USUAL = "grad_diff, all weights"
# `original`: what trains, as it was loaded; a run keeps it beside the copy that trains.
PARTS = ("frozen", "trainable", "original", "optimizer", "mask", "batch", "cached")


def plan(
    config: ml_collections.ConfigDict,
    topology: str,
    lengths: Lengths,
    compare: bool = True,
) -> dict[str, Any]:
    """All figures of a config on a topology, in JSON's types.

    Args:
        config: of a run.
        topology: such as "v5e:2x2".
        lengths: of the questions.
        compare: whether the step on all weights is compiled, too.

    Raises:
        UserError: see `devices` and `blueprint.draw`.
    """
    kind, chips = topology.partition(":")[0], devices(topology)
    mesh = make_mesh(**config.mesh, devices=chips)
    chip = CHIPS[kind]
    own = blueprint.draw(config, mesh, lengths)
    steps = {config.method.name: figures(own, chip)}
    if compare:
        steps[USUAL] = _usual(config, mesh, lengths, chip)
    rows = {name: batch.tokens.shape[0] for name, batch in own.batches.items()}
    pair = tuple(steps.values())
    return {
        "model": config.model.path or config.model.base,
        "topology": topology,
        "chips": mesh.size,
        "mesh": dict(mesh.shape),
        "dtype": config.model.dtype,
        "quantize": config.model.quantize,
        "remat": config.model.remat,
        "train": own.method.train,
        "rows": rows,
        "tokens": next(iter(own.batches.values())).tokens.shape[1],
        "answer_tokens": lengths.answer,
        "hbm_gib": chip.hbm,
        "usable_gib": chip.usable,
        "steps": steps,
        "ratios": ratios(*pair) if compare else None,
    }


def _usual(config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh, lengths: Lengths, chip: Chip) -> dict[str, Any]:
    """The figures of GradDiff on all weights; where what the config keeps for the backward pass does not fit, of one
    that computes all of it again.
    """
    changed = config.copy_and_resolve_references()
    for changed.model.remat in dict.fromkeys((config.model.remat, "full")):
        drawn = blueprint.draw(changed, mesh, lengths, methods.create("grad_diff", {"train": "all"}), whole=True)
        found = figures(drawn, chip)
        if found["fits"]:
            break
    return found


def figures(drawn: Blueprint, chip: Chip) -> dict[str, Any]:
    """What one step takes; bytes and seconds are of each chip.

    The seconds are the least that the chip's published figures allow, one beside the other, and those of the compiler's
    own reckoning in cycles; of a step that the compiler refuses all but those of computing are None, as there is no
    program to read them from.
    """
    parts = held(drawn)
    compiled = aot.compile_step(drawn)
    work = flops.count(drawn.traced.jaxpr, drawn.from_batch)
    total = sum(part.total for part in work.values())
    found: dict[str, Any] = {
        "remat": drawn.model_config.remat,
        "bytes": parts,
        "quantised_saves": quantised_saves(drawn),
        "flops": {name: dataclasses.asdict(part) for name, part in work.items()},
        "flops_total": total,
        "compiler": compiled,
        "total": total_bytes(drawn, compiled["total"], parts),
    }
    found["fits"] = compiled["refused"] is None and found["total"] <= chip.usable * GIB
    sent = sum(collective["bytes"] for collective in compiled["collectives"].values())
    refused, moved = compiled["refused"] is not None, compiled["traffic"]
    integers = sum(part.integers for part in work.values())
    found["seconds"] = {
        "compute": ((total - integers) / chip.flops + integers / chip.integers) / drawn.mesh.size,
        "memory": None if refused else moved / chip.bandwidth,
        "interconnect": None if refused else sent / chip.interconnect,
    }
    found["bound"] = max(found["seconds"], key=lambda name: found["seconds"][name] or 0.0)
    found["seconds_at_least"] = found["seconds"][found["bound"]]
    found["seconds_by_cycles"] = None if refused else compiled["cycles"] / chip.clock
    return found


def ratios(own: Mapping[str, Any], usual: Mapping[str, Any]) -> dict[str, Any]:
    """What of another step's least time, FLOPs and memory one takes, and which parts bought that.

    Of FLOPs and memory the parts are shares of the other step's total, negative where something is saved; together
    they are the ratio less one. None where the compiler gave no number.
    """

    def bought(amount: Callable[[Mapping[str, Any]], Mapping[str, float]], total: float) -> dict[str, float]:
        less, more = amount(usual), amount(own)
        return {name: (more[name] - less[name]) / total for name in more}

    def work(step: Mapping[str, Any]) -> dict[str, float]:
        sums = {name: sum(work[name] for work in step["flops"].values()) for name in flops.PASSES}
        return {name.replace("_", " "): value for name, value in sums.items()}

    def memory(step: Mapping[str, Any]) -> dict[str, float]:
        parts, saved = step["bytes"], step["quantised_saves"]
        shares = {
            "quantised weights": -saved,
            "weights not in float32": parts["frozen"] + parts["trainable"] + saved,
            "weights as loaded": parts["original"],
            "optimizer": parts["optimizer"],
            "mask": parts["mask"],
            "batches and caches": parts["batch"] + parts["cached"],
        }
        return shares | {"gradients and activations": step["total"] - sum(shares.values())}

    found = {
        "seconds": own["seconds_at_least"] / usual["seconds_at_least"],
        "seconds_by_cycles": None
        if None in (own["seconds_by_cycles"], usual["seconds_by_cycles"])
        else own["seconds_by_cycles"] / usual["seconds_by_cycles"],
        "flops": own["flops_total"] / usual["flops_total"],
        "flops_by": bought(work, usual["flops_total"]),
    }
    if own["total"] is None or usual["total"] is None:
        return found | {"bytes": None, "bytes_by": None}
    return found | {"bytes": own["total"] / usual["total"], "bytes_by": bought(memory, usual["total"])}


def quantised_saves(drawn: Blueprint) -> int:
    """Bytes of each chip that the quantised weights would take more in the type that the model computes in."""
    dtype, saved = jnp.dtype(drawn.model_config.compute_dtype), 0
    for x in drawn.frozen.values():
        if isinstance(x, quantize.QArray):
            value = x.qvalue
            plain = jax.ShapeDtypeStruct(value.shape, dtype, sharding=value.sharding)
            saved += nbytes(plain) - sum(map(nbytes, jax.tree.leaves(x)))
    return saved


def held(drawn: Blueprint) -> dict[str, int]:
    """Bytes of a chip that a run holds at each step, by part, without what layouts pad.

    The compiler drops what the step does not read: blocks that feed nothing, and what trains as it was loaded.
    """
    cached = {name: batch.cached for name, batch in drawn.batches.items()}
    plain = {name: dataclasses.replace(batch, cached={}) for name, batch in drawn.batches.items()}
    state = drawn.state
    trees = (drawn.frozen, state.params, drawn.original, (state.opt_state, state.step), drawn.mask, plain, cached)
    return {name: sum(map(nbytes, jax.tree.leaves(tree))) for name, tree in zip(PARTS, trees, strict=True)}


def total_bytes(drawn: Blueprint, compiled: int | None, parts: Mapping[str, int]) -> int | None:
    """What a chip holds while a step runs: by the compiler's account, and what a run keeps beside it."""
    unseen = 0 if drawn.start is not None else parts["original"]
    return None if compiled is None else compiled + unseen


def nbytes(x: jax.ShapeDtypeStruct) -> int:
    """Bytes of each chip's part of an array; two values of four bits make one."""
    shape = x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)
    bits = {"int4": 4, "uint4": 4}.get(x.dtype.name, 8 * x.dtype.itemsize)
    return math.ceil(math.prod(shape) * bits / 8)


def text(found: Mapping[str, Any]) -> str:
    """The figures as a page of plain text."""
    steps = found["steps"]
    mesh = ", ".join(f"{axis} {size}" for axis, size in found["mesh"].items())
    rows = " + ".join(f"{count} {name}" for name, count in found["rows"].items())
    lines = [
        f"{found['model']}, {found['quantize'] or 'not quantised'}, on {found['topology']}: {found['chips']} chips of "
        f"{found['hbm_gib']} GiB, mesh {mesh}",
        f"batch {rows} rows of {found['tokens']} tokens, {found['answer_tokens']} of them answer",
        "",
        f"{'':28}" + "".join(f"{name:>26}" for name in steps),
    ]

    def line(title: str, values: Sequence[str]) -> None:
        lines.append(f"{title:28}" + "".join(f"{value:>26}" for value in values))

    def gib(value: float | None) -> str:
        return "?" if value is None else f"{value / GIB:.3f}"

    lines.append("GiB a chip")
    for part in PARTS:
        line(f"  {part}", [gib(step["bytes"][part]) for step in steps.values()])
    line("  temporaries", [gib(step["compiler"]["temporaries"]) for step in steps.values()])
    line("  total by the compiler", [gib(step["compiler"]["total"]) for step in steps.values()])
    line("  and what a run holds", [gib(step["total"]) for step in steps.values()])
    line("  fits", ["yes" if step["fits"] else "no" for step in steps.values()])
    lines.append("TFLOP a step")
    for part in dict.fromkeys(part for step in steps.values() for part in step["flops"]):
        values = [flops.Work(**step["flops"].get(part, {})).total for step in steps.values()]
        line(f"  {part}", [f"{value / 1e12:.2f}" for value in values])
    for kind in flops.PASSES:
        line(f"  ({kind})", [f"{sum(p[kind] for p in step['flops'].values()) / 1e12:.2f}" for step in steps.values()])
    line("  total", [f"{step['flops_total'] / 1e12:.2f}" for step in steps.values()])
    lines.append("GiB sent by each chip")
    for kind in dict.fromkeys(kind for step in steps.values() for kind in step["compiler"]["collectives"]):
        counts = [step["compiler"]["collectives"].get(kind, {"bytes": 0.0}) for step in steps.values()]
        line(f"  {kind}", [gib(count["bytes"]) for count in counts])
    lines.append("milliseconds at least")
    for name in ("compute", "memory", "interconnect"):
        values = [step["seconds"][name] for step in steps.values()]
        line(f"  {name}", ["?" if value is None else f"{1e3 * value:.1f}" for value in values])
    reckoned = [step["seconds_by_cycles"] for step in steps.values()]
    line("by the compiler's cycles", ["?" if value is None else f"{1e3 * value:.1f}" for value in reckoned])
    for name, step in steps.items():
        if not step["fits"]:
            lines += ["", f"{name} does not fit: {why_not(step, found['usable_gib'])}"]
    if found["ratios"]:
        lines += ["", *compared(found)]
    return "\n".join(lines)


def why_not(step: Mapping[str, Any], usable: float) -> str:
    """How much a step that does not fit is too large, in one line."""
    if step["compiler"]["refused"]:
        return step["compiler"]["refused"]
    total = step["total"] / GIB
    return (
        f"with what a run holds beside it it needs {total:.2f} GiB of {usable:.2f}, {total - usable:.2f} GiB too much"
    )


def compared(found: Mapping[str, Any]) -> list[str]:
    """Two lines: what of the other step's least time and memory the first one takes, and what bought that."""
    (name, own), (other, usual) = found["steps"].items()
    by = found["ratios"]

    times = " against ".join(f"{1e3 * x['seconds_at_least']:.1f} ms by {x['bound']}" for x in (own, usual))
    refused = [label for label, step in found["steps"].items() if step["compiler"]["refused"]]
    alone = f"; {' and '.join(refused)} does not fit, so that compute alone is known" if refused else ""
    reckoned = ""
    if by["seconds_by_cycles"]:
        cycles = " against ".join(f"{1e3 * x['seconds_by_cycles']:.1f} ms" for x in (own, usual))
        reckoned = f"; by the compiler's cycles {_less(by['seconds_by_cycles'])} ({cycles})"
    memory = "not known" if by["bytes"] is None else f"{_less(by['bytes'])}: {tables.bought(by['bytes_by'])}"
    work = tables.bought(by["flops_by"])
    return [
        f"least time of {name} / {other}: {_less(by['seconds'])} ({times}{alone}){reckoned}; FLOPs: {work}",
        f"memory of {name} / {other}: {memory}",
    ]


def _less(ratio: float) -> str:
    return f"{ratio:.2f}, {abs(100 * (1 - ratio)):.0f} % {'less' if ratio <= 1 else 'more'}"


def table(config: ml_collections.ConfigDict, file: Path) -> None:
    """Makes the rows of configs/plans.py that the config asks for, each on disk as soon as it is known.

    A row of `file` is a line of a JSON list: what `plan` found, and which model, chips, command and commit it is of.

    Raises:
        UserError: the file holds something else.
    """
    rows = [(tuple(row[:2]), row[2]) for row in config.plans.rows]
    wanted = [(cell, given) for cell, given in rows if set(config.plans.only) <= set(cell)]
    if not wanted:
        raise UserError(f"no row is of {' and '.join(config.plans.only)}: give one model, one slice, or one of each.")
    source = {"commit": provenance.commit(but=file), "versions": aot.versions()}
    for cell, given in wanted:
        there = _rows(file)
        row = dict(zip(("model_name", "slice"), cell, strict=True), command=f"python -m vkd_jax.plan {given}") | source
        old = there.get(cell, {"error": ""})
        if "+changes" in row["commit"] or "error" in old or not row.items() <= old.items():
            started = time.perf_counter()
            row |= _row(given) | {"run": {"examples": config.plans.examples}}
            print(f"{cell[0]} on {cell[1]}, {time.perf_counter() - started:.0f} s: {_said(row)}", flush=True)
        else:
            continue  # nothing has changed, so that it need not even be traced
        there = _rows(file) | {cell: row}  # another process may have written meanwhile
        order = [cell for cell, _ in rows if cell in there]
        files.write_bytes(file, ("[\n" + ",\n".join(json.dumps(there[cell]) for cell in order) + "\n]\n").encode())


def _rows(file: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """What is in the file, by model and slice."""
    try:
        made = json.loads(file.read_text()) if file.exists() else []
        return {(row["model_name"], row["slice"]): row for row in made}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--json={file} is there, and holds no rows of this table: {error}") from error


def _row(given: str) -> dict[str, Any]:
    """What `plan` finds by these flags, or why it cannot."""
    values, own = flags.FlagValues(), sys.argv
    define(values)
    try:
        sys.argv = ["plan", *given.split()]  # which alone is read for overrides
        command_line.parse(sys.argv, values)
    finally:
        sys.argv = own
    try:
        return plan(values.config, values.topology, _lengths(values), values.compare)
    except UserError as error:
        return {"error": str(error)}


def _said(row: Mapping[str, Any]) -> str:
    if "error" in row:
        return row["error"]
    step = next(iter(row["steps"].values()))
    return "fits" if step["fits"] else f"does not fit: {why_not(step, row['usable_gib'])}"


def define(values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines --config, --topology, --json and the lengths of the questions."""
    command_line.define(values)
    flags.DEFINE_string("topology", "v5e:2x2", "Chips and how they lie, e.g. v5e:2x2.", flag_values=values)
    flags.DEFINE_string("json", None, "Where to write the figures for machines, too.", flag_values=values)
    flags.DEFINE_integer("text_tokens", Lengths.text, "Tokens of a row beside the picture's.", flag_values=values)
    flags.DEFINE_integer("answer_tokens", Lengths.answer, "Tokens of the answer, of these.", flag_values=values)
    flags.DEFINE_boolean("compare", True, "Compiles the step on all weights, too.", flag_values=values)


def _lengths(values: flags.FlagValues) -> Lengths:
    lengths = Lengths(values.text_tokens, values.answer_tokens)
    if not 1 <= lengths.answer <= lengths.text:
        raise UserError(
            f"--answer_tokens={lengths.answer}, --text_tokens={lengths.text}: the answer is part of the text, and "
            "at least one token."
        )
    return lengths


def run(argv: Sequence[str], values: flags.FlagValues = flags.FLAGS) -> int:
    """Prints the figures; the exit status."""
    if len(argv) > 1:
        return command_line.bad_input(f"unexpected argument {argv[1]!r}; flags begin with --")
    if values.config is None:
        return command_line.bad_input("pass --config FILE, e.g. configs/llava.py:7b.")
    jax.config.update("jax_platforms", "cpu")  # a chip that is there is left to those who use it
    jax.config.update("jax_enable_compilation_cache", False)  # what is compiled for other chips cannot be loaded here
    try:
        if "plans" in values.config:
            if not values.json:
                raise UserError("this config is a table of plans: pass --json FILE, where its rows go.")
            table(values.config, Path(values.json))
            return 0
        found = plan(values.config, values.topology, _lengths(values), values.compare)
        if values.json:
            files.write_bytes(Path(values.json), (json.dumps(found, indent=1) + "\n").encode())
    except UserError as error:
        return command_line.bad_input(str(error))
    print(text(found))
    return 0


if __name__ == "__main__":
    define()
    app.run(run, flags_parser=command_line.parse)
