"""The contract of an unlearning method, and the loss functions and cached arrays that several methods share."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from vkd_jax.data.batching import padded_rows, rng
from vkd_jax.data.encoding import Batch, EncodedSet
from vkd_jax.methods import losses, saliency
from vkd_jax.methods.worst_case import Adversary
from vkd_jax.models import lora
from vkd_jax.models.base import VisualTokens, bind
from vkd_jax.runtime import finite, memory, multihost
from vkd_jax.types import Example, Params, UserError

Metrics = dict[str, jax.Array]
LossFn = Callable[[Any, Batch], tuple[jax.Array, Metrics]]  # (model, batch) -> scalar loss, metrics
TeacherFn = Callable[[Any, Batch], dict[str, jax.Array]]  # (model, batch) -> arrays with one row per row of the batch

FORGET_STREAMS = ("forget", "forget_text")  # whose questions are to be forgotten: with an image, and in text alone

# `CacheSpec.per_example` of a stream whose loss is NPO: `reference_log_probs`.
REFERENCE_SPEC = {"reference": jax.ShapeDtypeStruct((), jnp.float32)}


@dataclasses.dataclass(frozen=True)
class Context:
    """What a method may read before training.

    Attributes:
        graphdef: the structure of the model.
        params: the weights of the model before training, which is the vanilla model except in later requests.
        load_base: loads the weights of the model before it was fine-tuned; None without `model.base`.
        model_config: the model's configuration.
        sets: the encoded sets. "forget" and "retain" have questions with an image; "forget_text" and "retain_text",
            which exist if the benchmark has such questions, have text alone; "text", which exists if the method has a
            text stream, has the questions that it keeps. "decouple" and "refusals" are harmless images with
            the questions of the forget set, and text-only rows whose answers are refusals, if the benchmark has them.
        seed: the seed of the run.
        encode: encodes other examples of one modality for this model.
        vanilla: the weights of the vanilla model, if they are not `params`: of the model before the first request.
    """

    graphdef: Any
    params: Params
    load_base: Callable[[], Params] | None
    model_config: Any
    sets: Mapping[str, EncodedSet]
    seed: int
    encode: Callable[[Sequence[Example]], EncodedSet] | None = None
    vanilla: Params | None = None

    @property
    def vanilla_params(self) -> Params:
        """The weights of the vanilla model."""
        return self.params if self.vanilla is None else self.vanilla

    def base_params(self) -> Params:
        """Loads the weights of the model before it was fine-tuned.

        Raises:
            UserError: the run has no such model.
        """
        if self.load_base is None:
            raise UserError(
                "model.base: the method needs the model before it was fine-tuned. Give its folder as "
                "--config.model.base=DIR."
            )
        return self.load_base()


@dataclasses.dataclass(frozen=True)
class CacheSpec:
    """The arrays that `prepare` adds to the set of one stream; each entry is the shape and dtype of one row."""

    per_image: Mapping[str, jax.ShapeDtypeStruct] = dataclasses.field(default_factory=dict)
    per_example: Mapping[str, jax.ShapeDtypeStruct] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What a method computed before training.

    Attributes:
        sets: the set of each stream, with the arrays of `Method.cache_spec`; see `with_cache`.
        mask: 0 or 1 for each trainable element; None if every element trains.
    """

    sets: Mapping[str, EncodedSet]
    mask: Params | None = None


class Method(Protocol):
    """The contract of an unlearning method: a frozen dataclass of hyperparameters.

    A method either trains, and has `losses`, or edits weights directly, and has `edit`. A run calls `check_model`
    before it reads any weights, loads the model with `trainable` weights in float32 and with `adapters`, and then
    calls `prepare` and trains on `losses`, or calls `edit`. The planner calls `cache_spec`, `mask_shape` and `teachers`
    instead of `prepare`, with shapes alone.

    `scope.Scope` implements the fields that all methods share and a default for everything but `losses`, and
    `scope.Unlearning` those that all methods with a forget set share.
    """

    cache_bytes: int  # budget of the host's memory for the cached arrays of each set, see `memory.allocator`
    mask_scope: str  # which gradients the prepared mask covers: "forget", "both", or "none" for no mask
    null_space: Any  # `null_space.NullSpace`: whether updates are projected

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
            model_config: the model's configuration.
        """
        ...

    def mask_shape(self, path: str, shape: tuple[int, ...], model_config: Any) -> tuple[int, ...]:
        """Returns the shape of the mask of a weight."""
        ...

    def teachers(self) -> Mapping[str, TeacherFn]:
        """Returns, by stream, a function whose outputs under the model before training are added to `batch.cached`.

        It is evaluated at each step. What fits in memory belongs in the set; a teacher is for what does not, such as
        whole logits.
        """
        ...

    def adversary(self, params: Params, model_config: Any) -> Adversary | None:
        """Returns the simulated attacker of worst-case forgetting, or None.

        Args:
            params: all parameters, or their shapes.
            model_config: the model's configuration.
        """
        ...


def tap_shapes(context: Context, encoded: EncodedSet) -> dict[str, VisualTokens]:
    """Returns the shapes of the vision taps of one row of images, as `Method.cache_spec` takes them.

    Traces the model without computing anything.
    """

    def encode(params, images):
        return bind(context.graphdef, params).encode(images)[1]

    return jax.eval_shape(encode, context.params, encoded.images[np.arange(1)])


def cache_allocator(encoded: EncodedSet, spec: CacheSpec, budget: int) -> memory.Allocate:
    """Chooses, before a method computes the arrays that it caches for a set, where they are held.

    Args:
        encoded: the set.
        spec: the arrays.
        budget: the largest number of bytes in memory; larger arrays go to memory-mapped files.

    Raises:
        UserError: they fit neither in memory nor on the disk.
    """
    image_count = 0 if encoded.images is None else len(encoded.images)
    arrays = [(image_count, x) for x in spec.per_image.values()]
    arrays += [(len(encoded.examples), x) for x in spec.per_example.values()]
    needed = sum(count * math.prod(x.shape) * x.dtype.itemsize for count, x in arrays)
    subject = f"cached values of {image_count:,} images, copies included,"
    remedy = "set method.teacher_features=recomputed, decrease the number of copies, or name fewer taps"
    return memory.allocator(needed, budget, subject, remedy)


def with_cache(encoded: EncodedSet, spec: CacheSpec, values: Mapping[str, np.ndarray]) -> EncodedSet:
    """Adds cached arrays to a set: exactly those that the method's `cache_spec` describes.

    Raises:
        ValueError: an array is missing, is not in the specification, or has another shape or dtype.
        NotFinite: an array has NaN or infinity.
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
        finite.check(value, f"The vanilla model's values of {name}")
    return dataclasses.replace(
        encoded,
        per_image={name: values[name] for name in spec.per_image},
        per_example={name: values[name] for name in spec.per_example},
    )


def encode_images(model: Any, batch: Batch) -> tuple[VisualTokens | None, dict[str, VisualTokens]]:
    """Computes the image features and the taps of the vision tower; None and {} for a batch of text.

    If the batch has the cached outputs of vision blocks (see `training.loop.cache_prefix`), the blocks up to the last
    of them are not computed again.
    """
    if batch.images is None:
        return None, {}
    earlier = {name: values for name, values in batch.cached.items() if name.startswith("vision/")}
    return model.encode(batch.images, earlier=earlier)


def logits_of_features(model: Any, batch: Batch, features: VisualTokens | None) -> jax.Array:
    """Computes the logits at the answer positions from image features: [b, a, v]."""
    return model(batch.tokens, batch.mask, features=features, query_positions=batch.target_positions)[0]


def answer_logits(model: Any, batch: Batch) -> tuple[jax.Array, dict[str, VisualTokens]]:
    """Computes the logits at the answer positions, [b, a, v], and the taps of the vision tower ({} for text)."""
    features, taps = encode_images(model, batch)
    return logits_of_features(model, batch, features), taps


def vanilla_logits(model: Any, batch: Batch) -> dict[str, jax.Array]:
    """The teacher whose outputs are its logits at the answer positions, [b, a, v]."""
    return {"vanilla": answer_logits(model, batch)[0]}


def cross_entropy(model: Any, batch: Batch) -> jax.Array:
    """Computes the mean cross-entropy of each row's answer tokens, in nats: [b]."""
    logits, _ = answer_logits(model, batch)
    return losses.answer_cross_entropy(logits, batch.targets, batch.target_mask)


def npo_of_logits(logits: jax.Array, batch: Batch, beta: float) -> jax.Array:
    """Computes `losses.npo` of each row's answer, relative to the cached `reference_log_probs`: [b]."""
    log_prob = losses.sequence_log_prob(logits, batch.targets, batch.target_mask)
    return losses.npo(log_prob, batch.cached["reference"], beta)


def descent_loss(name: str, weight: float) -> LossFn:
    """Returns the loss mean(weight * CE), which is logged as the metric `{name}_ce`."""

    def loss(model, batch):
        ce = cross_entropy(model, batch)
        return weight * jnp.mean(ce), mean_metrics(**{f"{name}_ce": ce})

    return loss


def hidden_states(model: Any, batch: Batch, layers: int) -> jax.Array:
    """Computes the output of the language model's block number `layers`, counted from 1: [b, t, d].

    The blocks after it are not computed.
    """
    embedded = model.embed(batch.tokens, batch.mask, encode_images(model, batch)[0])
    return model.language_model.read(embedded, batch.mask, layers=layers)[0]


def fisher_information(
    context: Context, paths: Iterable[str], sets: Mapping[str, EncodedSet], *, samples: int, chunk: int, name: str
) -> dict[str, Params]:
    """Computes the diagonal Fisher information of CE under the vanilla model; see `saliency.fisher_information`.

    Args:
        context: the method's context.
        paths: the weights to differentiate.
        sets: the sets to draw rows from, by name.
        samples: the largest number of rows per set; the seed determines which.
        chunk: the number of per-example gradients in memory at once.
        name: the method, which names the random draw.

    Returns:
        For each set, {path: array of the weight's shape}.

    Raises:
        NotFinite: a gradient is NaN or infinite.
    """
    paths = set(paths)
    trainable = {k: v for k, v in context.params.items() if k in paths}
    frozen = {k: v for k, v in context.params.items() if k not in paths}

    def loss(trainable, frozen, batch):
        return cross_entropy(bind(context.graphdef, {**frozen, **trainable}), batch)

    samples_by_set = {
        set_name: (
            dataclasses.replace(encoded, per_image={}, per_example={}),
            rng(context.seed, f"{name}/fisher/{set_name}").permutation(len(encoded))[:samples],
        )
        for set_name, encoded in sets.items()
    }
    information = saliency.fisher_information(loss, trainable, frozen, samples_by_set, chunk)
    if finite.nonfinite_paths(information):  # a mask of NaN would train nothing
        raise finite.error("The vanilla model's gradients")
    return information


def reference_log_probs(context: Context, encoded: EncodedSet, batch_size: int = 32) -> np.ndarray:
    """Computes log p(answer | question, image) of each row under the vanilla model: float32 [n]."""

    @jax.jit
    def score(params, batch):
        logits, _ = answer_logits(bind(context.graphdef, params), batch)
        return losses.sequence_log_prob(logits, batch.targets, batch.target_mask)

    scores = [score(context.params, encoded.batch(rows)) for rows in padded_rows(len(encoded), batch_size)]
    return np.concatenate([multihost.gather(x) for x in scores])[: len(encoded)]


def mean_metrics(**rows: jax.Array) -> Metrics:
    """Averages each metric over the rows of the batch."""
    return {name: jnp.mean(value) for name, value in rows.items()}
