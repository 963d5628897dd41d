"""Benchmarks, one file each.

To add one, write its file and a line in vkd_jax/registry.py.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vkd_jax import registry
from vkd_jax.types import Example

STRANGERS = 1000  # between the seed of made-up people and that of those whom no model ever met


def create(name: str, fields: Mapping[str, Any]) -> Any:
    """The benchmark called `name` with these hyperparameters; see `registry.create`."""
    return registry.create("benchmark", registry.BENCHMARKS, name, fields)


def read(benchmark: Any, folder: str | Path, finetune: bool = False) -> dict[str, list[Example]]:
    """The sets of a benchmark, by name; see `vkd_jax.benchmarks.store.read`."""
    from vkd_jax.benchmarks import store  # tensorflow-datasets takes a while to import

    return store.read(benchmark, folder, finetune)


def held_out(benchmark: Any, folder: str | Path, own: str = "") -> list[Example]:
    """Questions like those that unlearning is to forget, each with a picture, about people whom no model ever met.

    Made-up people have strangers drawn by the same hand, in as many questions of the same words; others need a folder.

    Args:
        benchmark: whose forgotten people they are held against.
        folder: where data sets are kept, see `store.read`.
        own: a folder of pictures and questions as `vkd_jax.benchmarks.folder` describes it, which takes their place.

    Returns:
        Each pair of picture and question once; [] for a benchmark of real people without a folder.

    Raises:
        UserError: the folder cannot be read.
    """
    from vkd_jax.benchmarks.folder import Folder

    if own:
        examples = [example for row in Folder(test=own).questions("test") for example in row]
    elif getattr(benchmark, "source", None) == "":
        strangers = dataclasses.replace(benchmark, people=benchmark.people + STRANGERS)
        name = benchmark.UNLEARN["forget"]
        examples = read(strangers, folder, finetune=name.startswith("finetune_"))[name]
    else:
        examples = []
    return list({(e.image_id, e.question): e for e in examples if e.image is not None}.values())
