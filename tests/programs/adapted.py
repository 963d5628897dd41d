"""Computes the loss and the gradients of one model with adapters on several meshes of eight devices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import random_llava

from vkd_jax.methods import base as methods
from vkd_jax.methods import losses, scope
from vkd_jax.models import lora
from vkd_jax.models.base import bind
from vkd_jax.runtime.mesh import batch_sharding, make_mesh, replicated

BATCH = dataclasses.replace(random_llava.rows(1, 8).batch(np.arange(8)), images=None)
KEY = jax.random.key(5)


def computed(mesh) -> dict:
    """Loss and gradients with dropout, the sums of A, and whether A and B are replicated."""
    graphdef, params = random_llava.model(mesh)
    everywhere = replicated(mesh)
    params = lora.attach(params, rank=3, alpha=6.0, dropout=0.5, seed=0, sharding=everywhere)
    paths = scope.trainable_paths(params, random_llava.CONFIG, "lora", -1)
    is_replicated = all(params[path].sharding.is_equivalent_to(everywhere, params[path].ndim) for path in paths)
    for path in paths:
        if path.endswith("lora_b"):
            params[path] = jax.device_put(np.full(params[path].shape, 0.1, np.float32), everywhere)

    @jax.jit
    def run(trainable, frozen, batch, key):
        def loss(trainable):
            logits, _ = methods.answer_logits(bind(graphdef, {**frozen, **trainable}, key), batch)
            return losses.answer_cross_entropy(logits, batch.targets, batch.target_mask).mean()

        return jax.value_and_grad(loss)(trainable)

    batch = jax.device_put(BATCH, batch_sharding(mesh))
    trainable, frozen = ({k: x for k, x in params.items() if (k in paths) == trains} for trains in (True, False))
    loss, gradient = run(trainable, frozen, batch, KEY)
    return {
        "loss": float(loss),
        "gradient": [float(jnp.abs(gradient[path]).sum()) for path in sorted(gradient)],
        "replicated": is_replicated,
        "a": [float(np.asarray(params[path]).sum()) for path in sorted(paths) if path.endswith("lora_a")],
    }


def main() -> dict:
    """The results of one device and of eight, by mesh."""
    return {",".join(map(str, shape)): computed(make_mesh(*shape)) for shape in ((1, 1, 1), (2, 2, 2))}
