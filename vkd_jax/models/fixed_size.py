"""Families whose images are squares of one size: `clip_vit` on each image, then a projector of its features.

The images of other families are cut into several such squares; they extend `tiled`.

Axes: b batch, n square of a prompt, t token of the vision tower, p token of a square, d width.
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
    def feature_blocks(self) -> tuple[int, ...]:
        """The vision blocks whose outputs the projector reads, -1 for the input of block 0; the last one computed."""
        return (self.used_blocks - 1,)

    def taps_before(self, block: int) -> tuple[str, ...]:
        """Returns the taps from which `encode` continues at a vision block: those of `feature_blocks`, and the last."""
        return tuple(f"vision/{i}" for i in sorted({*self.feature_blocks, block - 1}) if 0 <= i < block)

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
                f"the image processor returns {height} x {width} pixels (crop_size, size or do_resize of its "
                f"configuration), and the model takes {size} x {size} (vision_config.image_size of config.json)"
            )
        return images

    def pack(self, rows: Sequence[Sequence[np.ndarray]], min_tokens: int = 0) -> dict[str, np.ndarray]:
        """Stacks the images of prompts, [H, W, 3] each.

        Args:
            rows: the images of each prompt.
            min_tokens: least number of image tokens to make room for, so that several calls give one shape.

        Returns:
            {"pixels": float32 [b, H, W, 3]} if every prompt has one image, otherwise
            {"pixels": float32 [b, n, H, W, 3], "tile_coords": int32 [b, n, 3]}: the image index, 0 and 0 of each image;
            0 and -1 after the last one.
        """
        rows = [[(image[None], [[index, 0, 0]]) for index, image in enumerate(row)] for row in rows]
        return self.pack_tiles(rows, min_tokens)

    def pack_tiles(self, rows: Sequence[Sequence[tuple[np.ndarray, Any]]], min_tokens: int) -> dict[str, np.ndarray]:
        """Stacks tiles, which `encode` takes as images of a prompt; see `pack`.

        Args:
            rows: for each image of each prompt, its tiles [n, H, W, 3] and their index, row and column [n, 3].
            min_tokens: least number of image tokens to make room for.
        """
        counts = [sum(len(tiles) for tiles, _ in row) for row in rows]
        count = max(1, -(-min_tokens // len(self.token_coords)), *counts)
        if min(counts) == count == 1:
            return {"pixels": np.concatenate([tiles for ((tiles, _),) in rows])}
        size = self.vision.image_size
        pixels = np.zeros((len(rows), count, size, size, 3), np.float32)
        coords = np.full((len(rows), count, 3), -1, np.int32)
        for i, row in enumerate(rows):
            start = 0
            for tiles, tile_coords in row:
                stop = start + len(tiles)
                pixels[i, start:stop], coords[i, start:stop] = tiles, tile_coords
                start = stop
        return {"pixels": pixels, "tile_coords": coords}


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
        tile_coords = None if images is None else images.get("tile_coords")
        if hidden is None:
            b, outputs = len(images["pixels"]), {-1: self._embed_pixels(images)}
        else:
            b, shape = len(hidden), (-1, len(config.vision.patch_coords), hidden.shape[-1])
            outputs = {int(name.removeprefix("vision/")): values.reshape(shape) for name, values in earlier.items()}
        outputs |= enumerate(tower(outputs[start - 1], start, config.used_blocks), start)

        def tokens(values: jax.Array, coords: np.ndarray) -> VisualTokens:
            return _join(values, coords, b, tile_coords)

        computed = range(start, config.used_blocks)
        taps = {f"vision/{i}": tokens(outputs[i], config.vision.patch_coords) for i in computed}
        features = jnp.concatenate([outputs[i] for i in config.feature_blocks], axis=-1)
        features = tower.normalize(features) if config.uses_post_norm else features
        features = features[:, -len(config.feature_coords) :]  # a class token would be the first
        taps["features"] = tokens(features, config.feature_coords)
        with jax.named_scope("projector"):
            projected = shard_batch(self.projector(features), config.mesh)
            taps["projector"] = self.arrange(tokens(projected, config.token_coords), images)
        return taps["projector"], taps

    def arrange(self, tokens: VisualTokens, images: Mapping[str, jax.Array] | None) -> VisualTokens:
        """Turns the projected features of all squares of a prompt into its image tokens: they already are."""
        del images
        return tokens

    def vision_neurons(
        self, images: Mapping[str, jax.Array], reduce: Callable[[jax.Array, jax.Array], Any]
    ) -> list[Any]:
        """Applies `reduce` to the inner MLP activations of each block that feeds the projector."""
        coords, tile_coords, b = self.config.vision.patch_coords, images.get("tile_coords"), len(images["pixels"])

        def reduce_rows(z: jax.Array) -> Any:
            joined = _join(z, coords, b, tile_coords)
            return reduce(joined.values, joined.valid)

        return self.vision_tower.neurons(self._embed_pixels(images), self.config.used_blocks, reduce_rows)

    def _embed_pixels(self, images: Mapping[str, jax.Array]) -> jax.Array:
        """Returns the input of block 0, with all images of all prompts on the leading axis: [b * n, t, d]."""
        pixels = images["pixels"]
        return self.vision_tower.embed(pixels.reshape(-1, *pixels.shape[-3:]))


def _join(values: jax.Array, coords: np.ndarray, b: int, tile_coords: jax.Array | None) -> VisualTokens:
    """Joins the tokens of the images, or tiles, of each prompt.

    Args:
        values: [b * n, p, d].
        coords: int32 [p, 3], those of one image.
        b: number of prompts.
        tile_coords: int32 [b, n, 3], the index, row and column of each image, -1 at images that a prompt does not have;
            None for images in order, of which every prompt has n.

    Returns:
        Tokens [b, n * p, d].
    """
    (_, p, d), n = values.shape, len(values) // b
    values, size = values.reshape(b, n * p, d), coords.max(0) + 1  # 1, rows and columns
    if tile_coords is None:
        joined = coords + np.arange(n)[:, None, None] * np.array([1, 0, 0])
        return VisualTokens(values, jnp.broadcast_to(jnp.asarray(joined.reshape(-1, 3), jnp.int32), (b, n * p, 3)))
    joined = (tile_coords[:, :, None] * size + coords).reshape(b, n * p, 3)
    valid = joined[..., :1] >= 0
    return VisualTokens(jnp.where(valid, values, 0), jnp.where(valid, joined, -1))
