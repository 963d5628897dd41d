"""The jitted training step and its state."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from vkd_jax.data.encoding import Batch
from vkd_jax.methods.base import FORGET_STREAMS, LossFn, Metrics, TeacherFn
from vkd_jax.methods.worst_case import Adversary
from vkd_jax.models.base import bind
from vkd_jax.runtime.mesh import replicated
from vkd_jax.training import optimizer
from vkd_jax.types import Params

# Named scopes of what a step computes besides the losses: a teacher's forward pass, and the attacker's passes.
TEACHER = "teacher"
ATTACK = "attack"


@functools.partial(jax.tree_util.register_dataclass, data_fields=["params", "opt_state", "step"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The state of training, which is donated to each step and saved in checkpoints."""

    params: Params  # the trainable weights, without the frozen ones
    opt_state: optax.OptState
    step: jax.Array  # scalar int32


def make_step(
    graphdef: Any,
    losses: Mapping[str, LossFn],
    tx: optax.GradientTransformationExtraArgs,
    mask_scope: str,
    teachers: Mapping[str, TeacherFn] = {},  # noqa: B006 (never written to)
    microbatches: int = 1,
    adversary: Adversary | None = None,
) -> Callable:
    """Returns the function of one update.

        (state, frozen, mask, batches, start, rate, key, projections) -> (state, metrics)

    The gradient of each stream is computed separately, so that a mask can cover the forget streams alone; the sum goes
    to the optimizer. Frozen weights are an argument that is neither differentiated nor donated. Neither is `start`, the
    trainable weights before the first step, which the teachers need. `rate` is the learning rate. Dropout is a function
    of the key, the step, the stream and the microbatch. `projections` are those of `methods.null_space`.

    Args:
        graphdef: the structure of the model.
        losses: the loss of each stream.
        tx: the optimizer, from `optimizer.create`.
        mask_scope: which gradients the mask covers; see `Method.mask_scope`.
        teachers: see `Method.teachers`.
        microbatches: the number of parts that a batch is computed in, one after another, to save memory. The loss is
            the mean over rows, and all parts have equally many rows, so the mean of their gradients is the batch's.
        adversary: the simulated attacker of worst-case forgetting, on the stream "forget"; None for no such attacker.
    """

    def step(
        state: TrainState,
        frozen: Params,
        mask: Params | None,
        batches: Mapping[str, Batch],
        start: Params | None = None,
        rate: jax.Array | float = 1.0,
        key: jax.Array | None = None,
        projections: Params | None = None,
    ) -> tuple[TrainState, Metrics]:
        total, metrics = None, {}
        for number, (name, loss_fn) in enumerate(losses.items()):
            stream_key = None if key is None else jax.random.fold_in(jax.random.fold_in(key, state.step), number)
            teach = None
            if name in teachers:
                teach = functools.partial(_add_teacher_outputs, graphdef, teachers[name], frozen, start)
            # Without the barrier a compiler may start the next stream while this one's activations are in memory.
            batch, total = jax.lax.optimization_barrier((batches[name], total))
            stream = _Stream(graphdef, name, loss_fn, teach, batch, stream_key, microbatches)
            grads, stream_metrics = stream.gradient(state.params, frozen)
            metrics |= stream_metrics
            if adversary is not None and name == "forget":
                worst_grads, metrics["worst_case_loss"] = stream.worst_case_gradient(adversary, state.params, frozen)
                grads = optax.tree.add_scale(grads, adversary.settings.weight, worst_grads)
            if mask is not None and name in FORGET_STREAMS and mask_scope == "forget":
                grads = optimizer.apply_mask(grads, mask)
            total = grads if total is None else jax.tree.map(jnp.add, total, grads)
        metrics["loss"] = sum(metrics[f"{name}_loss"] for name in losses)
        if adversary is not None:
            metrics["loss"] += adversary.settings.weight * metrics["worst_case_loss"]
        metrics["grad_norm"] = optax.tree.norm(total)
        masks = dict(mask=mask if mask_scope == "both" else None, projections=projections)
        updates, opt_state = tx.update(total, state.opt_state, state.params, rate=rate, **masks)
        return TrainState(optax.apply_updates(state.params, updates), opt_state, state.step + 1), metrics

    return step


def make_losses(
    graphdef: Any,
    losses: Mapping[str, LossFn],
    teachers: Mapping[str, TeacherFn] = {},  # noqa: B006 (never written to)
    microbatches: int = 1,
) -> Callable:
    """Returns the function of the losses of a step without its update: (params, frozen, batches, start) -> metrics.

    The arguments are those of `make_step`. The function needs less memory than the step: it computes no gradient, and
    one stream after another.
    """

    def compute(
        params: Params, frozen: Params, batches: Mapping[str, Batch], start: Params | None = None
    ) -> dict[str, jax.Array]:
        values: dict[str, jax.Array] = {}
        for name, loss_fn in losses.items():
            teach = None
            if name in teachers:
                teach = functools.partial(_add_teacher_outputs, graphdef, teachers[name], frozen, start)
            batch, values = jax.lax.optimization_barrier((batches[name], values))
            stream = _Stream(graphdef, name, loss_fn, teach, batch, None, microbatches)
            values[f"{name}_loss"] = stream.loss(params, frozen)
        return values

    return compute


def _add_teacher_outputs(graphdef: Any, teacher: TeacherFn, frozen: Params, start: Params, batch: Batch) -> Batch:
    """Adds a teacher's outputs under the weights before the first step to `batch.cached`."""
    with jax.named_scope(TEACHER):
        outputs = teacher(bind(graphdef, {**frozen, **start}), batch)
    return dataclasses.replace(batch, cached={**batch.cached, **outputs})


@dataclasses.dataclass(frozen=True)
class _Stream:
    """One stream's loss on its batch of a step, as a function of the weights."""

    graphdef: Any
    name: str
    loss_fn: LossFn
    teach: Callable[[Batch], Batch] | None
    batch: Batch
    key: jax.Array | None  # of dropout
    microbatches: int

    def gradient(self, params: Params, frozen: Params) -> tuple[Params, Metrics]:
        """Computes the gradient of the loss with respect to `params`, and the metrics."""

        def compute(batch: Batch, key: jax.Array | None) -> tuple[Params, Metrics]:
            batch = self.teach(batch) if self.teach else batch

            def loss(params):
                return self.loss_fn(bind(self.graphdef, {**frozen, **params}, key), batch)

            (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(params)
            return grads, {f"{self.name}_loss": value, **metrics}

        return self._mean(compute)

    def loss(self, params: Params, frozen: Params) -> jax.Array:
        """Computes the loss without its gradient."""

        def compute(batch: Batch, key: jax.Array | None) -> jax.Array:
            batch = self.teach(batch) if self.teach else batch
            return self.loss_fn(bind(self.graphdef, {**frozen, **params}, key), batch)[0]

        return self._mean(compute)

    def worst_case_gradient(self, adversary: Adversary, params: Params, frozen: Params) -> tuple[Params, jax.Array]:
        """Computes the gradient of the loss where the attack leads, and the loss there; see `methods.worst_case`.

        The attacker follows the gradient of the whole batch, whatever the number of microbatches, and has no dropout.
        """
        weights = {**frozen, **params}

        def attack_gradient(moved: Params) -> Params:
            def compute(batch: Batch, key: jax.Array | None) -> Params:
                del key
                return jax.grad(lambda moved: adversary.loss(bind(self.graphdef, {**weights, **moved}), batch))(moved)

            return self._mean(compute)

        with jax.named_scope(ATTACK):
            moved = adversary.attack({path: weights[path] for path in adversary.paths}, attack_gradient)
        weights = weights | moved
        attacked, fixed = {path: weights[path] for path in params}, {path: weights[path] for path in frozen}
        grads, metrics = self.gradient(attacked, fixed)
        return grads, metrics[f"{self.name}_loss"]

    def _mean(self, compute: Callable[[Batch, jax.Array | None], Any]) -> Any:
        """Computes the mean of `compute` over the microbatches, one after another."""
        if self.microbatches == 1:
            return compute(self.batch, self.key)
        count = self.microbatches

        def split(x: jax.Array) -> jax.Array:
            # Each microbatch takes rows of every device, so that no row moves between devices.
            return x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1)

        def add(total: Any, numbered: tuple[jax.Array, Batch]) -> tuple[Any, None]:
            number, rows = numbered
            value = compute(rows, None if self.key is None else jax.random.fold_in(self.key, number))
            return jax.tree.map(lambda a, b: a + b / count, total, value), None

        rows = jax.tree.map(split, self.batch)
        shapes = jax.eval_shape(lambda batch: compute(batch, self.key), jax.tree.map(lambda x: x[0], rows))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        return jax.lax.scan(add, zeros, (jnp.arange(count), rows))[0]


def init_state(tx: optax.GradientTransformation, trainable: Params, mesh: jax.sharding.Mesh) -> TrainState:
    """Creates the state of step 0. Optimizer moments inherit each weight's sharding; scalars are replicated."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(tx, trainable, mesh).opt_state)
    return TrainState(
        params=trainable,
        opt_state=jax.jit(tx.init, out_shardings=shardings)(trainable),
        step=jax.device_put(jnp.int32(0), replicated(mesh)),
    )


def abstract_state(tx: optax.GradientTransformation, trainable: Params, mesh: jax.sharding.Mesh) -> TrainState:
    """Returns the shapes and shardings of the state of step 0. The trainable weights can be shapes, too."""
    scalar_sharding = replicated(mesh)
    opt_state = optax.tree.map_params(
        tx,
        lambda x, weight: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=weight.sharding),
        jax.eval_shape(tx.init, trainable),
        trainable,
        transform_non_params=lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=scalar_sharding),
    )
    return TrainState(trainable, opt_state, jax.ShapeDtypeStruct((), jnp.int32, sharding=scalar_sharding))
