"""Features of a frozen model as distillation targets: recorded once, and resampled from one image to another."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import spatial

from vkd_jax.data.batching import in_batches
from vkd_jax.data.images import PackedImages
from vkd_jax.methods.base import Context
from vkd_jax.models.base import VisualTokens, bind
from vkd_jax.runtime import memory
from vkd_jax.types import Example, Params

SQUARES = 2**27  # values that are squared at once: 0.5 GiB in float32


def record_taps(
    graphdef: Any,
    params: Params,
    images: PackedImages,
    names: Iterable[str],
    batch_size: int = 32,
    allocate: memory.Allocate = np.empty,
) -> dict[str, VisualTokens]:
    """Computes the taps of all m images under a frozen model.

    Args:
        graphdef: the structure of the model.
        params: its weights.
        images: the m images.
        names: the taps to record.
        batch_size: the number of images per batch.
        allocate: allocates the arrays; see `base.cache_allocator`.

    Returns:
        {tap: tokens [m, p, c]}, in NumPy.
    """
    names = tuple(names)

    @jax.jit
    def encode(params, images):
        _, taps = bind(graphdef, params).encode(images)
        return {name: taps[name] for name in names}

    return in_batches(lambda batch: encode(params, batch), images, batch_size, allocate)


def tap_coords(
    context: Context, images: PackedImages, names: Iterable[str], batch_size: int = 32
) -> dict[str, np.ndarray]:
    """Returns the coordinates of each tap's tokens for all m images: {tap: int32 [m, p, 3]}.

    XLA removes the computation of the activations, which the result does not depend on.
    """

    @jax.jit
    def coords(params, images):
        _, taps = bind(context.graphdef, params).encode(images)
        return {name: taps[name].coords for name in names}

    return in_batches(lambda batch: coords(context.params, batch), images, batch_size)


def look_alikes(context: Context, tap: str = "features") -> dict[str, str]:
    """Finds, for each person of the forget set, the most similar person of the retain set.

    Similarity is that of the vanilla model's features. An image is the mean of its tokens at `tap`, a person the mean
    of their images, from which the mean of all people of the retain set is subtracted. The look-alike has the largest
    cosine similarity. An image of no named person counts as a person.

    Returns:
        {person of the forget set: person of the retain set}
    """
    people, means = {}, {}
    for name in ("forget", "retain"):
        encoded = context.sets[name]
        values = _mean_tokens(context, encoded.images, tap)
        rows: dict[str, set[int]] = {}
        for example, row in zip(encoded.examples, encoded.image_rows, strict=True):
            rows.setdefault(person_of(example), set()).add(row)
        people[name] = list(rows)
        means[name] = np.stack([values[sorted(images)].mean(0) for images in rows.values()])
    center = means["retain"].mean(0)
    similarity = 1 - spatial.distance.cdist(means["forget"] - center, means["retain"] - center, "cosine")
    return {person: people["retain"][i] for person, i in zip(people["forget"], similarity.argmax(1), strict=True)}


def _mean_tokens(context: Context, images: PackedImages, tap: str, batch_size: int = 32) -> np.ndarray:
    """Averages the real tokens of a tap over each of m images, under the vanilla model: float32 [m, c]."""

    @jax.jit
    def mean(params, images):
        tokens = bind(context.graphdef, params).encode(images)[1][tap]
        return jnp.mean(tokens.values, axis=1, where=tokens.valid[..., None], dtype=jnp.float32)

    return in_batches(lambda batch: mean(context.params, batch), images, batch_size)


def person_of(example: Example) -> str:
    """The person of a question or, without one, its image."""
    return example.person or example.image_id


def mean_squares(taps: Mapping[str, VisualTokens]) -> dict[str, np.ndarray]:
    """Computes the mean square of each tap over all real tokens and channels: {tap: float32 scalar}."""
    return {tap: _mean_square(tokens) for tap, tokens in taps.items()}


def _mean_square(tokens: VisualTokens, chunk: int = 512) -> np.ndarray:
    """Computes the mean square over all real tokens, `chunk` images or `SQUARES` values at a time.

    Squares are temporary copies.
    """
    chunk = min(chunk, max(SQUARES // max(tokens.values[0].size, 1), 1))
    means, counts = [], []
    for begin in range(0, len(tokens.values), chunk):
        values, valid = tokens.values[begin : begin + chunk], tokens.valid[begin : begin + chunk]
        squares = np.square(values, dtype=np.float32)
        means.append(np.mean(squares, where=valid[..., None], dtype=np.float32))
        counts.append(np.sum(valid))
    return np.average(np.array(means, np.float64), weights=counts).astype(np.float32)


def resample_features(
    tokens: VisualTokens, rows: np.ndarray, coords: np.ndarray, allocate: memory.Allocate = np.empty
) -> np.ndarray:
    """Resamples the features of some images at the token coordinates of others, which may have other shapes.

    Each coordinate takes the nearest feature, in coordinates relative to the size of the image. Between images of one
    shape the features stay as they are.

    Args:
        tokens: the features of n images, in NumPy.
        rows: int [m], the source image of each result.
        coords: int [m, q, 3], the coordinates to resample at.
        allocate: allocates the result.

    Returns:
        [m, q, c].
    """
    nearest: dict[tuple[bytes, bytes], np.ndarray] = {}  # images have few shapes
    values = allocate((*coords.shape[:2], tokens.values.shape[2]), tokens.values.dtype)
    for number, (row, target) in enumerate(zip(rows, coords, strict=True)):
        source = tokens.coords[row]
        key = source.tobytes(), target.tobytes()
        if key not in nearest:
            nearest[key] = _nearest_tokens(source, target)
        values[number] = tokens.values[row][nearest[key]]
    return values


def mean_features(tokens: VisualTokens, coords: np.ndarray, allocate: memory.Allocate = np.empty) -> np.ndarray:
    """Averages the features of all n images, resampled at the token coordinates of others; see `resample_features`.

    Args:
        tokens: the features of n images, in NumPy.
        coords: int [m, q, 3], the coordinates to resample at.
        allocate: allocates the result.

    Returns:
        float32 [m, q, c].
    """
    shapes, shape_index = np.unique(coords, axis=0, return_inverse=True)
    values = allocate((*coords.shape[:2], tokens.values.shape[2]), np.float32)
    for number, shape in enumerate(shapes):
        total = np.zeros(values.shape[1:], np.float32)
        for row in range(len(tokens.coords)):  # one after another: all images need not fit in memory
            total += resample_features(tokens, np.array([row]), shape[None])[0]
        values[shape_index.ravel() == number] = total / np.float32(len(tokens.coords))
    return values


def _nearest_tokens(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Returns the index into `source` [p, 3] of the coordinate nearest to each one of `target` [q, 3]: int [q]."""
    real = np.flatnonzero(source[:, 0] >= 0)
    last = source[real, 0].max()  # images beyond the source's last one are matched with it
    return real[spatial.cKDTree(_relative_coords(source[real], last)).query(_relative_coords(target, last))[1]]


def _relative_coords(coords: np.ndarray, last: int) -> np.ndarray:
    """Divides coordinates by the height and width of their image, and sets images 10 apart."""
    relative = coords[:, 1:] + 0.5
    for image in np.unique(coords[:, 0]):
        rows = coords[:, 0] == image
        relative[rows] /= np.maximum(coords[rows, 1:].max(0) + 1, 1)
    return np.column_stack([10.0 * np.clip(coords[:, 0], 0, last), relative])
