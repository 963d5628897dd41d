"""Bytes of each chip that a training run holds while a step runs, by kind of array."""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from vkd_jax.models import quantize
from vkd_jax.planner.abstract_step import AbstractStep

GIB = 2**30
# `original`: the trainable weights as loaded; a run keeps them beside the copy that trains. `mask`: also the
# projections of updates into the null space.
KINDS = ("frozen", "trainable", "original", "optimizer", "mask", "batch", "cached")


def bytes_by_kind(step: AbstractStep) -> dict[str, int]:
    """Bytes of each chip that a run holds at each step, by KINDS, without the padding of layouts.

    The compiler drops what the step does not read: blocks that feed nothing, and the trainable weights as loaded.
    """
    cached = {name: batch.cached for name, batch in step.batches.items()}
    plain = {name: dataclasses.replace(batch, cached={}) for name, batch in step.batches.items()}
    state = step.state
    masks = step.mask, step.projections
    trees = (step.frozen, state.params, step.original, (state.opt_state, state.step), masks, plain, cached)
    return {kind: sum(map(nbytes, jax.tree.leaves(tree))) for kind, tree in zip(KINDS, trees, strict=True)}


def total_bytes(step: AbstractStep, compiled: int | None, kinds: Mapping[str, int]) -> int | None:
    """Bytes of each chip while a step runs: the compiler's total, and arrays of the run that the step does not read."""
    unread = 0 if step.start is not None else kinds["original"]
    return None if compiled is None else compiled + unread


def quantized_saving(step: AbstractStep) -> int:
    """Bytes of each chip that the quantized weights save compared with the dtype that the model computes in."""
    dtype, saved = jnp.dtype(step.model_config.compute_dtype), 0
    for x in step.frozen.values():
        if isinstance(x, quantize.QArray):
            value = x.qvalue
            plain = jax.ShapeDtypeStruct(value.shape, dtype, sharding=value.sharding)
            saved += nbytes(plain) - sum(map(nbytes, jax.tree.leaves(x)))
    return saved


def nbytes(x: jax.ShapeDtypeStruct) -> int:
    """Bytes of each chip's shard of an array; two values of four bits share a byte."""
    shape = x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)
    bits = {"int4": 4, "uint4": 4}.get(x.dtype.name, 8 * x.dtype.itemsize)
    return math.ceil(math.prod(shape) * bits / 8)
