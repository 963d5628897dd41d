"""What a method is, and what several of them need."""

import dataclasses
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from scipy import spatial

from vkd_jax import losses
from vkd_jax.data.pictures import Pictures
from vkd_jax.data.processing import Batch, EncodedSet
from vkd_jax.models import lora
from vkd_jax.models.base import VisualTokens, bind
from vkd_jax.types import Params, UserError

Metrics = dict[str, jax.Array]
LossFn = Callable[[Any, Batch], tuple[jax.Array, Metrics]]  # (model, batch) -> scalar, metrics


@dataclasses.dataclass(frozen=True)
class Context:
    """All that a method may look at before the loop begins."""

    graphdef: Any
    params: Params  # the vanilla model
    load_base: Callable[[], Params] | None  # the model before it met anybody, where its checkpoint is given
    model_config: Any
    sets: Mapping[str, EncodedSet]  # one per stream of the method
    seed: int


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What a method computed before the loop: sets with cached arrays, and which weights may move."""

    sets: Mapping[str, EncodedSet]
    mask: Params | None = None  # 0/1 per trainable element; None lets every element move


class Method(Protocol):
    """A frozen dataclass of hyperparameters.

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
        """One loss function per stream; the gradients of the streams add up."""
        ...


def visual_paths(paths: Iterable[str], model_config: Any, blocks: int) -> list[str]:
    """The projector and the last `blocks` vision blocks *that feed it*.

    With a feature layer of -2 the very last block feeds nothing: it would get no gradient, yet weight decay would
    move it. So it never trains, nor does the norm that stands behind it (`post_norm`).

    Args:
        paths: of all parameters.
        model_config: of the family; its `used_blocks` is how many blocks feed the projector.
        blocks: 0 is the projector alone; -1 is the whole used tower, embeddings included.
    """
    used = model_config.used_blocks
    if not -1 <= blocks <= used:
        raise UserError(
            f"blocks={blocks}: the model has {used} vision blocks that feed the projector; give -1 to {used}."
        )
    trained = {f"vision_tower/blocks/{i}" for i in range(used - blocks if blocks >= 0 else 0, used)}

    def trains(path: str) -> bool:
        tower, part, *rest = path.split("/")
        if tower == "vision_tower" and part == "blocks":
            return f"{tower}/{part}/{rest[0]}" in trained
        return tower == "projector" or (tower == "vision_tower" and blocks == -1 and part != "post_norm")

    return [path for path in paths if trains(path)]


def trainable_paths(paths: Iterable[str], model_config: Any, scope: str, blocks: int) -> list[str]:
    """The paths of a scope.

    "visual": see `visual_paths`; "all": those of the whole tower, and the language model; "lora": the adapters.
    """
    paths = list(paths)
    if scope == "lora":
        return [path for path in paths if path.endswith((f"/{lora.A}", f"/{lora.B}"))]
    if scope == "visual":
        return visual_paths(paths, model_config, blocks)
    if scope == "all":
        visual = set(visual_paths(paths, model_config, -1))
        return [path for path in paths if path in visual or path.startswith("language_model/")]
    raise UserError(f"method.train={scope!r}: give 'visual', 'all' or 'lora'.")


def answer_logits(model: Any, batch: Batch) -> tuple[jax.Array, dict[str, VisualTokens]]:
    """Logits at the answer positions, and the taps of the vision tower ({} without pictures)."""
    features, taps = (None, {}) if batch.pictures is None else model.encode(batch.pictures)
    logits, _ = model(batch.tokens, batch.mask, features=features, at=batch.at)
    return logits, taps


def cross_entropy(model: Any, batch: Batch) -> jax.Array:
    """[b] answer-token cross-entropies."""
    logits, _ = answer_logits(model, batch)
    return losses.answer_cross_entropy(logits, batch.targets, batch.target_mask)


def reference_log_probs(context: Context, encoded: EncodedSet, batch_size: int = 32) -> np.ndarray:
    """[n] log p(answer | question, picture) under the vanilla model."""

    @jax.jit
    def score(params, batch):
        logits, _ = answer_logits(bind(context.graphdef, params), batch)
        return losses.sequence_log_prob(logits, batch.targets, batch.target_mask)

    parts = [score(context.params, encoded.batch(rows)) for rows in padded_rows(len(encoded), batch_size)]
    return np.concatenate([np.asarray(p) for p in parts])[: len(encoded)]


def teacher_taps(
    context: Context, params: Params, pictures: Pictures, names: Iterable[str], batch_size: int = 32
) -> dict[str, VisualTokens]:
    """{tap: tokens [m, p, c]} of every row of pictures, computed once by a frozen model."""
    names = tuple(names)

    @jax.jit
    def encode(params, pictures):
        _, taps = bind(context.graphdef, params).encode(pictures)
        if unknown := sorted(set(names) - set(taps)):
            raise UserError(f"method.taps: the model has no {', '.join(unknown)}; it has {', '.join(taps)}.")
        return {name: taps[name] for name in names}

    return in_batches(lambda part: encode(params, part), pictures, batch_size)


def tap_places(
    context: Context, pictures: Pictures, names: Iterable[str], batch_size: int = 32
) -> dict[str, np.ndarray]:
    """{tap: `where` [m, p, 3]} of every row of pictures; the activations themselves are never computed."""

    @jax.jit
    def places(params, pictures):
        _, taps = bind(context.graphdef, params).encode(pictures)
        return {name: taps[name].where for name in names}

    return in_batches(lambda part: places(context.params, part), pictures, batch_size)


def moved(tokens: VisualTokens, rows: np.ndarray, where: np.ndarray) -> np.ndarray:
    """The features of pictures `rows` at the places of other pictures, which may have other shapes.

    Each place takes the feature at the nearest relative place; between pictures of one shape nothing changes.

    Args:
        tokens: features of n rows of pictures, in NumPy.
        rows: int [m], which of them.
        where: int [m, q, 3], where each feature is to stand.

    Returns:
        [m, q, c].
    """
    nearest: dict[tuple[bytes, bytes], np.ndarray] = {}  # pictures have few shapes
    values = []
    for row, target in zip(rows, where, strict=True):
        source = tokens.where[row]
        key = source.tobytes(), target.tobytes()
        if key not in nearest:
            nearest[key] = _nearest(source, target)
        values.append(tokens.values[row][nearest[key]])
    return np.stack(values)


def mean_at(tokens: VisualTokens, where: np.ndarray) -> np.ndarray:
    """The mean of all rows of features at the places of other pictures: [m, q, c]; see `moved`."""
    shapes, which = np.unique(where, axis=0, return_inverse=True)
    everyone = np.arange(len(tokens.where))
    means = [
        moved(tokens, everyone, np.broadcast_to(shape, (len(everyone), *shape.shape))).mean(0, dtype=np.float32)
        for shape in shapes
    ]
    return np.stack(means)[which.ravel()]


def _nearest(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """For each place of `target` [q, 3], the index of the place of `source` [p, 3] that is nearest to it."""
    real = np.flatnonzero(source[:, 0] >= 0)
    last = source[real, 0].max()  # pictures beyond the source's last are compared with that one
    return real[spatial.cKDTree(_relative(source[real], last)).query(_relative(target, last))[1]]


def _relative(where: np.ndarray, last: int) -> np.ndarray:
    """Places as shares of their picture's height and width; pictures stand far apart."""
    place = where[:, 1:] + 0.5
    for picture in np.unique(where[:, 0]):
        mine = where[:, 0] == picture
        place[mine] /= np.maximum(where[mine, 1:].max(0) + 1, 1)
    return np.column_stack([10.0 * np.clip(where[:, 0], 0, last), place])


def in_batches(function: Callable[[Any], Any], tree: Any, batch_size: int) -> Any:
    """`function` of a tree with a row each (arrays, `Pictures`), `batch_size` rows at a time; results in NumPy."""
    count = len(jax.tree.leaves(tree)[0])
    parts = [
        jax.tree.map(np.asarray, function(jax.tree.map(lambda x, rows=rows: x[rows], tree)))
        for rows in padded_rows(count, batch_size)
    ]
    return jax.tree.map(lambda *arrays: np.concatenate(arrays)[:count], *parts)


def padded_rows(count: int, batch_size: int) -> list[np.ndarray]:
    """Row numbers 0..count-1 in batches of one size; the last one repeats its last row."""
    return [np.arange(begin, begin + batch_size).clip(max=count - 1) for begin in range(0, count, batch_size)]


def rng(seed: int, name: str) -> np.random.Generator:
    """A generator of its own for every named use of the one seed."""
    return np.random.default_rng([seed, zlib.crc32(name.encode())])


def mean_metrics(**rows: jax.Array) -> Metrics:
    """Means over the batch, by name."""
    return {name: jnp.mean(value) for name, value in rows.items()}
