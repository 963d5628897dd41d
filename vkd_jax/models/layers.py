"""Layers that several models share.

Axes: b batch, t query position, s key position, d width in, f width out, m key/value head, g query heads per
key/value head, c head channel.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from vkd_jax.models import lora, quantize
from vkd_jax.runtime.mesh import BATCH_SPEC

# The activations of a block that are saved for the backward pass; it recomputes the others. Most FLOPs are spent in
# matrix products with weights; most bytes are attention scores and the activations between those products.
REMAT = {
    "": None,  # save everything
    "dots": jax.checkpoint_policies.save_only_these_names(lora.PRODUCT),  # save the products with weights
    "full": jax.checkpoint_policies.nothing_saveable,  # save only the input of the block
}

RotaryTables = tuple[jax.Array, jax.Array]  # cosines and sines, [b, t, 1, c / 2] each

lecun_normal = nnx.initializers.lecun_normal()
small_normal = nnx.initializers.normal(0.02)


def rematerialize(body: Callable, remat: str) -> Callable:
    """Returns the body of a scan with the rematerialization policy `remat`, a key of `REMAT`."""
    # Inside a scan XLA cannot merge the recomputation with the forward pass, so `prevent_cse` is not needed.
    return jax.checkpoint(body, policy=REMAT[remat], prevent_cse=False) if remat else body


def shard_batch(x: jax.Array, mesh: Mesh | None) -> jax.Array:
    """Constrains x [b, ...] to the sharding of the batch.

    Without the constraint XLA may propagate the sharding of the weights, whose width is sharded over the same devices,
    and compute all rows on every device.

    Args:
        x: activations; returned unchanged if the batch axes of the mesh do not divide b.
        mesh: the device mesh, or None for one device.
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
    """Applies blocks in sequence and returns the output of each, [b, ...].

    With rematerialization the blocks run as one scan, because otherwise XLA would compile the forward and backward
    pass of each block separately. Their matrices are stacked in the dtype of `x`, in which they are multiplied.

    Args:
        call: function of (block, input, index of the block) to the output of the block.
        blocks: blocks that differ only in their weights.
        x: input of the first block, [b, ...].
        remat: a key of `REMAT`.
        mesh: the device mesh, or None for one device.
    """
    if not remat or not blocks:
        outputs = []
        for index, block in enumerate(blocks):
            x = shard_batch(call(block, shard_batch(x, mesh), index), mesh)
            outputs.append(x)
        return outputs
    graphdefs, states = zip(*map(nnx.split, blocks), strict=True)

    def stack(*leaves: jax.Array) -> jax.Array:
        return jnp.stack([leaf.astype(x.dtype) if leaf.ndim > 1 else leaf for leaf in leaves])

    def body(x, layer):
        state, index = layer
        x = shard_batch(call(nnx.merge(graphdefs[0], state), shard_batch(x, mesh), index), mesh)
        return x, x

    layers = jax.tree.map(stack, *states), jnp.arange(len(blocks))
    return list(jax.lax.scan(rematerialize(body, remat), x, layers)[1])


class Linear(nnx.Module):
    """`y = x W + b`, computed in `dtype`; the parameters are stored in `param_dtype`."""

    def __init__(self, d, f, *, bias, dtype, param_dtype, rngs, init=lecun_normal):
        self.dtype = jnp.dtype(dtype)
        self.kernel = nnx.Param(init(rngs.params(), (d, f), param_dtype))
        self.bias = nnx.Param(jnp.zeros((f,), param_dtype)) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [..., d] to [..., f]."""
        # The leading axes are flattened because a product without batch axes is faster on CPU.
        y = lora.matmul(x.astype(self.dtype).reshape(-1, x.shape[-1]), self.kernel.get_value())
        y = y.reshape(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)


class Embedding(nnx.Module):
    """Token embedding table [vocab, d], which tied models also use as the output head.

    Looked-up embeddings, but not the head, are multiplied by `scale`, rounded to `dtype` as in Gemma.
    """

    def __init__(self, vocab, d, *, dtype, param_dtype, rngs, scale=1.0):
        self.dtype, self.scale = jnp.dtype(dtype), scale
        self.embedding = nnx.Param(small_normal(rngs.params(), (vocab, d), param_dtype))

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Looks up tokens, int [...], and returns [..., d]."""
        x = quantize.take_rows(self.embedding.get_value(), tokens, self.dtype)
        return x if self.scale == 1 else x * jnp.asarray(self.scale, self.dtype)

    def attend(self, x: jax.Array) -> jax.Array:
        """Returns the logits [..., vocab] of x [..., d]: its products with the rows of the table."""
        y = quantize.matmul(x.astype(self.dtype).reshape(-1, x.shape[-1]), self.embedding.get_value(), axis=1)
        return y.reshape(*x.shape[:-1], -1)


class MLP(nnx.Module):
    """`fc2(activation(fc1(x)))`, with biases."""

    def __init__(self, d, f, *, activation, **options):
        self.activation = activation
        self.fc1 = Linear(d, f, bias=True, **options)
        self.fc2 = Linear(f, d, bias=True, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [..., d] to [..., d]."""
        return self.fc2(self.neurons(x))

    def neurons(self, x: jax.Array) -> jax.Array:
        """Returns the input of the last layer: maps [..., d] to [..., f]."""
        return ACTIVATIONS[self.activation](self.fc1(x))


class GatedMLP(nnx.Module):
    """Gated linear unit (Shazeer, arXiv 2002.05202): `down(activation(gate(x)) * up(x))`."""

    def __init__(self, d, f, *, bias, activation="silu", **options):
        self.activation = activation
        self.gate = Linear(d, f, bias=bias, **options)
        self.up = Linear(d, f, bias=bias, **options)
        self.down = Linear(f, d, bias=bias, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [..., d] to [..., d]."""
        return self.down(self.neurons(x))

    def neurons(self, x: jax.Array) -> jax.Array:
        """Returns the input of the last layer: maps [..., d] to [..., f]."""
        return ACTIVATIONS[self.activation](self.gate(x)) * self.up(x)


class LayerNorm(nnx.Module):
    """`(x - mean(x)) / sqrt(var(x) + eps) * scale + bias` over the last axis, computed in float32."""

    def __init__(self, d, *, eps, dtype, param_dtype):
        self.eps, self.dtype = eps, jnp.dtype(dtype)
        self.scale = nnx.Param(jnp.ones((d,), param_dtype))
        self.bias = nnx.Param(jnp.zeros((d,), param_dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalizes [..., d]."""
        x = x.astype(jnp.float32)
        x = x - x.mean(-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.eps)
        x = x * self.scale[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)
        return x.astype(self.dtype)


class RMSNorm(nnx.Module):
    """`x / sqrt(mean(x^2) + eps) * scale` over the last axis.

    The mean is computed in float32 and the product with `scale` in `dtype`, as in LLaMA. A zero-centered norm, as in
    Gemma, multiplies by `1 + scale` instead, in float32.
    """

    def __init__(self, d, *, eps, dtype, param_dtype, zero_centered=False):
        self.eps, self.dtype, self.zero_centered = eps, jnp.dtype(dtype), zero_centered
        self.scale = nnx.Param((jnp.zeros if zero_centered else jnp.ones)((d,), param_dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalizes [..., d]."""
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.eps)
        if self.zero_centered:
            return (x * (1 + self.scale[...].astype(jnp.float32))).astype(self.dtype)
        return self.scale[...].astype(self.dtype) * x.astype(self.dtype)


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    attention_mask: jax.Array | None = None,
    scale: float | None = None,
) -> jax.Array:
    """Softmax attention with grouped key/value heads: `softmax(scale q k^T) v`, the softmax in float32.

    Args:
        q: [b, t, heads, c].
        k: [b, s, kv_heads, c], with kv_heads dividing heads.
        v: [b, s, kv_heads, c].
        attention_mask: bool [b, t, s], the keys that each query attends to; None for all. A query without any key
            gets a finite average of the values, not NaN.
        scale: factor of the scores; None for 1 / sqrt(c).

    Returns:
        [b, t, heads, c].
    """
    b, t, heads, c = q.shape
    q = (q * (c**-0.5 if scale is None else scale)).reshape(b, t, k.shape[2], -1, c)
    scores = jnp.einsum("btmgc,bsmc->bmgts", q, k, preferred_element_type=jnp.float32)
    if attention_mask is not None:
        scores = jnp.where(attention_mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bmgts,bsmc->btmgc", weights, v).reshape(b, t, heads, c)


def rotary_tables(
    positions: jax.Array,
    frequency: np.ndarray,
    sections: Sequence[int],
    length: int,
    dtype: Any,
    order: np.ndarray | None = None,
) -> RotaryTables:
    """Returns the cosines and sines of the rotary angles of each position: [b, t, 1, c / 2] each.

    They are rows of a constant table, which all heads and blocks share. If they were computed from the positions, XLA
    on a CPU would fuse that computation into every use, and repeat it in each head and block, forward and backward.

    Args:
        positions: int [b, t, axes], from 0 to length - 1; other values are clipped to this range.
        frequency: float32 [c / 2], the angle of each channel pair at position 1, in radians.
        sections: number of channel pairs per axis: the first `sections[0]` pairs rotate by the first axis, and so on.
        length: number of rows of the table.
        dtype: dtype of the result.
        order: int [c / 2], the channel pairs in the order that `sections` counts them; None for 0, 1, 2, ...
    """
    angle = np.arange(length, dtype=np.float32)[:, None] * (frequency if order is None else frequency[order])
    angle_of_axis = np.split(angle, np.cumsum(sections)[:-1], axis=1)

    def look_up(function: Callable[[np.ndarray], np.ndarray]) -> jax.Array:
        tables = [jnp.asarray(function(angle), dtype) for angle in angle_of_axis]
        rows = [jnp.take(table, positions[..., i], axis=0, mode="clip") for i, table in enumerate(tables)]
        joined = jnp.concatenate(rows, axis=-1)[:, :, None]
        return joined if order is None else joined[..., np.argsort(order)]

    return look_up(np.cos), look_up(np.sin)


def rotate(x: jax.Array, tables: RotaryTables) -> jax.Array:
    """Applies the rotary position embedding (Su et al., arXiv 2104.09864); channel i is paired with channel i + c/2.

    Args:
        x: [b, t, heads, c].
        tables: from `rotary_tables`; the rotation is computed in their dtype.

    Returns:
        [b, t, heads, c], in the dtype of `x`.
    """
    cos, sin = tables
    x1, x2 = jnp.split(x.astype(cos.dtype), 2, axis=-1)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(x.dtype)


def insert_features(x: jax.Array, is_image: jax.Array, features: jax.Array) -> jax.Array:
    """Replaces the j-th image token of each row with the row's j-th feature.

    Args:
        x: embedded tokens [b, t, d]; image tokens beyond the last feature are not replaced.
        is_image: bool [b, t], True at image tokens.
        features: [b, p, d].

    Returns:
        [b, t, d].
    """
    p = features.shape[1]
    feature_index = jnp.cumsum(is_image, axis=1) - 1
    gathered = jnp.take_along_axis(features, jnp.clip(feature_index, 0, p - 1)[..., None], axis=1)
    return jnp.where((is_image & (feature_index < p))[..., None], gathered.astype(x.dtype), x)


def join_cells(x: jax.Array, scale: int) -> jax.Array:
    """Concatenates the features of each cell of patches, row by row.

    Args:
        x: features of the patches of a square, row by row, [b, side^2, d].
        scale: rows and columns of patches of a cell, a divisor of `side`.

    Returns:
        [b, (side / scale)^2, scale^2 d].
    """
    b, p, d = x.shape
    cells = math.isqrt(p) // scale
    x = x.reshape(b, cells, scale, cells, scale, d).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, cells**2, scale**2 * d)


def quick_gelu(x: jax.Array) -> jax.Array:
    """`x sigmoid(1.702 x)`, the approximation of GELU that CLIP uses."""
    return x * jax.nn.sigmoid(1.702 * x)


def gelu(x: jax.Array) -> jax.Array:
    """The exact GELU, `x/2 (1 + erf(x / sqrt(2)))`."""
    return jax.nn.gelu(x, approximate=False)


ACTIVATIONS = {
    "quick_gelu": quick_gelu,
    "gelu": gelu,
    "gelu_pytorch_tanh": jax.nn.gelu,  # the approximation with tanh
    "silu": jax.nn.silu,
}
