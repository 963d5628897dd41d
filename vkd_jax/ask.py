"""Ask a model a question, with or without a picture.

python -m vkd_jax.ask --model DIR --image FILE --question TEXT

>>> from vkd_jax import ask
>>> model = ask.load("tiny_llava")
>>> ask.answer(model, "What colour is a banana?")
'yellow'
"""

import argparse
import sys
from pathlib import Path

from PIL import Image

from vkd_jax.checkpoints.bundle import ModelBundle
from vkd_jax.data.images import open_image
from vkd_jax.data.processor import MAX_PIXELS
from vkd_jax.evaluation.inference import Answerer
from vkd_jax.runtime import hub
from vkd_jax.types import UserError


def load(folder: str | Path, *, dtype: str | None = None, max_pixels: int = MAX_PIXELS) -> Answerer:
    """A model from any supported Hugging Face folder or hub id, ready to be asked.

    Args:
        folder: of the model, or its id.
        dtype: of weights and computation; None keeps the one on disk.
        max_pixels: larger pictures are shrunk to so many, where the model's pictures differ in size.
    """
    folder = hub.fetch_model(folder)
    bundle = ModelBundle.load(folder, dtype=dtype)
    if bundle.processor.max_pixels:
        bundle.processor.limit_pixels(max_pixels)
    return Answerer(bundle, batch_size=1)


def answer(
    model: Answerer, question: str, image: str | Path | Image.Image | None = None, *, max_new_tokens: int = 50
) -> str:
    """The greedy answer to one question about a picture (a file or a PIL image), or about none.

    Raises:
        UserError: the picture cannot be read, or the question is too long for the model.
    """
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens={max_new_tokens}: an answer has at least one token.")
    picture = image if image is None or isinstance(image, Image.Image) else _read(Path(image))
    seen = None if picture is None else model.look([picture])
    prompt, _ = model.processor.encode(question, None, seen.images(0) if seen else ())
    room = max(model.config.text.max_positions - len(prompt), 1)
    return model.generate([question], seen, max_new_tokens=min(max_new_tokens, room))[0]


def _read(path: Path) -> Image.Image:
    try:
        return open_image(path.read_bytes())
    except Exception as error:  # whatever the decoder of that format raises
        reason = getattr(error, "strerror", None) or "unknown or broken format"
        raise UserError(f"{path} is not a picture that can be read ({reason}).") from error


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m vkd_jax.ask", description="Ask a model a question.")
    parser.add_argument("--model", required=True, help="a Hugging Face model folder, or an id on its hub")
    parser.add_argument("--question", required=True)
    parser.add_argument("--image", help="a picture; without it the question is asked as text alone")
    parser.add_argument("--max_new_tokens", type=int, default=50)
    parser.add_argument("--max_pixels", type=int, default=MAX_PIXELS, help="shrink larger pictures (Qwen)")
    args = parser.parse_args()
    try:
        print(
            answer(
                load(args.model, max_pixels=args.max_pixels),
                args.question,
                args.image,
                max_new_tokens=args.max_new_tokens,
            )
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
