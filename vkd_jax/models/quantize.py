"""The frozen language model in int8 or int4, by qwix: about a quarter or an eighth of its float32 bytes.

    W[i, o] ~ q[i, o] s[g(i), o],   s[g, o] = max over i in g of |W[i, o]| / (2^(bits - 1) - 1/2)

with input channel i, its group g(i), output channel o. A quantised weight is a `qwix.QArray` (q, and s in float32)
where an array stood, in `params` and in the module alike. Each use makes floats of it, one layer at a time, and so
does the backward pass, which keeps q alone: the floats of the whole model are never there together. Gradients pass
through to the activations; the weight itself has none, so it is never trained.

With "w8a8" the blocks make no floats of q at all: x is rounded to 8 bits, a scale each token, and integers are
multiplied, which v5e, v5p and v6e do twice as fast as bfloat16. The gradient is that of the product with s q, and is
rounded likewise, a scale each token, before it is multiplied with q.

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

from vkd_jax.types import UserError

# What is quantised, the axis of its input channels, and the fewest bits it takes. Norms and biases stay as they are:
# they are small. Token embeddings and the head keep 8 bits: 4 would save little and cost the visual gradient most.
BLOCKS = "language_model/blocks/"
WEIGHTS = (
    (BLOCKS + r".+/kernel", -2, 4),
    (r"language_model/head/kernel", -2, 8),
    (r"language_model/embed/embedding", -1, 8),  # with tied embeddings the head, too
)
# The other weight matrices, which only `round_param` rounds; their last axis is that of output channels.
OTHERS = r"(vision_tower|projector)/(.+/kernel|patch_embedding)"
TYPES = {8: jnp.int8, 4: jnp.int4}


@flax.struct.dataclass
class W8A8Kernel(QArray):
    """A quantised kernel [d, f], scales [1, f], that is multiplied with rounded activations."""


@dataclasses.dataclass(frozen=True)
class Quantization:
    """How many bits a weight has, and how many input channels share a scale in each output channel."""

    bits: int  # 8 or 4
    group: int | None = None  # None: all
    activations: bool = False  # whether the blocks' activations are rounded, too

    def size(self, width: int) -> int:
        """The group size for `width` input channels: the largest divisor of it that is at most `group`.

        Raises:
            UserError: there is none from a quarter of `group` on, and scales would take much of the memory.
        """
        if self.group is None or width <= self.group:
            return width
        size = max(n for n in range(1, self.group + 1) if width % n == 0)
        if 4 * size < self.group:
            raise UserError(
                f"model.quantize: {width} channels do not split into equal groups of {self.group} or somewhat fewer; "
                f"give a group size that divides {width}, or int8 without one."
            )
        return size


def parse(text: str, field: str = "model.quantize") -> Quantization | None:
    """Reads "int8" (one scale an output channel), "int4" (one per 128 inputs of it), "int8:64" (per 64), "w8a8" (int8,
    activations too); "" is None.

    Args:
        text: to read.
        field: of the config, that it stands in.

    Raises:
        UserError: the text is none of these.
    """
    if not text:
        return None
    if text == "w8a8":
        return Quantization(8, activations=True)
    match = re.fullmatch(r"int([84])(?::([1-9]\d*))?", text)
    if match is None:
        raise UserError(f"{field}={text!r}: give int8 or int4, or one with a group size, such as int4:64; or w8a8.")
    bits = int(match[1])
    return Quantization(bits, int(match[2]) if match[2] else {8: None, 4: 128}[bits])


def quantize_param(
    path: str, array: jax.Array, settings: Quantization, sharding: NamedSharding | None = None
) -> jax.Array | QArray:
    """The parameter as the frozen model keeps it: quantised if it is one of `WEIGHTS`, else as it came.

    q lies on the devices as the array did, and so do the scales, but for axes that the mesh no longer divides. Where it
    splits the input channels, but not their groups, each group becomes a few that share a scale.

    Args:
        path: of the parameter.
        array: its floats.
        settings: it is quantised.
        sharding: of a traced array, which has none to ask for.

    Raises:
        UserError: the groups do not fit the width.
    """
    found = [(axis, bits) for pattern, axis, bits in WEIGHTS if re.fullmatch(pattern, path)]
    if not found:
        return array
    axis, bits = found[0]
    sharding = sharding or getattr(array, "sharding", None)
    sharding = sharding if isinstance(sharding, NamedSharding) else None
    small = _quantize(array, axis, max(bits, settings.bits), settings.size(array.shape[axis]), sharding)
    return W8A8Kernel(small.qvalue, small.scale) if settings.activations and path.startswith(BLOCKS) else small


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _quantize(array, axis, bits, size, sharding):
    def one(x):
        rest = [i for i in range(x.ndim) if i != x.ndim + axis]
        # In float32: bfloat16 has too few digits for 127 steps.
        x = x.astype(jnp.float32)
        return qwix.quantize(x, TYPES[bits], channelwise_axes=rest, tiled_axes={x.ndim + axis: size})

    # Layer by layer, because the float32 values of a whole stack may not fit.
    out = jax.lax.map(one, array) if array.ndim == 3 else one(array)
    if sharding is None:
        return out
    # Or each device would need all of q to multiply group by group.
    groups, parts = out.scale.shape[axis], array.shape[axis] // sharding.shard_shape(array.shape)[axis]
    times = parts // math.gcd(parts, groups)
    if groups > 1 and size % times == 0:
        out = dataclasses.replace(out, scale=jnp.repeat(out.scale, times, axis))
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, _fitting(sharding, x.shape)), out)


def quantized_shape(path: str, array: jax.ShapeDtypeStruct, settings: Quantization) -> jax.ShapeDtypeStruct | QArray:
    """The shapes of `quantize_param`, and where they lie, of the shape of a parameter that has a sharding."""
    bare = jax.ShapeDtypeStruct(array.shape, array.dtype)
    out = jax.eval_shape(lambda x: quantize_param(path, x, settings, array.sharding), bare)
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=_fitting(array.sharding, x.shape)), out
    )


def round_param(path: str, array: jax.Array | QArray, settings: Quantization) -> jax.Array | QArray:
    """The parameter with the values it has once all weight matrices of the model are quantised, of its own type.

    A token table or head takes as few bits as the rest. Norms, biases, and what is added to tokens rather than
    multiplied with them, stay as they came, as does what is quantised already.

    Raises:
        UserError: the groups do not fit the width.
    """
    found = [axis for pattern, axis, _ in (*WEIGHTS, (OTHERS, -2, 4)) if re.fullmatch(pattern, path)]
    if not found or isinstance(array, QArray):
        return array
    width = math.prod(array.shape[:-1]) if array.ndim > 3 else array.shape[found[0]]
    return jax.device_put(_round(array, found[0], settings.bits, settings.size(width)), array.sharding)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _round(array, axis, bits, size):
    flat = array.reshape(-1, array.shape[-1]) if array.ndim > 3 else array  # all of a patch is one output's input
    return dequantize(_quantize(flat, axis, bits, size, None), array.dtype).reshape(array.shape)


def _fitting(sharding: NamedSharding, shape: tuple[int, ...]) -> NamedSharding:
    """The sharding, but for axes of this shape that it does not divide."""

    def parts(names: str | tuple[str, ...] | None) -> int:
        return math.prod(sharding.mesh.shape[name] for name in ([names] if isinstance(names, str) else names or ()))

    spec = zip(sharding.spec, shape, strict=False)
    return NamedSharding(sharding.mesh, P(*(names if size % parts(names) == 0 else None for names, size in spec)))


def dequantize(weight: jax.Array | QArray, dtype: Any) -> jax.Array:
    """The weight in `dtype`."""
    return (qwix.dequantize(weight) if isinstance(weight, QArray) else weight).astype(dtype)


def matmul(x: jax.Array, weight: jax.Array | QArray, axis: int = 0) -> jax.Array:
    """x [n, d] times a weight [d, f], or [f, d] with axis 1: [n, f], computed in x's dtype.

    The backward pass makes the floats of a quantised weight again.
    """
    if isinstance(weight, W8A8Kernel):
        return _product(x, weight.qvalue, weight.scale)

    def on_floats(x, weight):
        if isinstance(weight, QArray) and weight.scale.shape[axis] > 1:
            return _of_groups(x, weight, axis)
        return jax.lax.dot_general(x, dequantize(weight, x.dtype), (((1,), (axis,)), ((), ())))

    # Kept for the backward pass, the floats of each layer would stack up to those of the whole model.
    return (jax.checkpoint(on_floats, prevent_cse=False) if isinstance(weight, QArray) else on_floats)(x, weight)


def _of_groups(x: jax.Array, weight: QArray, axis: int) -> jax.Array:
    """`matmul` where each of g > 1 groups has its scales: over g and over what is in a group.

    So the floats are made as they are multiplied. With a plain [d, f], libtpu 0.0.42 writes the scales of all d first.
    """
    q, scale = weight.qvalue, jnp.expand_dims(weight.scale, axis + 1)
    groups = weight.scale.shape[axis]
    q = q.reshape(*q.shape[:axis], groups, -1, *q.shape[axis + 1 :])
    kernel = (jax.lax.optimization_barrier(q).astype(scale.dtype) * scale).astype(x.dtype)  # or XLA undoes the reshape
    return jax.lax.dot_general(x.reshape(len(x), groups, -1), kernel, (((1, 2), (axis, axis + 1)), ((), ())))


@jax.custom_vjp
def _product(x: jax.Array, q: jax.Array, scale: jax.Array) -> jax.Array:
    return _of_integers(x, q, 1, scale)


def _of_integers(x: jax.Array, q: jax.Array, axis: int, scale: jax.Array | float = 1.0) -> jax.Array:
    """x, rounded to 8 bits, times q [d, f] or, with axis 0, its transpose; times a scale of each output."""
    small = qwix.quantize(x.astype(jnp.float32), jnp.int8, channelwise_axes=[0])
    products = jax.lax.dot_general(small.qvalue, q, (((1,), (1 - axis,)), ((), ())), preferred_element_type=jnp.int32)
    return (products.astype(jnp.float32) * (small.scale * scale)).astype(x.dtype)


def _product_forward(x, q, scale):
    return _product(x, q, scale), (q, scale)


def _product_backward(kept, gradient):
    q, scale = kept
    scaled = gradient.astype(jnp.float32) * scale
    return _of_integers(scaled, q, 0).astype(gradient.dtype), None, None


_product.defvjp(_product_forward, _product_backward)


def take_rows(table: jax.Array | QArray, index: jax.Array, dtype: Any) -> jax.Array:
    """Rows of a table in `dtype`: [v, d], int [...] to [..., d]; other rows of a quantised one never become floats."""
    return dequantize(jax.tree.map(lambda x: x[index], table), dtype)


def is_quantized(path: str) -> bool:
    """Whether a parameter of this name is quantised."""
    return any(re.fullmatch(pattern, path) for pattern, _, _ in WEIGHTS)
