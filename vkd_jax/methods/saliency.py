"""Saliency of weights for the forget set: the diagonal Fisher information, and masks from it."""

import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from vkd_jax.data.encoding import EncodedSet
from vkd_jax.runtime import multihost
from vkd_jax.types import Params, UserError


def fisher_information(
    loss: Callable,
    trainable: Params,
    frozen: Params,
    samples: Mapping[str, tuple[EncodedSet, np.ndarray]],
    chunk: int,
) -> dict[str, Params]:
    """Computes the diagonal of the empirical Fisher information of each set: the mean of squared per-example gradients.

        F_i = 1/n sum_s (d loss(s) / d theta_i)^2

    The gradient of each example is squared. The square of a batch's mean gradient is another, smaller quantity.

    Args:
        loss: (trainable, frozen, batch) -> the losses of the rows, [b].
        trainable: the weights to differentiate.
        frozen: all other weights.
        samples: by name, a set and the rows to use, int [n].
        chunk: the number of per-example gradients in memory at once, each the size of `trainable`.

    Returns:
        For each set, {path: float32 array of the weight's shape}.
    """

    @functools.partial(jax.jit, donate_argnums=0)
    def add(total, trainable, frozen, batch, valid):
        def one(row):
            return jax.grad(lambda t: jnp.sum(loss(t, frozen, jax.tree.map(lambda x: x[None], row))))(trainable)

        return jax.tree.map(
            lambda a, g: a + jnp.einsum("s...,s->...", jnp.square(g.astype(jnp.float32)), valid),
            total,
            jax.vmap(one)(batch),
        )

    information = {}
    for name, (encoded, rows) in samples.items():
        total = {k: jnp.zeros(v.shape, jnp.float32, device=v.sharding) for k, v in trainable.items()}
        for begin in range(0, len(rows), chunk):
            members = rows[begin : begin + chunk]
            padded = np.concatenate([members, np.repeat(members[-1:], chunk - len(members))])
            valid = (np.arange(chunk) < len(members)).astype(np.float32)
            total = add(total, dict(trainable), dict(frozen), encoded.batch(padded), valid)
        information[name] = {path: x / len(rows) for path, x in total.items()}
    return information


def pool(means: Sequence[tuple[Params, int]]) -> dict[str, jax.Array]:
    """Averages the Fisher information of several sets, weighted by the size of each set.

    Args:
        means: for each set, its Fisher information and its number of examples. The whole set counts, not the rows that
            were sampled from it.
    """
    total = sum(count for _, count in means)
    return {path: sum(mean[path] * (count / total) for mean, count in means) for path in means[0][0]}


def mask_from_ratio(
    forget: Params, retain: Params, *, threshold: float | None, keep: float | None, eps: float
) -> Params:
    """Selects the weights that matter more for the forget set than for the retain set.

        ratio_i = F_forget_i / (F_retain_i + eps);   mask_i = [ratio_i >= threshold], or the top `keep` share

    The share is of all weights together, not of each tensor. Weights with the ratio of the last selected one are
    selected, too. A weight with F_forget_i = 0 is never selected, whatever
    the threshold or the share.

    Args:
        forget: F_forget by path.
        retain: F_retain by path.
        threshold: the smallest selected ratio; None to select by `keep`.
        keep: the share of weights to select; None to select by `threshold`.
        eps: the constant that is added to F_retain.

    Returns:
        {path: bool array of the weight's shape}.

    Raises:
        UserError: no weight is selected.
    """
    ratio = {k: forget[k] / (retain[k] + eps) for k in forget}
    advice = "increase method.mask_keep" if threshold is None else "decrease method.mask_threshold"
    if threshold is None:
        count = round(keep * sum(r.size for r in ratio.values()))
        threshold = ranked_value(list(ratio.values()), count) if count else np.inf
    mask = {k: (r >= threshold) & (r > 0) for k, r in ratio.items()}
    if not any(bool(jnp.any(m)) for m in mask.values()):
        raise UserError(f"The saliency mask selects no weight: {advice}.")
    return mask


def ranked_value(arrays: Sequence[jax.Array], rank: int) -> float:
    """Finds the value at a rank, counted from 1 for the largest, among all elements of several arrays.

    The values stay on their devices, sharded as they are. The bits of floats that are not negative are in the order of
    the floats, so 31 passes find the bits of the value from the highest to the lowest: each counts the elements that
    have at least the bits so far. The result is exact, ties included.

    Args:
        arrays: float32 arrays of any shapes and shardings, without negative values and NaN; fewer than 2^31 elements
            each.
        rank: 1 to the number of elements.

    Example:
        >>> ranked_value([jnp.array([1.0, 5.0]), jnp.array([3.0])], 2)
        3.0
    """
    bits = 0
    for bit in reversed(range(31)):  # the highest one is the sign
        candidate = bits | 1 << bit
        if multihost.gather(_counts(arrays, np.uint32(candidate))).sum(dtype=np.int64) >= rank:
            bits = candidate
    return float(np.uint32(bits).view(np.float32))


@jax.jit
def _counts(arrays: Sequence[jax.Array], least: jax.Array) -> jax.Array:
    """Counts, in each of n arrays, the values whose bits are at least `least`: int32 [n]."""
    bits = (jax.lax.bitcast_convert_type(x, jnp.uint32) for x in arrays)
    return jnp.stack([jnp.sum(x >= least, dtype=jnp.int32) for x in bits])
