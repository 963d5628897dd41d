"""Image rephrasing: the same images, slightly changed before the model's own image processing.

noise        Gaussian noise of standard deviation `noise`, for pixels from 0 to 1
brightness   pixels times `brightness`
contrast     differences from the mean gray level times `contrast`
resize       downsampled to `resize` of the sides, and upsampled again
crop         the central `crop` of the sides, enlarged to the original size
blur         Gaussian blur of standard deviation `blur` times the shorter side
occlusion    a gray square of `occlusion` times the shorter side at a random position

Image sizes stay, so the number of image tokens stays as well.

Reference: the paraphrased questions of Lynch et al., "Eight methods to evaluate robust unlearning in LLMs", arXiv
2402.16835, applied to images.
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

GRAY = (128, 128, 128)
MIN_SIDE = 0.1  # smallest side of a resized or cropped image, as a share of the original

Change = Callable[[Image.Image, np.random.Generator], Image.Image]


@dataclasses.dataclass(frozen=True)
class Rephrase(Section):
    """The strength of each image change."""

    SECTION: ClassVar[str] = "attacks.rephrase"
    noise: float = setting(
        0.02, "Standard deviation of the noise, as a share of the range of values.", minimum=0, maximum=1
    )
    brightness: float = setting(0.85, "Factor of the brightness.", minimum=0, maximum=10)
    contrast: float = setting(0.85, "Factor of the contrast.", minimum=0, maximum=10)
    resize: float = setting(0.5, "Side of the coarser copy, as a share of the image's.", minimum=MIN_SIDE, maximum=1)
    crop: float = setting(0.9, "Side of the crop, as a share of the image's.", minimum=MIN_SIDE, maximum=1)
    blur: float = setting(0.02, "Radius of the blur, as a share of the shorter side.", minimum=0, maximum=1)
    occlusion: float = setting(0.25, "Side of the covered square, as a share of the image's.", minimum=0, maximum=1)

    TITLE: ClassVar[str] = "Image rephrasing: the same images, slightly changed"
    ABOUT: ClassVar[str] = (
        "The questions about the people to forget are asked again with changed copies of their images: with noise, "
        "darker, with less contrast, at a lower resolution, cropped, blurred, or with a gray square. An accuracy above "
        "that of the unchanged images means that single images were forgotten rather than people."
    )
    METRIC: ClassVar[str] = "accuracy"
    VARIANTS: ClassVar[Mapping[str, str]] = {}

    def check(self, config: RunConfig) -> None:
        """All valid settings can run."""

    def changes(self) -> dict[str, Change]:
        """The change of each variant: a function of an RGB image and a random generator."""
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
        """The answers about the unchanged images and about each changed copy, all asked in one pass."""
        questions = base.questions(subject, Role.FORGET)
        records = [base.attack_record(UNCHANGED, r) for r in subject.unattacked(questions)]
        images = {e.image_id: e.image for examples in questions.values() for e in examples}
        sets = {}
        for variant, change in self.changes().items():
            copies = {
                image_id: changed(data, change, rng(subject.seed, f"rephrase/{variant}/{image_id}"))
                for image_id, data in images.items()
            }
            for name, examples in questions.items():
                sets[variant, name] = [
                    dataclasses.replace(e, image=copies[e.image_id], image_id=f"{e.image_id}/{variant}")
                    for e in examples
                ]
        answers = subject.ask_sets(subject.model, sets)
        return records + [base.attack_record(r["set"][0], r | {"set": r["set"][1]}) for r in answers]

    def summarize(self, records: Mapping[str, Records]) -> list[AttackCell]:
        """The accuracy with each change."""
        return base.accuracy(records)

    def _noisy(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        pixels = np.asarray(image) + 255 * self.noise * rng.standard_normal((image.height, image.width, 3))
        return Image.fromarray(np.rint(pixels.clip(0, 255)).astype(np.uint8))

    def _coarse(self, image: Image.Image, _: np.random.Generator) -> Image.Image:
        small = [max(1, round(self.resize * side)) for side in image.size]
        return image.resize(small, Image.Resampling.BILINEAR).resize(image.size, Image.Resampling.BILINEAR)

    def _cropped(self, image: Image.Image, _: np.random.Generator) -> Image.Image:
        x, y = (round((1 - self.crop) / 2 * side) for side in image.size)
        center = image.crop((x, y, image.width - x, image.height - y))  # the filter must not see pixels outside
        return center.resize(image.size, Image.Resampling.BILINEAR)

    def _covered(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        side = round(self.occlusion * min(image.size))
        x, y = (int(rng.integers(length - side + 1)) for length in image.size)
        covered = image.copy()
        covered.paste(GRAY, (x, y, x + side, y + side))
        return covered


def changed(data: bytes, change: Change, rng: np.random.Generator) -> bytes:
    """Applies a change to an encoded image; returns a PNG."""
    stream = io.BytesIO()
    change(open_image(data).convert("RGB"), rng).save(stream, "png")
    return stream.getvalue()
