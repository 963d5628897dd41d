"""Activation statistics of MLP neurons, and the importance of neurons that MANU computes from them; see `manu`."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vkd_jax.data.batching import padded_rows, rng
from vkd_jax.data.encoding import EncodedSet
from vkd_jax.methods import base
from vkd_jax.models.base import bind
from vkd_jax.runtime import finite, multihost

TERMS = ("abs", "freq", "var", "rms")
EPS = 1e-5


class Statistics(NamedTuple):
    """Statistics of each neuron's activation z over the tokens of one set; arrays of one shape, [layers, f]."""

    mean: np.ndarray  # mean z
    mean_abs: np.ndarray  # mean |z|
    active_share: np.ndarray  # share of |z| > tau
    mean_square: np.ndarray  # mean z^2

    @property
    def variance(self) -> np.ndarray:
        """The variance of z, [layers, f]."""
        return np.maximum(self.mean_square - self.mean**2, 0.0)  # rounding can make the difference negative


def collect(
    context: base.Context,
    names: Iterable[str],
    *,
    threshold: float,
    samples: int,
    batch_size: int,
    language_model: bool,
) -> dict[str, dict[str, Statistics]]:
    """Computes the statistics of the neurons under the vanilla model.

    Args:
        context: the method's context.
        names: the names of the sets to read.
        threshold: the magnitude tau above which an activation counts as active.
        samples: the largest number of rows per set; the seed determines which.
        batch_size: the number of rows per batch.
        language_model: whether to include the language model's neurons.

    Returns:
        {set: {tower: statistics}}; the vision tower is missing for sets without images.

    Raises:
        NotFinite: an activation is NaN or infinite.
    """

    def sums(neurons, real):
        z = jnp.where(real[..., None], neurons.astype(jnp.float32), 0)
        size = jnp.abs(z)
        terms = z, size, size > threshold, jnp.square(z)
        return jnp.sum(real), Statistics(*(jnp.sum(term, axis=(0, 1), dtype=jnp.float32) for term in terms))

    @jax.jit
    def batch_sums(params, batch, new):
        towers = bind(context.graphdef, params).neurons(
            batch.tokens, batch.mask, lambda z, valid: sums(z, valid & new[:, None]), images=batch.images
        )
        if "vision_tower" in towers:
            towers["vision_tower"] = jax.tree.map(lambda *x: jnp.stack(x), *towers["vision_tower"])
        # XLA removes the computation of what is not returned.
        return towers if language_model else {"vision_tower": towers["vision_tower"]}

    def set_sums(encoded: EncodedSet, rows: np.ndarray) -> dict[str, Any]:
        total = None
        for indices in padded_rows(len(rows), batch_size):
            new = np.diff(indices, prepend=-1) > 0  # the last batch repeats a row, which counts once
            towers = batch_sums(context.params, encoded.batch(rows[indices]), new)
            towers = jax.tree.map(lambda x: multihost.gather(x).astype(np.float64), towers)
            total = towers if total is None else jax.tree.map(np.add, total, towers)
        return total

    statistics = {}
    for name in names:
        encoded = context.sets[name]
        rows = rng(context.seed, f"manu/{name}").permutation(len(encoded))[:samples]
        statistics[name] = {
            tower: Statistics(*(x / count[:, None] for x in totals))
            for tower, (count, totals) in set_sums(encoded, rows).items()
        }
    finite.check(statistics, "The vanilla model's activations")
    return statistics


def importance(image: Statistics, text: Statistics | None = None, terms: Iterable[str] = TERMS) -> np.ndarray:
    """Computes I(D, n) of each neuron: [layers, f].

    Args:
        image: the statistics over the questions with an image.
        text: the statistics over the text-only questions. If None, each term is the statistic itself: see assumption
            M2 of `manu`.
        terms: the terms of the sum.
    """
    variance = image.variance + (0.0 if text is None else text.variance)

    def contrast(field: str) -> np.ndarray:
        x = getattr(image, field)
        if text is None:
            return x
        y = getattr(text, field)
        return np.abs(x - y) / (x + y + EPS)

    values = {
        "abs": contrast("mean_abs"),
        "freq": contrast("active_share"),
        "var": np.sqrt(variance),
        "rms": np.sqrt(contrast("mean_square")),
    }
    return sum(values[term] for term in terms)
