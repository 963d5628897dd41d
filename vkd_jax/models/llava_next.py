"""LLaVA-1.6, or LLaVA-NeXT (Liu et al., llava-vl.github.io/blog/2024-01-30-llava-next): LLaVA on tiles.

An image is read twice: squeezed into one tile, and, with its own aspect ratio, in the grid of tiles that fits it best,
where black borders pad it. Features of borders are dropped (unpadding), and a trained vector follows each row of the
others (newline). The language model is LLaMA's or Mistral's decoder.

Axes: b batch, n tile of a prompt, p image token, d width.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P

from vkd_jax.data.image_settings import setting
from vkd_jax.data.images import TiledImage
from vkd_jax.models import base, conversion, llava
from vkd_jax.models.base import VisualTokens
from vkd_jax.models.conversion import Row
from vkd_jax.models.fixed_size import FixedSizeModel
from vkd_jax.models.layers import small_normal
from vkd_jax.models.llava import LlavaConfig
from vkd_jax.models.tiled import Grid, TiledConfig, join
from vkd_jax.types import UserError


@dataclasses.dataclass(frozen=True)
class LlavaNextConfig(TiledConfig, LlavaConfig):
    """Configuration of a LLaVA-1.6 model.

    The `TiledImage.size` of an image is that of its grid in pixels, less one for each row or column of patches that
    unpadding drops.
    """

    image_processors: ClassVar[tuple[str, ...]] = ("LlavaNextImageProcessor",)
    has_default_template: ClassVar[bool] = False  # its prompts depend on the language model
    choices: tuple[Grid, ...] = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))  # grids that an image may have

    @property
    def side(self) -> int:
        """Patches of a side of a tile."""
        return self.vision.image_size // self.vision.patch_size

    def grids(self, height: int, width: int) -> list[Grid]:
        """Returns the rows and columns of tiles of the whole image in one tile, and of the grid."""
        return [(1, 1), (-(-height // self.image_step), -(-width // self.image_step))]

    def image_tokens(self, height: int, width: int) -> int:
        """Returns the number of image tokens of an image: both views without borders, and one newline for each row."""
        rows, columns = self._kept(height, width)
        return self.side**2 + rows * (columns + 1)

    def packed_tokens(self, height: int, width: int) -> int:
        """Returns the number of image tokens that `pack` makes room for, which depends on the number of tiles alone."""
        return self._room(self._tiles(height, width))

    def pack(self, rows: Sequence[Sequence[TiledImage | np.ndarray]], min_tokens: int = 0) -> dict[str, np.ndarray]:
        """Stacks the tiles of the images of prompts, and says of which features their image tokens are made.

        Args:
            rows: the images of each prompt. An array [H, W, 3] stands for a black image with that `TiledImage.size`.
            min_tokens: least number of image tokens to make room for, so that several calls give one shape.

        Returns:
            "pixels" and "tile_coords" as in `TiledConfig.pack`; "token_index", int32 [b, p]: for each image token the
            index of its feature among those of all tiles of the prompt, -1 for a newline; "token_coords",
            int32 [b, p, 3]: its view, row and column, in a view of their own for newlines, and -1 after the last token.
        """
        tiles = 0
        while self._room(tiles) < min_tokens:
            tiles += 1
        packed = super().pack(rows, tiles * self.side**2)
        sizes = [[image.shape[:2] for image in row] for row in rows]
        room = max(min_tokens, *(sum(self.packed_tokens(*size) for size in row) for row in sizes))
        index, coords = np.full((len(rows), room), -1, np.int32), np.full((len(rows), room, 3), -1, np.int32)
        for i, row in enumerate(sizes):
            start = first_tile = 0
            for number, size in enumerate(row):
                features, places = self._layout(*size)
                stop = start + len(features)
                index[i, start:stop] = np.where(features < 0, -1, features + first_tile * self.side**2)
                coords[i, start:stop] = places + np.array([3 * number, 0, 0])
                start, first_tile = stop, first_tile + self._tiles(*size)
        return packed | {"token_index": index, "token_coords": coords}

    def _layout(self, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the index of the feature of each token of an image, -1 for newlines; and its view, row and column."""
        side, (_, columns) = self.side, self.grids(height, width)[1]
        whole, kept = self.token_coords, self._kept(height, width)
        row, column = np.indices(kept)
        top, left = (dropped // 2 for dropped in self._dropped(height, width))
        (tile_row, r), (tile_column, c) = np.divmod(row + top, side), np.divmod(column + left, side)
        features = ((1 + tile_row * columns + tile_column) * side + r) * side + c
        places = np.stack([np.ones_like(row), row, column], axis=-1)
        newlines = np.array([[[2, i, 0]] for i in range(kept[0])]).reshape(-1, 1, 3)
        features = np.concatenate([features, np.full((kept[0], 1), -1)], axis=1).ravel()
        places = np.concatenate([places, newlines], axis=1).reshape(-1, 3)
        return np.concatenate([np.arange(len(whole)), features]), np.concatenate([whole, places])

    def _tiles(self, height: int, width: int) -> int:
        return sum(map(math.prod, self.grids(height, width)))

    def _room(self, tiles: int) -> int:
        """Returns at least the number of tokens of an image of so many tiles; it grows with their number."""
        most_rows = min(max(tiles - 1, 0), max(rows for rows, _ in self.choices))
        return tiles * self.side**2 + most_rows * self.side

    def _dropped(self, height: int, width: int) -> tuple[int, int]:
        """Returns the rows and columns of patches that unpadding drops from the grid of an image."""
        _, (rows, columns) = self.grids(height, width)
        return rows * self.image_step - height, columns * self.image_step - width

    def _kept(self, height: int, width: int) -> tuple[int, int]:
        """Returns the rows and columns of patches of the grid of an image after unpadding."""
        _, grid = self.grids(height, width)
        rows, columns = (n * self.side - d for n, d in zip(grid, self._dropped(height, width), strict=True))
        return rows, columns

    def tiled_size(self, height: int, width: int, grid: Grid) -> tuple[int, int]:
        """Returns the `TiledImage.size` of an image of `height` x `width` pixels in a grid.

        Unpadding works on the grid of patches: its longer side, relative to the image's, keeps all of them, and of the
        other side the border is dropped, as many patches before as after the image.
        """
        rows, columns = (n * self.side for n in grid)
        # The order of the operations is that of transformers, where rounding decides.
        if width / height > columns / rows:
            dropped = (rows - int(round(height * (columns / width), 7))) // 2 * 2, 0
        else:
            dropped = 0, (columns - int(round(width * (rows / height), 7))) // 2 * 2
        tall, wide = (n * self.image_step - d for n, d in zip(grid, dropped, strict=True))
        return tall, wide

    def best_grid(self, height: int, width: int, tiles: int) -> Grid:
        """Returns the grid of so many tiles that fits an image best: most of its pixels, then least border.

        Raises:
            UserError: no grid has so many tiles.
        """
        best, highest = None, (-1, 0)
        for rows, columns in self.choices:
            if rows * columns != tiles:
                continue
            tall, wide = rows * self.image_step, columns * self.image_step
            scale = min(wide / width, tall / height)
            pixels = min(int(width * scale) * int(height * scale), width * height)
            if (score := (pixels, pixels - tall * wide)) > highest:
                best, highest = (rows, columns), score
        if best is None:
            raise UserError(
                f"the image processor returns a grid of {tiles} tiles, and no image_grid_pinpoints of config.json has "
                "so many"
            )
        return best

    def extract_images(self, output: Mapping[str, Any]) -> list[TiledImage]:
        """Returns the views of the image in the output of the Hugging Face image processor.

        Raises:
            UserError: the tiles have another size, or another number, than those of the model.
        """
        (image,), ((height, width),) = output["pixel_values"], np.asarray(output["image_sizes"]).tolist()
        tiles = np.asarray(image, np.float32).transpose(0, 2, 3, 1)
        side = self.image_step
        if tiles.shape[1:3] != (side, side):
            raise UserError(
                f"the image processor returns {tiles.shape[1]} x {tiles.shape[2]} pixels (crop_size or size of its "
                f"configuration), and the model takes {side} x {side} (vision_config.image_size of config.json)"
            )
        grid = self.best_grid(height, width, len(tiles) - 1)
        return [TiledImage((tiles[0], join(tiles[1:], grid)), self.tiled_size(height, width, grid))]

    def largest_image(self, max_pixels: int) -> tuple[int, int]:
        """Returns the `TiledImage.size` with most image tokens, among grids of at most `max_pixels` pixels."""
        sizes = [(rows * self.image_step, columns * self.image_step) for rows, columns in self.choices]
        allowed = [size for size in sizes if math.prod(size) <= (max_pixels or math.inf)]
        return max(allowed or [min(sizes, key=math.prod)], key=lambda size: self.image_tokens(*size))

    def pixel_limits(self, image_processor: Any) -> tuple[int, int]:
        """Returns the numbers of pixels of the smallest and the largest grid of an image."""
        pixels = [math.prod(size) for size in setting(image_processor, "image_grid_pinpoints", list)]
        return min(pixels), max(pixels)

    def limit_pixels(self, image_processor: Any, max_pixels: int) -> None:
        """Takes away the grids of more than `max_pixels` pixels."""
        sizes = setting(image_processor, "image_grid_pinpoints", list)
        image_processor.image_grid_pinpoints = [size for size in sizes if math.prod(size) <= max_pixels]

    def image_processor_problem(self, image_processor: Any) -> str | None:
        """Returns whether the grids of the image processor differ from those of the model; None if not."""
        theirs = setting(image_processor, "image_grid_pinpoints", list)
        ours = np.array(self.choices) * self.image_step
        if np.array_equal(theirs, ours):
            return None
        return (
            f"image_grid_pinpoints is {theirs}, and it is {ours.tolist()} in config.json, which has to be the same; "
            "get both files again"
        )

    @classmethod
    def from_hf(cls, hf: Any, **changes: Any) -> "LlavaNextConfig":
        """Reads a `transformers.LlavaNextConfig`; `changes` override fields, such as `remat="full"`.

        Raises:
            UserError: lists every field with a value that this implementation does not support.
        """
        llava.check_hf_config("LLaVA-1.6", hf, ("llama", "mistral"), *llava.feature_checks(hf))
        side, patch_size = (np.max(x).item() for x in (hf.vision_config.image_size, hf.vision_config.patch_size))
        choices = _read_choices(hf.image_grid_pinpoints, side)
        # Beyond that `tiled_size` would be ambiguous: a grid loses fewer patches than a tile has pixels.
        most = (side - 1) // (side // patch_size)
        supported = f"pairs of multiples of vision_config.image_size, {side}, up to {most} times"
        window, select = getattr(hf.text_config, "sliding_window", None), hf.vision_feature_select_strategy
        newline = getattr(hf, "use_image_newline_parameter", True)
        base.check_supported(
            "LLaVA-1.6",
            [
                (bool(choices) and np.max(choices) <= most, "image_grid_pinpoints", hf.image_grid_pinpoints, supported),
                (select == "default", "vision_feature_select_strategy", select, "default"),
                (newline in (True, None), "use_image_newline_parameter", newline, "True"),
                (window is None, "text_config.sliding_window", window, "null"),
            ],
        )
        return cls(**dict(choices=choices, **llava.read_fields(hf), **llava.read_feature_fields(hf)) | changes)


def _read_choices(pinpoints: Any, side: int) -> tuple[Grid, ...]:
    """Returns the rows and columns of tiles of each of `image_grid_pinpoints`; () if one of them has none."""
    if not isinstance(pinpoints, list | tuple):
        return ()
    sizes = [tuple(size) if isinstance(size, list | tuple) else () for size in pinpoints]
    if not all(len(size) == 2 and all(type(n) is int and n > 0 and n % side == 0 for n in size) for size in sizes):
        return ()
    return tuple((height // side, width // side) for height, width in sizes)


class Projector(llava.Projector):
    """LLaVA's projector, and the newline: an embedding that does not depend on the image."""

    def __init__(self, config: LlavaNextConfig, *, param_dtype, rngs, **options):
        super().__init__(config, param_dtype=param_dtype, rngs=rngs, **options)
        self.newline = nnx.Param(small_normal(rngs.params(), (config.text.width,), param_dtype))


class LlavaNext(FixedSizeModel):
    """LLaVA-1.6: projected CLIP features of tiles, unpadded, with newlines, inserted at their image tokens."""

    @staticmethod
    def build_projector(config: LlavaNextConfig, **options: Any) -> Projector:
        """Builds the two-layer projector with the newline."""
        return Projector(config, **options)

    def arrange(self, tokens: VisualTokens, images: Mapping[str, jax.Array]) -> VisualTokens:
        """Orders the projected features of all tiles as the image tokens of a prompt, with newlines."""
        index, coords = images["token_index"], jnp.asarray(images["token_coords"])
        values = jnp.take_along_axis(tokens.values, jnp.maximum(index, 0)[..., None], axis=1)
        newline = self.projector.newline[...].astype(values.dtype)
        values = jnp.where((index < 0)[..., None], newline, values)
        return VisualTokens(jnp.where(coords[..., :1] < 0, 0, values), coords)


Config, Model = LlavaNextConfig, LlavaNext

HF_ALIASES = (*conversion.PARTS_ALIASES, (r"^model\.image_newline$", "image_newline"))
HF_SKIP, HF_ARCHITECTURE = llava.HF_SKIP, "LlavaNextForConditionalGeneration"


def hf_table(config: LlavaNextConfig) -> tuple[Row, ...]:
    """Returns the rows of the conversion table, which `conversion` describes."""
    return (*llava.hf_table(config), ("image_newline", "projector/newline", None))


SHARDING = (*llava.SHARDING, (r"projector/newline", P()))

# Fields of the published config.json files, by size.
_PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
_SHARED = llava.PRESETS["7b"][1] | dict(image_grid_pinpoints=_PINPOINTS, tie_word_embeddings=False)
_MISTRAL = dict(
    model_type="mistral",
    vocab_size=32064,
    intermediate_size=14336,
    num_key_value_heads=8,
    max_position_embeddings=32768,
    rms_norm_eps=1e-5,
    rope_theta=1e6,
    sliding_window=None,
)
PRESETS = {
    "7b": ("llava-hf/llava-v1.6-vicuna-7b-hf", _SHARED),
    "13b": (
        "llava-hf/llava-v1.6-vicuna-13b-hf",
        _SHARED | dict(text_config=llava.PRESETS["13b"][1]["text_config"]),
    ),
    "mistral-7b": ("llava-hf/llava-v1.6-mistral-7b-hf", _SHARED | dict(text_config=_MISTRAL)),
}
