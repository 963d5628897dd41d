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
class Prepared:
    """What a method computed before the loop: sets with cached arrays, and which weights may move."""

    sets: Mapping[str, EncodedSet]
    mask: Params | None = None  # 0/1 per trainable element; None lets every element move
    # By stream, what the model as it was before the loop says of each batch; found in `batch.cached`. Where it can be
    # computed once and held, it belongs into the set; this is for what is too large to hold, such as whole logits.
    teacher: Mapping[str, TeacherFn] = dataclasses.field(default_factory=dict)
    edited: Params | None = None  # new values of the trainable weights: then there is nothing to train


class Method(Protocol):
    """A frozen dataclass of hyperparameters, those of `scope.Scope` among them.

    `mask_scope` says which gradients the prepared mask covers: "forget", "both", or "none".
    """

    mask_scope: str

    def trainable(self, paths: Iterable[str], model_config: Any) -> list[str]:
        """The paths of the weights that train."""
        ...

    def prepare(self, context: Context) -> Prepared:
        """Computes, once, what the loss functions would otherwise compute at each step."""
        ...

    def losses(self) -> Mapping[str, LossFn]:
        """One loss function per stream; the gradients of the streams add up. {} for a method that trains nothing."""
        ...


def see(model: Any, batch: Batch) -> tuple[VisualTokens | None, dict[str, VisualTokens]]:
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
    features, taps = see(model, batch)
    logits, _ = model(batch.tokens, batch.mask, features=features, at=batch.target_positions)
    return logits, taps


def cross_entropy(model: Any, batch: Batch) -> jax.Array:
    """[b] answer-token cross-entropies."""
    logits, _ = answer_logits(model, batch)
    return losses.answer_cross_entropy(logits, batch.targets, batch.target_mask)


def ascent(weight: float, cap: float) -> LossFn:
    """The loss -weight * min(CE, cap), bounded row by row: ascent on the forget set."""

    def loss(model, batch):
        ce = cross_entropy(model, batch)
        return weight * jnp.mean(losses.bounded_ascent(ce, cap)), mean_metrics(forget_ce=ce)

    return loss


def descent(name: str, weight: float) -> LossFn:
    """The loss weight * CE; `name` is what the answers are called in the metrics."""

    def loss(model, batch):
        ce = cross_entropy(model, batch)
        return weight * jnp.mean(ce), mean_metrics(**{f"{name}_ce": ce})

    return loss


def hidden_states(model: Any, batch: Batch, layers: int) -> jax.Array:
    """What comes out of the language model's block number `layers`, counted from 1: [b, t, d]; no later one is run."""
    x, positions = model.embed(batch.tokens, batch.mask, see(model, batch)[0])
    return model.language_model.read(x, batch.mask, positions, layers=layers)[0]


def fisher(
    context: Context, paths: Iterable[str], sets: Mapping[str, EncodedSet], *, samples: int, chunk: int, name: str
) -> dict[str, Params]:
    """{set: the diagonal of the Fisher information of CE}, of the vanilla model; see `saliency.fisher`.

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
    return saliency.fisher(loss, trainable, frozen, chosen, chunk)


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
