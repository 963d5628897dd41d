"""Low-rank adapters (LoRA) of the frozen kernels of the language model.

    y = x W + (alpha / rank) dropout(x) A B,    A [d, rank] ~ U(-1 / sqrt(d), 1 / sqrt(d)),    B [rank, f] = 0

A `Lora` replaces a kernel, plain or quantized. In `params` it holds only W; A and B are float32 parameters of their
own, at "<path of the kernel>/lora_a" and ".../lora_b", which are trained, clipped, masked, checkpointed and sharded
like any other. `models.base.bind` joins the three. An export contains W + (alpha / rank) A B.

The LoRA of qwix does not fit: it creates A and B inside the module while a call is traced. That fails in the body of a
scan over stacked blocks, and A and B would not be part of `params`.

Reference: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685. The distribution of A and
the position of dropout are those of https://github.com/huggingface/peft
"""

import dataclasses
import functools
import re
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from qwix import QArray

from vkd_jax.models import quantize
from vkd_jax.models.observed import Observed, pass_through
from vkd_jax.runtime import multihost

KERNELS = r"language_model/blocks/.+/kernel"
A, B = "lora_a", "lora_b"
PRODUCT = "product"  # checkpoint name of the products with weights, for `layers.REMAT`


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
    """A frozen kernel with its adapter; arrays may have a leading layer axis. In `params`, a and b are None."""

    weight: jax.Array | QArray  # [.., d, f]
    scale: float  # alpha / rank
    dropout: float  # share of the adapter's inputs that are dropped
    a: jax.Array | None = None  # float32 [.., d, r]
    b: jax.Array | None = None  # float32 [.., r, f]
    key: jax.Array | None = None  # random key [..]; None for no dropout

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the kernel."""
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
    """Attaches an adapter to every kernel of the blocks of the language model; the model's function does not change.

    Args:
        params: the parameters of the model; kernels may be quantized.
        rank: r, the inner width.
        alpha: the adapter's output is scaled by alpha / rank.
        dropout: share of the adapter's inputs that training drops.
        seed: seed of A; one seed gives the same A on every mesh.
        sharding: sharding of A and B, None for the default device. They are small enough to be replicated.

    Returns:
        The parameters, with a `Lora` for each of these kernels, and A and B of each.
    """
    kernels = {path: x.shape for path, x in params.items() if re.fullmatch(KERNELS, path)}
    adapted = {path: Lora(params[path], scale=alpha / rank, dropout=dropout) for path in kernels}
    draw = _drawing(tuple(kernels.items()), rank, sharding)
    return {**params, **adapted, **draw(jax.random.key(seed))}


@functools.lru_cache(maxsize=8)
def _drawing(
    kernels: tuple[tuple[str, tuple[int, ...]], ...], rank: int, sharding: jax.sharding.Sharding | None
) -> Callable[[jax.Array], dict[str, jax.Array]]:
    """The compiled function of a random key to A and B of kernels of these paths and shapes."""

    @functools.partial(jax.jit, out_shardings=sharding)
    def draw(key: jax.Array) -> dict[str, jax.Array]:
        drawn = {}
        for path, (*layers, d, f) in kernels:
            # The bound of PEFT's Kaiming-uniform distribution with slope sqrt(5) is 1 / sqrt(d).
            drawn[f"{path}/{A}"] = jax.random.uniform(
                _key_of(key, path), (*layers, d, rank), jnp.float32, minval=-(d**-0.5), maxval=d**-0.5
            )
            drawn[f"{path}/{B}"] = jnp.zeros((*layers, rank, f), jnp.float32)
        return drawn

    return draw


def is_adapter(path: str) -> bool:
    """Whether a parameter is the A or B of an adapter."""
    return path.endswith((f"/{A}", f"/{B}"))


def adapters(params: Mapping[str, Any]) -> dict[str, Lora]:
    """Returns the kernels with an adapter, which `export.export` needs together with the trained A and B."""
    return {path: x for path, x in params.items() if isinstance(x, Lora)}


def join(params: Mapping[str, Any], key: jax.Array | None = None) -> dict[str, Any]:
    """Moves each A and B into the `Lora` of its kernel.

    Args:
        params: some parameters of a model, from `attach`.
        key: random key for dropout, from which each kernel and layer gets a subkey; None for no dropout.

    Raises:
        ValueError: lists adapters without A or B, and A or B without adapter.
    """
    params = dict(params)
    required = {f"{path}/{name}" for path in adapters(params) for name in (A, B)}
    given = {path for path in params if is_adapter(path)}
    if required != given:
        missing, unknown = sorted(required - given), sorted(given - required)
        raise ValueError(f"Adapters lack {missing}, and {unknown} belong to no adapter.")
    for path, x in adapters(params).items():
        a, b = params.pop(f"{path}/{A}"), params.pop(f"{path}/{B}")
        keys = None
        if key is not None and x.dropout:
            keys = _key_of(key, path)
            keys = jax.random.split(keys, a.shape[:-2]) if a.ndim > 2 else keys
        params[path] = dataclasses.replace(x, a=a, b=b, key=keys)
    return params


def split(params: Mapping[str, Any]) -> dict[str, Any]:
    """Moves A and B out of each `Lora`: the inverse of `join`, except that the key is dropped."""
    out = dict(params)
    for path, x in adapters(params).items():
        out |= {path: dataclasses.replace(x, a=None, b=None, key=None), f"{path}/{A}": x.a, f"{path}/{B}": x.b}
    return out


def matmul(x: jax.Array, weight: jax.Array | QArray | Lora | Observed) -> jax.Array:
    """Multiplies x [n, d] with a kernel of one layer, of any of these kinds: [n, f], in the dtype of x."""
    if isinstance(weight, Observed):
        x, weight = pass_through(x, weight.probe), weight.weight
    if not isinstance(weight, Lora):
        return checkpoint_name(quantize.matmul(x, weight), PRODUCT)
    y, adapter_input = checkpoint_name(quantize.matmul(x, weight.weight), PRODUCT), x
    if weight.key is not None:
        keep = jax.random.bernoulli(weight.key, 1 - weight.dropout, x.shape)
        adapter_input = jnp.where(keep, x / (1 - weight.dropout), 0)  # keeps the mean of x
    inner = checkpoint_name(adapter_input @ weight.a.astype(x.dtype), PRODUCT)
    return y + (inner * weight.scale) @ weight.b.astype(x.dtype)


def delta(lora: Lora, layer: int | None) -> np.ndarray:
    """Returns the product (alpha / rank) A B that an adapter adds to its kernel, float32 [d, f].

    Args:
        lora: the adapter.
        layer: index of the layer if layers are stacked, else None.
    """
    a, b = (multihost.gather(x if layer is None else x[layer]) for x in (lora.a, lora.b))
    return a @ b * np.float32(lora.scale)


def _key_of(key: jax.Array, path: str) -> jax.Array:
    """Returns the random key of the kernel at `path`."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()))
