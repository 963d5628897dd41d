"""Quantizes the frozen language model to int8 or int4 with qwix: about 1/4 or 1/8 of its float32 bytes.

    W[i, o] ~ q[i, o] s[g(i), o],   s[g, o] = max over i in g of |W[i, o]| / (2^(bits - 1) - 1/2)

with input channel i, its group g(i) and output channel o. A quantized weight is a `qwix.QArray` (q, and s in float32)
that replaces the array in `params` and in the module. Each use dequantizes it, one layer at a time, and so does the
backward pass, which saves only q: the dequantized model is never in memory as a whole. Gradients flow to the
activations. The weight has no gradient, so it is never trained.

With "w8a8" the blocks do not dequantize q: x is rounded to 8 bits with one scale per token, and integers are
multiplied, which v5e, v5p and v6e do at twice the speed of bfloat16. The gradient is that of the product with s q; it
is rounded in the same way, with one scale per token, before it is multiplied with q.

Reference: https://github.com/google/qwix
"""

import dataclasses
import functools
import math
import re
from typing import Any

import flax
import jax
import jax.numpy as jnp
import qwix
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from qwix import QArray

from vkd_jax.config.fields import FieldError
from vkd_jax.config.model import QUANTIZATIONS
from vkd_jax.types import UserError

# The weights to quantize, their axis of input channels, and their smallest number of bits. Norms and biases are small
# and stay as they are. Token embeddings and the head keep 8 bits: 4 would save little, and would cost the visual
# gradient most of its accuracy.
BLOCKS = "language_model/blocks/"
WEIGHTS = (
    (BLOCKS + r".+/kernel", -2, 4),
    (r"language_model/head/kernel", -2, 8),
    (r"language_model/embed/embedding", -1, 8),  # also the head of tied models
)
# The other weight matrices, which only `round_param` rounds; their last axis is that of output channels.
VISUAL_WEIGHTS = r"(vision_tower|projector)/(.+/kernel|patch_embedding)"
TYPES = {8: jnp.int8, 4: jnp.int4}


@flax.struct.dataclass
class W8A8Kernel(QArray):
    """A quantized kernel [d, f] with scales [1, f] that is multiplied with rounded activations."""


@dataclasses.dataclass(frozen=True)
class Quantization:
    """Number of bits of a weight, and number of input channels that share a scale per output channel."""

    bits: int  # 8 or 4
    group: int | None = None  # None for all input channels
    activations: bool = False  # whether the activations of the blocks are rounded as well

    def group_size(self, width: int) -> int:
        """Returns the group size for `width` input channels: its largest divisor that is at most `group`.

        Raises:
            UserError: that divisor is less than `group` / 4, so that the scales would take much of the memory.
        """
        if self.group is None or width <= self.group:
            return width
        size = max(n for n in range(1, self.group + 1) if width % n == 0)
        if 4 * size < self.group:
            raise UserError(
                f"model.quantize: {width} channels do not divide into equal groups of {self.group} or slightly fewer. "
                f"Set a group size that divides {width}, or int8 without a group size."
            )
        return size


def parse(text: str) -> Quantization | None:
    """Parses a quantization setting.

    Args:
        text: "int8" (one scale per output channel), "int4" (one per 128 of its input channels), "int8:64" (one per
            64), "w8a8" (int8, with rounded activations), or "" for None.

    Raises:
        FieldError: the text is none of these.
    """
    if not text:
        return None
    if text == "w8a8":
        return Quantization(8, activations=True)
    match = re.fullmatch(r"int([84])(?::([1-9]\d*))?", text)
    if match is None:
        raise FieldError("model.quantize", f"{text!r} is not allowed. Give {QUANTIZATIONS}.")
    bits = int(match[1])
    return Quantization(bits, int(match[2]) if match[2] else {8: None, 4: 128}[bits])


def quantize_param(
    path: str, array: jax.Array, settings: Quantization, sharding: NamedSharding | None = None
) -> jax.Array | QArray:
    """Quantizes a parameter if it is one of `WEIGHTS`; returns any other parameter unchanged.

    q has the sharding of the array. The scales have it as well, except on axes that the mesh does not divide. Where the
    mesh divides the input channels but not their groups, each group is divided into several with the same scale.

    Args:
        path: path of the parameter.
        array: its floating-point values.
        settings: how to quantize.
        sharding: sharding of a traced array, which does not have one itself.

    Raises:
        UserError: the group size does not fit the width.
    """
    matches = [(axis, bits) for pattern, axis, bits in WEIGHTS if re.fullmatch(pattern, path)]
    if not matches:
        return array
    axis, bits = matches[0]
    sharding = sharding or getattr(array, "sharding", None)
    sharding = sharding if isinstance(sharding, NamedSharding) else None
    weight = _quantize(array, axis, max(bits, settings.bits), settings.group_size(array.shape[axis]), sharding)
    return W8A8Kernel(weight.qvalue, weight.scale) if settings.activations and path.startswith(BLOCKS) else weight


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _quantize(array, axis, bits, size, sharding):
    def quantize_layer(x):
        other_axes = [i for i in range(x.ndim) if i != x.ndim + axis]
        # In float32, because bfloat16 has too few digits for 127 steps.
        x = x.astype(jnp.float32)
        return qwix.quantize(x, TYPES[bits], channelwise_axes=other_axes, tiled_axes={x.ndim + axis: size})

    # One layer at a time, because the float32 values of a whole stack may not fit in memory.
    out = jax.lax.map(quantize_layer, array) if array.ndim == 3 else quantize_layer(array)
    if sharding is None:
        return out
    # Without more groups each device would need all of q to multiply group by group.
    groups, shards = out.scale.shape[axis], array.shape[axis] // sharding.shard_shape(array.shape)[axis]
    repeats = shards // math.gcd(shards, groups)
    if groups > 1 and size % repeats == 0:
        out = dataclasses.replace(out, scale=jnp.repeat(out.scale, repeats, axis))
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, _divisible(sharding, x.shape)), out)


def quantized_shape(path: str, array: jax.ShapeDtypeStruct, settings: Quantization) -> jax.ShapeDtypeStruct | QArray:
    """Returns the shapes and shardings that `quantize_param` gives for a parameter with this shape and sharding."""
    unsharded = jax.ShapeDtypeStruct(array.shape, array.dtype)
    out = jax.eval_shape(lambda x: quantize_param(path, x, settings, array.sharding), unsharded)
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=_divisible(array.sharding, x.shape)), out
    )


def round_param(path: str, array: jax.Array | QArray, settings: Quantization) -> jax.Array | QArray:
    """Rounds a parameter to the values it has when all weight matrices of the model are quantized; keeps its dtype.

    Token embeddings and the head are rounded to as few bits as the blocks. Norms, biases, embeddings that are added to
    tokens, newlines of images, and weights that are quantized already stay as they are.

    Raises:
        UserError: the group size does not fit the width.
    """
    axes = [axis for pattern, axis, _ in (*WEIGHTS, (VISUAL_WEIGHTS, -2, 4)) if re.fullmatch(pattern, path)]
    if not axes or isinstance(array, QArray):
        return array
    width = math.prod(array.shape[:-1]) if array.ndim > 3 else array.shape[axes[0]]
    return jax.device_put(_round(array, axes[0], settings.bits, settings.group_size(width)), array.sharding)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _round(array, axis, bits, size):
    flat = array.reshape(-1, array.shape[-1]) if array.ndim > 3 else array  # a patch is the input of an output channel
    return dequantize(_quantize(flat, axis, bits, size, None), array.dtype).reshape(array.shape)


def _divisible(sharding: NamedSharding, shape: tuple[int, ...]) -> NamedSharding:
    """Returns the sharding without the axes of this shape that it does not divide."""

    def shards(names: str | tuple[str, ...] | None) -> int:
        return math.prod(sharding.mesh.shape[name] for name in ([names] if isinstance(names, str) else names or ()))

    spec = zip(sharding.spec, shape, strict=False)
    return NamedSharding(sharding.mesh, P(*(names if size % shards(names) == 0 else None for names, size in spec)))


def dequantize(weight: jax.Array | QArray, dtype: Any) -> jax.Array:
    """Returns the values of a plain or quantized weight in `dtype`."""
    return (qwix.dequantize(weight) if isinstance(weight, QArray) else weight).astype(dtype)


def matmul(x: jax.Array, weight: jax.Array | QArray, axis: int = 0) -> jax.Array:
    """Multiplies x [n, d] with a weight [d, f], or [f, d] with axis 1: [n, f], computed in the dtype of x.

    The backward pass dequantizes the weight again.
    """
    if isinstance(weight, W8A8Kernel):
        return _matmul_w8a8(x, weight.qvalue, weight.scale)

    def multiply(x, weight):
        if isinstance(weight, QArray) and weight.scale.shape[axis] > 1:
            return _matmul_groups(x, weight, axis)
        return jax.lax.dot_general(x, dequantize(weight, x.dtype), (((1,), (axis,)), ((), ())))

    # If they were saved for the backward pass, the dequantized layers would add up to the whole model.
    return (jax.checkpoint(multiply, prevent_cse=False) if isinstance(weight, QArray) else multiply)(x, weight)


def _matmul_groups(x: jax.Array, weight: QArray, axis: int) -> jax.Array:
    """Computes `matmul` with several groups of input channels, summing over groups and over the channels in a group.

    The weight is then dequantized inside the product. With a plain [d, f] product, libtpu 0.0.42 first writes the
    scales of all d channels to memory.
    """
    q, scale = weight.qvalue, jnp.expand_dims(weight.scale, axis + 1)
    groups = weight.scale.shape[axis]
    q = q.reshape(*q.shape[:axis], groups, -1, *q.shape[axis + 1 :])
    # Without the barrier XLA undoes the reshape.
    kernel = (jax.lax.optimization_barrier(q).astype(scale.dtype) * scale).astype(x.dtype)
    return jax.lax.dot_general(x.reshape(len(x), groups, -1), kernel, (((1, 2), (axis, axis + 1)), ((), ())))


@jax.custom_vjp
def _matmul_w8a8(x: jax.Array, q: jax.Array, scale: jax.Array) -> jax.Array:
    return _matmul_integers(x, q, 1, scale)


def _matmul_integers(x: jax.Array, q: jax.Array, axis: int, scale: jax.Array | float = 1.0) -> jax.Array:
    """Multiplies x, rounded to 8 bits, with q [d, f] or, with axis 0, its transpose, and with a scale per output."""
    rounded = qwix.quantize(x.astype(jnp.float32), jnp.int8, channelwise_axes=[0])
    products = jax.lax.dot_general(rounded.qvalue, q, (((1,), (1 - axis,)), ((), ())), preferred_element_type=jnp.int32)
    return (products.astype(jnp.float32) * (rounded.scale * scale)).astype(x.dtype)


def _matmul_w8a8_forward(x, q, scale):
    return _matmul_w8a8(x, q, scale), (q, scale)


def _matmul_w8a8_backward(residuals, gradient):
    q, scale = residuals
    scaled = gradient.astype(jnp.float32) * scale
    return _matmul_integers(scaled, q, 0).astype(gradient.dtype), None, None


_matmul_w8a8.defvjp(_matmul_w8a8_forward, _matmul_w8a8_backward)


def take_rows(table: jax.Array | QArray, index: jax.Array, dtype: Any) -> jax.Array:
    """Returns rows of a plain or quantized table in `dtype`: [v, d] and int [...] to [..., d].

    The other rows of a quantized table are not dequantized.
    """
    return dequantize(jax.tree.map(lambda x: x[index], table), dtype)


def is_quantized(path: str) -> bool:
    """Whether `quantize_param` quantizes a parameter of this path."""
    return any(re.fullmatch(pattern, path) for pattern, _, _ in WEIGHTS)
