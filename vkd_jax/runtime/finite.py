"""The check for NaN and infinity, of everything that an answer or a figure depends on.

A model with NaN weights writes nothing and chooses the first option, which looks like forgetting. Weights are therefore
checked when they are read (`is_finite` of each piece, while it is in the processor's cache), the state of training
before it is saved (`nonfinite_paths`), weights before they are exported, and scores when they arrive at the host.
Errors about weights have their own texts; those of `error` are about values that are computed from finite weights.

Finite scores can also be useless: a norm turns activations whose squares overflow into zeros, and a head of zeros
turns them into equal scores. Features that are too large to be normalized (`LARGEST_FEATURE`), or the same for
different images, and scores that are the same for all tokens are therefore refused like NaN. Activations are added up
from block to block, so those that overflow anywhere in a decoder still do in its last norm, and all scores are equal.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from vkd_jax.types import NotFinite

# For each floating-point format, the signed and unsigned integers of its size, and the bits of +infinity and -infinity.
# The bits of NaN are larger ones of the same sign. Two maxima of integers take a tenth of the time of `np.isfinite` for
# bfloat16.
_BITS = {
    np.dtype(np.float64): (np.int64, 0x7FF0_0000_0000_0000, np.uint64, 0xFFF0_0000_0000_0000),
    np.dtype(np.float32): (np.int32, 0x7F80_0000, np.uint32, 0xFF80_0000),
    np.dtype(np.float16): (np.int16, 0x7C00, np.uint16, 0xFC00),
    np.dtype(ml_dtypes.bfloat16): (np.int16, 0x7F80, np.uint16, 0xFF80),
}


# A norm computes the mean of squares in float32, which overflows from 2^64 / sqrt(width) on; widths are below 2^16.
LARGEST_FEATURE = 2.0**56


def is_finite(values: np.ndarray, largest: float = np.inf) -> bool:
    """Whether no value is NaN or infinite, nor `largest` or larger in magnitude; integers are always finite.

    Example:
        >>> is_finite(np.array([1.0, np.nan])), is_finite(np.array([1, 2]))
        (False, True)
    """
    if values.dtype not in _BITS:
        return not jnp.issubdtype(values.dtype, jnp.inexact) or bool((abs(values) < largest).all())
    signed, infinity, unsigned, minus_infinity = _BITS[values.dtype]
    if largest < float(ml_dtypes.finfo(values.dtype).max):
        infinity, minus_infinity = (int(np.array(x, values.dtype).view(unsigned)) for x in (largest, -largest))
    maximum = functools.partial(np.maximum.reduce, axis=None, initial=0)
    return bool(maximum(values.view(signed)) < infinity and maximum(values.view(unsigned)) < minus_infinity)


def check(values: Any, what: str, largest: float = np.inf) -> None:
    """Checks arrays at the host that were computed by a model, or scores that depend on them.

    Args:
        values: a tree of NumPy arrays.
        what: the values in words, as the subject of a sentence.
        largest: the magnitude from which on values count as infinite.

    Raises:
        NotFinite: a value is NaN or infinite.
    """
    if not all(is_finite(np.asarray(x), largest) for x in jax.tree.leaves(values)):
        raise error(what)


def error(what: str) -> NotFinite:
    """The error of `check`, to be raised."""
    return NotFinite(
        f"{what} are NaN or infinite, or the same for every input, although the weights are finite: some of them are "
        "too large for the computation, or zero. Use a model whose training did not diverge, or a larger dtype."
    )


def nonfinite_paths(tree: Any) -> list[str]:
    """Returns the paths of the arrays in a tree that have a NaN or an infinity.

    Arrays stay on their devices and may be sharded over several processes, all of which must call this function.
    """
    # One array after another: on CPU devices, programs that wait for each other's reductions can block forever.
    return [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, x in jax.tree.leaves_with_path(tree)
        if jnp.issubdtype(x.dtype, jnp.inexact) and not bool(_all_finite(x))
    ]


@jax.jit
def _all_finite(x: jax.Array) -> jax.Array:
    return jnp.isfinite(x).all()
