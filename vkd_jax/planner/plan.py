"""What one training step requires on a TPU slice: memory, FLOPs, bytes sent, and the least time."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax

from vkd_jax import methods, registry
from vkd_jax.config.schema import RunConfig
from vkd_jax.planner import abstract_step, flops, memory
from vkd_jax.planner.abstract_step import AbstractStep, Lengths
from vkd_jax.planner.compile import compile_step
from vkd_jax.planner.memory import GIB
from vkd_jax.planner.tpu_specs import TPUS, Tpu, topology_devices
from vkd_jax.runtime.mesh import make_mesh

BASELINE = "grad_diff, all weights"


def plan(config: RunConfig, topology: str, lengths: Lengths, compare: bool = True) -> dict[str, Any]:
    """Plans the training step of a config for a topology, in JSON's types.

    Args:
        config: The config of a run.
        topology: The chips, such as "v5e:2x2".
        lengths: The lengths of the questions.
        compare: Whether to plan GradDiff on all weights as well.

    Raises:
        UserError: See `topology_devices` and `abstract_step.build`.
    """
    devices = topology_devices(topology)
    tpu = TPUS[topology.partition(":")[0]]
    mesh = make_mesh(**dataclasses.asdict(config.mesh), devices=devices)
    step = abstract_step.build(config, mesh, lengths)
    steps = {registry.name_of(registry.METHODS, config.method): figures(step, tpu)}
    if compare:
        steps[BASELINE] = baseline(config, mesh, lengths, tpu)
    pair = tuple(steps.values())
    return {
        "model": config.model.path or config.model.base,
        "topology": topology,
        "chips": mesh.size,
        "mesh": dict(mesh.shape),
        "dtype": config.model.dtype,
        "quantize": config.model.quantize,
        "remat": config.model.remat,
        "train": step.method.train,
        "rows": {name: batch.tokens.shape[0] for name, batch in step.batches.items()},
        "tokens": next(iter(step.batches.values())).tokens.shape[1],
        "answer_tokens": lengths.answer,
        "hbm_gib": tpu.hbm,
        "usable_gib": tpu.usable,
        "steps": steps,
        "ratios": ratios(*pair) if compare else None,
    }


def baseline(config: RunConfig, mesh: jax.sharding.Mesh, lengths: Lengths, tpu: Tpu) -> dict[str, Any]:
    """Plans GradDiff on all weights, with full rematerialization if it does not fit with the config's own."""
    method = methods.create("grad_diff", {"train": "all"})
    for remat in dict.fromkeys((config.model.remat, "full")):
        changed = dataclasses.replace(config, model=dataclasses.replace(config.model, remat=remat))
        results = figures(abstract_step.build(changed, mesh, lengths, method, quantized=False), tpu)
        if results["fits"]:
            break
    return results


def figures(step: AbstractStep, tpu: Tpu) -> dict[str, Any]:
    """Memory, FLOPs and times of one step; bytes and seconds are of each chip.

    `seconds` are the least times that the published figures of the chip allow, and `seconds_by_cycles` is the
    compiler's own estimate. A step that the compiler refuses has no program: its compute time is known, and the rest is
    None.
    """
    kinds = memory.bytes_by_kind(step)
    compiled = compile_step(step)
    work = flops.count(step.traced.jaxpr, step.from_batch)
    total_flops = sum(part.total for part in work.values())
    integers = sum(part.integers for part in work.values())
    total = memory.total_bytes(step, compiled["total"], kinds)
    refused = compiled["refused"] is not None
    sent = sum(collective["bytes"] for collective in compiled["collectives"].values())
    seconds = {
        "compute": ((total_flops - integers) / tpu.flops + integers / tpu.integers) / step.mesh.size,
        "interconnect": None if refused else sent / tpu.interconnect,
    }
    bound = max(seconds, key=lambda name: seconds[name] or 0.0)
    return {
        "remat": step.model_config.remat,
        "bytes": kinds,
        "quantized_saving": memory.quantized_saving(step),
        "flops": {name: dataclasses.asdict(part) for name, part in work.items()},
        "flops_total": total_flops,
        "compiler": compiled,
        "total": total,
        "fits": not refused and total <= tpu.usable * GIB,
        "seconds": seconds,
        "bound": bound,
        "seconds_at_least": seconds[bound],
        "seconds_by_cycles": None if refused else compiled["cycles"] / tpu.clock,
    }


def ratios(step: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Ratios of two steps' least times, FLOPs and memory, and the contributions to the difference.

    Contributions are shares of the other step's total, negative where something is saved, and add up to the ratio minus
    one. A ratio is None where the compiler gave no number.
    """

    def contributions(amounts: Callable[[Mapping[str, Any]], Mapping[str, float]], total: float) -> dict[str, float]:
        first, second = amounts(step), amounts(other)
        return {name: (first[name] - second[name]) / total for name in first}

    cycles = step["seconds_by_cycles"], other["seconds_by_cycles"]
    by_time = {
        "seconds": step["seconds_at_least"] / other["seconds_at_least"],
        "seconds_by_cycles": None if None in cycles else cycles[0] / cycles[1],
        "flops": step["flops_total"] / other["flops_total"],
        "flops_by": contributions(_flops_by_pass, other["flops_total"]),
    }
    if None in (step["total"], other["total"]):
        return by_time | {"bytes": None, "bytes_by": None}
    by_memory = contributions(_bytes_by_cause, other["total"])
    return by_time | {"bytes": step["total"] / other["total"], "bytes_by": by_memory}


def _flops_by_pass(step: Mapping[str, Any]) -> dict[str, float]:
    sums = {name: sum(work[name] for work in step["flops"].values()) for name in flops.PASSES}
    return {name.replace("_", " "): value for name, value in sums.items()}


def _bytes_by_cause(step: Mapping[str, Any]) -> dict[str, float]:
    kinds, saved = step["bytes"], step["quantized_saving"]
    causes = {
        "quantized weights": -saved,
        "weights not in float32": kinds["frozen"] + kinds["trainable"] + saved,
        "weights as loaded": kinds["original"],
        "optimizer": kinds["optimizer"],
        "mask": kinds["mask"],
        "batches and caches": kinds["batch"] + kinds["cached"],
    }
    return causes | {"gradients and activations": step["total"] - sum(causes.values())}


def why_not(step: Mapping[str, Any], usable: float) -> str:
    """One line that says by how much a step that does not fit is too large."""
    if step["compiler"]["refused"]:
        return step["compiler"]["refused"]
    total = step["total"] / GIB
    return f"the run requires {total:.2f} GiB of {usable:.2f} GiB, {total - usable:.2f} GiB too much"
