"""Image rephrasing: the same people on pictures that were changed a little before the model's own processing.

noise        normal, of standard deviation `noise`, pixels being 0 to 1
brightness   pixels times `brightness`
contrast     distances from the picture's mean grey times `contrast`
resize       to `resize` of its sides, and up again
crop         the middle `crop` of its sides, enlarged to the old size
blur         Gaussian, of standard deviation `blur` times the shorter side
occlusion    a grey square of `occlusion` times the shorter side, somewhere

Sizes stay, so that a picture has as many tokens as before.

Reference: Lynch et al., "Eight methods to evaluate robust unlearning in LLMs", arXiv 2402.16835, rephrase texts so
"""

import dataclasses
import io
from collections.abc import Callable, Mapping
from typing import ClassVar

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter

from vkd_jax.attacks import base
from vkd_jax.attacks.base import Records, Subject
from vkd_jax.config.fields import Section, setting
from vkd_jax.config.schema import RunConfig
from vkd_jax.data.batching import rng
from vkd_jax.data.images import open_image
from vkd_jax.results import UNCHANGED, AttackCell
from vkd_jax.types import Role

GREY = (128, 128, 128)
LEAST = 0.1  # of the sides, that is left of a picture

Change = Callable[[Image.Image, np.random.Generator], Image.Image]


@dataclasses.dataclass(frozen=True)
class Rephrase(Section):
    """How strong each change is."""

    SECTION: ClassVar[str] = "attacks.rephrase"
    noise: float = setting(0.02, "Standard deviation of the noise, as a share of the range of values.", minimum=0)
    brightness: float = setting(0.85, "Factor of the brightness.", minimum=0)
    contrast: float = setting(0.85, "Factor of the contrast.", minimum=0)
    resize: float = setting(0.5, "Side of the coarser copy, as a share of the image's.", minimum=LEAST, maximum=1)
    crop: float = setting(0.9, "Side of the crop, as a share of the image's.", minimum=LEAST, maximum=1)
    blur: float = setting(0.02, "Radius of the blur, as a share of the shorter side.", minimum=0)
    occlusion: float = setting(0.25, "Side of the covered square, as a share of the image's.", minimum=0, maximum=1)

    TITLE: ClassVar[str] = "Image rephrasing: the same pictures, slightly changed"
    ABOUT: ClassVar[str] = (
        "The questions about the people to forget are asked again of copies of their pictures: with noise, darker, "
        "with less contrast, coarser, cropped, blurred, or with a part covered. Figures above those of the unchanged "
        "pictures say that single photographs were forgotten rather than people."
    )
    METRIC: ClassVar[str] = "accuracy"
    VARIANTS: ClassVar[Mapping[str, str]] = {}

    def check(self, config: RunConfig) -> None:
        """Any settings can run."""

    def changes(self) -> dict[str, Change]:
        """By variant, what is done to an RGB picture."""
        return {
            "noise": self._noisy,
            "brightness": lambda image, _: ImageEnhance.Brightness(image).enhance(self.brightness),
            "contrast": lambda image, _: ImageEnhance.Contrast(image).enhance(self.contrast),
            "resize": self._coarse,
            "crop": self._cropped,
            "blur": lambda image, _: image.filter(ImageFilter.GaussianBlur(self.blur * min(image.size))),
            "occlusion": self._covered,
        }

    def run(self, subject: Subject) -> Records:
        """The answers about the pictures as they are, and about each changed copy, all asked in one pass."""
        questions = base.questions(subject, Role.FORGET)
        records = [base.attack_record(UNCHANGED, r) for r in subject.unattacked(questions)]
        pictures = {e.image_id: e.image for examples in questions.values() for e in examples}
        asked = {}
        for variant, change in self.changes().items():
            copies = {
                image_id: changed(data, change, rng(subject.seed, f"rephrase/{variant}/{image_id}"))
                for image_id, data in pictures.items()
            }
            for name, examples in questions.items():
                asked[variant, name] = [
                    dataclasses.replace(e, image=copies[e.image_id], image_id=f"{e.image_id}/{variant}")
                    for e in examples
                ]
        answers = subject.ask_sets(subject.model, asked)
        return records + [base.attack_record(r["set"][0], r | {"set": r["set"][1]}) for r in answers]

    def summarize(self, records: Mapping[str, Records]) -> list[AttackCell]:
        """The share of correct answers of every change."""
        return base.accuracy(records)

    def _noisy(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        pixels = np.asarray(image) + 255 * self.noise * rng.standard_normal((image.height, image.width, 3))
        return Image.fromarray(np.rint(pixels.clip(0, 255)).astype(np.uint8))

    def _coarse(self, image: Image.Image, _: np.random.Generator) -> Image.Image:
        small = [max(1, round(self.resize * side)) for side in image.size]
        return image.resize(small, Image.Resampling.BILINEAR).resize(image.size, Image.Resampling.BILINEAR)

    def _cropped(self, image: Image.Image, _: np.random.Generator) -> Image.Image:
        x, y = (round((1 - self.crop) / 2 * side) for side in image.size)
        middle = image.crop((x, y, image.width - x, image.height - y))  # before the filter, which looks around
        return middle.resize(image.size, Image.Resampling.BILINEAR)

    def _covered(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        side = round(self.occlusion * min(image.size))
        x, y = (int(rng.integers(length - side + 1)) for length in image.size)
        covered = image.copy()
        covered.paste(GREY, (x, y, x + side, y + side))
        return covered


def changed(data: bytes, change: Change, rng: np.random.Generator) -> bytes:
    """A changed copy of an encoded picture, as PNG."""
    stream = io.BytesIO()
    change(open_image(data).convert("RGB"), rng).save(stream, "png")
    return stream.getvalue()
