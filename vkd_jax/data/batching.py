"""Rows in batches of one size, and named random generators."""

import zlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from vkd_jax.runtime import multihost


def in_batches(function: Callable[[Any], Any], tree: Any, batch_size: int) -> Any:
    """`function` of a tree with a row each (arrays, `Pictures`), `batch_size` rows at a time; results in NumPy."""
    count = len(jax.tree.leaves(tree)[0])
    parts = [
        jax.tree.map(multihost.gather, function(jax.tree.map(lambda x, rows=rows: x[rows], tree)))
        for rows in padded_rows(count, batch_size)
    ]
    return jax.tree.map(lambda *arrays: np.concatenate(arrays)[:count], *parts)


def padded_rows(count: int, batch_size: int) -> list[np.ndarray]:
    """Row numbers 0..count-1 in batches of one size; the last one repeats its last row."""
    return [np.arange(begin, begin + batch_size).clip(max=count - 1) for begin in range(0, count, batch_size)]


def rng(seed: int, name: str) -> np.random.Generator:
    """A generator of its own for every named use of the one seed."""
    return np.random.default_rng([seed, zlib.crc32(name.encode())])
