"""The images of a set: decoded and resized by several threads, and cached in memory while they are few."""

import concurrent.futures
import contextlib
import copy
import hashlib
import io
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from vkd_jax.data import image_formats
from vkd_jax.runtime import files, memory, storage
from vkd_jax.types import UserError

MOST_IMAGE_BYTES = 100 * 2**20  # of an image file; the largest that cameras write are about half of it
# Modes of Pillow with 8 bits per channel, which become RGB without a loss of range. The pixels of others, such as "F"
# and "I" with 32 bits, have no known range: most would become black or white.
MODES = frozenset({"1", "CMYK", "HSV", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "YCbCr"})
MOST_ELONGATED = 200  # longer side by shorter side, as of Qwen2-VL; a strip becomes very large when it is resized
MAX_CACHED_BYTES = memory.CACHE_BYTES  # sets of at most this many bytes of pixels are prepared once and cached
DARKEST = 2**14  # the brightest pixels of an image of 16 bits have at least this value
BRIGHTEST = 99.9  # the percentile of the values that is compared with it: sensors have single hot pixels
THREADS = min(os.cpu_count() or 1, 16)  # decoding and resizing release Python's global lock

T = TypeVar("T")


class TiledImage(NamedTuple):
    """An image that a model reads as square tiles of one size, in place of an array [height, width, 3].

    Views are, for example, the whole image in a grid of tiles and the whole image in one tile.
    """

    views: tuple[np.ndarray, ...]  # float32 [H, W, 3] each, in the order of their tokens; tiles divide H and W
    size: tuple[int, int]  # the height and width that determine the views, as the model's configuration defines them

    @property
    def shape(self) -> tuple[int, int, int]:
        """The (height, width, 3) that determines the views and the number of image tokens."""
        return (*self.size, 3)

    def map(self, function: Callable[[np.ndarray], np.ndarray]) -> "TiledImage":
        """Applies a function, which keeps the shape, to each view."""
        return self._replace(views=tuple(map(function, self.views)))


def open_image(data: bytes | Image.Image) -> Image.Image:
    """Decodes an image file, rotated as its EXIF orientation says; 16 bits per pixel become 8.

    The caller converts the mode. An image that is already open is checked and converted in the same way. A truncated
    file is refused even if the program has set `PIL.ImageFile.LOAD_TRUNCATED_IMAGES`.

    Raises:
        UserError: the image cannot be decoded, is empty, too large or too elongated, or has pixels that do not become
            RGB or would all become black.
    """
    with _WHOLE_FILES.required():
        return _open_image(data)


class _WholeFiles:
    """Makes Pillow refuse truncated files while any thread decodes: its flag is one of the whole process."""

    def __init__(self):
        self._lock, self._threads, self._allowed = threading.Lock(), 0, False

    @contextlib.contextmanager
    def required(self) -> Iterator[None]:
        """Context manager that clears Pillow's flag; the last thread to leave sets it again if it was set."""
        with self._lock:
            self._allowed = ImageFile.LOAD_TRUNCATED_IMAGES or (self._threads > 0 and self._allowed)
            ImageFile.LOAD_TRUNCATED_IMAGES = False
            self._threads += 1
        try:
            yield
        finally:
            with self._lock:
                self._threads -= 1
                if not self._threads:
                    ImageFile.LOAD_TRUNCATED_IMAGES = self._allowed or ImageFile.LOAD_TRUNCATED_IMAGES


_WHOLE_FILES = _WholeFiles()


def _open_image(data: bytes | Image.Image) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data), formats=image_formats.FORMATS) if isinstance(data, bytes) else data
        _check_shape(image)
        image_formats.check(image, data)
        deep = any(";16B" in str(tile.args) for tile in getattr(image, "tile", ()))  # Pillow drops 8 of 16 bits
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):  # PIL's own conversion would clip all values above 255
            pixels = np.asarray(image)
            if pixels.any():  # an image without any light is what it says
                _check_light(pixels, DARKEST)  # 12 bits of a camera, or 8 bits, may have been stored in 16
            return Image.fromarray((pixels >> 8).astype(np.uint8))
        if deep:
            _check_light(np.asarray(image.convert("RGB")), DARKEST >> 8)
        if image.mode in ("L", "LA", "RGB", "RGBA") and _has_zeros_and_ones(image):
            raise UserError(
                "the image would be black: its values are 0 and 1 of 255, as of shares that were stored as whole "
                "numbers; save it with values up to 255"
            )
        if image.mode in ("LA", "RGBA") and not image.getchannel("A").getbbox():
            raise UserError("the image is fully transparent, so that there is nothing to see; save it without alpha")
        if image.mode not in MODES:
            raise UserError(f"the image has pixels of the mode {image.mode}; save it as RGB with 8 bits per channel")
        if image.has_transparency_data and _is_hidden(image):
            raise UserError(
                "the image would be of one color: what it shows is in its transparency, which models do not see; save "
                "it without transparency"
            )
        return image
    except UserError:
        raise
    except Image.DecompressionBombError as error:
        pixels, limit = map(int, re.findall(r"\d+", str(error))[:2])
        raise UserError(f"the image is too large: it has {pixels:,} pixels, and at most {limit:,} are read") from error
    except UnidentifiedImageError as error:
        if isinstance(data, bytes) and data.startswith(files.LFS_POINTER):
            raise UserError("the image is a Git LFS pointer; run `git lfs pull` where it is from") from error
        problem = f"the image is broken or of a format that is not read; save it as {image_formats.NAMES}"
        raise UserError(problem) from error
    except Exception as error:  # the decoders of image formats raise many types of errors
        raise UserError(f"the image cannot be decoded ({storage.first_line(error)})") from error


def pixel_digest(image: Image.Image) -> bytes:
    """The SHA-256 of what a model sees of a decoded image: its size and its pixels as RGB.

    It takes about 3 ms for a million pixels, less than half of the time of decoding them.
    """
    rgb = image if image.mode == "RGB" else image.convert("RGB")
    digest = hashlib.sha256(repr(rgb.size).encode())
    digest.update(rgb.tobytes())
    return digest.digest()


def _has_zeros_and_ones(image: Image.Image) -> bool:
    """Whether the colors of an image are 0 and 1 and nothing else, and differ within a channel."""
    channels = len(image.getbands()) - image.mode.endswith("A")  # a model does not see transparency
    extrema = np.reshape(image.getextrema(), (-1, 2))[:channels]  # the least and the largest value of each channel
    return extrema.max() == 1 and bool((extrema[:, 0] < extrema[:, 1]).any())


def _is_hidden(image: Image.Image) -> bool:
    """Whether an image has one color and a transparency that differs, as black drawings often have."""
    rgba = np.reshape(image.convert("RGBA").getextrema(), (4, 2))  # the least and the largest value of each channel
    return (rgba[:, 0] < rgba[:, 1]).tolist() == [False, False, False, True]


def _check_light(pixels: np.ndarray, darkest: int) -> None:
    if np.percentile(pixels, BRIGHTEST) < darkest:
        raise UserError(
            f"the image would be almost black: nearly all 16-bit values are below {DARKEST:,}; save it with 8 bits"
        )


def _check_shape(image: Image.Image) -> None:
    """Checks the shape of an image before its pixels are decoded."""
    if not all(image.size):
        raise UserError(f"the image has {image.width} x {image.height} pixels, so that there is nothing to see")
    if max(image.size) > MOST_ELONGATED * min(image.size):
        shape = f"{image.width:,} x {image.height:,} pixels"
        raise UserError(f"the image has {shape}, and its longer side may be {MOST_ELONGATED} times its shorter one")


class PackedImages:
    """m images, one per row, packed as the model takes them, all in one shape.

    Few images are packed once and cached. Many are made again whenever they are requested, by the threads that request
    them.

    Args:
        make: returns image i, normalized, float32 [height, width, 3] or a `TiledImage`.
        shapes: the (height, width, 3) of each of the m images.
        config: the model's configuration, which defines how images are packed, and for how many tokens.
    """

    def __init__(
        self,
        make: Callable[[int], Any],
        shapes: Sequence[tuple[int, ...]],
        config: Any,
    ):
        self.make, self.shapes, self.config = make, shapes, config
        self._max_tokens = max((config.packed_tokens(*shape[:2]) for shape in shapes), default=0)
        self.cached = None
        if shapes and sum(map(pixel_bytes, shapes)) <= MAX_CACHED_BYTES:
            self.cached = self._pack(map_in_threads(make, range(len(shapes))))

    @classmethod
    def of(cls, images: Sequence[Any], config: Any) -> "PackedImages":
        """Packs images that are in memory."""
        return cls(images.__getitem__, [image.shape for image in images], config)

    @classmethod
    def measured(cls, make: Callable[[int], Any], count: int, config: Any) -> "PackedImages":
        """Makes each of `count` images once to measure its shape, and again on request if they are many."""
        shapes, images, total = [], [], 0
        for image in map_in_threads(make, range(count)):
            shapes.append(image.shape)
            total += pixel_bytes(image.shape)
            if total <= MAX_CACHED_BYTES:
                images.append(image)
            else:
                images.clear()
        return cls.of(images, config) if len(images) == count else cls(make, shapes, config)

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, rows: np.ndarray) -> Mapping[str, np.ndarray]:
        """The packed images of these rows, arrays [len(rows), ...]."""
        if self.cached is not None:
            return {name: array[rows] for name, array in self.cached.items()}
        return self._pack(self.make(int(row)) for row in rows)

    def subset(self, rows: np.ndarray) -> "PackedImages":
        """The images of some rows, in the shape in which the whole set is packed."""
        subset = copy.copy(self)
        subset.make, subset.shapes = (lambda i: self.make(int(rows[i]))), [self.shapes[row] for row in rows]
        subset.cached = None if self.cached is None else {name: array[rows] for name, array in self.cached.items()}
        return subset

    def _pack(self, images: Iterable[Any]) -> dict[str, np.ndarray]:
        return self.config.pack([[image] for image in images], self._max_tokens)


def pixel_bytes(shape: tuple[int, ...]) -> int:
    """The size of float32 pixels of this shape in bytes."""
    return int(np.prod(shape)) * np.dtype(np.float32).itemsize


def map_in_threads(function: Callable[[Any], T], items: Iterable[Any]) -> Iterable[T]:
    """The results of the function for each item, in order, computed by several threads."""
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        yield from pool.map(function, items)
