"""The optimizer over the trainable weights: clip inside, mask last."""

import jax
import jax.numpy as jnp
import ml_collections
import optax

from vkd_jax.types import Params, UserError


def create(config: ml_collections.ConfigDict, steps: int) -> optax.GradientTransformationExtraArgs:
    """clip -> Adam -> weight decay -> learning rate -> mask.

    It only ever sees the trainable weights: `optax.masked` over all of them would let raw gradients through to the
    frozen ones. The element-wise mask stands last, since momentum and weight decay move weights whose gradient is
    zero.

    Args:
        config: learning_rate, warmup_steps, schedule (cosine | constant), weight_decay, clip_norm, b2.
        steps: of the whole run; the cosine ends there.
    """
    warmup = optax.linear_schedule(0.0, config.learning_rate, config.warmup_steps)
    if config.schedule == "cosine":
        rest = optax.cosine_decay_schedule(config.learning_rate, max(steps - config.warmup_steps, 1))
    elif config.schedule == "constant":
        rest = optax.constant_schedule(config.learning_rate)
    else:
        raise UserError(f"train.schedule={config.schedule!r}: give cosine or constant.")
    schedule = optax.join_schedules([warmup, rest], [config.warmup_steps])
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(schedule, b2=config.b2, weight_decay=config.weight_decay, mask=decayed),
        mask_updates(),
    )


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
