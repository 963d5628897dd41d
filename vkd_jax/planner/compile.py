"""Compiles a step for chips that need not exist, and reads the requirements of its program.

Compiling takes minutes, so programs are cached: `programs/` in the cache of this package has a file with the compiled
text for each step, topology and compiler version.
"""

import gzip
import hashlib
import importlib.metadata
import importlib.util
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import jax

from vkd_jax.planner import hlo
from vkd_jax.planner.abstract_step import AbstractStep
from vkd_jax.runtime import files, storage
from vkd_jax.runtime.memory import program_bytes
from vkd_jax.types import UserError


def compile_step(step: AbstractStep) -> dict[str, Any]:
    """Compiles a step, or reads it from the cache, and returns the compiler's figures.

    A step that does not fit has only `total`, what it would require, and `refused`, the reason.

    Raises:
        UserError: The compiler refuses the step for another reason than memory.
    """
    lowered = step.traced.lower()
    target = repr((step.mesh.devices.flat[0].device_kind, step.mesh.devices.tolist(), versions()))
    program = hashlib.sha256((target + lowered.as_text()).encode()).hexdigest()[:16]
    file = storage.CACHE / "programs" / f"{program}.json.gz"
    if file.exists():
        compiled = json.loads(gzip.decompress(file.read_bytes()))
    else:
        compiled = _compile(lowered)
        file.parent.mkdir(parents=True, exist_ok=True)
        files.write_bytes(file, gzip.compress(json.dumps(compiled).encode()))
    source = {"program": program, "seconds": compiled["seconds"]}
    if "refusal" in compiled:
        refusal = hlo.Refusal.parse(compiled["refusal"])
        unknown = {"arguments": None, "temporaries": None, "collectives": {}, "cycles": None}
        return source | unknown | {"total": refusal.required, "refused": refusal.sentence}
    sums: dict[str, dict[str, float]] = {}
    for collective in hlo.collectives(compiled["page"], step.mesh.size):
        kind = sums.setdefault(collective.kind, {"bytes": 0.0, "times": 0})
        kind["bytes"] += collective.sent
        kind["times"] += collective.times
    sizes = {name: compiled[name] for name in ("arguments", "temporaries", "total")}
    return source | {"refused": None} | sizes | {"collectives": sums, "cycles": hlo.cycles(compiled["page"])}


def versions() -> dict[str, str]:
    """The versions of the compiler's packages."""
    return {name: importlib.metadata.version(name) for name in ("jaxlib", "libtpu") if importlib.util.find_spec(name)}


def _compile(lowered: jax.stages.Lowered) -> dict[str, Any]:
    """Compiles, and returns the program's text and bytes, or the compiler's refusal for lack of memory."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        try:
            compiled = lowered.compile(compiler_options={"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                sentence = hlo.Refusal.parse(str(error)).sentence
                raise UserError(f"the TPU compiler refuses this step: {sentence}") from error
            return {"refusal": str(error), "seconds": time.perf_counter() - started}
        page = _page(compiled, Path(folder))
    memory = compiled.memory_analysis()
    return {
        "page": page,
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "total": program_bytes(compiled),
        "seconds": time.perf_counter() - started,
    }


def _page(compiled: jax.stages.Compiled, folder: Path) -> str:
    """The HLO text of a compiled program, from the compiler's dump if jaxlib cannot read the program back."""
    try:
        return compiled.as_text()
    except jax.errors.JaxRuntimeError:  # jaxlib 0.10.2, libtpu 0.0.52, v5p: an async-update with several operands
        (file,) = folder.glob("*.after_codegen.txt")
        return file.read_text()
