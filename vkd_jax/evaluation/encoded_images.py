"""Images after the vision tower and the projector, the prompts to which they belong, and checks of their values."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vkd_jax.data.images import PackedImages
from vkd_jax.models.base import VisualTokens
from vkd_jax.runtime import finite
from vkd_jax.types import Array

_FEATURES = "The model's features of images"


@dataclasses.dataclass(frozen=True)
class EncodedImages:
    """Images after the vision tower and the projector, and the images of each prompt. Each image is stored once."""

    shapes: Sequence[tuple[int, ...]]  # (height, width, 3) of each image after the model's processor
    features: VisualTokens  # NumPy arrays, one row per image
    rows: tuple[tuple[int, ...], ...]  # the images of each prompt, in order

    def select(self, rows: Sequence[int]) -> "EncodedImages":
        """Selects prompts by row, in this order; rows may repeat."""
        return dataclasses.replace(self, rows=tuple(self.rows[i] for i in rows))

    def for_prompts(self, rows: Sequence[Sequence[int]]) -> "EncodedImages":
        """Other prompts about the same images: the images of each prompt, by their rows in `features`."""
        return dataclasses.replace(self, rows=tuple(map(tuple, rows)))

    def blank_images(self, row: int) -> list[np.ndarray]:
        """Arrays of zeros with the shapes of a prompt's images, for code that reads only the shapes."""
        return [np.broadcast_to(np.float32(0), self.shapes[i]) for i in self.rows[row]]

    def tokens(self) -> VisualTokens:
        """The features of each prompt: those of its images in order, padding last.

        The images of a prompt do not attend to each other in the vision tower, so the result equals that of encoding
        them together.
        """
        count = max(map(len, self.rows))
        indices = np.array([[*row, *[-1] * (count - len(row))] for row in self.rows])
        if count == 1:
            return jax.tree.map(lambda x: x[indices[:, 0]], self.features)
        values, coords = (x[indices] for x in self.features)
        valid = (coords[..., 0] >= 0) & (indices >= 0)[..., None]
        coords[..., 0] = np.where(valid, np.arange(count)[:, None], -1)
        order = np.argsort(~valid.reshape(len(indices), -1), axis=1, kind="stable")[..., None]
        return VisualTokens(
            *(np.take_along_axis(x.reshape(len(x), -1, x.shape[-1]), order, axis=1) for x in (values, coords))
        )


def with_soft_tokens(features: VisualTokens, soft_tokens: Array) -> VisualTokens:
    """Puts embeddings before the features of each image, at the coordinates of its first feature.

    Args:
        features: of b images.
        soft_tokens: [k, width].
    """
    b, k = len(features.values), len(soft_tokens)
    values = jnp.broadcast_to(jnp.asarray(soft_tokens, features.values.dtype), (b, *soft_tokens.shape))
    coords = jnp.repeat(jnp.asarray(features.coords[:, :1]), k, axis=1)
    parts = (values, features.values), (coords, features.coords)
    return VisualTokens(*(jnp.concatenate(part, axis=1) for part in parts))


def check_features(images: PackedImages, features: np.ndarray) -> None:
    """Checks that features are not too large to be normalized, and that those of different images differ.

    Args:
        images: the images.
        features: their features, one row per image.

    Raises:
        NotFinite: the features are too large, or the same for all images, so that no answer depends on an image.
    """
    finite.check(features, _FEATURES, finite.LARGEST_FEATURE)
    if len(images) < 2 or any(not np.array_equal(row, features[0]) for row in features[1:]):
        return
    first = images[np.arange(1)]  # copies of one image have the same features
    others = (images[np.arange(i, i + 1)] for i in range(1, len(images)))
    if any(not np.array_equal(first[name], image[name]) for image in others for name in first):
        raise finite.error(_FEATURES)


def check_sight(images: PackedImages, values: np.ndarray, encode: Callable[[Mapping[str, np.ndarray]], Any]) -> None:
    """Checks the features of a single image: those of its negative differ, so that they depend on the image.

    Args:
        images: the image.
        values: its features.
        encode: returns the features of packed images.

    Raises:
        NotFinite: they are the same.
    """
    packed = {
        name: np.where(x == 0, np.ones_like(x), -x) if jnp.issubdtype(x.dtype, jnp.floating) else x
        for name, x in images[np.arange(1)].items()
    }
    if np.array_equal(np.asarray(encode(packed).values)[:1], values):
        raise finite.error(_FEATURES)
