"""What a method is, and what several of them need."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from vkd_jax.data.batching import padded_rows, rng
from vkd_jax.data.encoding import Batch, EncodedSet
from vkd_jax.methods import losses, saliency
from vkd_jax.models import lora
from vkd_jax.models.base import VisualTokens, bind
from vkd_jax.runtime import multihost
from vkd_jax.types import Example, Params

Metrics = dict[str, jax.Array]
LossFn = Callable[[Any, Batch], tuple[jax.Array, Metrics]]  # (model, batch) -> scalar, metrics
TeacherFn = Callable[[Any, Batch], dict[str, jax.Array]]  # (model, batch) -> arrays, a row each


@dataclasses.dataclass(frozen=True)
class Context:
    """All that a method may look at before the loop begins."""

    graphdef: Any
    params: Params  # the vanilla model
    load_base: Callable[[], Params] | None  # the model before it met anybody, where its checkpoint is given
    model_config: Any
    # Questions with a picture as "forget" and "retain", those of text alone as "forget_text" and "retain_text" if there
    # are any. A method has a stream for each of its losses, and takes what else it needs to look at.
    sets: Mapping[str, EncodedSet]
    seed: int
    encode: Callable[[Sequence[Example]], EncodedSet] | None = None  # other examples of one modality for this model


@dataclasses.dataclass(frozen=True)
class CacheSpec:
    """The arrays that `prepare` adds to the set of one stream; each entry is the shape and dtype of one row."""

    per_image: Mapping[str, jax.ShapeDtypeStruct] = dataclasses.field(default_factory=dict)
    per_example: Mapping[str, jax.ShapeDtypeStruct] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What a method computed before the loop: sets with cached arrays, and which weights may move."""

    sets: Mapping[str, EncodedSet]  # with the arrays of `Method.cache_spec`; see `with_cache`
    mask: Params | None = None  # 0/1 per trainable element; None lets every element move
    # By stream, the output of the model before training for each batch, added to `batch.cached`. What can be computed
    # once and stored belongs into the set; a teacher is for what is too large to store, such as whole logits.
    teachers: Mapping[str, TeacherFn] = dataclasses.field(default_factory=dict)


class Method(Protocol):
    """The contract of an unlearning method: a frozen dataclass of hyperparameters.

    A method either trains, and has `losses`, or edits weights directly, and has `edit`. A run calls `check_model`
    before it reads any weights, loads the model with `trainable` weights in float32 and with `adapters`, and then
    calls `prepare` and trains on `losses`, or calls `edit`. The planner calls `cache_spec`, `mask_shape` and `teachers`
    instead of `prepare`, with shapes alone.

    `scope.Scope` implements the fields that all methods share and a default for everything but `losses`.
    """

    mask_scope: str  # which gradients the prepared mask covers: "forget", "both", or "none" for no mask

    @property
    def needs_base(self) -> bool:
        """Whether `prepare` loads the model before it was fine-tuned."""
        ...

    @property
    def adapters(self) -> lora.AdapterConfig | None:
        """The adapters that the method adds to the model, or None."""
        ...

    def trainable(self, paths: Iterable[str], model_config: Any) -> list[str]:
        """Selects the paths of the weights that train, or that `edit` may change."""
        ...

    def check_model(self, paths: Iterable[str], model_config: Any) -> None:
        """Raises a `UserError` that names the field if the method does not fit a model."""
        ...

    def prepare(self, context: Context) -> Prepared:
        """Computes once what the loss functions would otherwise compute at each step."""
        ...

    def losses(self) -> Mapping[str, LossFn]:
        """Returns one loss function per stream; the gradients of the streams add up. {} for a method that edits."""
        ...

    def edit(self, context: Context) -> Params:
        """Returns new values of the trainable weights; only for methods without losses."""
        ...

    def cache_spec(self, stream: str, taps: Mapping[str, VisualTokens], model_config: Any) -> CacheSpec:
        """Describes the arrays that `prepare` adds to the set of a stream.

        Args:
            stream: name of the stream.
            taps: shapes of the vision taps of one row of images, [1, p, c] each.
            model_config: of the family.
        """
        ...

    def mask_shape(self, path: str, shape: tuple[int, ...], model_config: Any) -> tuple[int, ...]:
        """Returns the shape of the mask of a weight."""
        ...

    def teachers(self) -> Mapping[str, TeacherFn]:
        """Returns `Prepared.teachers`; {} for a method without teachers."""
        ...


def tap_shapes(context: Context, encoded: EncodedSet) -> dict[str, VisualTokens]:
    """The shapes of the vision taps of one row of images, as `Method.cache_spec` takes them; nothing is computed."""

    def encode(params, images):
        return bind(context.graphdef, params).encode(images)[1]

    return jax.eval_shape(encode, context.params, encoded.images[np.arange(1)])


def with_cache(encoded: EncodedSet, spec: CacheSpec, values: Mapping[str, np.ndarray]) -> EncodedSet:
    """Adds cached arrays to a set: exactly those that the method's `cache_spec` describes.

    Raises:
        ValueError: an array is missing, is not in the specification, or has another shape or dtype.
    """
    entries = {**spec.per_image, **spec.per_example}
    if problems := sorted(entries.keys() ^ values.keys()):
        raise ValueError(f"cache_spec and prepare disagree about {', '.join(problems)}.")
    for name, entry in entries.items():
        value = values[name]
        if (value.shape[1:], value.dtype) != (entry.shape, entry.dtype):
            raise ValueError(
                f"{name}: cache_spec describes rows of {entry.dtype}{list(entry.shape)}, and prepare computed "
                f"{value.dtype}{list(value.shape[1:])}."
            )
    return dataclasses.replace(
        encoded,
        per_image={name: values[name] for name in spec.per_image},
        per_example={name: values[name] for name in spec.per_example},
    )


def encode_images(model: Any, batch: Batch) -> tuple[VisualTokens | None, dict[str, VisualTokens]]:
    """The features of the batch's pictures and the taps of the vision tower; None and {} without pictures.

    Where the output of a block is cached (`train.cached_prefix`), the blocks up to it are not computed again.
    """
    if batch.images is None:
        return None, {}
    known = next((name for name in batch.cached if name.startswith("vision/")), None)
    if known is None:
        return model.encode(batch.images)
    return model.encode(batch.images, hidden=batch.cached[known], start=int(known.split("/")[1]) + 1)


def answer_logits(model: Any, batch: Batch) -> tuple[jax.Array, dict[str, VisualTokens]]:
    """Logits at the answer positions, and the taps of the vision tower ({} without pictures)."""
    features, taps = encode_images(model, batch)
    logits, _ = model(batch.tokens, batch.mask, features=features, query_positions=batch.target_positions)
    return logits, taps


def cross_entropy(model: Any, batch: Batch) -> jax.Array:
    """[b] answer-token cross-entropies."""
    logits, _ = answer_logits(model, batch)
    return losses.answer_cross_entropy(logits, batch.targets, batch.target_mask)


def ascent_loss(weight: float, cap: float) -> LossFn:
    """The loss -weight * min(CE, cap), bounded row by row: ascent on the forget set."""

    def loss(model, batch):
        ce = cross_entropy(model, batch)
        return weight * jnp.mean(losses.bounded_ascent(ce, cap)), mean_metrics(forget_ce=ce)

    return loss


def descent_loss(name: str, weight: float) -> LossFn:
    """The loss weight * CE; `name` is what the answers are called in the metrics."""

    def loss(model, batch):
        ce = cross_entropy(model, batch)
        return weight * jnp.mean(ce), mean_metrics(**{f"{name}_ce": ce})

    return loss


def hidden_states(model: Any, batch: Batch, layers: int) -> jax.Array:
    """What comes out of the language model's block number `layers`, counted from 1: [b, t, d]; no later one is run."""
    x, positions = model.embed(batch.tokens, batch.mask, encode_images(model, batch)[0])
    return model.language_model.read(x, batch.mask, positions, layers=layers)[0]


def fisher_information(
    context: Context, paths: Iterable[str], sets: Mapping[str, EncodedSet], *, samples: int, chunk: int, name: str
) -> dict[str, Params]:
    """{set: the diagonal of the Fisher information of CE}, of the vanilla model; see `saliency.fisher_information`.

    Args:
        context: of the method.
        paths: the weights to differentiate.
        sets: by name, what to take rows of.
        samples: at most so many rows of each set, drawn by the seed.
        chunk: how many per-sample gradients are held at once.
        name: of the draw, the method's.
    """
    paths = set(paths)
    trainable = {k: v for k, v in context.params.items() if k in paths}
    frozen = {k: v for k, v in context.params.items() if k not in paths}

    def loss(trainable, frozen, batch):
        return cross_entropy(bind(context.graphdef, {**frozen, **trainable}), batch)

    chosen = {
        part: (
            dataclasses.replace(encoded, per_image={}, per_example={}),
            rng(context.seed, f"{name}/fisher/{part}").permutation(len(encoded))[:samples],
        )
        for part, encoded in sets.items()
    }
    return saliency.fisher_information(loss, trainable, frozen, chosen, chunk)


def reference_log_probs(context: Context, encoded: EncodedSet, batch_size: int = 32) -> np.ndarray:
    """[n] log p(answer | question, picture) under the vanilla model."""

    @jax.jit
    def score(params, batch):
        logits, _ = answer_logits(bind(context.graphdef, params), batch)
        return losses.sequence_log_prob(logits, batch.targets, batch.target_mask)

    parts = [score(context.params, encoded.batch(rows)) for rows in padded_rows(len(encoded), batch_size)]
    return np.concatenate([multihost.gather(p) for p in parts])[: len(encoded)]


def mean_metrics(**rows: jax.Array) -> Metrics:
    """Means over the batch, by name."""
    return {name: jnp.mean(value) for name, value in rows.items()}
