"""Updates in the null space of the inputs of each layer on retained examples.

For the kernel W [d, f] of a linear layer y = x W, the second moment of its inputs over retained examples is

    C = sum_i x_i x_i^T = U diag(lambda) U^T,    lambda_1 >= lambda_2 >= ...

U_k has the first k eigenvectors, with the smallest k for which their eigenvalues have at least the share `energy` of
the sum. Each update of the optimizer, including weight decay, is projected last:

    dW <- (I - U_k U_k^T) dW

The outputs of the layer for inputs in the span of U_k then do not change; the other directions are left to forgetting.
Only these kernels train. Biases, norms, embeddings and the patch convolution stay frozen, because any change of them
would affect retained inputs. With energy=1, all outputs for the observed examples stay the same up to rounding, because
the inputs of each layer do not change.

The inputs are those of the model before training, at the tokens on which its outputs depend, in all streams except the
forget set: the retain set, text, and the people of earlier requests. C, its eigenvectors and the projections are
float32; a projection has d^2 values for each kernel and the rows of its kernel's shards.

Reference: Wang et al., "Training Networks in Null Space of Feature Covariance for Continual Learning", arXiv
2103.07113; Saha et al., "Gradient Projection Memory for Continual Learning", arXiv 2103.09762, whose rule for k this
is. Projecting the updates of unlearning is an idea of arXiv 2605.05909, whose equations were not available.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from vkd_jax.config.fields import Section, setting
from vkd_jax.data.batching import padded_rows, rng
from vkd_jax.data.encoding import Batch, EncodedSet
from vkd_jax.methods import base
from vkd_jax.models.base import bind
from vkd_jax.models.observed import observe
from vkd_jax.runtime import finite
from vkd_jax.types import Params

LINEAR = r"language_model/blocks/.+/kernel"  # kernels with a leading layer axis


@dataclasses.dataclass(frozen=True)
class NullSpace(Section):
    """Updates in the null space of the inputs of each layer on retained examples."""

    SECTION: ClassVar[str] = "method.null_space"

    energy: float = setting(
        0.0,
        "Share of the energy of each layer's retained inputs in the directions that no update changes; 0 projects "
        "nothing.",
        minimum=0,
        maximum=1,
    )
    samples: int = setting(
        256, "Largest number of examples of each stream but the forget set whose inputs are collected.", minimum=1
    )


def linear_kernels(params: Mapping[str, Any], paths: Iterable[str]) -> list[str]:
    """Selects the kernels of linear layers: matrices, with a layer axis in the language model's blocks."""
    return [
        path
        for path in paths
        if path.endswith("/kernel") and len(params[path].shape) == 2 + bool(re.fullmatch(LINEAR, path))
    ]


def projection_shapes(params: Mapping[str, Any], paths: Iterable[str]) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes and shardings of `projections`: float32 [.., d, d] for each linear kernel [.., d, f]."""
    shapes = {}
    for path in linear_kernels(params, paths):
        *layers, d, _ = params[path].shape
        sharding = _row_sharding(params[path])
        shapes[path] = jax.ShapeDtypeStruct((*layers, d, d), jnp.float32, sharding=sharding)
    return shapes


def _row_sharding(kernel: Any) -> Sharding:
    """The sharding of a kernel without that of its last axis."""
    sharding = kernel.sharding
    if not isinstance(sharding, NamedSharding):
        return sharding
    return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[: len(kernel.shape) - 1]))


def projections(
    graphdef: Any,
    params: Params,
    paths: Iterable[str],
    sets: Mapping[str, EncodedSet],
    settings: NullSpace,
    *,
    batch_size: int,
    seed: int,
    put: Callable[[Batch], Batch] = lambda batch: batch,
) -> Params:
    """Computes I - U_k U_k^T of each linear kernel that trains.

    Args:
        graphdef: the structure of the model.
        params: its weights before training.
        paths: the weights that train.
        sets: the sets whose inputs are retained, by name.
        settings: the share of energy, and the number of rows per set.
        batch_size: the number of rows per batch.
        seed: determines which rows are drawn.
        put: moves a batch to the devices.

    Returns:
        {path: float32 [.., d, d]}

    Raises:
        NotFinite: an input of a layer is NaN or infinite.
    """
    shapes = projection_shapes(params, paths)
    whole = any(path.startswith("language_model/") for path in shapes)
    shardings = {path: x.sharding for path, x in shapes.items()}

    def outputs(moments: Params, params: Params, batch: Batch, new: jax.Array) -> jax.Array:
        observed = {path: dataclasses.replace(observe(params[path]), probe=probe) for path, probe in moments.items()}
        return _squares(bind(graphdef, {**params, **observed}), batch, new, whole)

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=shardings)
    def add(moments: Params, params: Params, batch: Batch, new: jax.Array) -> Params:
        flat = {path: moment.reshape(*moment.shape[:-2], -1) for path, moment in moments.items()}
        gradients = jax.grad(outputs)(flat, params, batch, new)
        return {path: moment + gradients[path].reshape(moment.shape) for path, moment in moments.items()}

    moments = jax.jit(lambda: {path: jnp.zeros(x.shape) for path, x in shapes.items()}, out_shardings=shardings)()
    for name, encoded in sets.items():
        rows = rng(seed, f"null_space/{name}").permutation(len(encoded))[: settings.samples]
        for indices in padded_rows(len(rows), batch_size):
            new = np.diff(indices, prepend=-1) > 0  # the last batch repeats a row, which counts once
            batch, counted = put((encoded.batch(rows[indices]), new))
            moments = add(moments, params, batch, counted)
    if finite.nonfinite_paths(moments):
        raise finite.error("The inputs of the vanilla model's layers")
    return {path: _of_moment(shardings[path])(moment, settings.energy) for path, moment in moments.items()}


def _squares(model: Any, batch: Batch, new: jax.Array, whole: bool) -> jax.Array:
    """A function whose gradient is not zero at the outputs of the model that count, and zero elsewhere.

    Args:
        model: the model.
        batch: rows of a set.
        new: bool [b], False at rows that do not count.
        whole: whether the language model trains, too; else the image features are all that changes.
    """
    features, total = base.encode_images(model, batch)[0], jnp.float32(0)
    if features is not None:
        counts = features.valid & new[:, None]
        total += jnp.sum(jnp.square(features.values.astype(jnp.float32)) * counts[..., None])
    if whole:
        logits = base.logits_of_features(model, batch, features)
        total += jnp.sum(jnp.square(logits) * (batch.target_mask & new[:, None])[..., None])
    return total


@functools.cache
def _of_moment(sharding: Sharding) -> Callable[[jax.Array, float], jax.Array]:
    """The jitted `null_projection` of a stack of moments, one layer at a time, with this sharding."""

    def compute(moments: jax.Array, energy: float) -> jax.Array:
        if moments.ndim == 2:
            return null_projection(moments, energy)
        return jax.lax.map(lambda moment: null_projection(moment, energy), moments)

    return jax.jit(compute, out_shardings=sharding)


def null_projection(moment: jax.Array, energy: float) -> jax.Array:
    """Computes I - U_k U_k^T from a second moment C [d, d]; see the module.

    Directions whose eigenvalue is within rounding of zero are never in U_k.

    Example:
        >>> null_projection(jnp.diag(jnp.array([9.0, 1.0, 0.0])), 0.9)  # the first direction holds 90 % of the energy
        Array([[0., 0., 0.],
               [0., 1., 0.],
               [0., 0., 1.]], dtype=float32)
    """
    d = len(moment)
    values, vectors = jnp.linalg.eigh(moment.astype(jnp.float32))  # ascending
    values, vectors = jnp.maximum(values[::-1], 0), vectors[:, ::-1]
    total = jnp.cumsum(values)
    before = jnp.concatenate([jnp.zeros(1), total[:-1]])
    kept = (before < energy * total[-1]) & (values > 4 * jnp.finfo(jnp.float32).eps * values[0])
    basis = vectors * kept
    return jnp.eye(d) - jnp.matmul(basis, basis.T, precision="highest")


def share_left(projection: jax.Array) -> float:
    """The share of a kernel's directions that updates may change: (d - k) / d, a mean over layers."""
    return float(jnp.mean(jnp.trace(projection, axis1=-2, axis2=-1)) / math.prod(projection.shape[-1:]))
