"""Pure loss functions.

Shapes: b rows, a answer tokens, v vocabulary entries, p feature tokens, c channels. Every function computes in float32
and returns one value per row, and the caller averages: NPO of a batch mean, for one, is not the mean of NPO.

The functions in `DISTANCES` take features and targets [b, p, c], a scale [b] or scalar, which is the mean square of the
teacher's features, and bool [b, p], which is False at padding.
"""

import jax
import jax.numpy as jnp
import optax

from vkd_jax.types import Array


def token_log_probs(logits: Array, targets: Array) -> jax.Array:
    """Computes the log-probability of each target token: [b, a, v], int [b, a] -> [b, a]."""
    return -optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), targets)


def sequence_log_prob(logits: Array, targets: Array, target_mask: Array) -> jax.Array:
    """Computes log p(answer | prompt), the sum over the answer tokens: [b].

    Args:
        logits: [b, a, v].
        targets: int [b, a].
        target_mask: bool [b, a], False at padding.
    """
    return jnp.sum(token_log_probs(logits, targets) * target_mask, axis=-1)


def answer_cross_entropy(logits: Array, targets: Array, target_mask: Array) -> jax.Array:
    """Computes the mean negative log-probability of the answer tokens, in nats: [b].

    Args:
        logits: [b, a, v].
        targets: int [b, a].
        target_mask: bool [b, a], False at padding.
    """
    count = jnp.maximum(jnp.sum(target_mask, axis=-1), 1)
    return -sequence_log_prob(logits, targets, target_mask) / count


def bounded_ascent(cross_entropy: Array, cap: float) -> jax.Array:
    """Computes -min(CE, cap), which is gradient ascent with a gradient of zero beyond `cap` nats."""
    return -jnp.minimum(cross_entropy, cap)


def npo(log_prob: Array, reference_log_prob: Array, beta: float) -> jax.Array:
    """Computes negative preference optimization of sequence log-probabilities: [b].

        -(2 / beta) log sigmoid(-beta (log p - log p_ref))

    At log p = log p_ref it equals (2 / beta) log 2, and its gradient is that of log p: plain gradient ascent.

    Args:
        log_prob: log p of each answer, [b].
        reference_log_prob: log p_ref of each answer, [b].
        beta: the inverse temperature, per nat.

    Reference: Zhang et al., "Negative Preference Optimization", arXiv 2404.05868.

    Example:
        >>> float(npo(jnp.float32(-1.0), jnp.float32(-1.0), beta=2.0))  # log 2
        0.6931...
    """
    return -(2.0 / beta) * jax.nn.log_sigmoid(-beta * (log_prob - reference_log_prob))


def kl_divergence(teacher_logits: Array, logits: Array, target_mask: Array) -> jax.Array:
    """Computes KL(teacher || student) of the next-token distributions, averaged over the answer tokens: [b].

        1/a sum_t sum_v p_T(v | t) (log p_T(v | t) - log p(v | t))

    At the teacher both the divergence and its gradient are zero.

    Args:
        teacher_logits: [b, a, v]; constants.
        logits: [b, a, v].
        target_mask: bool [b, a], False at padding.
    """
    teacher = jax.nn.log_softmax(_f32(teacher_logits), axis=-1)
    student = jax.nn.log_softmax(_f32(logits), axis=-1)
    return _masked_mean(jnp.sum(jnp.exp(teacher) * (teacher - student), axis=-1), target_mask)


def relative_squared_distance(feature: Array, target: Array, scale: Array, valid: Array) -> jax.Array:
    """Computes the mean squared error over tokens and channels, divided by `scale`: [b]."""
    return _masked_mean(jnp.mean(jnp.square(_f32(feature) - _f32(target)), axis=-1), valid) / scale


def cosine_distance(feature: Array, target: Array, scale: Array, valid: Array) -> jax.Array:
    """Computes 1 - cosine similarity, averaged over tokens: [b]. The cosine is free of scale, so `scale` is unused."""
    del scale
    return _masked_mean(optax.losses.cosine_distance(_f32(feature), _f32(target), epsilon=1e-8), valid)


def smooth_l1_distance(feature: Array, target: Array, scale: Array, valid: Array) -> jax.Array:
    """Computes the Huber loss (delta 1) of features divided by sqrt(scale), averaged over tokens and channels: [b]."""
    root = jnp.sqrt(scale)[..., None, None]
    return _masked_mean(jnp.mean(optax.losses.huber_loss(_f32(feature) / root, _f32(target) / root), axis=-1), valid)


def _masked_mean(x: jax.Array, valid: Array) -> jax.Array:
    """Averages each row over its real tokens: [b, p], bool [b, p] -> [b]."""
    # `where` instead of a product, so that infinite values at padding do not become NaN.
    return jnp.sum(jnp.where(valid, x, 0.0), axis=-1) / jnp.maximum(jnp.sum(valid, axis=-1), 1)


DISTANCES = {
    "mse": relative_squared_distance,
    "cosine": cosine_distance,
    "smooth_l1": smooth_l1_distance,
}


def _f32(x: Array) -> jax.Array:
    return jnp.asarray(x, jnp.float32)
