"""Pixel noise: small perturbations of the images that are optimized to make the model answer again.

    universal   one delta for all images, learned from a share of the people and asked about the other people (SUA)
    per_image   a delta for each image, learned from some questions about it and asked the others (PGD)

Both minimize, over pixels x in [0, 1] at the size that the model reads,

    L(delta) = CE(answer; x') + CE(answer; D(x')) - weight_cosine cos(E(x'), E(D(x'))),    x' = clip(x + delta, 0, 1)

by delta <- clip(delta - step sign(grad L), -radius, radius). D is a 3 x 3 binomial blur, in place of the learned
denoiser of SUA, and E the mean of the image's features: the perturbation should survive denoising. The attacked images
are rounded to 8 bits and asked like any other image. The baseline `clean` are the same images without delta, at the
size that the model reads. The retain-only model has a delta of its own.

Reference: SUA, "stealthy universal attack" on unlearned multimodal models. Its published code computes the cosine
without a gradient, so that the term does nothing, does not clip x + delta to valid pixels, starts from the black image,
and optimizes on questions of the same kind that it reports without a clean baseline or control.
"""

import dataclasses
import functools
import io
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from PIL import Image

from vkd_jax.attacks import base
from vkd_jax.attacks.base import Records, Subject
from vkd_jax.attacks.finetuning import rows_of
from vkd_jax.attacks.lessons import Lesson, attacker_rows, labeled, lessons, recoveries
from vkd_jax.config.fields import Section, setting
from vkd_jax.config.schema import RunConfig
from vkd_jax.data.batching import padded_rows
from vkd_jax.data.encoding import Batch, EncodedSet
from vkd_jax.data.sampler import Sampler
from vkd_jax.methods import losses
from vkd_jax.methods.base import logits_of_features
from vkd_jax.models.base import VisualTokens, bind
from vkd_jax.results import UNCHANGED, AttackCell
from vkd_jax.runtime import multihost
from vkd_jax.runtime.mesh import replicated, shard_rows, shards
from vkd_jax.types import Example, Params, Role

BINOMIAL = np.outer([0.25, 0.5, 0.25], [0.25, 0.5, 0.25]).astype(np.float32)


LEAST_CHANGE = 0.5 / 255  # of a pixel in [0, 1]; a smaller one is lost when the image is stored


@dataclasses.dataclass(frozen=True)
class PixelNoise(Section):
    """Optimized perturbations of the pixels: one for all images, and one for each image."""

    SECTION: ClassVar[str] = "attacks.pixel_noise"
    radius: float = setting(12 / 255, "Largest change of a pixel in [0, 1].", above=0, maximum=1)
    step: float = setting(1 / 255, "Change of a pixel in one step.", above=0, maximum=1)
    universal_steps: int = setting(100, "Steps of the universal perturbation; 0 for none.", minimum=0, maximum=10**6)
    image_steps: int = setting(30, "Steps of each image's perturbation; 0 for none.", minimum=0, maximum=10**6)
    batch_size: int = setting(6, "Questions per step, rounded up to a multiple of the devices.", minimum=1)
    people: float = setting(0.5, "Share of the people whom the universal one is learned from.", above=0, below=1)
    questions: float = setting(
        0.5, "Share of each image's questions that its perturbation is learned from.", above=0, below=1
    )
    images: int = setting(12, "Images that get their own perturbation; 0 for all.", minimum=0)
    weight_cosine: float = setting(0.7, "Weight of the cosine between the features with and without blur.", minimum=0)

    TITLE: ClassVar[str] = "Pixel noise: images perturbed to make the model answer"
    ABOUT: ClassVar[str] = (
        "An attacker who knows the weights optimizes a perturbation that is hard to see: one for all images, learned "
        "from some of the people to forget and asked about the *others*, and one for each image, learned from some "
        "questions about it and asked the *others*. The baseline are the same images without a perturbation. Compare "
        "the accuracy with that of the retain-only model under a perturbation of its own."
    )
    METRIC: ClassVar[str] = "accuracy"
    VARIANTS: ClassVar[Mapping[str, str]] = {
        "clean": "no perturbation",
        "universal": "one perturbation for all images",
        "per_image": "a perturbation for each image",
    }

    def check(self, config: RunConfig) -> None:
        """Checks that each perturbation can change a pixel of 8 bits.

        Raises:
            UserError: the steps are so small that all attacked images would be the unchanged ones.
        """
        for field in ("universal_steps", "image_steps"):
            steps = getattr(self, field)
            if steps and min(self.radius, steps * self.step) < LEAST_CHANGE:
                raise self.error(
                    "radius" if self.radius < LEAST_CHANGE else "step",
                    f"{field}={steps} of {self.step:g} within radius={self.radius:g} changes no pixel by 1/255, so "
                    f"nothing would be attacked. Give a radius, and steps times step, of at least {LEAST_CHANGE:.4f}.",
                )

    def run(self, subject: Subject) -> Records:
        """The answers before the attack, with clean copies of the images, and with both perturbations.

        Models whose images differ in size are not attacked: no perturbation fits all of their images.
        """
        if subject.model.processor.max_pixels is not None:
            logging.warning("%s: attacks.pixel_noise supports only models whose images have one size", subject.name)
            return []
        sets = base.questions(subject, Role.FORGET, Role.FORGET_HOLDOUT)
        pixels = _Pixels(subject)
        records = [base.attack_record(UNCHANGED, r) for r in subject.unattacked(sets)]
        clean = subject.ask_sets(subject.model, _shown(sets, "clean", lambda e: pixels.png(e.image)))
        records += [base.attack_record("clean", r) for r in clean]
        encoded = subject.model.encode(subject.forgets)  # one shape for both
        if self.universal_steps:
            for lesson in lessons(subject.forgets, subject.seed, people=(self.people,)):
                records += self._universal(subject, sets, pixels, encoded, lesson)
        if self.image_steps:
            records += self._per_image(subject, sets, pixels, encoded)
        return records

    def summarize(self, records: Mapping[str, Records]) -> list[AttackCell]:
        """The accuracy of each perturbation on the answers that the attacker did not know, and the recovery."""
        return recoveries(records)

    def _universal(
        self, subject: Subject, sets: Mapping, pixels: "_Pixels", encoded: EncodedSet, lesson: Lesson
    ) -> Records:
        delta = self.learn(subject, rows_of(encoded, lesson.rows), pixels, universal=True)[0]
        attacked = _shown(sets, "universal", lambda e: pixels.png(e.image, delta))
        answers = subject.ask_sets(subject.model, attacked)
        fields = dict(variant="universal", steps=self.universal_steps, share=self.people, unit="people")
        return labeled(subject, _original(answers), lesson.rows, lesson.people, **fields)

    def _per_image(self, subject: Subject, sets: Mapping, pixels: "_Pixels", encoded: EncodedSet) -> Records:
        forget_sets = subject.with_role(Role.FORGET)
        rows = known_rows(subject.forgets, self.questions, self.images, subject.seed)
        if not rows:
            return []
        learned = self.learn(subject, rows_of(encoded, np.array(rows)), pixels, universal=False)
        shown = {encoded.image_rows[i]: subject.forgets[i].image_id for i in rows}
        deltas = {image_id: delta for (_, image_id), delta in zip(sorted(shown.items()), learned, strict=True)}
        asked = {name: [e for e in sets.get(name, ()) if e.image_id in deltas] for name in forget_sets}
        asked = {name: examples for name, examples in asked.items() if examples}
        attacked = _shown(asked, "per_image", lambda e: pixels.png(e.image, deltas[e.image_id]))
        answers = subject.ask_sets(subject.model, attacked) if asked else []
        fields = dict(variant="per_image", steps=self.image_steps, share=self.questions, unit="questions")
        return labeled(subject, _original(answers), rows, **fields)

    def learn(self, subject: Subject, encoded: EncodedSet, pixels: "_Pixels", *, universal: bool) -> np.ndarray:
        """Optimizes the perturbations, of all images together or of each in order: float32 [1 or m, H, W, 3].

        A step reads `batch_size` questions for the universal one, and every question for those of each image.
        """
        mesh, model = subject.model.mesh, subject.model
        multiple = 1 if mesh is None else shards(mesh)
        size = -(-self.batch_size // multiple) * multiple
        sampler = Sampler(encoded, size, seed=subject.seed, name="pixel_noise")
        shown, owner_of_row = np.unique(encoded.image_rows, return_inverse=True)

        def batch(rows: np.ndarray) -> tuple[Batch, np.ndarray, np.ndarray]:
            counts = np.append(True, np.diff(rows) != 0) if not universal else np.ones(size, bool)
            owners = np.zeros(size, np.int32) if universal else owner_of_row[rows].astype(np.int32)
            arrays = encoded.batch(rows), owners, counts.astype(np.float32)
            return arrays if mesh is None else shard_rows(mesh, arrays)

        deltas = jnp.zeros((1 if universal else len(shown), *encoded.images.shapes[0]), jnp.float32)
        fixed = () if universal else [batch(rows) for rows in padded_rows(len(encoded), size)]
        for number in range(self.universal_steps if universal else self.image_steps):
            # Put anew in each step: another sharding than before would compile the program again.
            deltas = deltas if mesh is None else jax.device_put(deltas, replicated(mesh))
            gradient = jnp.zeros_like(deltas)
            for arrays in [batch(sampler.rows(number))] if universal else fixed:
                normalization = pixels.mean, pixels.std
                gradient += noise_gradient(
                    model.graphdef, model.params, deltas, *arrays, normalization, self.weight_cosine
                )
            deltas = signed_step(deltas, gradient, self.step, self.radius)
        return multihost.gather(deltas)


def signed_step(deltas: jax.Array, gradient: jax.Array, step: float, radius: float) -> jax.Array:
    """Moves each pixel against its gradient, within `radius` of the image."""
    return jnp.clip(deltas - step * jnp.sign(gradient), -radius, radius)


@functools.partial(jax.jit, static_argnums=0)
def noise_gradient(
    graphdef: Any,
    params: Params,
    deltas: jax.Array,
    batch: Batch,
    owners: jax.Array,
    counts: jax.Array,
    normalization: tuple[jax.Array, jax.Array],
    weight_cosine: float,
) -> jax.Array:
    """The gradient of L, summed over the rows of a batch, with respect to the perturbations.

    Args:
        graphdef: the structure of the model.
        params: its weights.
        deltas: [m, H, W, 3].
        batch: b questions with their normalized images.
        owners: int [b], the perturbation of each row.
        counts: [b], 0 for rows of padding and 1 for others.
        normalization: mean and standard deviation of the image processor, [3] each.
        weight_cosine: weight of the cosine.
    """
    mean, std = normalization
    model, clean = bind(graphdef, params), batch.images["pixels"] * std + mean

    def read(pixels: jax.Array) -> tuple[jax.Array, jax.Array]:
        features, _ = model.encode({"pixels": (pixels - mean) / std})
        logits = logits_of_features(model, batch, features)
        return losses.answer_cross_entropy(logits, batch.targets, batch.target_mask), _mean_feature(features)

    def loss(deltas: jax.Array) -> jax.Array:
        attacked = jnp.clip(clean + deltas[owners], 0.0, 1.0)
        (direct, feature), (blurred, other) = read(attacked), read(blur(attacked))
        cosine = 1.0 - optax.losses.cosine_distance(feature, other, epsilon=1e-8)
        return jnp.sum(counts * (direct + blurred - weight_cosine * cosine))

    return jax.grad(loss)(deltas)


def _mean_feature(features: VisualTokens) -> jax.Array:
    weights = features.valid[..., None].astype(jnp.float32)
    return (features.values * weights).sum(1) / weights.sum(1)


def blur(images: jax.Array) -> jax.Array:
    """Convolves images [b, H, W, 3] with a 3 x 3 binomial filter; the border is repeated."""
    padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    height, width = images.shape[1:3]
    return sum(
        float(BINOMIAL[i, j]) * padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)
    )  # fmt: skip


def known_rows(forgets: Sequence[Example], share: float, images: int, seed: int) -> list[int]:
    """The questions that the attacker knows of each image: a share, at least one, and never all.

    Args:
        forgets: the forget questions.
        share: of each image's questions.
        images: the number of images, drawn at random; 0 for all. Images with one question are left out.
        seed: of the draws.
    """
    of_image: dict[str, list[int]] = {}
    for row, example in enumerate(forgets):
        of_image.setdefault(example.image_id, []).append(row)
    groups = [rows for rows in of_image.values() if len(rows) > 1]
    if 0 < images < len(groups):
        groups = [groups[i] for i in attacker_rows(images / len(groups), len(groups), seed)]
    return [
        rows[i]
        for number, rows in enumerate(groups)
        for i in attacker_rows(share, len(rows), seed + number)[: len(rows) - 1]
    ]


class _Pixels:
    """Images as the model reads them, as pixels in [0, 1]."""

    def __init__(self, subject: Subject):
        self._processor = subject.model.processor
        options = self._processor.image_processor
        ones = np.ones(3, np.float32)
        normalizes = getattr(options, "do_normalize", True)
        self.mean = ones * np.float32(options.image_mean if normalizes else 0)
        self.std = ones * np.float32(options.image_std if normalizes else 1)

    def png(self, image: bytes, delta: np.ndarray | float = 0.0) -> bytes:
        """The image at the model's size with a perturbation, rounded to 8 bits."""
        pixels = np.clip(self._processor.image(image) * self.std + self.mean + delta, 0, 1)
        stream = io.BytesIO()
        Image.fromarray(np.rint(255 * pixels).astype(np.uint8)).save(stream, "png")
        return stream.getvalue()


def _shown(sets: Mapping[str, Sequence[Example]], variant: str, change: Any) -> dict[str, list[Example]]:
    """The questions with changed images."""
    images: dict[str, bytes] = {}
    for e in (e for examples in sets.values() for e in examples):
        if e.image_id not in images:
            images[e.image_id] = change(e)
    return {
        name: [dataclasses.replace(e, image=images[e.image_id], image_id=f"{e.image_id}//{variant}") for e in examples]
        for name, examples in sets.items()
    }


def _original(answers: Records) -> Records:
    """The records with the IDs of the unchanged images."""
    return [r | {"image_id": r["image_id"].rsplit("//", 1)[0]} for r in answers]
