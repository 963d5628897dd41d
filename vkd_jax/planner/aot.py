"""The step compiled for chips that are not there, and what its program says.

A program takes the compiler minutes, so what it made is kept: `programs/` in the cache of this package, a file of the
compiled text for each step, chips and version of the compiler.
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
from vkd_jax.planner.blueprint import Blueprint
from vkd_jax.runtime import files, storage
from vkd_jax.training import loop
from vkd_jax.types import UserError


def compile_step(drawn: Blueprint) -> dict[str, Any]:
    """The compiler's figures; of a step that does not fit it says how much that would need.

    Raises:
        UserError: the compiler refuses the step, and not for want of memory.
    """
    lowered = drawn.traced.lower()
    where = repr((drawn.mesh.devices.flat[0].device_kind, drawn.mesh.devices.tolist(), versions()))
    program = hashlib.sha256((where + lowered.as_text()).encode()).hexdigest()[:16]
    file = storage.CACHE / "programs" / f"{program}.json.gz"
    if file.exists():
        made = json.loads(gzip.decompress(file.read_bytes()))
    else:
        made = _compile(lowered)
        file.parent.mkdir(parents=True, exist_ok=True)
        files.write_bytes(file, gzip.compress(json.dumps(made).encode()))
    found = {"program": program, "refused": None, "seconds": made["seconds"]}
    if "refusal" in made:
        refusal = hlo.Refusal.parse(made["refusal"])
        nothing = {"arguments": None, "temporaries": None, "collectives": {}, "traffic": None, "cycles": None}
        return found | nothing | {"total": refusal.needs, "refused": refusal.sentence}
    sums: dict[str, dict[str, float]] = {}
    for one in hlo.collectives(made["page"], drawn.mesh.size):
        kind = sums.setdefault(one.kind, {"bytes": 0.0, "times": 0})
        kind["bytes"] += one.sent
        kind["times"] += one.times
    figures = {name: made[name] for name in ("arguments", "temporaries", "total")}
    read = {"collectives": sums, "traffic": hlo.traffic(made["page"]), "cycles": hlo.cycles(made["page"])}
    return found | figures | read


def versions() -> dict[str, str]:
    """Of the compiler."""
    return {name: importlib.metadata.version(name) for name in ("jaxlib", "libtpu") if importlib.util.find_spec(name)}


def _compile(lowered: jax.stages.Lowered) -> dict[str, Any]:
    """The program's text and bytes, or the compiler's refusal for want of memory."""
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
        "total": loop.step_bytes(compiled),
        "seconds": time.perf_counter() - started,
    }


def _page(compiled: jax.stages.Compiled, folder: Path) -> str:
    """The compiled program's HLO; of one that jaxlib cannot read back as libtpu wrote it into the folder."""
    try:
        return compiled.as_text()
    except jax.errors.JaxRuntimeError:  # 0.10.2 of what 0.0.52 makes for v5p: an async-update with several operands
        (file,) = folder.glob("*.after_codegen.txt")
        return file.read_text()
