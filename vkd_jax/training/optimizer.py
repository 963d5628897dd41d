"""The optimizer over the trainable weights: clip inside, mask last."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vkd_jax.config.training import TrainConfig
from vkd_jax.types import Params

# What follows the warmup: (learning rate, steps from there on) -> the rate of each.
SCHEDULES = {"cosine": optax.cosine_decay_schedule, "constant": lambda rate, steps: optax.constant_schedule(rate)}


def create(config: TrainConfig) -> optax.GradientTransformationExtraArgs:
    """clip -> Adam -> weight decay -> learning rate -> mask.

    It only ever sees the trainable weights: `optax.masked` over all of them would let raw gradients through to the
    frozen ones. The element-wise mask stands last, since momentum and weight decay move weights whose gradient is
    zero. The learning rate is an argument of `update`, so that runs at different rates are one program.

    Args:
        config: only `weight_decay`, `clip_norm` and `b2` are read.
    """
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.scale_by_adam(b2=config.b2),
        optax.add_decayed_weights(config.weight_decay, decayed),
        _descend(),
        mask_updates(),
    )


def rates(config: TrainConfig, steps: int) -> np.ndarray:
    """The learning rate of each step: float32 [steps].

    Args:
        config: only `learning_rate`, `warmup_steps` and `schedule` are read.
        steps: of the whole run; the cosine ends there.
    """
    warmup = optax.linear_schedule(0.0, config.learning_rate, config.warmup_steps)
    rest = SCHEDULES[config.schedule](config.learning_rate, max(steps - config.warmup_steps, 1))
    schedule = optax.join_schedules([warmup, rest], [config.warmup_steps])
    return np.asarray(jax.vmap(schedule)(jnp.arange(steps)), np.float32).reshape(-1)


def _descend() -> optax.GradientTransformationExtraArgs:
    """Updates against the gradient, `rate` times as long."""

    def update(updates, state, params=None, *, rate, **extra):
        del params, extra
        return jax.tree.map(lambda u: -rate * u, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def decayed(params: Params) -> dict[str, bool]:
    """Matrices decay; norms, biases, the class embedding and the like do not."""
    return {path: value.ndim > 1 and path.endswith(("kernel", "embedding")) for path, value in params.items()}


def mask_updates() -> optax.GradientTransformationExtraArgs:
    """Zeroes updates outside `mask`, an extra argument of `update`; None lets all through."""

    def update(updates, state, params=None, *, mask=None, **extra):
        del params, extra
        return (updates if mask is None else apply_mask(updates, mask)), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def apply_mask(tree: Params, mask: Params) -> Params:
    """Zero outside the mask, also where the value is not finite."""
    return jax.tree.map(lambda x, m: jnp.where(m, x, jnp.zeros_like(x)), tree, mask)
