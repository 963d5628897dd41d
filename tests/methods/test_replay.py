"""The stream of people of earlier requests: its loss by hand, and that it reads no image."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from vkd_jax import methods, registry
from vkd_jax.methods import base, feature_targets
from vkd_jax.methods.replay import STREAM, Replay, cache_spec
from vkd_jax.models.base import bind
from vkd_jax.training import loop


@pytest.fixture(scope="module")
def context(tiny_model, tiny_sets):
    return base.Context(tiny_model.graphdef, tiny_model.params, None, tiny_model.config, tiny_sets, seed=0)


@pytest.fixture(scope="module")
def batch(context):
    """Two rows with the cached output of block 0, targets, scales and cross-entropies."""
    encoded = context.sets["forget"]
    hidden = feature_targets.record_taps(context.graphdef, context.params, encoded.images, ["vision/0", "projector"])
    rows = encoded.image_rows[:2]
    batch = encoded.batch(np.arange(2))
    target = hidden["projector"].values[rows] + 1
    cached = {"vision/0": hidden["vision/0"].values[rows], "target": target, "scale": np.array([2, 4], np.float32)}
    return dataclasses.replace(batch, cached=cached | {"ce": np.array([0, 9], np.float32)})


def test_methods_that_train_on_a_forget_set_have_the_stream():
    for name in (name for name in registry.METHODS if name not in ("finetune", "manu")):
        assert STREAM not in methods.create(name, {}).losses()
        assert STREAM in methods.create(name, {"replay": Replay(weight=1.0)}).losses()


@pytest.fixture(scope="module")
def evaluated(context):
    """A compiled function of a batch: the loss with weight 3, its metrics, and the cross-entropies."""

    @jax.jit
    def evaluate(params, batch):
        model = bind(context.graphdef, params)
        return *Replay(weight=3.0).losses()[STREAM](model, batch), base.cross_entropy(model, batch)

    return functools.partial(evaluate, context.params)


def test_the_loss_is_what_became_likelier_and_the_distance_to_the_cached_features(evaluated, batch):
    loss, metrics, ce = evaluated(batch)
    assert all(0 < ce) and all(ce < 9)
    # The features differ from their targets by 1 in every channel: the distance is 1 / scale.
    np.testing.assert_allclose(loss, 3 * np.mean([0 + 1 / 2, (9 - ce[1]) + 1 / 4]), rtol=1e-4)
    assert metrics.keys() == {"earlier_ce", "earlier_distance"}


def test_the_loss_does_not_depend_on_the_image(evaluated, batch):
    blank = dataclasses.replace(batch, images=jax.tree.map(np.zeros_like, batch.images))
    assert evaluated(blank)[0] == evaluated(batch)[0]


def test_the_loop_does_not_replace_cached_features_by_those_of_blank_images(context):
    encoded = dataclasses.replace(context.sets["forget"], per_image={"vision/0": np.ones(3)})
    assert loop.cache_prefix(context.graphdef, context.params, encoded, 2) is encoded
    assert set(cache_spec(base.tap_shapes(context, encoded)).per_image) == {"target", "scale"}
