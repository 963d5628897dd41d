"""Which weights matter for the forget set: diagonal Fisher information, and the masks made of it."""

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
    """Diagonals of the empirical Fisher information: per set, the mean of squared per-sample gradients.

        F_i = 1/n sum_s (d loss(s) / d theta_i)^2

    The square is taken of each sample's own gradient; the square of a batch's mean gradient is another, smaller
    quantity and is not computed here.

    Args:
        loss: (trainable, frozen, batch) -> [b] losses of the rows.
        trainable: the weights to differentiate; `frozen`, all others.
        samples: by name, a set and which of its rows to take.
        chunk: how many per-sample gradients are held at once, each the size of `trainable`.
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
            part = rows[begin : begin + chunk]
            padded = np.concatenate([part, np.repeat(part[-1:], chunk - len(part))])
            valid = (np.arange(chunk) < len(part)).astype(np.float32)
            total = add(total, dict(trainable), dict(frozen), encoded.batch(padded), valid)
        information[name] = {path: x / len(rows) for path, x in total.items()}
    return information


def pool(parts: Sequence[tuple[Params, int]]) -> dict[str, jax.Array]:
    """The mean over all samples of several sets: (mean over a set, how many samples it has) of each.

    Of drawn rows, so that a set counts by its size and not by how many of its rows were looked at.
    """
    total = sum(count for _, count in parts)
    return {path: sum(mean[path] * (count / total) for mean, count in parts) for path in parts[0][0]}


def mask_from_ratio(
    forget: Params, retain: Params, *, threshold: float | None, keep: float | None, eps: float
) -> Params:
    """True where a weight matters more for the forget set than for the retain set.

        ratio_i = F_forget_i / (F_retain_i + eps);   mask_i = [ratio_i >= threshold], or the top `keep` share

    The share is taken over all weights together, not per tensor; ties at the border go to zero-information
    weights last, so a weight that the forget set does not touch is never selected.

    Raises:
        UserError: no weight is selected.
    """
    ratio = {k: forget[k] / (retain[k] + eps) for k in forget}
    advice = "raise method.mask_keep" if threshold is None else "lower method.mask_threshold"
    if threshold is None:
        values = np.concatenate([multihost.gather(r).ravel() for r in ratio.values()])
        count = round(keep * values.size)
        threshold = np.inf if count == 0 else float(np.partition(values, values.size - count)[values.size - count])
    mask = {k: (r >= threshold) & (r > 0) for k, r in ratio.items()}
    if not any(bool(jnp.any(m)) for m in mask.values()):
        raise UserError(f"the saliency mask selects no weight at all: {advice}.")
    return mask
