"""Families whose images are squares of one size: `clip_vit` on each image, then a projector of its features.

Axes: b batch, n image of a prompt, t token of the vision tower, p token of an image, d width.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vkd_jax.models import base
from vkd_jax.models.base import ModelConfig, VisionLanguageModel, VisualTokens
from vkd_jax.models.clip_vit import VisionConfig, VisionTower
from vkd_jax.models.layers import shard_batch
from vkd_jax.types import UserError


@dataclasses.dataclass(frozen=True)
class FixedSizeConfig(ModelConfig):
    """Configuration of a model whose images are squares of one size."""

    vision: VisionConfig

    @property
    def feature_coords(self) -> np.ndarray:
        """Image index 0, row and column of each input token of the projector: int32 [p, 3]."""
        return self.vision.patch_coords

    @property
    def token_coords(self) -> np.ndarray:
        """Image index 0, row and column of each image token, an output of the projector: int32 [p, 3]."""
        return self.feature_coords

    def image_tokens(self, height: int, width: int) -> int:
        """Returns the number of image tokens of an image; all images have one size here."""
        del height, width
        return len(self.token_coords)

    def extract_images(self, output: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Returns the images [H, W, 3] in the output of the Hugging Face image processor.

        Raises:
            UserError: the images have another size than those of the model.
        """
        images = [np.ascontiguousarray(x.transpose(1, 2, 0), np.float32) for x in output["pixel_values"]]
        size = self.vision.image_size
        for height, width in {x.shape[:2] for x in images} - {(size, size)}:
            raise UserError(
                f"the image processor returns {height} x {width} pixels (crop_size or size of its configuration), and "
                f"the model takes {size} x {size} (vision_config.image_size of config.json)"
            )
        return images

    def pack(self, rows: Sequence[Sequence[np.ndarray]], min_tokens: int = 0) -> dict[str, np.ndarray]:
        """Stacks the images of prompts, [H, W, 3] each.

        Args:
            rows: the images of each prompt.
            min_tokens: least number of image tokens to make room for, so that several calls give one shape.

        Returns:
            {"pixels": float32 [b, H, W, 3]} if every prompt has one image, otherwise
            {"pixels": float32 [b, n, H, W, 3], "is_image": bool [b, n]}: zeros and False after the last image.
        """
        size = self.vision.image_size
        count = max([1, -(-min_tokens // self.image_tokens(size, size)), *map(len, rows)])
        if count == 1 and all(map(len, rows)):
            return {"pixels": np.stack([image for (image,) in rows])}
        pixels = np.zeros((len(rows), count, size, size, 3), np.float32)
        for slots, images in zip(pixels, rows, strict=True):
            for slot, image in zip(slots, images, strict=False):
                slot[:] = image
        return {"pixels": pixels, "is_image": np.arange(count) < np.array([[len(images)] for images in rows])}


class FixedSizeModel(VisionLanguageModel):
    """A model whose images are squares of one size; they do not attend to each other in the vision tower."""

    tower_class = VisionTower

    def encode(
        self, images: Mapping[str, jax.Array] | None = None, *, earlier: Mapping[str, jax.Array] | None = None
    ) -> tuple[VisualTokens, dict[str, VisualTokens]]:
        """Maps images, or cached activations, to the features that replace the image tokens of a prompt.

        Args:
            images: from the configuration's `pack`; with `earlier`, they tell which images a prompt has.
            earlier: as in `VisionLanguageModel.encode`.

        Returns:
            The features, and the taps by name: "vision/0" ... (the output of each computed block, class token
            included), "features" (the input of the projector) and "projector" (its output, which is the features).
            They are zero at images that a prompt does not have.
        """
        if images is None and not earlier:
            raise ValueError("encode takes images, or the taps of an earlier block.")
        hidden, start = base.continue_from(earlier)
        config, tower = self.config, self.vision_tower
        is_image = None if images is None else images.get("is_image")
        if hidden is None:
            b, hidden = len(images["pixels"]), self._embed_pixels(images)
        else:
            b, hidden = len(hidden), hidden.reshape(-1, len(config.vision.patch_coords), hidden.shape[-1])
        outputs = tower(hidden, start, config.used_blocks)

        def tokens(values: jax.Array, coords: np.ndarray) -> VisualTokens:
            return _join(values, coords, b, is_image)

        taps = {f"vision/{i}": tokens(output, config.vision.patch_coords) for i, output in enumerate(outputs, start)}
        features = (outputs or [hidden])[-1]
        features = tower.normalize(features) if config.uses_post_norm else features
        features = features[:, -len(config.feature_coords) :]  # a class token would be the first
        taps["features"] = tokens(features, config.feature_coords)
        with jax.named_scope("projector"):
            projected = shard_batch(self.projector(features), config.mesh)
        taps["projector"] = tokens(projected, config.token_coords)
        return taps["projector"], taps

    def vision_neurons(
        self, images: Mapping[str, jax.Array], reduce: Callable[[jax.Array, jax.Array], Any]
    ) -> list[Any]:
        """Applies `reduce` to the inner MLP activations of each block that feeds the projector."""
        coords, is_image, b = self.config.vision.patch_coords, images.get("is_image"), len(images["pixels"])

        def reduce_rows(z: jax.Array) -> Any:
            joined = _join(z, coords, b, is_image)
            return reduce(joined.values, joined.valid)

        return self.vision_tower.neurons(self._embed_pixels(images), self.config.used_blocks, reduce_rows)

    def _embed_pixels(self, images: Mapping[str, jax.Array]) -> jax.Array:
        """Returns the input of block 0, with all images of all prompts on the leading axis: [b * n, t, d]."""
        pixels = images["pixels"]
        return self.vision_tower.embed(pixels.reshape(-1, *pixels.shape[-3:]))


def _join(values: jax.Array, coords: np.ndarray, b: int, is_image: jax.Array | None) -> VisualTokens:
    """Joins the tokens of the images of each prompt.

    Args:
        values: [b * n, p, d].
        coords: int32 [p, 3], those of one image.
        b: number of prompts.
        is_image: bool [b, n], False at images that a prompt does not have; None for no such image.

    Returns:
        Tokens [b, n * p, d].
    """
    (_, p, d), n = values.shape, len(values) // b
    coords = np.tile(coords, (n, 1))
    coords[:, 0] = np.repeat(np.arange(n), p)
    values, coords = values.reshape(b, n * p, d), jnp.broadcast_to(jnp.asarray(coords), (b, n * p, 3))
    if is_image is None:
        return VisualTokens(values, coords)
    valid = jnp.repeat(is_image, p, axis=1)[..., None]
    return VisualTokens(jnp.where(valid, values, 0), jnp.where(valid, coords, -1))
