"""Which rows a step sees: shuffled, endless, and a function of (seed, name, step), so that resuming needs no state.

a cycle    = B epochs, B being the batch size: then each bucket of n rows fills exactly n batches, and none is short
an epoch   = every row once, in an order drawn anew
a batch    = rows of one bucket, so of one shape; buckets alternate as often as they have rows
"""

import functools
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import grain
import numpy as np

from vkd_jax.data.pictures import THREADS
from vkd_jax.data.processing import Batch, EncodedSet

AHEAD = 4  # batches that wait for the device


class Stream:
    """Batches of one set."""

    def __init__(self, encoded: EncodedSet, batch_size: int, *, seed: int, name: str):
        self._encoded, self._size = encoded, batch_size
        self._seed = [seed, zlib.crc32(name.encode())]
        if encoded.cut is None:
            self._buckets = [np.arange(len(encoded))]
        else:
            _, bucket = np.unique(encoded.cut, axis=0, return_inverse=True)
            self._buckets = [np.flatnonzero(bucket.ravel() == i) for i in range(bucket.max() + 1)]
        self._cycle = functools.lru_cache(maxsize=2)(self._draw)

    def rows(self, step: int) -> np.ndarray:
        """The rows of the batch of `step`: int [batch_size]."""
        cycle, place = divmod(step, len(self._encoded))
        return self._cycle(cycle)[place]

    def __getitem__(self, step: int) -> Batch:
        """The batch of `step`, whole: which of its rows a process needs is for the mesh to say."""
        return self._encoded.batch(self.rows(step))

    def batches(self, first: int, last: int, put: Callable[[Batch], Any]) -> Iterator[Any]:
        """`put` of the batches of steps first to last - 1, made ahead of time by threads of their own."""
        steps = grain.MapDataset.range(first, last).map(lambda step: put(self[int(step)]))
        return iter(
            steps.to_iter_dataset(grain.ReadOptions(num_threads=min(THREADS, AHEAD), prefetch_buffer_size=AHEAD))
        )

    def _draw(self, cycle: int) -> np.ndarray:
        """The rows of every batch of a cycle: [n, batch_size]."""
        rng = np.random.default_rng([*self._seed, cycle])
        batches, times = [], []
        for rows in self._buckets:
            epochs = [rng.permutation(rows) for _ in range(self._size)]
            batches.append(np.concatenate(epochs).reshape(len(rows), self._size))
            # The j-th batch of a bucket falls somewhere in the j-th part of the cycle.
            times.append((np.arange(len(rows)) + rng.random(len(rows))) / len(rows))
        return np.concatenate(batches)[np.argsort(np.concatenate(times))]
