"""Benchmarks, one file each. A new one is a new file and a line here."""

import dataclasses
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vkd_jax.types import Example, UserError

BENCHMARKS = {
    "clear": "vkd_jax.data.clear:Clear",
    "folder": "vkd_jax.data.folder:Folder",
    "mllmu": "vkd_jax.data.mllmu:Mllmu",
}


def create(name: str, fields: Mapping[str, Any]) -> Any:
    """The benchmark called `name` with these hyperparameters; its dataclass says which there are.

    Raises:
        UserError: there is no such benchmark, or it has no such hyperparameter.
    """
    if name not in BENCHMARKS:
        raise UserError(f"there is no benchmark {name!r}; the benchmarks are {', '.join(sorted(BENCHMARKS))}.")
    module, attribute = BENCHMARKS[name].split(":")
    benchmark = getattr(importlib.import_module(module), attribute)
    known = {field.name for field in dataclasses.fields(benchmark)}
    if unknown := sorted(set(fields) - known):
        raise UserError(
            f"benchmark {name} has no hyperparameter {', '.join(unknown)}; it has {', '.join(sorted(known))}."
        )
    return benchmark(**fields)


def read(benchmark: Any, folder: str | Path, finetune: bool = False) -> dict[str, list[Example]]:
    """The sets of a benchmark, by name; see `vkd_jax.data.store.read`."""
    from vkd_jax.data import store  # tensorflow-datasets takes a while to import

    return store.read(benchmark, folder, finetune)
