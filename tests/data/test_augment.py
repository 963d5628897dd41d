"""Augmented copies: the image of each row, and copies that differ while questions stay the same."""

import dataclasses

import numpy as np
import pytest

from vkd_jax.data import augment, images
from vkd_jax.data.encoding import EncodedSet
from vkd_jax.data.images import PackedImages
from vkd_jax.types import Example


@pytest.fixture
def encoded(tiny_config):
    """Three questions about two images, a bright one and a dark one."""
    pixels = np.stack([np.full((12, 12, 3), 2.0), np.full((12, 12, 3), -1.0)]).astype(np.float32)
    pixels[:, 4:8, 2:5] = 0.5
    rows = np.arange(3, dtype=np.int32)[:, None]
    return EncodedSet(
        examples=[Example(str(i), "1", b"", "p", f"q{i}", "a") for i in range(3)],
        tokens=rows,
        mask=rows >= 0,
        target_positions=rows,
        targets=rows,
        target_mask=rows >= 0,
        prompt_length=rows[:, 0],
        image_rows=np.array([0, 1, 0], np.int32),
        images=PackedImages.of(pixels, tiny_config),
    )


def test_every_copy_of_a_question_has_its_own_copy_of_the_image(encoded):
    out = augment.augment_set(encoded, 2, np.random.default_rng(0))
    pixels = out.images.cached["pixels"]
    assert len(out) == 9 and len(out.images) == 6
    np.testing.assert_array_equal(out.image_rows, [0, 1, 0, 2, 3, 2, 4, 5, 4])
    np.testing.assert_array_equal(out.tokens[:, 0], [0, 1, 2] * 3)
    np.testing.assert_array_equal(pixels[:2], encoded.images.cached["pixels"])  # the originals come first
    for copy in (2, 4):
        assert pixels[copy].mean() > 1 > 0 > pixels[copy + 1].mean()  # bright images stay bright, and dark ones dark
    assert not np.allclose(pixels[2], pixels[0]) and not np.allclose(pixels[2], pixels[4])


def test_copies_that_are_not_cached_are_the_same_each_time(encoded, monkeypatch):
    cached = augment.augment_set(encoded, 2, np.random.default_rng(0))
    monkeypatch.setattr(images, "MAX_CACHED_BYTES", 0)
    lazy = augment.augment_set(encoded, 2, np.random.default_rng(0))
    assert lazy.images.cached is None
    for rows in (np.array([4, 1]), np.array([1, 5, 4])):
        np.testing.assert_array_equal(lazy.images[rows]["pixels"], cached.images[rows]["pixels"])


def test_the_seed_determines_the_copies(encoded):
    sets = (augment.augment_set(encoded, 1, np.random.default_rng(5)) for _ in range(2))
    a, b = (out.images.cached["pixels"] for out in sets)
    np.testing.assert_array_equal(a, b)
    assert a.dtype == np.float32 and np.isfinite(a).all()


def test_a_set_with_cached_arrays_is_refused(encoded):
    cached = dataclasses.replace(encoded, per_image={"target": np.zeros((2, 1))})
    with pytest.raises(ValueError, match="before caching"):
        augment.augment_set(cached, 1, np.random.default_rng(0))
