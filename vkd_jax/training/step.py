"""The jitted training step and its state."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from vkd_jax.data.encoding import Batch
from vkd_jax.methods.base import LossFn, TeacherFn
from vkd_jax.models.base import bind
from vkd_jax.runtime.mesh import replicated
from vkd_jax.training import optimizer
from vkd_jax.types import Params

TEACHER = "teacher"  # the named scope of a teacher's forward pass


@functools.partial(jax.tree_util.register_dataclass, data_fields=["params", "opt_state", "step"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What training changes: all of it is donated to each step, and all of it is checkpointed."""

    params: Params  # the trainable weights alone
    opt_state: optax.OptState
    step: jax.Array  # scalar int32


def make_step(
    graphdef: Any,
    losses: Mapping[str, LossFn],
    tx: optax.GradientTransformationExtraArgs,
    mask_scope: str,
    teacher: Mapping[str, TeacherFn] = {},  # noqa: B006 (never written to)
    microbatches: int = 1,
):
    """One update: (state, frozen, mask, batches, start, rate, key) -> (state, metrics).

    Each stream's gradient is taken apart, so that a mask can cover the forget stream alone; they add up before the
    optimizer. Frozen weights are an argument that is neither differentiated nor donated, as is `start`: the trainable
    weights before the first step, for the teacher of the streams that have one. `rate` is the learning rate. Dropout,
    where the model has any, is a function of the key, the step, the stream and the microbatch.

    A batch is computed in `microbatches` parts of equally many rows, one after another, so that the activations of one
    part alone are held: the loss is the mean over rows, so the mean of the parts' gradients is that of the batch.
    """

    def gradient(params: Params, name: str, batch: Batch, frozen: Params, start: Params | None, key: jax.Array | None):
        if name in teacher:
            with jax.named_scope(TEACHER):
                outputs = teacher[name](bind(graphdef, {**frozen, **start}), batch)
            batch = dataclasses.replace(batch, cached={**batch.cached, **outputs})

        def loss(params):
            return losses[name](bind(graphdef, {**frozen, **params}, key), batch)

        (value, more), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return grads, {f"{name}_loss": value, **more}

    def step(
        state: TrainState,
        frozen: Params,
        mask: Params | None,
        batches: Mapping[str, Batch],
        start: Params | None = None,
        rate: jax.Array | float = 1.0,
        key: jax.Array | None = None,
    ):
        total, metrics = None, {}
        for number, name in enumerate(losses):
            own = None if key is None else jax.random.fold_in(jax.random.fold_in(key, state.step), number)
            part = functools.partial(gradient, state.params, name, frozen=frozen, start=start)
            # One stream after the other: else a compiler may begin the second while it holds the first's activations.
            batch, total = jax.lax.optimization_barrier((batches[name], total))
            if microbatches == 1:
                grads, more = part(batch, key=own)
            else:
                grads, more = _mean_of_parts(part, batch, own, microbatches)
            metrics |= more
            if mask is not None and name == "forget" and mask_scope == "forget":
                grads = optimizer.apply_mask(grads, mask)
            total = grads if total is None else jax.tree.map(jnp.add, total, grads)
        metrics["loss"] = sum(metrics[f"{name}_loss"] for name in losses)
        metrics["grad_norm"] = optax.tree.norm(total)
        updates, opt_state = tx.update(
            total, state.opt_state, state.params, rate=rate, mask=mask if mask_scope == "both" else None
        )
        return TrainState(optax.apply_updates(state.params, updates), opt_state, state.step + 1), metrics

    return step


def _mean_of_parts(part: Callable, batch: Batch, key: jax.Array | None, count: int) -> Any:
    """The mean of `part(rows, key=...)` over `count` parts of a batch, one after another."""

    def cut(x: jax.Array) -> jax.Array:
        # Each part takes rows of every device: the first axis stays on the devices that it lies on.
        return x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1)

    def add(total: Any, numbered: tuple[jax.Array, Batch]) -> tuple[Any, None]:
        number, rows = numbered
        found = part(rows, key=None if key is None else jax.random.fold_in(key, number))
        return jax.tree.map(lambda a, b: a + b / count, total, found), None

    parts = jax.tree.map(cut, batch)
    shapes = jax.eval_shape(lambda rows: part(rows, key=key), jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.scan(add, zeros, (jnp.arange(count), parts))[0]


def init_state(tx: optax.GradientTransformation, trainable: Params, mesh: jax.sharding.Mesh) -> TrainState:
    """A fresh state, born sharded: moments lie where their weights lie, counters everywhere."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(tx, trainable, mesh).opt_state)
    return TrainState(
        params=trainable,
        opt_state=jax.jit(tx.init, out_shardings=shardings)(trainable),
        step=jax.device_put(jnp.int32(0), replicated(mesh)),
    )


def abstract_state(tx: optax.GradientTransformation, trainable: Params, mesh: jax.sharding.Mesh) -> TrainState:
    """The shapes of a fresh state, and where they lie; of the trainable weights no more than that is needed."""
    everywhere = replicated(mesh)
    opt_state = optax.tree.map_params(
        tx,
        lambda x, weight: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=weight.sharding),
        jax.eval_shape(tx.init, trainable),
        trainable,
        transform_non_params=lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere),
    )
    return TrainState(trainable, opt_state, jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere))
