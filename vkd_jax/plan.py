"""python -m vkd_jax.plan --config configs/llava.py:7b --topology v5e:2x2 [--json FILE]

Compiles the step of unlearning that the config describes for TPUs that are not there, and says what it takes: bytes a
chip by part, FLOPs, bytes sent between chips, the least time that follows from the chip's published figures, and
whether it fits. Beside it stands the step that trains all weights by GradDiff, the usual baseline. No array is
made and nothing is downloaded; libtpu, which holds the compiler, is needed: pip install 'vkd_jax[tpu]'.

Topologies: v5e:1x1, v5e:2x2, v5e:4x4, v5e:8x8, v5e:16x16, v4:2x2x1, v5p:2x2x1, v6e:1x1, v6e:2x4, and others that the
compiler knows. Exit status: 0 done, 2 bad input (one sentence says what).
"""

import dataclasses
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections
from absl import app, flags

from vkd_jax import arithmetic, blueprint, hlo, main, methods, sharding, train, workdir
from vkd_jax.blueprint import Blueprint, Lengths
from vkd_jax.types import UserError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """A chip's published figures."""

    flops: float  # bfloat16 a second
    hbm: float  # GiB
    bandwidth: float  # bytes a second, of its memory
    interconnect: float  # bytes a second that it sends, all links together


# https://cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}: peak compute per chip, HBM capacity and bandwidth, and
# inter-chip interconnect bandwidth per chip (in Gbit/s there: 2400, 1600, 4800, 3584).
CHIPS = {
    "v4": Chip(275e12, 32, 1228e9, 300e9),
    "v5e": Chip(197e12, 16, 819e9, 200e9),
    "v5p": Chip(459e12, 95, 2765e9, 600e9),
    "v6e": Chip(918e12, 32, 1640e9, 448e9),
}
# `original`: what trains, as it was loaded; a run keeps it beside the copy that trains.
PARTS = ("frozen", "trainable", "original", "optimizer", "mask", "batch", "cached")


def devices(topology: str) -> Sequence[jax.Device]:
    """The chips of a topology, which need not be there.

    Raises:
        UserError: there is no TPU compiler, or no such topology.
    """
    from jax.experimental import topologies

    kind, _, shape = topology.partition(":")
    if kind not in CHIPS or not re.fullmatch(r"\d+(x\d+)+", shape):
        raise UserError(f"--topology={topology}: give a chip ({', '.join(CHIPS)}) and a shape, such as v5e:2x2.")
    try:
        import libtpu  # noqa: F401
    except ImportError as error:
        raise UserError(
            "libtpu, which holds the TPU compiler, is not installed: pip install 'vkd_jax[tpu]'."
        ) from error
    # Many processes may compile at once, and none asks the network what machine this is.
    os.environ.update(ALLOW_MULTIPLE_LIBTPU_LOAD="1", TPU_SKIP_MDS_QUERY="1")
    # What it would find out from a TPU's host, lest it complains that there is none.
    os.environ.update(TPU_ACCELERATOR_TYPE="v5litepod-1", TPU_WORKER_HOSTNAMES="localhost", TPU_WORKER_ID="0")
    os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
    options: dict[str, Any] = {"chips_per_host_bounds": [1, 1, 1]} if set(shape) <= set("1x") else {}
    if kind == "v4":
        options["chip_config_name"] = "megacore"  # the two cores of a chip are one device, as in a run
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices
    except Exception as error:  # the runtime's own, which no public name has
        raise UserError(f"--topology={topology}: the TPU compiler refuses it: {_first_line(error)}") from error


def plan(config: ml_collections.ConfigDict, topology: str, lengths: Lengths, compare: bool = True) -> dict[str, Any]:
    """All figures of a config on a topology, in JSON's types.

    Args:
        config: of a run.
        topology: such as "v5e:2x2".
        lengths: of the questions.
        compare: whether the step on all weights is compiled, too.

    Raises:
        UserError: see `devices` and `blueprint.draw`.
    """
    chips = devices(topology)
    mesh = sharding.make_mesh(**config.mesh, devices=chips)
    chip = CHIPS[topology.partition(":")[0]]
    own = blueprint.draw(config, mesh, lengths)
    steps = {config.method.name: figures(own, chip)}
    if compare:
        usual = blueprint.draw(config, mesh, lengths, methods.create("grad_diff", {"train": "all"}), whole=True)
        steps["grad_diff, all weights"] = figures(usual, chip)
    rows = {name: batch.tokens.shape[0] for name, batch in own.batches.items()}
    return {
        "model": config.model.path or config.model.base,
        "topology": topology,
        "chips": mesh.size,
        "mesh": dict(mesh.shape),
        "quantize": config.model.quantize,
        "remat": config.model.remat,
        "train": own.method.train,
        "rows": rows,
        "tokens": next(iter(own.batches.values())).tokens.shape[1],
        "answer_tokens": lengths.answer,
        "hbm_gib": chip.hbm,
        "steps": steps,
    }


def figures(drawn: Blueprint, chip: Chip) -> dict[str, Any]:
    """What one step takes; bytes and seconds are of each chip."""
    parts = held(drawn)
    compiled = compile_step(drawn)
    work = flops(drawn)
    total = sum(part.total for part in work.values())
    found: dict[str, Any] = {
        "bytes": parts,
        "flops": {name: dataclasses.asdict(part) for name, part in work.items()},
        "flops_total": total,
        "compiler": compiled,
        "total": total_bytes(drawn, compiled["total"], parts),
    }
    found["fits"] = compiled["refused"] is None and found["total"] <= chip.hbm * GIB
    sent = sum(collective["bytes"] for collective in compiled["collectives"].values())
    moved = traffic(drawn, parts, work) + 2 * (compiled["temporaries"] or 0)
    found["seconds"] = {
        "compute": total / drawn.mesh.size / chip.flops,
        "memory": moved / chip.bandwidth,
        "interconnect": sent / chip.interconnect,
    }
    found["seconds_at_least"] = max(found["seconds"].values())
    return found


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


def flops(drawn: Blueprint) -> dict[str, arithmetic.Part]:
    """FLOPs of the step by part of the model, all chips together; a teacher's forward pass is a part of its own."""
    total: dict[str, arithmetic.Part] = {}
    for name, batch in drawn.batches.items():
        rows, tokens = batch.tokens.shape
        pictures = next(iter(batch.pictures.values()))
        config = drawn.model_config
        patches = config.vision.patches + 1 if hasattr(config.vision, "patches") else pictures.shape[1]
        image_tokens = patches // config.vision.merge**2 if hasattr(config.vision, "merge") else config.vision.patches
        if getattr(config, "feature_select", "") == "full":
            image_tokens += 1
        sizes = arithmetic.Sizes(patches, image_tokens, tokens, batch.at.shape[1])
        parts = arithmetic.row(config, drawn.shapes, drawn.state.params, sizes, drawn.method.depth(config))
        if name in drawn.method.teachers():
            parts["teacher"] = arithmetic.Part(forward=sum(part.forward for part in parts.values()))
        for part, value in parts.items():
            scaled = arithmetic.Part(*(rows * x for x in dataclasses.astuple(value)))
            total[part] = total.get(part, arithmetic.Part()) + scaled
    return total


def traffic(drawn: Blueprint, parts: Mapping[str, int], work: Mapping[str, arithmetic.Part]) -> float:
    """Bytes that each chip reads and writes of weights and state: a rough estimate.

    Each stream reads the weights of a part once for each of its passes, gathered from all chips but those of the axis
    `tensor`; the optimizer reads and writes what trains and its moments once.
    """
    moved = 2.0 * (parts["trainable"] + parts["optimizer"])
    for path, x in drawn.shapes.items():
        name = "head" if path.startswith("language_model/head") else path.split("/")[0]
        part = work.get(name, arithmetic.Part())
        passes = sum(value > 0 for value in (part.forward, part.backward, part.weights, part.recomputed))
        whole = sum(nbytes(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)) for leaf in jax.tree.leaves(x))
        if "/embed/" not in path:
            moved += passes * len(drawn.batches) * whole / drawn.mesh.shape["tensor"]
    return moved


def compile_step(drawn: Blueprint) -> dict[str, Any]:
    """The compiler's figures; of a step that does not fit it says how much that would need."""
    none = {"arguments": None, "temporaries": None, "total": None, "collectives": {}}
    try:
        compiled = drawn.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        needs = re.search(r"Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT]) hbm", str(error))
        scale = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
        total = needs and int(float(needs[1]) * scale[needs[2]])
        return none | {"total": total, "refused": _first_line(error)}
    memory = compiled.memory_analysis()
    sums: dict[str, dict[str, float]] = {}
    for found in hlo.collectives(compiled.as_text(), drawn.mesh.size):
        kind = sums.setdefault(found.kind, {"bytes": 0.0, "times": 0})
        kind["bytes"] += found.sent
        kind["times"] += found.times
    return {
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "total": train.step_bytes(compiled),
        "collectives": sums,
        "refused": None,
    }


def _first_line(error: Exception) -> str:
    return " ".join((str(error).strip().splitlines() or [type(error).__name__])[0].split())


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
        values = [arithmetic.Part(**step["flops"].get(part, {})).total for step in steps.values()]
        line(f"  {part}", [f"{value / 1e12:.2f}" for value in values])
    for kind in ("forward", "backward", "weights", "recomputed"):
        line(f"  ({kind})", [f"{sum(p[kind] for p in step['flops'].values()) / 1e12:.2f}" for step in steps.values()])
    line("  total", [f"{step['flops_total'] / 1e12:.2f}" for step in steps.values()])
    lines.append("GiB sent by each chip")
    for kind in dict.fromkeys(kind for step in steps.values() for kind in step["compiler"]["collectives"]):
        counts = [step["compiler"]["collectives"].get(kind, {"bytes": 0.0}) for step in steps.values()]
        line(f"  {kind}", [gib(count["bytes"]) for count in counts])
    lines.append("milliseconds at least")
    for name in ("compute", "memory", "interconnect"):
        line(f"  {name}", [f"{1e3 * step['seconds'][name]:.1f}" for step in steps.values()])
    for name, step in steps.items():
        if step["compiler"]["refused"]:
            lines += ["", f"{name} does not fit: {step['compiler']['refused']}"]
    return "\n".join(lines)


def define(values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines --config, --topology, --json and the lengths of the questions."""
    main.define(values)
    flags.DEFINE_string("topology", "v5e:2x2", "Chips and how they lie, e.g. v5e:2x2.", flag_values=values)
    flags.DEFINE_string("json", None, "Where to write the figures for machines, too.", flag_values=values)
    flags.DEFINE_integer("text_tokens", Lengths.text, "Tokens of a row beside the picture's.", flag_values=values)
    flags.DEFINE_integer("answer_tokens", Lengths.answer, "Tokens of the answer, of these.", flag_values=values)
    flags.DEFINE_boolean("compare", True, "Compiles the step on all weights, too.", flag_values=values)


def run(argv: Sequence[str], values: flags.FlagValues = flags.FLAGS) -> int:
    """Prints the figures; the exit status."""
    if len(argv) > 1:
        return main.bad_input(f"unexpected argument {argv[1]!r}; flags begin with --")
    if values.config is None:
        return main.bad_input("pass --config FILE, e.g. configs/llava.py:7b.")
    jax.config.update("jax_platforms", "cpu")  # a chip that is there is left to those who use it
    jax.config.update("jax_enable_compilation_cache", False)  # what is compiled for other chips cannot be loaded here
    try:
        lengths = Lengths(values.text_tokens, values.answer_tokens)
        if not 1 <= lengths.answer <= lengths.text:
            raise UserError(
                f"--answer_tokens={lengths.answer}, --text_tokens={lengths.text}: the answer is part of the text, and "
                "at least one token."
            )
        found = plan(values.config, values.topology, lengths, values.compare)
        if values.json:
            workdir.write(Path(values.json), (json.dumps(found, indent=1) + "\n").encode())
    except UserError as error:
        return main.bad_input(str(error))
    print(text(found))
    return 0


if __name__ == "__main__":
    define()
    app.run(run, flags_parser=main.parse)
