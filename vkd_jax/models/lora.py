"""Low-rank adapters beside the frozen kernels of the language model.

    y = x W + (alpha / rank) dropout(x) A B,    A [d, rank] ~ U(-1 / sqrt(d), 1 / sqrt(d)),    B [rank, f] = 0

A `Lora` stands where a kernel stood, as a quantised weight does, and its W may be one. In `params` it holds W alone;
A and B are parameters of their own, float32, at "<path of the kernel>/lora_a" and ".../lora_b": they train, are
clipped, masked, checkpointed and sharded like any other. `models.base.bind` brings them together. What is exported is
W + (alpha / rank) A B.

qwix's own LoRA does not fit: it makes A and B inside the module while a call is traced, which in the body of a scan
over stacked blocks fails, and there they would be no parameters that `params` knows.

Reference: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685; A is drawn and dropout
placed as in https://github.com/huggingface/peft
"""

import dataclasses
import functools
import re
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from qwix import QArray

from vkd_jax.models import quantize
from vkd_jax.runtime import multihost

KERNELS = r"language_model/blocks/.+/kernel"
A, B = "lora_a", "lora_b"
PRODUCT = "product"  # what `layers.REMAT` calls the outcome of a product with a weight


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """Sizes of the adapters that a method trains."""

    rank: int  # r, the inner width
    alpha: float  # the adapter's output is scaled by alpha / rank
    dropout: float  # share of the adapter's inputs that training drops


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["weight", "a", "b", "key"], meta_fields=["scale", "dropout"]
)
@dataclasses.dataclass(frozen=True)
class Lora:
    """A frozen kernel with its adapter; all arrays may have a leading layer axis. In `params` a and b are None."""

    weight: jax.Array | QArray  # [.., d, f]
    scale: float  # alpha / rank
    dropout: float  # the share of inputs that the adapter does not see
    a: jax.Array | None = None  # float32 [.., d, r]
    b: jax.Array | None = None  # float32 [.., r, f]
    key: jax.Array | None = None  # random key [..]; None for no dropout

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the kernel."""
        return self.weight.shape


def attach(
    params: Mapping[str, Any],
    *,
    rank: int,
    alpha: float,
    dropout: float,
    seed: int,
    sharding: jax.sharding.Sharding | None = None,
) -> dict[str, Any]:
    """The parameters with an adapter at every kernel of the language model's blocks; as functions they are the same.

    Args:
        params: of the model; the kernels may be quantised, and stay as they are.
        rank: r, the inner width.
        alpha: the adapter's output is scaled by alpha / rank.
        dropout: the share of the adapter's inputs that is dropped in training.
        seed: of A; one seed gives the same A for every mesh.
        sharding: where A and B lie, None for the default device. They are small enough for a copy on every device.
    """
    kernels = {path: x.shape for path, x in params.items() if re.fullmatch(KERNELS, path)}

    @functools.partial(jax.jit, out_shardings=sharding)
    def draw(key: jax.Array) -> dict[str, jax.Array]:
        drawn = {}
        for path, (*layers, d, f) in kernels.items():
            # PEFT's Kaiming-uniform with slope sqrt(5), which is a bound of 1 / sqrt(d).
            drawn[f"{path}/{A}"] = jax.random.uniform(
                _key_of(key, path), (*layers, d, rank), jnp.float32, minval=-(d**-0.5), maxval=d**-0.5
            )
            drawn[f"{path}/{B}"] = jnp.zeros((*layers, rank, f), jnp.float32)
        return drawn

    placed = {path: Lora(params[path], scale=alpha / rank, dropout=dropout) for path in kernels}
    return {**params, **placed, **draw(jax.random.key(seed))}


def adapters(params: Mapping[str, Any]) -> dict[str, Lora]:
    """The kernels that have an adapter: what `export.export` needs beside the trained A and B; {} without any."""
    return {path: x for path, x in params.items() if isinstance(x, Lora)}


def join(params: Mapping[str, Any], key: jax.Array | None = None) -> dict[str, Any]:
    """The parameters with each A and B put into the `Lora` that they belong to.

    Args:
        params: some of a model's parameters, from `attach`.
        key: for dropout, a subkey of it for each kernel and layer; None for no dropout.

    Raises:
        ValueError: there is an adapter without its A or B, or one of these without its adapter; they are listed.
    """
    params = dict(params)
    wanted = {f"{path}/{name}" for path in adapters(params) for name in (A, B)}
    given = {path for path in params if path.endswith((f"/{A}", f"/{B}"))}
    if wanted != given:
        raise ValueError(f"Adapters lack {sorted(wanted - given)}; {sorted(given - wanted)} belong to no adapter.")
    for path, x in adapters(params).items():
        a, b = params.pop(f"{path}/{A}"), params.pop(f"{path}/{B}")
        keys = None
        if key is not None and x.dropout:
            keys = _key_of(key, path)
            keys = jax.random.split(keys, a.shape[:-2]) if a.ndim > 2 else keys
        params[path] = dataclasses.replace(x, a=a, b=b, key=keys)
    return params


def split(params: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `join`, but for the key."""
    parted = dict(params)
    for path, x in adapters(params).items():
        parted |= {path: dataclasses.replace(x, a=None, b=None, key=None), f"{path}/{A}": x.a, f"{path}/{B}": x.b}
    return parted


def matmul(x: jax.Array, weight: jax.Array | QArray | Lora) -> jax.Array:
    """x W in x's dtype, [n, d] to [n, f], for a plain, quantised or adapted kernel of one layer."""
    if not isinstance(weight, Lora):
        return checkpoint_name(quantize.matmul(x, weight), PRODUCT)
    y, seen = checkpoint_name(quantize.matmul(x, weight.weight), PRODUCT), x
    if weight.key is not None:
        kept = jax.random.bernoulli(weight.key, 1 - weight.dropout, x.shape)
        seen = jnp.where(kept, x / (1 - weight.dropout), 0)  # of the same mean as x
    inner = checkpoint_name(seen @ weight.a.astype(x.dtype), PRODUCT)
    return y + (inner * weight.scale) @ weight.b.astype(x.dtype)


def delta(lora: Lora, layer: int | None) -> np.ndarray:
    """What an adapter adds to a kernel: float32 [d, f], of one layer where layers are stacked."""
    a, b = (multihost.gather(x if layer is None else x[layer]) for x in (lora.a, lora.b))
    return a @ b * np.float32(lora.scale)


def _key_of(key: jax.Array, path: str) -> jax.Array:
    """A key of its own for every kernel."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()))
