"""Benchmarks, one file each. A new one is a new file and a line here."""

import importlib
import types

from vkd_jax.types import UserError

BENCHMARKS = {
    "mllmu": "vkd_jax.data.mllmu",
}


def benchmark(name: str) -> types.ModuleType:
    """The module that reads a benchmark: read(folder, forget) and read_finetune(folder, without_forget).

    Raises:
        UserError: there is no such benchmark.
    """
    if name not in BENCHMARKS:
        raise UserError(f"there is no benchmark {name!r}; the benchmarks are {', '.join(sorted(BENCHMARKS))}.")
    return importlib.import_module(BENCHMARKS[name])
