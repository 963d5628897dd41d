"""Losses against values worked by hand, and identities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vkd_jax.methods import losses


def test_token_log_probs_by_hand():
    logits = jnp.log(jnp.array([[[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]]))
    got = losses.token_log_probs(logits, jnp.array([[1, 2]]))
    np.testing.assert_allclose(got, [[np.log(0.25), np.log(0.8)]], rtol=1e-6)


def test_answer_cross_entropy_counts_answer_tokens_only():
    logits = jnp.log(jnp.array([[[0.5, 0.5], [0.25, 0.75], [0.9, 0.1]]]))
    targets, mask = jnp.array([[0, 1, 1]]), jnp.array([[True, True, False]])
    want = -(np.log(0.5) + np.log(0.75)) / 2
    np.testing.assert_allclose(losses.answer_cross_entropy(logits, targets, mask), [want], rtol=1e-6)
    changed = logits.at[:, 2].set(jnp.array([-9.0, 7.0]))
    np.testing.assert_array_equal(
        losses.answer_cross_entropy(logits, targets, mask),
        losses.answer_cross_entropy(changed, targets, mask),
    )
    np.testing.assert_allclose(losses.sequence_log_prob(logits, targets, mask), [-2 * want], rtol=1e-6)


def test_bounded_ascent_stops_at_the_cap():
    value, slope = jax.value_and_grad(lambda ce: losses.bounded_ascent(ce, 2.0))(jnp.float32(1.5))
    assert (value, slope) == (-1.5, -1.0)
    value, slope = jax.value_and_grad(lambda ce: losses.bounded_ascent(ce, 2.0))(jnp.float32(3.0))
    assert (value, slope) == (-2.0, 0.0)


@pytest.mark.parametrize("beta", [0.1, 0.4, 0.9])
def test_npo_at_the_reference(beta):
    log_prob = jnp.array([-3.0, -0.5])
    value, slope = jax.vmap(jax.value_and_grad(lambda x, r: losses.npo(x, r, beta)))(log_prob, log_prob)
    np.testing.assert_allclose(value, 2 / beta * np.log(2), rtol=1e-6)
    np.testing.assert_allclose(slope, 1.0, rtol=1e-6)  # descent lowers log p


def test_npo_by_hand_and_its_saturation():
    want = 2 / 0.5 * np.log(1 + np.exp(0.5 * (-1.0 + 3.0)))
    np.testing.assert_allclose(losses.npo(jnp.float32(-1.0), jnp.float32(-3.0), 0.5), want, rtol=1e-6)
    slope = jax.grad(lambda x: losses.npo(x, jnp.float32(0.0), 0.5))(jnp.float32(-60.0))
    assert 0 <= slope < 1e-6  # an unlikely answer has no gradient, unlike with plain ascent


def test_npo_of_rows_differs_from_npo_of_their_mean():
    log_prob, reference = jnp.array([-1.0, -9.0]), jnp.array([-1.0, -1.0])
    per_row = losses.npo(log_prob, reference, 0.4).mean()
    of_mean = losses.npo(log_prob.mean(), reference.mean(), 0.4)
    assert abs(per_row - of_mean) > 0.1


def test_kl_divergence_by_hand_in_both_directions():
    teacher = jnp.log(jnp.array([[[0.5, 0.5], [0.9, 0.1], [0.2, 0.8]]])) + 3.0  # logits are free up to a constant
    student = jnp.log(jnp.array([[[0.25, 0.75], [0.9, 0.1], [0.8, 0.2]]])) - 2.0
    mask = jnp.array([[True, True, False]])  # the third token is padding
    want = (0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75) + 0.0) / 2
    np.testing.assert_allclose(losses.kl_divergence(teacher, student, mask), [want], rtol=1e-5)
    other = (0.25 * np.log(0.25 / 0.5) + 0.75 * np.log(0.75 / 0.5)) / 2
    np.testing.assert_allclose(losses.kl_divergence(student, teacher, mask), [other], rtol=1e-5)


def test_kl_divergence_and_its_gradient_are_zero_at_the_teacher():
    logits, mask = jax.random.normal(jax.random.key(0), (2, 3, 7)), jnp.ones((2, 3), bool)
    value, slope = jax.value_and_grad(lambda x: losses.kl_divergence(logits, x, mask).sum())(logits)
    np.testing.assert_allclose(value, 0.0, atol=1e-6)
    np.testing.assert_allclose(slope, 0.0, atol=1e-6)
    other = jax.random.normal(jax.random.key(1), (2, 3, 7))
    assert (losses.kl_divergence(logits, other, mask) > 0).all()


ALL = jnp.ones((1, 2), bool)


def test_relative_squared_distance_by_hand():
    feature, target = jnp.array([[[1.0, 2.0], [3.0, 4.0]]]), jnp.array([[[1.0, 0.0], [3.0, 0.0]]])
    np.testing.assert_allclose(losses.relative_squared_distance(feature, target, 2.5, ALL), [(4 + 16) / 4 / 2.5])


def test_cosine_distance_ignores_length():
    feature = jnp.array([[[1.0, 0.0], [0.0, 2.0]]])
    np.testing.assert_allclose(losses.cosine_distance(feature, 5 * feature, 1.0, ALL), [0.0], atol=1e-6)
    turned = jnp.array([[[0.0, 1.0], [0.0, 1.0]]])
    np.testing.assert_allclose(losses.cosine_distance(feature, turned, 1.0, ALL), [0.5], atol=1e-6)


def test_smooth_l1_by_hand():
    feature, target = jnp.array([[[0.5, 6.0]]]), jnp.zeros((1, 1, 2))  # scale 4: 0.25 and 3 root mean squares
    np.testing.assert_allclose(
        losses.smooth_l1_distance(feature, target, 4.0, ALL[:, :1]), [(0.25**2 / 2 + 2.5) / 2], rtol=1e-6
    )


@pytest.mark.parametrize("name", losses.DISTANCES)
def test_the_distance_to_itself_is_zero_with_a_finite_gradient(name):
    feature = jax.random.normal(jax.random.key(0), (3, 4, 5))
    value, slope = jax.value_and_grad(lambda x: losses.DISTANCES[name](x, feature, 1.3, jnp.ones((3, 4), bool)).sum())(
        feature
    )
    np.testing.assert_allclose(value, 0.0, atol=1e-5)
    assert np.isfinite(slope).all()


@pytest.mark.parametrize("name", losses.DISTANCES)
def test_distances_ignore_padding_and_other_rows(name):
    feature, target = jax.random.normal(jax.random.key(0), (2, 2, 4, 5))
    scale, valid = jnp.array([1.3, 0.2]), jnp.array([[True] * 4, [True, True, False, False]])
    distance = losses.DISTANCES[name]
    padded, slope = jax.value_and_grad(lambda x: distance(x, target, scale, valid).sum())(feature.at[1, 2:].set(1e6))
    first = distance(feature[:1], target[:1], scale[:1], valid[:1])
    second = distance(feature[1:, :2], target[1:, :2], scale[1:], valid[1:, :2])
    np.testing.assert_allclose(padded, (first + second)[0], rtol=1e-5)
    assert not slope[1, 2:].any()


def test_bfloat16_inputs_are_computed_in_float32():
    logits = jax.random.normal(jax.random.key(1), (2, 3, 50)).astype(jnp.bfloat16)
    assert losses.token_log_probs(logits, jnp.zeros((2, 3), jnp.int32)).dtype == jnp.float32
    assert losses.kl_divergence(logits, logits, jnp.ones((2, 3), bool)).dtype == jnp.float32
    assert losses.relative_squared_distance(logits, logits, 1.0, jnp.ones((2, 3), bool)).dtype == jnp.float32
