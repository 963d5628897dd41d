"""Quantizes one model on several meshes of eight devices: the layout of its arrays and what it computes."""

import jax
import jax.numpy as jnp
import numpy as np
import random_llava
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from qwix import QArray

from vkd_jax.methods import base as methods
from vkd_jax.methods import losses, scope
from vkd_jax.models import quantize
from vkd_jax.models.base import bind
from vkd_jax.runtime.mesh import batch_sharding, make_mesh

MESHES = [(1, 1, 1), (1, 8, 1), (2, 2, 2)]
BATCH = random_llava.rows(1, 8).batch(np.arange(8))


def spec(x) -> list:
    """Returns the mesh axis of each axis of an array; None for an axis that is not sharded."""
    names = [*x.sharding.spec, *[None] * x.ndim]
    return [name if x.sharding.shard_shape(x.shape)[i] < x.shape[i] else None for i, name in enumerate(names[: x.ndim])]


def layout(small, floats) -> dict:
    """Returns the sharding of scales, and the values whose sharding differs from that of their weights."""
    return {
        "sum": {path: int(np.asarray(x.qvalue.astype(jnp.int32)).sum()) for path, x in small.items()},
        "moved": [p for p, x in small.items() if not x.qvalue.sharding.is_equivalent_to(floats[p].sharding, x.ndim)],
        "spec": {path: spec(x.scale) for path, x in small.items()},
    }


def work(mesh, groups: int) -> float:
    """Returns the FLOPs of a device for a product with a grouped kernel and its gradient, over an equal share."""
    kernel = jax.ShapeDtypeStruct((384, 256), jnp.float32, sharding=NamedSharding(mesh, P("tensor", "fsdp")))
    how = quantize.Quantization(4, 384 // groups)
    weight = quantize.quantized_shape("language_model/blocks/mlp/down/kernel", kernel, how)
    x = jax.ShapeDtypeStruct((512, 384), jnp.float32, sharding=NamedSharding(mesh, P("fsdp", "tensor")))

    def both(x, weight):
        y, pull = jax.vjp(lambda x: quantize.matmul(x, weight), x)
        return y, pull(y)

    flops = jax.jit(both).lower(x, weight).compile().cost_analysis()["flops"]
    return flops / (2 * 2 * 512 * 384 * 256 / mesh.size)


def computed(mesh, graphdef, params) -> dict:
    """The loss and the gradients of the projector."""
    paths = scope.visual_paths(params, random_llava.CONFIG, 0)

    @jax.jit
    def run(trainable, frozen, batch):
        def loss(trainable):
            logits, _ = methods.answer_logits(bind(graphdef, {**frozen, **trainable}), batch)
            return losses.answer_cross_entropy(logits, batch.targets, batch.target_mask).mean()

        return jax.value_and_grad(loss)(trainable)

    batch = jax.device_put(BATCH, batch_sharding(mesh))
    trainable, frozen = ({k: x for k, x in params.items() if (k in paths) == trains} for trains in (True, False))
    loss, gradient = run(trainable, frozen, batch)
    return {"loss": float(loss), "gradient": [float(jnp.abs(gradient[path]).sum()) for path in sorted(gradient)]}


def main() -> dict:
    """Layouts by quantization and mesh, losses and gradients by mesh, and the FLOPs of a device."""
    results = {"int8": {}, "int4:8": {}, "computed": {}}
    for shape in MESHES:
        mesh, name = make_mesh(*shape), ",".join(map(str, shape))
        graphdef, floats = random_llava.model(mesh)
        for text in ("int8", "int4:8"):
            how = quantize.parse(text)
            params = {path: quantize.quantize_param(path, x, how) for path, x in floats.items()}
            results[text][name] = layout({path: x for path, x in params.items() if isinstance(x, QArray)}, floats)
        results["computed"][name] = computed(mesh, graphdef, params)
    results["work"] = {groups: work(make_mesh(1, 2, 4), groups) for groups in (6, 8)}
    return results
