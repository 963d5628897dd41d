"""The second moment of the inputs of a kernel, as the gradient with respect to a probe.

    y = observe(x, P) W,    observe(x, P) = x,    whose gradient with respect to P is defined as sum_i x_i x_i^T

An `Observed` takes the place of a kernel in `params`. Every linear layer of every family multiplies by `lora.matmul`,
so differentiating any function of the model with respect to the probes returns the moments of all layers at once, also
in scans over blocks and under rematerialization.

The sum is over the rows x_i on whose output the differentiated function depends: at padding the gradient is zero.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp


@functools.partial(jax.tree_util.register_dataclass, data_fields=["weight", "probe"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Observed:
    """A kernel with a probe of its inputs; arrays may have a leading layer axis."""

    weight: jax.Array  # [.., d, f]
    probe: jax.Array  # zeros, float32 [.., d * d]; flat, since `layers.apply_blocks` casts stacked matrices

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the kernel."""
        return self.weight.shape


def observe(weight: jax.Array) -> Observed:
    """Attaches a probe to a kernel [.., d, f]."""
    *layers, d, _ = weight.shape
    return Observed(weight, jnp.zeros((*layers, d * d), jnp.float32))


@jax.custom_vjp
def pass_through(x: jax.Array, probe: jax.Array) -> jax.Array:
    """Returns x [n, d]; the gradient of `probe` [d * d] is the second moment of its rows."""
    del probe
    return x


def _forward(x: jax.Array, probe: jax.Array) -> tuple[jax.Array, Any]:
    del probe
    return x, x


def _backward(x: jax.Array, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    rows = jnp.where(jnp.any(gradient != 0, axis=-1, keepdims=True), x, 0)
    moment = jnp.matmul(rows.T, rows, precision="highest", preferred_element_type=jnp.float32)
    return gradient, moment.reshape(-1)


pass_through.defvjp(_forward, _backward)
