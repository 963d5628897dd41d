"""Layers that several models share.

Axes: b batch, t query position, s key position, d width in, f width out, m key/value head, g query heads per
key/value head, c head channel.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from vkd_jax.models import lora, quantize
from vkd_jax.runtime.mesh import BATCH_SPEC

# What the backward pass finds of a block's forward pass, and what it computes again. By far the most FLOPs are those of
# products with weights; by far the most bytes are scores of attention and what stands between the products.
REMAT = {
    "": None,  # everything is kept
    "dots": jax.checkpoint_policies.save_only_these_names(lora.PRODUCT),  # products with weights are kept
    "full": jax.checkpoint_policies.nothing_saveable,  # the block's input alone is kept
}

RotaryTables = tuple[jax.Array, jax.Array]  # cosines and sines, [b, t, 1, c / 2] each


lecun_normal = nnx.initializers.lecun_normal()
small_normal = nnx.initializers.normal(0.02)


def rematerialize(body: Callable, remat: str) -> Callable:
    """The body of a scan, whose backward pass computes again what `remat`, a key of REMAT, does not keep."""
    return jax.checkpoint(body, policy=REMAT[remat], prevent_cse=False) if remat else body  # a scan needs no guard


def shard_batch(x: jax.Array, mesh: Mesh | None) -> jax.Array:
    """x [b, ...] with its rows where those of the batch lie, which XLA would not always guess.

    It may follow the weights, whose width lies over the same devices, and compute all rows on each of them.
    """
    if mesh is None or x.shape[0] % (mesh.shape["data"] * mesh.shape["fsdp"]):
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, BATCH_SPEC))


def apply_blocks(
    call: Callable[[nnx.Module, jax.Array, jax.Array], jax.Array],
    blocks: Sequence[nnx.Module],
    x: jax.Array,
    remat: str,
    mesh: Mesh | None,
) -> list[jax.Array]:
    """The outputs of blocks of one kind, one after the other: [b, ...] each.

    With `remat`, a key of REMAT that keeps less than everything, they are one scan, since else XLA compiles each block
    anew, forward and backward; their matrices are stacked in x's dtype, in which they are multiplied.

    Args:
        call: (block, what enters it, its number among these) -> what leaves it.
        blocks: alike but for their weights.
        x: what enters the first one.
        remat: see `rematerialize`.
        mesh: see `shard_batch`.
    """
    if not remat or not blocks:
        outputs = []
        for number, block in enumerate(blocks):
            x = shard_batch(call(block, shard_batch(x, mesh), number), mesh)
            outputs.append(x)
        return outputs
    graphdefs, states = zip(*map(nnx.split, blocks), strict=True)

    def stack(*leaves: jax.Array) -> jax.Array:
        return jnp.stack([leaf.astype(x.dtype) if leaf.ndim > 1 else leaf for leaf in leaves])

    def body(x, layer):
        state, number = layer
        x = shard_batch(call(nnx.merge(graphdefs[0], state), shard_batch(x, mesh), number), mesh)
        return x, x

    layers = jax.tree.map(stack, *states), jnp.arange(len(blocks))
    return list(jax.lax.scan(rematerialize(body, remat), x, layers)[1])


class Linear(nnx.Module):
    """`y = x W + b`, computed in `dtype` whatever the parameters are stored in."""

    def __init__(self, d, f, *, bias, dtype, param_dtype, rngs, init=lecun_normal):
        self.dtype = jnp.dtype(dtype)
        self.kernel = nnx.Param(init(rngs.params(), (d, f), param_dtype))
        self.bias = nnx.Param(jnp.zeros((f,), param_dtype)) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., d] to [..., f]."""
        # Leading axes flattened: on CPU a plain matrix product is faster than one with batch axes.
        y = lora.matmul(x.astype(self.dtype).reshape(-1, x.shape[-1]), self.kernel.get_value())
        y = y.reshape(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)


class Embedding(nnx.Module):
    """A table of token embeddings that can also serve as the output head."""

    def __init__(self, vocab, d, *, dtype, param_dtype, rngs):
        self.dtype = jnp.dtype(dtype)
        self.embedding = nnx.Param(small_normal(rngs.params(), (vocab, d), param_dtype))

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """int [...] to [..., d]."""
        return quantize.take_rows(self.embedding.get_value(), tokens, self.dtype)

    def attend(self, x: jax.Array) -> jax.Array:
        """Logits against the table itself (tied embeddings)."""
        y = quantize.matmul(x.astype(self.dtype).reshape(-1, x.shape[-1]), self.embedding.get_value(), axis=1)
        return y.reshape(*x.shape[:-1], -1)


class LayerNorm(nnx.Module):
    """`(x - mean) / sqrt(var + eps) * scale + bias`, in float32."""

    def __init__(self, d, *, eps, dtype, param_dtype):
        self.eps, self.dtype = eps, jnp.dtype(dtype)
        self.scale = nnx.Param(jnp.ones((d,), param_dtype))
        self.bias = nnx.Param(jnp.zeros((d,), param_dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., d] to [..., d]."""
        x = x.astype(jnp.float32)
        x = x - x.mean(-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.eps)
        x = x * self.scale[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)
        return x.astype(self.dtype)


class RMSNorm(nnx.Module):
    """`x / sqrt(mean(x^2) + eps) * scale`; the mean in float32, the scaling in `dtype` as LLaMA does it."""

    def __init__(self, d, *, eps, dtype, param_dtype):
        self.eps, self.dtype = eps, jnp.dtype(dtype)
        self.scale = nnx.Param(jnp.ones((d,), param_dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., d] to [..., d]."""
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.eps)
        return self.scale[...].astype(self.dtype) * x.astype(self.dtype)


def attention(q: jax.Array, k: jax.Array, v: jax.Array, allowed: jax.Array | None = None) -> jax.Array:
    """Softmax attention with grouped key/value heads; the softmax is in float32.

    Args:
        q: [b, t, heads, c].
        k: [b, s, kv_heads, c], with kv_heads dividing heads.
        v: [b, s, kv_heads, c].
        allowed: bool [b, t, s]; a query that may see nothing gets a finite average, never NaN.

    Returns:
        [b, t, heads, c].
    """
    b, t, heads, c = q.shape
    q = (q * c**-0.5).reshape(b, t, k.shape[2], -1, c)
    scores = jnp.einsum("btmgc,bsmc->bmgts", q, k, preferred_element_type=jnp.float32)
    if allowed is not None:
        scores = jnp.where(allowed[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bmgts,bsmc->btmgc", weights, v).reshape(b, t, heads, c)


def rotary_tables(
    positions: jax.Array, frequency: np.ndarray, sections: Sequence[int], length: int, dtype: Any
) -> RotaryTables:
    """Cosine and sine of the angles by which `rotate` turns: [b, t, 1, c / 2] each, for all heads and blocks.

    Rows of a table that is made while this is traced. As functions of the places a CPU would compute them again for
    each head and block, forward and backward: XLA fuses them into whatever takes them.

    Args:
        positions: int [b, t, axes], from 0 to length - 1; what lies outside turns like the nearest of these.
        frequency: float32 [c / 2], the angle of each channel pair at place 1.
        sections: how many channel pairs turn with each axis: the first so many with the first, and so on.
        length: of the table.
        dtype: of what is returned.
    """
    angle = np.arange(length, dtype=np.float32)[:, None] * frequency
    owned = np.split(angle, np.cumsum(sections)[:-1], axis=1)

    def of(function: Callable[[np.ndarray], np.ndarray]) -> jax.Array:
        tables = [jnp.asarray(function(part), dtype) for part in owned]
        rows = [jnp.take(table, positions[..., i], axis=0, mode="clip") for i, table in enumerate(tables)]
        return jnp.concatenate(rows, axis=-1)[:, :, None]

    return of(np.cos), of(np.sin)


def rotate(x: jax.Array, tables: RotaryTables) -> jax.Array:
    """Rotary position embedding (Su et al., arXiv 2104.09864): channel i is paired with channel i + c/2.

    Args:
        x: [b, t, heads, c].
        tables: what `rotary_tables` gives, in whose type this is computed.

    Returns:
        [b, t, heads, c].
    """
    cos, sin = tables
    x1, x2 = jnp.split(x.astype(cos.dtype), 2, axis=-1)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(x.dtype)


def insert_features(x: jax.Array, is_image: jax.Array, features: jax.Array) -> jax.Array:
    """Puts a row's j-th feature at its j-th image token; image tokens beyond the last stay as they are.

    Args:
        x: embedded tokens [b, t, d].
        is_image: bool [b, t].
        features: [b, p, d].

    Returns:
        [b, t, d].
    """
    p = features.shape[1]
    which = jnp.cumsum(is_image, axis=1) - 1
    chosen = jnp.take_along_axis(features, jnp.clip(which, 0, p - 1)[..., None], axis=1)
    return jnp.where((is_image & (which < p))[..., None], chosen.astype(x.dtype), x)


def quick_gelu(x: jax.Array) -> jax.Array:
    """`x sigmoid(1.702 x)`, CLIP's approximation of GELU."""
    return x * jax.nn.sigmoid(1.702 * x)


def gelu(x: jax.Array) -> jax.Array:
    """The exact GELU, by the error function."""
    return jax.nn.gelu(x, approximate=False)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": gelu}
