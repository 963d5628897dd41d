"""Families that cut an image into square tiles of one size, which pass through the vision tower one by one.

An image has several views, such as the whole image in a grid of tiles and the whole image in one tile. The coordinates
of a token are the number of its view, beginning with the smallest, and its row and column in that view.
"""

import abc
import dataclasses
import math
from collections.abc import Iterable, Sequence

import numpy as np

from vkd_jax.data.images import TiledImage
from vkd_jax.models.clip_vit import square_coords
from vkd_jax.models.fixed_size import FixedSizeConfig
from vkd_jax.types import UserError

Grid = tuple[int, int]  # rows and columns of the tiles of a view


@dataclasses.dataclass(frozen=True)
class TiledConfig(FixedSizeConfig):
    """Configuration of a model that cuts images into tiles."""

    @property
    def image_step(self) -> int:
        """The sides of an image are multiples of this many pixels."""
        return self.vision.image_size

    @abc.abstractmethod
    def grids(self, height: int, width: int) -> list[Grid]:
        """Returns the rows and columns of tiles of each view, in order, of an image with this `TiledImage.size`."""

    def image_tokens(self, height: int, width: int) -> int:
        """Returns the number of image tokens of an image: those of all tiles of all views."""
        return len(self.token_coords) * sum(rows * columns for rows, columns in self.grids(height, width))

    def pack(self, rows: Sequence[Sequence[TiledImage | np.ndarray]], min_tokens: int = 0) -> dict[str, np.ndarray]:
        """Stacks the tiles of the images of prompts.

        Args:
            rows: the images of each prompt. An array [H, W, 3] stands for a black image with that `TiledImage.size`.
            min_tokens: least number of image tokens to make room for, so that several calls give one shape.

        Returns:
            {"pixels": float32 [b, H, W, 3]} if every prompt has one tile, otherwise
            {"pixels": float32 [b, n, H, W, 3], "tile_coords": int32 [b, n, 3]}: the view, row and column of each tile;
            0 and -1 after the last one.
        """
        packed = []
        for row in rows:
            first_view, images = 0, []
            for image in row:
                tiles, coords = self.tiles(image)
                images.append((tiles, coords + np.array([first_view, 0, 0], np.int32)))
                first_view += coords[:, 0].max() + 1
            packed.append(images)
        return self.pack_tiles(packed, min_tokens)

    def tiles(self, image: TiledImage | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the tiles of an image in the order of their tokens, and the view, row and column of each.

        Args:
            image: an image, or an array [H, W, 3] that stands for a black one.

        Returns:
            float32 [n, side, side, 3] and int32 [n, 3].

        Raises:
            UserError: the views do not consist of the tiles that their size determines.
        """
        grids, side = self.grids(*image.shape[:2]), self.vision.image_size
        shapes = [(rows * side, columns * side, 3) for rows, columns in grids]
        if isinstance(image, TiledImage):
            views = image.views
        else:
            views = [np.broadcast_to(np.float32(0), shape) for shape in shapes]
        if [view.shape for view in views] != shapes:
            sizes = " and ".join(f"{view.shape[0]} x {view.shape[1]}" for view in views)
            raise UserError(
                f"an image of views of {sizes} pixels does not consist of the model's tiles of {side} pixels."
            )
        numbers = np.argsort(np.argsort([rows * columns for rows, columns in grids], kind="stable"), kind="stable")
        coords = [(number, *cell) for number, grid in zip(numbers, grids, strict=True) for cell in np.ndindex(grid)]
        return np.concatenate([cut(view, side) for view in views]), np.array(coords, np.int32)


@dataclasses.dataclass(frozen=True)
class GridConfig(TiledConfig):
    """Configuration of a model that reads an image as a grid of tiles, if it has several, and as one tile."""

    scale: int = 1  # scale x scale patches become one image token

    @property
    def token_coords(self) -> np.ndarray:
        """Image index 0, row and column of each image token of a tile: int32 [p, 3]."""
        return square_coords(self.vision.image_size // self.vision.patch_size // self.scale)

    def grids(self, height: int, width: int) -> list[Grid]:
        """Returns the rows and columns of tiles of each view: the grid, if it has several, and the whole image."""
        rows, columns = height // self.image_step, width // self.image_step
        return [(1, 1)] if rows == columns == 1 else [(rows, columns), (1, 1)]

    def join_images(self, tiles: Iterable[np.ndarray], grids: Iterable[Grid], settings: str) -> list[TiledImage]:
        """Joins the tiles in the output of the Hugging Face image processor to images.

        Args:
            tiles: those of all images, in order, [3, H, W] each.
            grids: the rows and columns of tiles of each image.
            settings: names of the settings of the image processor that determine the size of a tile.

        Raises:
            UserError: the tiles have another size than those of the model.
        """
        tiles = [np.asarray(tile, np.float32).transpose(1, 2, 0) for tile in tiles]
        side = self.image_step
        for height, width in {tile.shape[:2] for tile in tiles} - {(side, side)}:
            raise UserError(
                f"the image processor returns tiles of {height} x {width} pixels ({settings} of its configuration), "
                f"and the model takes {side} x {side} (vision_config.image_size of config.json)"
            )
        images, start = [], 0
        for rows, columns in grids:
            size, views = (rows * side, columns * side), []
            for grid in self.grids(*size):
                stop = start + math.prod(grid)
                views.append(join(np.stack(tiles[start:stop]), grid))
                start = stop
            images.append(TiledImage(tuple(views), size))
        return images


def cut(view: np.ndarray, side: int) -> np.ndarray:
    """Cuts a view [H, W, 3] into tiles, row by row: [n, side, side, 3]."""
    rows, columns = (length // side for length in view.shape[:2])
    return view.reshape(rows, side, columns, side, 3).swapaxes(1, 2).reshape(-1, side, side, 3)


def join(tiles: np.ndarray, grid: Grid) -> np.ndarray:
    """Joins tiles [n, side, side, 3] to the view [H, W, 3] that they were cut from, the inverse of `cut`."""
    rows, columns = grid
    side = tiles.shape[1]
    return tiles.reshape(rows, columns, side, side, 3).swapaxes(1, 2).reshape(rows * side, columns * side, 3)
