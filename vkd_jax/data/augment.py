"""Augmented copies of images, so that the person is forgotten and not one photograph."""

import dataclasses

import numpy as np
from scipy import ndimage

from vkd_jax.data.encoding import EncodedSet
from vkd_jax.data.images import PackedImages, TiledImage
from vkd_jax.runtime import memory

SHIFT = 0.08  # largest shift, as a fraction of the side
ZOOM = 0.12  # largest change of scale
ROTATION = 0.12  # largest rotation, in radians
BRIGHTNESS = 0.15  # largest change of brightness
REPEATED_FIELDS = (
    "tokens",
    "mask",
    "target_positions",
    "targets",
    "target_mask",
    "prompt_length",
    "bucket_shapes",
)


def augment_set(encoded: EncodedSet, copies: int, rng: np.random.Generator) -> EncodedSet:
    """Appends `copies` copies of a set whose images are randomly rotated, shifted, zoomed, mirrored and relit.

    Questions and answers stay the same, and each copy of a question has its own copy of the image.

    Args:
        encoded: a set without cached arrays, which would belong to the original images.
        copies: the number of copies.
        rng: the source of randomness.

    Returns:
        A set of (copies + 1) * n examples, the originals first.

    Raises:
        UserError: the copies do not fit in memory.
    """
    if encoded.per_image or encoded.per_example:
        raise ValueError("augment a set before caching: cached arrays belong to the original images")
    times, images = copies + 1, encoded.images
    arrays = [x for name in REPEATED_FIELDS if (x := getattr(encoded, name)) is not None]
    memory.check(
        times * sum(x.nbytes for x in arrays),
        memory.host_bytes(),
        f"{copies:,} augmented copies of {len(encoded):,} examples",
        "decrease the number of copies",
    )
    seed = rng.integers(2**32)

    def make(row: int) -> np.ndarray | TiledImage:
        copy, original = divmod(row, len(images))
        image = images.make(original)
        if not copy:
            return image

        def augment(view: np.ndarray) -> np.ndarray:
            # Seeded by the row: a copy that is not cached is the same each time it is made, and all its views agree.
            return _augment_image(view, np.random.default_rng([seed, row]))

        return image.map(augment) if isinstance(image, TiledImage) else augment(image)

    def repeat(x: np.ndarray | None) -> np.ndarray | None:
        return None if x is None else np.concatenate([x] * times)

    offsets = np.repeat(np.arange(times) * len(images), len(encoded)).astype(np.int32)
    return dataclasses.replace(
        encoded,
        examples=tuple(encoded.examples) * times,
        image_rows=repeat(encoded.image_rows) + offsets,
        images=PackedImages(make, list(images.shapes) * times, images.config),
        **{name: repeat(getattr(encoded, name)) for name in REPEATED_FIELDS},
    )


def _augment_image(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Randomly transforms normalized pixels [height, width, 3]; the border is repeated outside of the image."""
    angle, zoom = rng.uniform(-ROTATION, ROTATION), 1 + rng.uniform(-ZOOM, ZOOM)
    matrix = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) / zoom
    size = np.array(image.shape[:2])
    center = (size - 1) / 2
    offset = center - matrix @ center + rng.uniform(-SHIFT, SHIFT, 2) * size
    channels = [
        ndimage.affine_transform(image[..., channel], matrix, offset, order=1, mode="nearest") for channel in range(3)
    ]
    copy = np.stack(channels, axis=-1) * (1 + rng.uniform(-BRIGHTNESS, BRIGHTNESS))
    return (copy[:, ::-1] if rng.random() < 0.5 else copy).astype(np.float32)
