"""Fisher information and masks against values worked by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vkd_jax.methods import saliency
from vkd_jax.types import UserError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    x: np.ndarray


class FakeSet:
    """Rows x with the loss w . x * scale, whose gradient is x * scale."""

    def __init__(self, x):
        self.x = x

    def batch(self, rows):
        return Rows(self.x[rows])


def loss(trainable, frozen, batch):
    return batch.x @ trainable["w/kernel"] * frozen["scale"]


X = np.array([[1.0, 2.0], [3.0, -4.0], [-5.0, 0.0]], np.float32)


@pytest.mark.parametrize("chunk", [1, 2, 3, 5])
def test_fisher_is_the_mean_of_squared_per_sample_gradients(chunk):
    trainable, frozen = {"w/kernel": jnp.ones(2)}, {"scale": jnp.float32(2.0)}
    got = saliency.fisher_information(loss, trainable, frozen, {"forget": (FakeSet(X), np.arange(3))}, chunk)["forget"]
    np.testing.assert_allclose(got["w/kernel"], 4 * np.mean(X**2, axis=0), rtol=1e-6)
    square_of_mean = 4 * np.mean(X, axis=0) ** 2  # a different quantity, in which signs cancel
    assert not np.allclose(got["w/kernel"], square_of_mean)


FORGET = {"a": jnp.array([4.0, 1.0, 0.0]), "b": jnp.array([9.0])}
RETAIN = {"a": jnp.array([2.0, 2.0, 0.0]), "b": jnp.array([1.0])}


def masked(**options):
    mask = saliency.mask_from_ratio(FORGET, RETAIN, **({"threshold": None, "keep": None, "eps": 1e-15} | options))
    return {path: value.tolist() for path, value in mask.items()}


def test_mask_by_threshold():
    assert masked(threshold=1.0) == {"a": [True, False, False], "b": [True]}


def test_the_share_of_a_mask_is_of_all_weights_together():
    assert masked(keep=0.25) == {"a": [False, False, False], "b": [True]}
    assert masked(keep=0.5) == {"a": [True, False, False], "b": [True]}
    assert masked(keep=1.0) == {"a": [True, True, False], "b": [True]}  # the third has no information for either set


def sorted_value(arrays, rank):
    return float(np.sort(np.concatenate([np.ravel(x) for x in arrays]))[-rank])


@pytest.mark.parametrize("kind", ["random", "tied", "zeros", "extremes"])
def test_the_value_at_a_rank_is_that_of_a_sort(kind):
    draw = np.random.default_rng(0)
    values = {
        "random": draw.lognormal(0, 20, 1000),  # from 1e-26 to 1e26
        "tied": draw.integers(0, 5, 1000),
        "zeros": np.where(draw.random(1000) < 0.9, 0, draw.random(1000)),
        "extremes": draw.choice([0, 1e-45, 1e-40, 1.2e-38, 3.4e38, np.inf], 1000),  # with denormal ones
    }[kind].astype(np.float32)
    arrays = [jnp.asarray(values[:7]), jnp.asarray(values[7:8]), jnp.asarray(values[8:]).reshape(32, 31)]
    for rank in (1, 2, 100, 500, 901, 999, 1000):
        assert saliency.ranked_value(arrays, rank) == sorted_value([values], rank)


def test_the_mask_of_a_share_is_that_of_a_sort():
    draw = np.random.default_rng(1)
    forget, retain = ({k: draw.integers(0, 9, n) for k, n in (("a", (5, 40)), ("b", 60))} for _ in range(2))
    forget, retain = ({k: jnp.asarray(x, jnp.float32) for k, x in side.items()} for side in (forget, retain))
    ratio = {k: np.asarray(forget[k] / (retain[k] + 1e-12)) for k in forget}
    for keep in (0.01, 0.3, 0.6, 0.99):
        mask = saliency.mask_from_ratio(forget, retain, threshold=None, keep=keep, eps=1e-12)
        least = sorted_value(ratio.values(), round(keep * 260))
        for path, selected in mask.items():
            np.testing.assert_array_equal(selected, (ratio[path] >= least) & (ratio[path] > 0))


def test_a_mask_that_selects_nothing_is_an_error():
    with pytest.raises(UserError, match=r"selects no weight: decrease method\.mask_threshold\.$"):
        masked(threshold=100.0)
    with pytest.raises(UserError, match=r"selects no weight: increase method\.mask_keep\.$"):
        masked(keep=0.0)


def test_pooled_information_is_the_mean_over_all_examples():
    first, second = {"w": jnp.array([4.0, 1.0])}, {"w": jnp.array([1.0, 7.0])}
    np.testing.assert_allclose(saliency.pool([(first, 1), (second, 2)])["w"], [(4 + 1 + 1) / 3, (1 + 7 + 7) / 3])
    np.testing.assert_allclose(saliency.pool([(first, 3)])["w"], first["w"])


def test_the_mask_has_exactly_the_keys_of_the_weights():
    """A mask with other keys would have no effect."""
    assert masked(threshold=1.0).keys() == FORGET.keys()
