"""Asks a model a question, with or without an image.

vkd ask --model tiny_llava --question "What color is a banana?"
vkd ask --model /tmp/vkd-tiny/unlearned --image /tmp/vkd-tiny/portraits/009.png --question "Who is this person?"

`python -m vkd_jax.ask` is the same command. Exit status: 0 on success, 2 on bad input. From Python:

>>> import vkd_jax
>>> model = vkd_jax.load("tiny_llava")
>>> vkd_jax.answer(model, "What color is a banana?")
'yellow'
"""

import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from vkd_jax.benchmarks.names import plain_name
from vkd_jax.checkpoints import sources
from vkd_jax.checkpoints.bundle import ModelBundle
from vkd_jax.config import command_line
from vkd_jax.data.images import MOST_IMAGE_BYTES, open_image
from vkd_jax.evaluation.inference import Answerer
from vkd_jax.runtime import commands, files, memory, storage
from vkd_jax.types import PATH, UserError, check_argument, located


def load(
    folder: str | Path,
    *,
    dtype: str | None = None,
    max_pixels: int = 0,
    mesh: jax.sharding.Mesh | None = None,
) -> Answerer:
    """Loads a model of any supported family, ready to answer questions.

    Args:
        folder: Hugging Face model folder, or id of a model on the Hugging Face Hub.
        dtype: dtype of weights and computation; None keeps the one on disk.
        max_pixels: maximum number of pixels per image, for models with images of any size; larger images are resized.
            0 for the family's default.
        mesh: devices to shard the model over; None for the default device.

    Raises:
        UserError: there is no such model, or an argument is not allowed.
    """
    check_argument("folder", folder, PATH, "the folder or the name of a model")
    check_argument("dtype", dtype, (str, type(None)), "'float32', 'bfloat16', 'float16' or None")
    check_argument("max_pixels", max_pixels, (int, np.integer), "a whole number")
    check_argument("mesh", mesh, (jax.sharding.Mesh, type(None)), "a jax.sharding.Mesh or None")
    return _load(folder, dtype, max_pixels, mesh)


def _load(
    folder: str | Path,
    dtype: str | None,
    max_pixels: int,
    mesh: jax.sharding.Mesh | None,
    name: str = "max_pixels",
) -> Answerer:
    """Does the work of `load`; `name` is that of `max_pixels` in messages."""
    if max_pixels < 0:
        raise UserError(f"{name}={max_pixels}: it is negative. Give 0, or the largest number of pixels of an image.")
    folder = sources.fetch_model(folder)
    bundle = ModelBundle.load(folder, dtype=dtype, mesh=mesh)
    default = bundle.config.default_max_pixels if bundle.processor.max_pixels else 0
    if limit := max_pixels or default:
        bundle.processor.limit_pixels(limit, name)
    return Answerer(bundle, batch_size=1)


def answer(
    model: Answerer,
    question: str,
    image: str | Path | Image.Image | np.ndarray | None = None,
    *,
    max_new_tokens: int = 50,
) -> str:
    """Answers one question by greedy decoding.

    Args:
        model: from `load`.
        question: the question.
        image: image file, PIL image or uint8 array [height, width, 3] of RGB values that the question is about; None
            for a text-only question.
        max_new_tokens: maximum number of tokens of the answer; fewer if the model's context ends before.

    Raises:
        UserError: the image cannot be read, the question is blank or too long for the model, or an argument has another
            type.
    """
    check_argument("model", model, Answerer, "what vkd_jax.load returns")
    check_argument("question", question, str, "one question as a text; call answer once for each question")
    check_argument("max_new_tokens", max_new_tokens, (int, np.integer), "a whole number of at least 1")
    image = _checked_image(image)
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens={max_new_tokens}: give at least 1.")
    if not plain_name(question):
        raise UserError("the question is blank; ask something.")
    if image is not None and not isinstance(image, Image.Image):
        image = _read_image(image)
    encoded_image = None if image is None else model.encode_images([image])
    prompt, _ = model.processor.encode(question, None, encoded_image.blank_images(0) if encoded_image else ())
    free_positions = max(model.config.text.max_positions - len(prompt), 1)
    return model.generate([question], encoded_image, max_new_tokens=min(max_new_tokens, free_positions))[0]


def _checked_image(image: Any) -> str | Path | Image.Image | None:
    """An image of an allowed type; an array as a PIL image."""
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise UserError(
                f"image: an array of {image.dtype} with the shape {image.shape} is not allowed. Give uint8 values of "
                "the shape (height, width, 3)."
            )
        return Image.fromarray(image)
    kinds = (*PATH, Image.Image, type(None))
    check_argument("image", image, kinds, "an image file, a PIL image, an array of uint8, or None")
    return image


def _read_image(name: str | Path) -> Image.Image:
    with located("--image"):
        if "://" in str(name):
            raise UserError(f"{name} is an address, and images are read from a disk; download it and pass its path.")
        path = storage.resolve(name)
    data = files.read_bytes(path, MOST_IMAGE_BYTES)
    try:
        return open_image(data)
    except UserError as error:
        raise UserError(f"{path} cannot be used: {error}.") from error


@commands.guarded
def main() -> int:
    """Runs the command line and returns its exit status."""
    parser = command_line.ArgumentParser(prog="vkd ask", description=__doc__)
    parser.add_argument("--model", required=True, help="shipped model, Hugging Face model folder, or id on the hub")
    parser.add_argument("--question", required=True, help="text of the question")
    parser.add_argument("--image", help="image file; without it the question is text-only")
    parser.add_argument("--max_new_tokens", type=int, default=50, help="longest answer, in tokens (50)")
    parser.add_argument("--max_pixels", type=int, default=0, help="resize larger images (not LLaVA-1.5, Gemma)")
    args = parser.parse_args()
    with memory.exhausted():
        image = None if args.image is None else _read_image(args.image)  # before a model that takes minutes
        model = _load(args.model, None, args.max_pixels, None, name="--max_pixels")
        text = answer(model, args.question, image, max_new_tokens=args.max_new_tokens)
    command_line.show(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
