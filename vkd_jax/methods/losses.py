"""Pure loss functions. Shapes: b rows, a answer tokens, v vocabulary entries, p feature tokens, c channels.

Distances take features and targets [b, p, c], a scale [b] and which tokens are real, bool [b, p].

All of them compute in float32 and return one value per row, so that the caller says how rows are averaged: NPO of
a batch mean, for one, is not the mean of NPO.
"""

import jax
import jax.numpy as jnp
import optax

from vkd_jax.types import Array


def token_log_probs(logits: Array, targets: Array) -> jax.Array:
    """Log-probability of each target token: [b, a, v], [b, a] -> [b, a]."""
    return -optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), targets)


def sequence_log_prob(logits: Array, targets: Array, target_mask: Array) -> jax.Array:
    """log p(answer | prompt), the sum over answer tokens: -> [b]."""
    return jnp.sum(token_log_probs(logits, targets) * target_mask, axis=-1)


def answer_cross_entropy(logits: Array, targets: Array, target_mask: Array) -> jax.Array:
    """Mean negative log-probability of a row's answer tokens, which are all that counts: -> [b]."""
    count = jnp.maximum(jnp.sum(target_mask, axis=-1), 1)
    return -sequence_log_prob(logits, targets, target_mask) / count


def bounded_ascent(cross_entropy: Array, cap: float) -> jax.Array:
    """Gradient ascent that stops at `cap` nats: -min(CE, cap), the gradient being zero beyond."""
    return -jnp.minimum(cross_entropy, cap)


def npo(log_prob: Array, reference_log_prob: Array, beta: float) -> jax.Array:
    """Negative preference optimisation of sequence log-probabilities: -> [b].

        -(2 / beta) log sigmoid(-beta (log p - log p_ref))

    Equals (2 / beta) log 2 at log p = log p_ref, where its gradient is that of log p, plain ascent.

    Reference: Zhang et al., "Negative Preference Optimization", arXiv 2404.05868.
    """
    return -(2.0 / beta) * jax.nn.log_sigmoid(-beta * (log_prob - reference_log_prob))


def kl_divergence(teacher_logits: Array, logits: Array, target_mask: Array) -> jax.Array:
    """KL(teacher || student) of the next-token distributions, averaged over a row's answer tokens: -> [b].

        1/a sum_t sum_v p_T(v | t) (log p_T(v | t) - log p(v | t))

    Zero at the teacher, and so is its gradient.

    Args:
        teacher_logits: [b, a, v]; constants.
        logits: [b, a, v].
        target_mask: bool [b, a].
    """
    teacher = jax.nn.log_softmax(_f32(teacher_logits), axis=-1)
    student = jax.nn.log_softmax(_f32(logits), axis=-1)
    return _mean(jnp.sum(jnp.exp(teacher) * (teacher - student), axis=-1), target_mask)


def relative_squared_distance(feature: Array, target: Array, scale: Array, valid: Array) -> jax.Array:
    """Mean squared error over tokens and channels, divided by `scale`, the teacher's mean square: -> [b]."""
    return _mean(jnp.mean(jnp.square(_f32(feature) - _f32(target)), axis=-1), valid) / scale


def cosine_distance(feature: Array, target: Array, scale: Array, valid: Array) -> jax.Array:
    """1 - cosine similarity, averaged over tokens: -> [b]; `scale` is ignored, cosine has no scale."""
    del scale
    return _mean(optax.losses.cosine_distance(_f32(feature), _f32(target), epsilon=1e-8), valid)


def smooth_l1_distance(feature: Array, target: Array, scale: Array, valid: Array) -> jax.Array:
    """Huber loss (delta 1) of the difference in units of the teacher's root mean square: -> [b]."""
    root = jnp.sqrt(scale)[..., None, None]
    return _mean(jnp.mean(optax.losses.huber_loss(_f32(feature) / root, _f32(target) / root), axis=-1), valid)


def _mean(x: jax.Array, valid: Array) -> jax.Array:
    """The mean over a row's real tokens: [b, p], bool [b, p] -> [b]; what padding holds never counts."""
    return jnp.sum(jnp.where(valid, x, 0.0), axis=-1) / jnp.maximum(jnp.sum(valid, axis=-1), 1)


DISTANCES = {
    "mse": relative_squared_distance,
    "cosine": cosine_distance,
    "smooth_l1": smooth_l1_distance,
}


def _f32(x: Array) -> jax.Array:
    return jnp.asarray(x, jnp.float32)
