"""Changed copies of pictures, so that what is forgotten is the person and not one photograph."""

import dataclasses

import numpy as np
from scipy import ndimage

from vkd_jax.data.pictures import Pictures
from vkd_jax.data.processing import EncodedSet

SHIFT = 0.08  # of the side, either way
ZOOM = 0.12  # nearer or farther
TURN = 0.12  # radians, either way
LIGHT = 0.15  # brighter or darker
REPEATED = ("tokens", "mask", "at", "targets", "target_mask", "prompt_length", "cut")


def augmented(encoded: EncodedSet, copies: int, rng: np.random.Generator) -> EncodedSet:
    """The set, followed by `copies` of it whose pictures are turned, shifted, zoomed, mirrored and relit at random.

    Questions and answers stay, each asked of its own copy of the picture. Only for sets without cached arrays, whose
    values belong to the pictures as they were.
    """
    if encoded.per_image or encoded.per_example:
        raise ValueError("augment before caching: what is cached belongs to the pictures as they were")
    times, pictures = copies + 1, encoded.pictures
    root = rng.integers(2**32)

    def make(row: int) -> np.ndarray:
        copy, original = divmod(row, len(pictures))
        picture = pictures.make(original)
        # Seeded by its number: a copy that is not held comes out the same each time it is made.
        return _changed(picture, np.random.default_rng([root, row])) if copy else picture

    def repeat(x: np.ndarray | None) -> np.ndarray | None:
        return None if x is None else np.concatenate([x] * times)

    offsets = np.repeat(np.arange(times) * len(pictures), len(encoded)).astype(np.int32)
    return dataclasses.replace(
        encoded,
        examples=tuple(encoded.examples) * times,
        image=repeat(encoded.image) + offsets,
        pictures=Pictures(make, list(pictures.shapes) * times, pictures.config),
        **{name: repeat(getattr(encoded, name)) for name in REPEATED},
    )


def _changed(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One random copy of normalised pixels [height, width, 3]; what moves in from outside repeats the border."""
    angle, zoom = rng.uniform(-TURN, TURN), 1 + rng.uniform(-ZOOM, ZOOM)
    matrix = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) / zoom
    size = np.array(picture.shape[:2])
    centre = (size - 1) / 2
    offset = centre - matrix @ centre + rng.uniform(-SHIFT, SHIFT, 2) * size
    moved = [
        ndimage.affine_transform(picture[..., channel], matrix, offset, order=1, mode="nearest") for channel in range(3)
    ]
    copy = np.stack(moved, axis=-1) * (1 + rng.uniform(-LIGHT, LIGHT))
    return (copy[:, ::-1] if rng.random() < 0.5 else copy).astype(np.float32)
