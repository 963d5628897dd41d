"""The optimizer of the trainable weights: gradients are clipped first, and updates are masked or projected last."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vkd_jax.config.training import TrainConfig
from vkd_jax.types import Params

# Schedules after the warmup: (peak learning rate, number of steps after the warmup) -> optax schedule.
SCHEDULES = {"cosine": optax.cosine_decay_schedule, "constant": lambda rate, steps: optax.constant_schedule(rate)}


def create(config: TrainConfig) -> optax.GradientTransformationExtraArgs:
    """Creates the optimizer: clipping, Adam, weight decay, learning rate, mask, projection.

    It is applied to the trainable weights alone, because `optax.masked` over all weights passes the raw gradients of
    the frozen ones through. The element-wise mask comes late, because momentum and weight decay move weights whose
    gradient is zero, and so does the projection, because Adam and weight decay leave every subspace. The learning rate
    is an argument of `update`, so that runs with different rates share one program.

    Args:
        config: only `weight_decay`, `clip_norm` and `b2` are read.
    """
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.scale_by_adam(b2=config.b2),
        optax.add_decayed_weights(config.weight_decay, decay_mask),
        _scale_by_rate(),
        mask_updates(),
        project_updates(),
    )


def learning_rates(config: TrainConfig, steps: int) -> np.ndarray:
    """Computes the learning rate of each step: float32 [steps].

    Args:
        config: only `learning_rate`, `warmup_steps` and `schedule` are read.
        steps: the number of steps of the whole run, at which the cosine ends.
    """
    warmup = optax.linear_schedule(0.0, config.learning_rate, config.warmup_steps)
    rest = SCHEDULES[config.schedule](config.learning_rate, max(steps - config.warmup_steps, 1))
    schedule = optax.join_schedules([warmup, rest], [config.warmup_steps])
    return np.asarray(jax.vmap(schedule)(jnp.arange(steps)), np.float32).reshape(-1)


def _scale_by_rate() -> optax.GradientTransformationExtraArgs:
    """Multiplies updates by -rate, where `rate` is an extra argument of `update`."""

    def update(updates, state, params=None, *, rate, **extra):
        del params, extra
        return jax.tree.map(lambda u: -rate * u, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def decay_mask(params: Params) -> dict[str, bool]:
    """Selects the weights that decay: kernels and embedding tables, but no norms, biases or class embeddings."""
    return {path: value.ndim > 1 and path.endswith(("kernel", "embedding")) for path, value in params.items()}


def mask_updates() -> optax.GradientTransformationExtraArgs:
    """Sets updates outside `mask` to zero. `mask` is an extra argument of `update`; None keeps all updates."""

    def update(updates, state, params=None, *, mask=None, **extra):
        del params, extra
        return (updates if mask is None else apply_mask(updates, mask)), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def project_updates() -> optax.GradientTransformationExtraArgs:
    """Multiplies the update of each kernel [.., d, f] by its projection [.., d, d], in float32.

    `projections` is an extra argument of `update`, from `methods.null_space`; None keeps all updates. Weights without a
    projection then keep their values.
    """

    def project(path: str, update: jax.Array, projections: Params) -> jax.Array:
        if path not in projections:
            return jnp.zeros_like(update)
        return jnp.matmul(projections[path], update, precision="highest")

    def update(updates, state, params=None, *, projections=None, **extra):
        del params, extra
        if projections is not None:
            updates = {path: project(path, x, projections) for path, x in updates.items()}
        return updates, state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def apply_mask(tree: Params, mask: Params) -> Params:
    """Sets values outside the mask to zero, including those that are not finite."""
    return jax.tree.map(lambda x, m: jnp.where(m, x, jnp.zeros_like(x)), tree, mask)
