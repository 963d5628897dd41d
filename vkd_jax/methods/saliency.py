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

    The share is of all weights together, not of each tensor. A weight with F_forget_i = 0 is never selected, whatever
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
        values = np.concatenate([multihost.gather(r).ravel() for r in ratio.values()])
        count = round(keep * values.size)
        threshold = np.inf if count == 0 else float(np.partition(values, values.size - count)[values.size - count])
    mask = {k: (r >= threshold) & (r > 0) for k, r in ratio.items()}
    if not any(bool(jnp.any(m)) for m in mask.values()):
        raise UserError(f"The saliency mask selects no weight: {advice}.")
    return mask
