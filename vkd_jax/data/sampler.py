"""The rows of each step: shuffled, endless, and a function of (seed, name, step), so that resuming needs no state.

A cycle is `batch_size` epochs: then a bucket of n rows fills exactly n batches, and no batch is short. An epoch is
every row once, in a new random order. A batch has rows of one bucket, so of one shape; buckets alternate in proportion
to their rows.
"""

import functools
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import grain
import jax
import numpy as np

from vkd_jax.data.encoding import Batch, EncodedSet
from vkd_jax.data.images import THREADS
from vkd_jax.runtime import memory

PREFETCHED = 4  # batches that are ready before the device needs them


class Sampler:
    """The batches of one encoded set.

    Args:
        encoded: the set.
        batch_size: rows per batch, over all processes.
        seed: the seed of the run.
        name: separates the random draws of several sets that share a seed.

    Example:
        >>> sampler = Sampler(encoded, 8, seed=0, name="forget")
        >>> batch = sampler[100]  # the batch of step 100
    """

    def __init__(self, encoded: EncodedSet, batch_size: int, *, seed: int, name: str):
        self._encoded, self.batch_size, self._name = encoded, batch_size, name
        self._seed = [seed, zlib.crc32(name.encode())]
        if encoded.bucket_shapes is None:
            self._buckets = [np.arange(len(encoded))]
        else:
            _, bucket = np.unique(encoded.bucket_shapes, axis=0, return_inverse=True)
            self._buckets = [np.flatnonzero(bucket.ravel() == i) for i in range(bucket.max() + 1)]
        self._cycle = functools.lru_cache(maxsize=2)(self._draw_cycle)

    def check_memory(self, mesh: jax.sharding.Mesh) -> None:
        """Checks that one batch, and the order of the rows of a cycle, fit in memory; nothing is allocated.

        Args:
            mesh: the devices that a batch is sharded over.

        Raises:
            UserError: they do not fit.
        """
        row_bytes = sum(x.nbytes for x in jax.tree.leaves(self._encoded.batch(np.arange(1))))
        order_bytes = 2 * len(self._encoded) * np.dtype(np.int64).itemsize  # by bucket, and sorted
        subject = f"batches of {self.batch_size:,} examples of the stream {self._name!r}"
        remedy = "decrease the batch size"
        memory.check(self.batch_size * (row_bytes + order_bytes), memory.host_bytes(), subject, remedy)
        rows = -(-self.batch_size // jax.process_count())
        memory.check(rows * row_bytes, memory.device_bytes(mesh.devices.flat), subject, remedy)

    def rows(self, step: int) -> np.ndarray:
        """The rows of the batch of `step`: int [batch_size]."""
        cycle, index = divmod(step, len(self._encoded))
        return self._cycle(cycle)[index]

    def __getitem__(self, step: int) -> Batch:
        """The whole batch of `step`; the mesh determines which of its rows a process needs."""
        return self._encoded.batch(self.rows(step))

    def batches(self, start: int, stop: int, put: Callable[[Batch], Any]) -> Iterator[Any]:
        """Yields `put(batch)` for the steps start to stop - 1, prefetched by background threads."""
        steps = grain.MapDataset.range(start, stop).map(lambda step: put(self[int(step)]))
        return iter(
            steps.to_iter_dataset(
                grain.ReadOptions(num_threads=min(THREADS, PREFETCHED), prefetch_buffer_size=PREFETCHED)
            )
        )

    def _draw_cycle(self, cycle: int) -> np.ndarray:
        """The rows of every batch of a cycle: int [n, batch_size]."""
        rng = np.random.default_rng([*self._seed, cycle])
        batches, times = [], []
        for rows in self._buckets:
            epochs = [rng.permutation(rows) for _ in range(self.batch_size)]
            batches.append(np.concatenate(epochs).reshape(len(rows), self.batch_size))
            # The j-th of a bucket's n batches falls at a random time within the j-th of n equal spans of the cycle.
            times.append((np.arange(len(rows)) + rng.random(len(rows))) / len(rows))
        return np.concatenate(batches)[np.argsort(np.concatenate(times))]
