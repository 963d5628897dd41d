"""The images and questions that both libraries are asked about."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from vkd_jax.benchmarks.names import plain_name
from vkd_jax.data.images import MOST_IMAGE_BYTES, open_image
from vkd_jax.runtime import files, storage
from vkd_jax.types import UserError, located

# A square, a landscape and a portrait, whose sides are no multiples of a patch; (width, height) in pixels.
SIZES = ((336, 336), (413, 275), (190, 331))
QUESTIONS = ("What is in this image?", "Which color is the most frequent one here, and what could it belong to?")
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})


@dataclasses.dataclass(frozen=True)
class Question:
    """A question to ask both libraries."""

    text: str
    image: Image.Image | None  # None for a text-only question

    @property
    def size(self) -> str:
        """Width and height of the image in pixels, for tables."""
        return "text only" if self.image is None else f"{self.image.width} x {self.image.height}"


def build(folder: str | None, texts: Sequence[str]) -> list[Question]:
    """Returns each text with each image, and without an image.

    Args:
        folder: folder with image files; None for synthetic images of the sizes in `SIZES`.
        texts: the texts of the questions; () for `QUESTIONS`.

    Raises:
        UserError: the folder has no images, one cannot be read, or a text is blank.
    """
    if not all(map(plain_name, texts)):
        raise UserError("--questions: a question is blank; ask something.")
    images = _synthetic() if folder is None else _read(folder)
    return [Question(text, image) for image in (*images, None) for text in texts or QUESTIONS]


def _synthetic() -> list[Image.Image]:
    """Draws smooth colored images with noise, which have structure at every scale."""
    rng, images = np.random.default_rng(0), []
    for width, height in SIZES:
        coarse = Image.fromarray(rng.integers(0, 256, (5, 7, 3), np.uint8)).resize((width, height), Image.BICUBIC)
        noise = rng.integers(-40, 41, (height, width, 3))
        images.append(Image.fromarray(np.clip(np.asarray(coarse) + noise, 0, 255).astype(np.uint8)))
    return images


def _read(name: str) -> list[Image.Image]:
    with located("--images"):
        folder = Path(storage.resolve(name))
        paths = sorted(folder.iterdir()) if folder.is_dir() else []
        paths = [path for path in paths if path.suffix.lower() in SUFFIXES]
        if not paths:
            raise UserError(f"{folder} is not a folder with image files; pass one ({', '.join(sorted(SUFFIXES))}).")
        images = []
        for path in paths:
            data = files.read_bytes(path, MOST_IMAGE_BYTES)
            with located(str(path)):
                images.append(open_image(data).convert("RGB"))
        return images
