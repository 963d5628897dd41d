"""Benchmarks: data sets of people to forget and to retain, one file each.

    mllmu, clear   published benchmarks, or the synthetic people in their layouts
    folder         your own folders of images and questions
    parquet        snapshots of parquet files and their checks
    cache          benchmarks as tensorflow-datasets, and the contract of a benchmark
    synthetic/     the synthetic people and the writers of their snapshots

To add a benchmark, write a frozen dataclass with the attributes and methods of `cache.Benchmark` in a new file, and add
one line to vkd_jax/registry.py.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vkd_jax import registry
from vkd_jax.types import Example

STRANGERS = 1000  # added to the seed of synthetic people for people that no model was trained on


def create(name: str, fields: Mapping[str, Any]) -> Any:
    """Creates the benchmark `name` with these hyperparameters; see `registry.create`.

    Example:
        >>> benchmark = create("mllmu", {"forget": 5})
    """
    return registry.create("benchmark", registry.BENCHMARKS, name, fields)


def read(benchmark: Any, folder: str | Path, finetune: bool = False) -> dict[str, list[Example]]:
    """Reads the sets of a benchmark, by name; see `vkd_jax.benchmarks.cache.read`."""
    from vkd_jax.benchmarks import cache  # tensorflow-datasets takes a while to import

    return cache.read(benchmark, folder, finetune)


def held_out(benchmark: Any, folder: str | Path, own: str = "") -> list[Example]:
    """Questions like those of the forget set, each with an image, about people that no model was trained on.

    For the synthetic people, other synthetic people are generated with the same questions; real people need a folder.

    Args:
        benchmark: the benchmark whose forget set they are compared with.
        folder: the folder of cached data sets, see `cache.read`.
        own: a folder of images and questions as described in `vkd_jax.benchmarks.folder`, used instead.

    Returns:
        Each pair of image and question once; [] for a benchmark of real people without a folder.

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
