"""Visual knowledge distillation (VKD): a reconstruction of "Robust MLLM Unlearning via Visual Knowledge Distillation".

With a forget batch (x_f, q_f, y_f), a retain batch (x_r, q_r, y_r), the student theta, taps l and a distance D:

    L_f = w_cf * forget(theta; x_f, q_f, y_f) + w_kf * sum_l D(h_l(theta, x_f), target_l(x_f))
    L_r = w_cr * CE(theta; x_r, q_r, y_r)     + w_kr * sum_l D(h_l(theta, x_r), h_l(teacher, x_r))

    update = mask * optimizer(grad L_f + grad L_r)     mask_scope="both"
    update = optimizer(mask * grad L_f + grad L_r)     mask_scope="forget"

Only the projector and the vision tower, or its last `blocks` blocks, train; the language model has neither gradients
nor optimizer state. Each detail that the paper's abstract leaves open is an assumption, A1 to A8, and a field below.

h_l(teacher, x_r) of all retain images is cached, 5.6 MiB per image for LLaVA-1.5-7B: in the memory of the host up to
`cache_gib`, and in memory-mapped files above it. If a set is too large for both, use `teacher_features="recomputed"`:
each step computes the teacher's features of its retain images. This costs one more pass of the vision tower, and memory
and disk do not grow with the set.

Reference: arXiv 2512.11325. Not verified on official code, of which none is known.
"""

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vkd_jax import messages
from vkd_jax.config.fields import setting
from vkd_jax.data import augment
from vkd_jax.data.batching import rng
from vkd_jax.data.encoding import Batch, EncodedSet
from vkd_jax.methods import base, feature_targets, losses, saliency
from vkd_jax.methods.ascent import BOUND_SPEC, Ascent
from vkd_jax.methods.scope import TRAIN_SCOPES, frozen_blocks
from vkd_jax.methods.text_stream import FORGET_STREAM
from vkd_jax.models import lora
from vkd_jax.models.base import VisualTokens
from vkd_jax.runtime import memory
from vkd_jax.types import Params

FORGET = ("npo", "ga", "none")
TARGETS = ("swap", "look_alike", "anchor", "base", "repel", "none")
TEACHERS = ("vanilla", "base")
MASK_SCOPES = ("forget", "both", "none")
TEACHER_FEATURES = ("cached", "recomputed")
SCALE_IMAGES = 256  # retain images that scales and means are computed from if features are recomputed


@dataclasses.dataclass(frozen=True)
class VKD(Ascent):
    """Visual knowledge distillation with masked updates; a weight of 0 removes its term."""

    train: str = setting("visual", "A7: weights that train; see `Scope`.", choices=TRAIN_SCOPES)
    distance: str = setting("mse", "A1: distance D between features.", choices=tuple(losses.DISTANCES))
    forget: str = setting("ga", "A2: loss of the output on the forget set, or 'none'.", choices=FORGET)
    beta: float = setting(0.4, "Inverse temperature of forget=npo, per nat.", above=0)
    cap: float = setting(
        4.0, "Cross-entropy at which forget=ga stops, in nats per token; inf for no bound.", above=0, infinity=True
    )
    target: str = setting("swap", "A3: target of the features of forget images.", choices=TARGETS)
    repel_cap: float = setting(1.0, "Distance at which target=repel stops, in units of D.", above=0)
    teacher: str = setting("vanilla", "A4: teacher on the retain set.", choices=TEACHERS)
    teacher_features: str = setting(
        "cached",
        "How the retain set gets the teacher's features: 'cached', in memory or in files (see cache_gib), or "
        "'recomputed' at each step, for sets that fit in neither.",
        choices=TEACHER_FEATURES,
    )
    taps: tuple[str, ...] = setting(("features", "projector"), "A5: features that are distilled.", nonempty=True)
    mask_scope: str = setting("both", "A6: gradients that the saliency mask covers.", choices=MASK_SCOPES)
    mask_keep: float | None = setting(
        0.6, "Share of the weights that the mask selects; None to use mask_threshold.", above=0, maximum=1
    )
    mask_threshold: float | None = setting(
        None, "Smallest ratio F_f / F_r of a selected weight; None to use mask_keep.", minimum=0
    )
    mask_eps: float = setting(1e-12, "Constant that is added to F_r before the division.", above=0)
    fisher_samples: int = setting(128, "Largest number of examples per set for the Fisher information.", minimum=1)
    fisher_chunk: int = setting(
        16, "Number of per-example gradients in memory at once, each the size of the trainable weights.", minimum=1
    )
    augment_forget: int = setting(
        8, "A8: augmented copies of each forget image, so that unseen images are forgotten too.", minimum=0
    )
    augment_retain: int = setting(
        0, "A8: augmented copies of each retain image, each with its own features of the teacher.", minimum=0
    )
    weight_forget_ce: float = setting(1.0, "Weight w_cf of the forget loss of the output.", minimum=0)
    weight_forget_distill: float = setting(1.0, "Weight w_kf of the forget distillation.", minimum=0)
    weight_retain_ce: float = setting(1.0, "Weight w_cr of the retain loss of the output.", minimum=0)
    weight_retain_distill: float = setting(8.0, "Weight w_kr of the retain distillation.", minimum=0)

    def validate(self) -> None:
        """Also checks that exactly one field determines the size of the mask, and which fields exclude each other."""
        super().validate()
        if self.teacher_features == "recomputed" and self.teacher != "vanilla":
            raise self.error(
                "teacher_features",
                f"a step has the weights of the vanilla model, not of teacher={self.teacher}. Give 'cached'.",
            )
        if self.null_space.energy and self.mask_scope == "both":
            raise self.error(
                "null_space.energy", "a masked update leaves the null space. Give mask_scope=none or forget."
            )
        if self.forget_text.weight and not (self.forget != "none" and self.weight_forget_ce):
            raise self.error(
                "forget_text.weight",
                "text has no features to distill, and the output has no forget loss. Give forget=ga or npo, and a "
                "weight_forget_ce.",
            )
        if self.mask_scope != "none" and (self.mask_threshold is None) == (self.mask_keep is None):
            raise self.error("mask_keep", "the mask takes mask_threshold or mask_keep. Set exactly one to a number.")

    @property
    def needs_base(self) -> bool:
        """Whether `prepare` loads the model before it was fine-tuned."""
        return "base" in (self.target, self.teacher)

    def check_model(self, paths: Iterable[str], model_config: Any) -> None:
        """Checks the taps.

        Raises:
            UserError: the model does not have a tap, or no trainable weight precedes it.
        """
        blocks = [f"vision/{i}" for i in range(model_config.used_blocks)]
        constant = blocks[: frozen_blocks(self.trainable(paths, model_config), model_config)]
        available = [*blocks, "features", "projector"]
        for tap in self.taps:
            if tap not in available:
                raise self.error("taps", f"unknown tap {tap!r}. Available: {messages.choices(available)}.")
            if tap in constant:
                raise self.error("taps", f"{tap} precedes every trainable weight and never changes. Name a later one.")

    def prepare(self, context: base.Context) -> base.Prepared:
        """Caches teacher features, forget targets and reference log-probabilities, and computes the saliency mask."""
        self.check_model(context.params, context.model_config)
        augmented = {
            name: augment.augment_set(context.sets[name], copies, rng(context.seed, f"vkd/augment/{name}"))
            for name, copies in (("forget", self.augment_forget), ("retain", self.augment_retain))
        }
        bounds = self.bounds(context) if self.forget == "ga" else {}
        context = dataclasses.replace(context, sets={**context.sets, **augmented})
        forget, retain = context.sets["forget"], context.sets["retain"]
        specs = {
            name: self.cache_spec(name, base.tap_shapes(context, encoded), context.model_config)
            for name, encoded in augmented.items()
        }
        allocate = {
            name: base.cache_allocator(encoded, specs[name], self.cache_bytes) for name, encoded in augmented.items()
        }
        sources = self._source_rows(context)
        recorded = self._recorded_rows(context, sources)
        images = retain.images if len(recorded) == len(retain.images) else retain.images.subset(recorded)
        record = functools.partial(feature_targets.record_taps, context.graphdef, names=self.taps)
        vanilla_retain = record(context.vanilla_params, images, allocate=allocate["retain"])
        teacher_retain = vanilla_retain
        if self.teacher == "base":
            teacher_retain = record(context.base_params(), retain.images, allocate=allocate["retain"])
        scales = feature_targets.mean_squares(teacher_retain)
        cached = _cached_scales(scales, len(retain.images))
        if self.teacher_features == "cached":
            cached |= _cached_targets({tap: tokens.values for tap, tokens in teacher_retain.items()})
        retain = base.with_cache(retain, specs["retain"], cached)
        targets = self._targets(context, vanilla_retain, np.searchsorted(recorded, sources), allocate["forget"])
        cached = _cached_targets(targets) | (_cached_scales(scales, len(forget.images)) if targets else {})
        if "reference" in specs["forget"].per_example:
            cached["reference"] = base.reference_log_probs(context, forget)
        # Augmented copies follow the originals, one whole set after another.
        cached |= {name: np.tile(values, self.augment_forget + 1) for name, values in bounds.items()}
        forget = base.with_cache(forget, specs["forget"], cached)
        text = {stream: self.prepare_forget(context, stream) for stream in self.forget_streams[1:]}
        mask = None if self.mask_scope == "none" else self._mask(context)
        return base.Prepared(sets={**context.sets, **text, "forget": forget, "retain": retain}, mask=mask)

    def prepare_forget(self, context: base.Context, stream: str) -> EncodedSet:
        """Caches the reference log-probabilities of forget=npo for text-only questions."""
        forget, spec = context.sets[stream], self.cache_spec(stream, {}, context.model_config)
        values = {"reference": base.reference_log_probs(context, forget)} if spec.per_example else {}
        return base.with_cache(forget, spec, values)

    def cache_spec(self, stream, taps, model_config) -> base.CacheSpec:
        """Describes the target and scale of each tap, and what the loss of the output reads for each row."""
        del model_config
        if stream == FORGET_STREAM:
            return base.CacheSpec(per_example=base.REFERENCE_SPEC if self.forget == "npo" else {})
        if stream not in ("forget", "retain"):
            return base.CacheSpec()
        per_image, is_forget = {}, stream == "forget"
        if not is_forget or self.target != "none":
            for tap in self.taps:
                values = taps[tap].values
                dtype = jnp.float32 if is_forget and self.target == "anchor" else values.dtype
                per_image[f"scale/{tap}"] = jax.ShapeDtypeStruct((), jnp.float32)
                if is_forget or self.teacher_features == "cached":
                    per_image[f"target/{tap}"] = jax.ShapeDtypeStruct(values.shape[1:], dtype)
        per_example = {}
        if is_forget and self.forget == "npo":
            per_example = base.REFERENCE_SPEC
        if is_forget and self.forget == "ga" and self.bound != "cap":
            per_example = BOUND_SPEC
        return base.CacheSpec(per_image, per_example)

    def teachers(self) -> Mapping[str, base.TeacherFn]:
        """Also returns the recomputed features of the retain batch."""
        retain = {"retain": self._retain_targets} if self.teacher_features == "recomputed" else {}
        return {**super().teachers(), **retain}

    def _retain_targets(self, model, batch):
        _, taps = base.encode_images(model, batch)
        return {f"target/{tap}": taps[tap].values for tap in self.taps}

    def image_losses(self) -> Mapping[str, base.LossFn]:
        """Returns L_f and L_r, whose gradients are separate so that the mask can cover one of them."""
        return {"forget": self._forget_loss, "retain": self._retain_loss}

    def _forget_loss(self, model, batch):
        features, taps = base.encode_images(model, batch)
        distance = self._distance(taps, batch) if self.target != "none" else jnp.zeros(len(batch.tokens))
        distillation = -jnp.minimum(distance, self.repel_cap) if self.target == "repel" else distance
        loss = self.weight_forget_distill * distillation
        if self.forget == "none":  # the language model is not computed
            return jnp.mean(loss), base.mean_metrics(forget_distance=distance)
        ce, output = self._forget_output(model, batch, features)
        loss = jnp.mean(self.weight_forget_ce * output + loss)
        return loss, base.mean_metrics(forget_ce=ce, forget_output=output, forget_distance=distance)

    def _forget_output(self, model: Any, batch: Batch, features: VisualTokens | None) -> tuple[jax.Array, jax.Array]:
        """Computes the cross-entropy and the forget loss of each row's answer: [b], [b]."""
        logits = base.logits_of_features(model, batch, features)
        ce = losses.answer_cross_entropy(logits, batch.targets, batch.target_mask)
        npo = self.forget == "npo"
        return ce, base.npo_of_logits(logits, batch, self.beta) if npo else self.ascent(ce, batch)

    def text_forget_loss(self) -> base.LossFn:
        """Returns the forget loss of the output: a question without an image has no features to distill."""

        def loss(model, batch):
            ce, output = self._forget_output(model, batch, None)
            return self.weight_forget_ce * jnp.mean(output), base.mean_metrics(forget_ce=ce, forget_output=output)

        return loss

    def _retain_loss(self, model, batch):
        features, taps = base.encode_images(model, batch)
        distance = self._distance(taps, batch)
        loss = self.weight_retain_distill * distance
        if not self.weight_retain_ce:
            return jnp.mean(loss), base.mean_metrics(retain_distance=distance)
        logits = base.logits_of_features(model, batch, features)
        ce = losses.answer_cross_entropy(logits, batch.targets, batch.target_mask)
        loss = jnp.mean(self.weight_retain_ce * ce + loss)
        return loss, base.mean_metrics(retain_ce=ce, retain_distance=distance)

    def _distance(self, taps: Mapping[str, VisualTokens], batch: Batch) -> jax.Array:
        """Computes sum_l D(h_l, target_l) of each row: [b]."""
        distance = losses.DISTANCES[self.distance]
        return sum(
            distance(taps[tap].values, batch.cached[f"target/{tap}"], batch.cached[f"scale/{tap}"], taps[tap].valid)
            for tap in self.taps
        )

    def _source_rows(self, context: base.Context) -> np.ndarray:
        """Draws the retain image whose features are the target of each of the m forget images.

        Returns:
            int [m], or [0] if targets come from elsewhere.
        """
        if self.target == "look_alike":
            return self._look_alike_rows(context)
        if self.target == "swap":
            sizes = len(context.sets["retain"].images), len(context.sets["forget"].images)
            return rng(context.seed, "vkd/swap").integers(sizes[0], size=sizes[1])
        return np.zeros(0, int)

    def _recorded_rows(self, context: base.Context, sources: np.ndarray) -> np.ndarray:
        """The retain images whose features are recorded, ascending: all, or those that scales and targets need."""
        count = len(context.sets["retain"].images)
        if self.teacher_features == "cached":
            return np.arange(count)
        return np.union1d(rng(context.seed, "vkd/scales").permutation(count)[:SCALE_IMAGES], sources)

    def _targets(
        self,
        context: base.Context,
        retain: Mapping[str, VisualTokens],
        sources: np.ndarray,
        allocate: memory.Allocate,
    ) -> Mapping[str, np.ndarray]:
        """Computes the targets of the features of the m forget images: {tap: [m, p, c]}.

        Args:
            context: with the augmented sets.
            retain: the vanilla model's taps of the recorded retain images.
            sources: the `_source_rows`, as rows of the recorded images.
            allocate: allocates the targets.
        """
        images = context.sets["forget"].images
        if self.target == "none":
            return {}
        if self.target in ("base", "repel"):
            params = context.base_params() if self.target == "base" else context.params
            taps = feature_targets.record_taps(context.graphdef, params, images, self.taps, allocate=allocate)
            return {tap: tokens.values for tap, tokens in taps.items()}
        coords = feature_targets.tap_coords(context, images, self.taps)
        if self.target == "anchor":
            return {tap: feature_targets.mean_features(retain[tap], coords[tap], allocate) for tap in self.taps}
        return {
            tap: feature_targets.resample_features(retain[tap], sources, coords[tap], allocate) for tap in self.taps
        }

    def _look_alike_rows(self, context: base.Context) -> np.ndarray:
        """Draws, for each of the m forget images, an image of the person's look-alike: int [m]."""
        forget, retain = context.sets["forget"], context.sets["retain"]
        look_alikes, draw = feature_targets.look_alikes(context), rng(context.seed, "vkd/look_alike")
        images: dict[str, list[int]] = {}
        for example, row in zip(retain.examples, retain.image_rows, strict=True):
            images.setdefault(feature_targets.person_of(example), []).append(row)
        rows = np.zeros(len(forget.images), int)
        for example, row in zip(forget.examples, forget.image_rows, strict=True):
            rows[row] = draw.choice(images[look_alikes[feature_targets.person_of(example)]])
        return rows

    def _mask(self, context: base.Context) -> Params:
        """Computes the saliency mask over the trainable weights; adapters, which B = 0 makes look unused, all train."""
        paths = self.trainable(context.params, context.model_config)
        adapters = {path: np.array(True) for path in paths if lora.is_adapter(path)}
        if not (weights := [path for path in paths if path not in adapters]):
            return adapters
        information = base.fisher_information(
            context,
            weights,
            {name: context.sets[name] for name in ("forget", "retain")},
            samples=self.fisher_samples,
            chunk=self.fisher_chunk,
            name="vkd",
        )
        mask = saliency.mask_from_ratio(
            **information, threshold=self.mask_threshold, keep=self.mask_keep, eps=self.mask_eps
        )
        return mask | adapters

    def mask_shape(self, path, shape, model_config) -> tuple[int, ...]:
        """Returns the shape of the weight, or a scalar for an adapter."""
        return () if lora.is_adapter(path) else super().mask_shape(path, shape, model_config)


def _cached_targets(targets: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Names the cached targets as `VKD.cache_spec` does."""
    return {f"target/{tap}": value for tap, value in targets.items()}


def _cached_scales(scales: Mapping[str, np.ndarray], count: int) -> dict[str, np.ndarray]:
    """Names the scale of each tap as `VKD.cache_spec` does, repeated for each of `count` images."""
    return {f"scale/{tap}": np.full(count, scale) for tap, scale in scales.items()}
