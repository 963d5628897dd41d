"""Which rows a step sees: shuffled, endless, and a function of (seed, name, step), so that resuming needs no state."""

import zlib

import grain
import jax
import numpy as np

from vkd_jax.data.processing import Batch, EncodedSet


class Stream:
    """Batches of one set: every row once per epoch, in an order drawn anew for each epoch."""

    def __init__(self, encoded: EncodedSet, batch_size: int, *, seed: int, name: str):
        self._encoded = encoded
        self._rows = (
            grain.MapDataset.range(len(encoded))
            .seed(zlib.crc32(f"{seed}/{name}".encode()))
            .shuffle()
            .repeat()
            .batch(batch_size)
        )
        share = batch_size // jax.process_count()
        self._mine = slice(jax.process_index() * share, (jax.process_index() + 1) * share)

    def __getitem__(self, step: int) -> Batch:
        """This process's share of the batch of `step`."""
        return self._encoded.batch(np.asarray(self._rows[step])[self._mine])
