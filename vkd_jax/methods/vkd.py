"""Visual knowledge distillation: a reconstruction of "Robust MLLM Unlearning via Visual Knowledge Distillation".

Forget batch (x_f, q_f, y_f), retain batch (x_r, q_r, y_r), student theta, taps l, distance D:

    L_f = w_cf * forget(theta; x_f, q_f, y_f) + w_kf * sum_l D(h_l(theta, x_f), target_l(x_f))
    L_r = w_cr * CE(theta; x_r, q_r, y_r)     + w_kr * sum_l D(h_l(theta, x_r), h_l(teacher, x_r))
    g   = mask * grad L_f + grad L_r          (mask_scope "forget"; "both" masks the whole update)

Only the projector and the vision tower, or its last `blocks` blocks, train; the language model has neither gradient nor
optimizer state. What the paper's abstract does not say is an assumption, A1 to A8, and each of them is a field below.

Reference: arXiv 2512.11325. No official code was at hand.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vkd_jax.data import augment
from vkd_jax.data.batching import rng
from vkd_jax.methods import base, feature_targets, losses, saliency
from vkd_jax.methods.scope import Scope, frozen_blocks
from vkd_jax.models.base import VisualTokens
from vkd_jax.types import Params, UserError

FORGET = ("npo", "ga", "none")
TARGETS = ("swap", "anchor", "base", "repel", "none")
TEACHERS = ("vanilla", "base")
MASK_SCOPES = ("forget", "both", "none")


@dataclasses.dataclass(frozen=True)
class VKD(Scope):
    """Hyperparameters; weights of 0 switch a term off, so that an ablation is a config override."""

    train: str = "visual"  # A7: or all, or lora; see `Scope`, as for blocks: how many of the last vision blocks train
    distance: str = "mse"  # A1: mse | cosine | smooth_l1
    forget: str = "ga"  # A2: npo | ga | none
    beta: float = 0.4  # of npo
    cap: float = 4.0  # of ga, nats
    target: str = "swap"  # A3: swap | anchor | base | repel | none
    repel_cap: float = 1.0  # of repel, in units of D
    teacher: str = "vanilla"  # A4: vanilla | base
    taps: tuple[str, ...] = ("features", "projector")  # A5
    mask_scope: str = "both"  # A6: forget | both | none
    mask_keep: float | None = 0.6  # the share of weights that the mask selects ...
    mask_threshold: float | None = None  # ... or the least ratio F_f / F_r
    mask_eps: float = 1e-12
    fisher_samples: int = 128
    fisher_chunk: int = 16
    augment_forget: int = 8  # A8: changed copies of each forget picture, so that other pictures are forgotten too ...
    augment_retain: int = 0  # ... and of each retain picture; teacher features of all copies are held in memory
    weight_forget_ce: float = 1.0  # w_cf
    weight_forget_distill: float = 1.0  # w_kf
    weight_retain_ce: float = 1.0  # w_cr
    weight_retain_distill: float = 8.0  # w_kr

    def __post_init__(self):
        super().__post_init__()
        for name, allowed in (
            ("distance", tuple(losses.DISTANCES)),
            ("forget", FORGET),
            ("target", TARGETS),
            ("teacher", TEACHERS),
            ("mask_scope", MASK_SCOPES),
        ):
            if getattr(self, name) not in allowed:
                raise UserError(f"method.{name}={getattr(self, name)!r}: give one of {', '.join(allowed)}.")
        if not self.taps:
            raise UserError("method.taps is empty: name at least one, such as projector.")
        if self.mask_scope != "none" and (self.mask_threshold is None) == (self.mask_keep is None):
            raise UserError(
                "the saliency mask takes either method.mask_threshold or method.mask_keep; set exactly one."
            )

    @property
    def asks_base(self) -> bool:
        """Whether `prepare` loads the model as it was before it met anybody."""
        return "base" in (self.target, self.teacher)

    def check_model(self, paths: Iterable[str], model_config: Any) -> None:
        """Refuses taps that the model has not, or that no weight changes."""
        blocks = [f"vision/{i}" for i in range(model_config.used_blocks)]
        still = blocks[: frozen_blocks(self.trainable(paths, model_config), model_config)]
        known = [*blocks, "features", "projector"]
        for tap in self.taps:
            if tap not in known:
                raise UserError(f"method.taps: the model has no {tap}; it has {', '.join(known)}.")
            if tap in still:
                raise UserError(f"method.taps: {tap} lies before all that trains and never changes; name a later one.")

    def prepare(self, context: base.Context) -> base.Prepared:
        """Caches teacher features, forget targets and reference log-probabilities, and makes the saliency mask."""
        self.check_model(context.params, context.model_config)
        sets = {
            name: augment.augmented(context.sets[name], copies, rng(context.seed, f"vkd/augment/{name}"))
            for name, copies in (("forget", self.augment_forget), ("retain", self.augment_retain))
        }
        context = dataclasses.replace(context, sets=sets)
        forget, retain = context.sets["forget"], context.sets["retain"]
        vanilla_retain = feature_targets.record_taps(context.graphdef, context.params, retain.pictures, self.taps)
        teacher_retain = vanilla_retain
        if self.teacher == "base":
            teacher_retain = feature_targets.record_taps(
                context.graphdef, _base_params(context), retain.pictures, self.taps
            )
        scales = {
            tap: np.mean(np.square(tokens.values, dtype=np.float32), where=tokens.valid[..., None], dtype=np.float32)
            for tap, tokens in teacher_retain.items()
        }

        forget = dataclasses.replace(
            forget,
            per_image=_cached(self._targets(context, vanilla_retain), scales),
            per_example={"reference": base.reference_log_probs(context, forget)} if self.forget == "npo" else {},
        )
        teacher = {tap: tokens.values for tap, tokens in teacher_retain.items()}
        retain = dataclasses.replace(retain, per_image=_cached(teacher, scales))
        mask = None if self.mask_scope == "none" else self._mask(context)
        return base.Prepared(sets={"forget": forget, "retain": retain}, mask=mask)

    def cached(self, stream, rows, taps, model_config) -> dict[str, jax.ShapeDtypeStruct]:
        """Targets and scales of each tap, and NPO's reference."""
        shapes, forgets = {}, stream == "forget"
        if not forgets or self.target != "none":
            for tap in self.taps:
                values = taps[tap].values
                dtype = jnp.float32 if forgets and self.target == "anchor" else values.dtype
                shapes[f"target/{tap}"] = jax.ShapeDtypeStruct(values.shape, dtype)
                shapes[f"scale/{tap}"] = jax.ShapeDtypeStruct((rows,), jnp.float32)
        if forgets and self.forget == "npo":
            shapes["reference"] = jax.ShapeDtypeStruct((rows,), jnp.float32)
        return shapes

    def losses(self) -> Mapping[str, base.LossFn]:
        """The two halves of the objective; their gradients are taken apart, so that a mask can cover one."""
        return {"forget": self._forget_loss, "retain": self._retain_loss}

    def depth(self, stream, model_config) -> tuple[int, bool]:
        """All of the language model, or none of it where the stream's loss has no term of its output."""
        reads = self.weight_retain_ce if stream == "retain" else self.forget != "none"
        return super().depth(stream, model_config) if reads else (0, False)

    def _forget_loss(self, model, batch):
        features, taps = base.see(model, batch)
        distance = self._distance(taps, batch) if self.target != "none" else jnp.zeros(len(batch.tokens))
        feature = -jnp.minimum(distance, self.repel_cap) if self.target == "repel" else distance
        loss = self.weight_forget_distill * feature
        if self.forget == "none":  # nobody asks the language model
            return jnp.mean(loss), base.mean_metrics(forget_distance=distance)
        logits, _ = model(batch.tokens, batch.mask, features=features, at=batch.at)
        ce = losses.answer_cross_entropy(logits, batch.targets, batch.target_mask)
        if self.forget == "npo":
            log_prob = losses.sequence_log_prob(logits, batch.targets, batch.target_mask)
            output = losses.npo(log_prob, batch.cached["reference"], self.beta)
        else:
            output = losses.bounded_ascent(ce, self.cap)
        loss = jnp.mean(self.weight_forget_ce * output + loss)
        return loss, base.mean_metrics(forget_ce=ce, forget_output=output, forget_distance=distance)

    def _retain_loss(self, model, batch):
        features, taps = base.see(model, batch)
        distance = self._distance(taps, batch)
        loss = self.weight_retain_distill * distance
        if not self.weight_retain_ce:
            return jnp.mean(loss), base.mean_metrics(retain_distance=distance)
        logits, _ = model(batch.tokens, batch.mask, features=features, at=batch.at)
        ce = losses.answer_cross_entropy(logits, batch.targets, batch.target_mask)
        loss = jnp.mean(self.weight_retain_ce * ce + loss)
        return loss, base.mean_metrics(retain_ce=ce, retain_distance=distance)

    def _distance(self, taps: Mapping[str, VisualTokens], batch) -> jax.Array:
        """sum_l D(h_l, target_l) -> [b]."""
        distance = losses.DISTANCES[self.distance]
        return sum(
            distance(taps[tap].values, batch.cached[f"target/{tap}"], batch.cached[f"scale/{tap}"], taps[tap].valid)
            for tap in self.taps
        )

    def _targets(self, context: base.Context, retain: Mapping[str, VisualTokens]) -> Mapping[str, np.ndarray]:
        """What the features of each forget picture should become: {tap: [m, p, c]}."""
        pictures = context.sets["forget"].pictures
        if self.target == "none":
            return {}
        if self.target in ("base", "repel"):
            params = _base_params(context) if self.target == "base" else context.params
            return {
                tap: own.values
                for tap, own in feature_targets.record_taps(context.graphdef, params, pictures, self.taps).items()
            }
        places = feature_targets.tap_coords(context, pictures, self.taps)
        forget_count, retain_count = len(next(iter(places.values()))), len(next(iter(retain.values())).where)
        if self.target == "anchor":
            return {tap: feature_targets.mean_features(retain[tap], places[tap]) for tap in self.taps}
        chosen = rng(context.seed, "vkd/swap").integers(retain_count, size=forget_count)
        return {tap: feature_targets.resample_features(retain[tap], chosen, places[tap]) for tap in self.taps}

    def _mask(self, context: base.Context) -> Params:
        """The saliency mask over the trainable weights."""
        information = base.fisher(
            context,
            self.trainable(context.params, context.model_config),
            {name: context.sets[name] for name in ("forget", "retain")},
            samples=self.fisher_samples,
            chunk=self.fisher_chunk,
            name="vkd",
        )
        return saliency.mask_from_ratio(
            **information, threshold=self.mask_threshold, keep=self.mask_keep, eps=self.mask_eps
        )


def _cached(targets: Mapping[str, np.ndarray], scales: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    cached = {f"target/{tap}": value for tap, value in targets.items()}
    return cached | {f"scale/{tap}": np.full(len(value), scales[tap]) for tap, value in targets.items()}


def _base_params(context: base.Context) -> Params:
    if context.load_base is None:
        raise UserError("this needs the model before it was fine-tuned: pass its folder as --config.model.base=DIR.")
    return context.load_base()
