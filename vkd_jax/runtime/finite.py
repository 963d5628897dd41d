"""The check for NaN and infinity, of everything that an answer or a figure depends on.

A model of NaN writes nothing and chooses the first option, which looks like forgetting. Weights are therefore checked
when they are read (`is_finite` of each piece, while it is in the processor's cache), the state of training before it
is saved (`nonfinite_paths`), weights before they are exported, and scores when they arrive at the host.
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


def is_finite(values: np.ndarray) -> bool:
    """Whether no value is NaN or infinite; integers are always finite.

    Example:
        >>> is_finite(np.array([1.0, np.nan])), is_finite(np.array([1, 2]))
        (False, True)
    """
    if values.dtype not in _BITS:
        return not jnp.issubdtype(values.dtype, jnp.inexact) or bool(np.isfinite(values).all())
    signed, infinity, unsigned, minus_infinity = _BITS[values.dtype]
    largest = functools.partial(np.maximum.reduce, axis=None, initial=0)
    return bool(largest(values.view(signed)) < infinity and largest(values.view(unsigned)) < minus_infinity)


def check(values: Any, what: str) -> None:
    """Checks arrays at the host that were computed by a model, or scores that depend on them.

    Args:
        values: a tree of NumPy arrays.
        what: the values in words, as the subject of a sentence.

    Raises:
        NotFinite: a value is NaN or infinite.
    """
    if not all(is_finite(np.asarray(x)) for x in jax.tree.leaves(values)):
        raise error(what)


def error(what: str) -> NotFinite:
    """The error of `check`, to be raised."""
    return NotFinite(
        f"{what} are NaN or infinite, although the weights are finite: they are too large for the computation. Use "
        "a model whose training did not diverge, or a larger dtype."
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
