"""Benchmarks, one file each. A new one is a new file and a line here."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vkd_jax import registry
from vkd_jax.types import Example

BENCHMARKS = {
    "clear": "vkd_jax.data.clear:Clear",
    "folder": "vkd_jax.data.folder:Folder",
    "mllmu": "vkd_jax.data.mllmu:Mllmu",
}


def create(name: str, fields: Mapping[str, Any]) -> Any:
    """The benchmark called `name` with these hyperparameters; see `registry.create`."""
    return registry.create("benchmark", BENCHMARKS, name, fields)


def read(benchmark: Any, folder: str | Path, finetune: bool = False) -> dict[str, list[Example]]:
    """The sets of a benchmark, by name; see `vkd_jax.data.store.read`."""
    from vkd_jax.data import store  # tensorflow-datasets takes a while to import

    return store.read(benchmark, folder, finetune)
