"""Batches of equally many rows, and named random generators."""

import zlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from vkd_jax.runtime import memory, multihost


def in_batches(function: Callable[[Any], Any], tree: Any, batch_size: int, allocate: memory.Allocate = np.empty) -> Any:
    """Applies a function to `batch_size` rows at a time, and joins its results, each of which is copied once.

    Args:
        function: maps a tree of batches to a tree of arrays [batch_size, ...].
        tree: leaves with a first axis of n rows that can be indexed by int [batch_size]: arrays or `PackedImages`.
        batch_size: the number of rows per batch; the last batch is padded, and its padding removed from the results.
        allocate: allocates each array of the result; see `memory.allocator`.

    Returns:
        A tree of NumPy arrays [n, ...], the same in every process.

    Raises:
        UserError: a batch does not fit in memory.
    """
    count = len(jax.tree.leaves(tree)[0])
    one_row = jax.tree.leaves(jax.tree.map(lambda x: x[np.arange(1)], tree))
    check_rows(batch_size, sum(x.nbytes for x in one_row))
    joined = None
    for rows in padded_rows(count, batch_size):
        batch = jax.tree.map(multihost.gather, function(jax.tree.map(lambda x, rows=rows: x[rows], tree)))
        if joined is None:
            joined = jax.tree.map(lambda x: allocate((count, *x.shape[1:]), x.dtype), batch)
        first, last = rows[0], min(rows[0] + batch_size, count)
        for target, values in zip(jax.tree.leaves(joined), jax.tree.leaves(batch), strict=True):
            target[first:last] = values[: last - first]
    return joined


def check_rows(batch_size: int, row_bytes: int) -> None:
    """Checks, before a batch is made, that it fits in the memory of the host.

    Args:
        batch_size: the number of its rows.
        row_bytes: the size of a row.

    Raises:
        UserError: it does not fit.
    """
    row_bytes += np.dtype(np.int64).itemsize  # the number of the row
    memory.check(
        batch_size * row_bytes, memory.host_bytes(), f"batches of {batch_size:,} rows", "decrease the batch size"
    )


def padded_rows(count: int, batch_size: int) -> list[np.ndarray]:
    """Splits the row numbers 0 to count - 1 into batches of `batch_size`; the last batch repeats its last row.

    Example:
        >>> padded_rows(3, 2)
        [array([0, 1]), array([2, 2])]
    """
    return [np.arange(begin, begin + batch_size).clip(max=count - 1) for begin in range(0, count, batch_size)]


def rng(seed: int, name: str) -> np.random.Generator:
    """Creates the random generator of a named use of the seed; different names give independent draws."""
    return np.random.default_rng([seed, zlib.crc32(name.encode())])
