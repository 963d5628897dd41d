"""Features of a frozen model as targets: recorded once, and resampled from one image to another."""

from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from scipy import spatial

from vkd_jax.data.batching import in_batches
from vkd_jax.data.images import PackedImages
from vkd_jax.methods.base import Context
from vkd_jax.models.base import VisualTokens, bind
from vkd_jax.types import Params


def record_taps(
    graphdef: Any, params: Params, pictures: PackedImages, names: Iterable[str], batch_size: int = 32
) -> dict[str, VisualTokens]:
    """{tap: tokens [m, p, c]} of every row of pictures, computed once by a frozen model."""
    names = tuple(names)

    @jax.jit
    def encode(params, pictures):
        _, taps = bind(graphdef, params).encode(pictures)
        return {name: taps[name] for name in names}

    return in_batches(lambda part: encode(params, part), pictures, batch_size)


def tap_coords(
    context: Context, pictures: PackedImages, names: Iterable[str], batch_size: int = 32
) -> dict[str, np.ndarray]:
    """{tap: `where` [m, p, 3]} of every row of pictures; the activations themselves are never computed."""

    @jax.jit
    def places(params, pictures):
        _, taps = bind(context.graphdef, params).encode(pictures)
        return {name: taps[name].coords for name in names}

    return in_batches(lambda part: places(context.params, part), pictures, batch_size)


def resample_features(tokens: VisualTokens, rows: np.ndarray, where: np.ndarray) -> np.ndarray:
    """The features of pictures `rows` at the places of other pictures, which may have other shapes.

    Each place takes the feature at the nearest relative place; between pictures of one shape nothing changes.

    Args:
        tokens: features of n rows of pictures, in NumPy.
        rows: int [m], which of them.
        where: int [m, q, 3], where each feature is to stand.

    Returns:
        [m, q, c].
    """
    nearest: dict[tuple[bytes, bytes], np.ndarray] = {}  # pictures have few shapes
    values = []
    for row, target in zip(rows, where, strict=True):
        source = tokens.coords[row]
        key = source.tobytes(), target.tobytes()
        if key not in nearest:
            nearest[key] = _nearest_tokens(source, target)
        values.append(tokens.values[row][nearest[key]])
    return np.stack(values)


def mean_features(tokens: VisualTokens, where: np.ndarray) -> np.ndarray:
    """The mean of all rows of features at the places of other pictures: [m, q, c]; see `resample_features`."""
    shapes, which = np.unique(where, axis=0, return_inverse=True)
    everyone = np.arange(len(tokens.coords))
    means = [
        resample_features(tokens, everyone, np.broadcast_to(shape, (len(everyone), *shape.shape))).mean(
            0, dtype=np.float32
        )
        for shape in shapes
    ]
    return np.stack(means)[which.ravel()]


def _nearest_tokens(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """For each place of `target` [q, 3], the index of the place of `source` [p, 3] that is nearest to it."""
    real = np.flatnonzero(source[:, 0] >= 0)
    last = source[real, 0].max()  # pictures beyond the source's last are compared with that one
    return real[spatial.cKDTree(_relative_coords(source[real], last)).query(_relative_coords(target, last))[1]]


def _relative_coords(where: np.ndarray, last: int) -> np.ndarray:
    """Places as shares of their picture's height and width; pictures stand far apart."""
    place = where[:, 1:] + 0.5
    for picture in np.unique(where[:, 0]):
        mine = where[:, 0] == picture
        place[mine] /= np.maximum(where[mine, 1:].max(0) + 1, 1)
    return np.column_stack([10.0 * np.clip(where[:, 0], 0, last), place])
