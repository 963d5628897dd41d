"""Updates in the null space: moments and projections by hand, and a model that stays as it is where it is retained."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vkd_jax import methods
from vkd_jax.config.training import TrainConfig
from vkd_jax.data.batching import rng
from vkd_jax.methods import base, null_space
from vkd_jax.methods.null_space import NullSpace, null_projection
from vkd_jax.models import lora
from vkd_jax.models.base import bind
from vkd_jax.models.observed import observe
from vkd_jax.training import loop, optimizer
from vkd_jax.types import NotFinite, UserError

TRAIN = TrainConfig(steps=3, batch_size=dict(forget=4, retain=4), learning_rate=0.01, warmup_steps=0, weight_decay=0.5)


@pytest.mark.parametrize(
    ("energy", "kept"),
    [(1e-3, [1, 0, 0, 0]), (0.6, [1, 0, 0, 0]), (0.61, [1, 1, 0, 0]), (0.91, [1, 1, 1, 0]), (1.0, [1, 1, 1, 0])],
)
def test_the_fewest_directions_that_hold_the_share_of_energy_are_projected_out(energy, kept):
    """The directions hold 60, 30, 10 and 0 % of the energy, in a rotated basis."""
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(4, 4)))[0]
    moment = rotation @ np.diag([6.0, 3.0, 1.0, 0.0]) @ rotation.T
    want = np.eye(4) - rotation @ np.diag(kept) @ rotation.T
    np.testing.assert_allclose(null_projection(jnp.array(moment), energy), want, atol=1e-6)


def test_without_inputs_nothing_is_projected_out():
    np.testing.assert_array_equal(null_projection(jnp.zeros((3, 3)), 1.0), np.eye(3))


def test_the_gradient_of_a_probe_is_the_second_moment_of_the_inputs_that_count():
    """The kernel is used twice, and the output of the last row of x reaches nothing."""
    x = jnp.array([[1.0, 2.0], [3.0, -1.0], [100.0, 100.0]])
    kernel = observe(jnp.array([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]]))

    def function(probe):
        first, second = (lora.matmul(inputs, dataclasses.replace(kernel, probe=probe)) for inputs in (x, 10 * x[:1]))
        return jnp.sum(first[:2] ** 2) + jnp.sum(second)

    moment = jax.grad(function)(kernel.probe).reshape(2, 2)
    np.testing.assert_array_equal(moment, [[1 + 9 + 100, 2 - 3 + 200], [2 - 3 + 200, 4 + 1 + 400]])


def test_a_linear_model_keeps_its_outputs_on_retained_inputs_and_only_there():
    """y = x W + b with retained inputs in a plane of three dimensions, under Adam and weight decay."""
    retained = jnp.array([[1.0, 1.0, 0.0], [0.0, 2.0, 2.0]])
    params = {"a/kernel": jnp.arange(6.0).reshape(3, 2), "a/bias": jnp.ones(2)}
    projections = {"a/kernel": null_projection(retained.T @ retained, 1.0)}
    tx, after = optimizer.create(TRAIN), params
    state = tx.init(params)
    for number in range(5):
        grads = {path: jnp.cos(jnp.arange(x.size) + number).reshape(x.shape) for path, x in params.items()}
        updates, state = tx.update(grads, state, after, rate=0.1, projections=projections)
        after = optax.apply_updates(after, updates)
    np.testing.assert_allclose(retained @ after["a/kernel"], retained @ params["a/kernel"], atol=1e-5)
    normal = jnp.array([1.0, -1.0, 1.0])
    assert (jnp.abs(normal @ (after["a/kernel"] - params["a/kernel"])) > 0.1).all()
    np.testing.assert_array_equal(after["a/bias"], params["a/bias"])


@pytest.fixture(scope="module")
def context(tiny_model, tiny_sets):
    return base.Context(tiny_model.graphdef, tiny_model.params, None, tiny_model.config, tiny_sets, seed=0)


def trained(context, model, **settings):
    method = methods.create("grad_diff", {"train": "visual", "null_space": NullSpace(**settings)})
    return loop.fit(model, method, method.prepare(context), TRAIN, seed=0, folder=None)


@pytest.fixture(scope="module")
def features(context):
    encode = jax.jit(lambda params, images: bind(context.graphdef, params).encode(images)[0].values)
    return lambda params, name, rows: encode({**context.params, **params}, context.sets[name].batch(rows).images)


def test_training_keeps_the_features_of_the_examples_that_were_collected(context, tiny_model, features):
    after = trained(context, tiny_model, energy=1.0, samples=1)
    row = rng(0, "null_space/retain").permutation(len(context.sets["retain"]))[:1]
    for name, rows, unchanged in (("retain", row, True), ("forget", np.array([0]), False)):
        before, change = features({}, name, rows), features(after, name, rows) - features({}, name, rows)
        assert (np.abs(change).max() < 1e-3 * np.abs(before).max()) == unchanged
    changed = {path for path, x in after.items() if (x != context.params[path]).any()}
    assert changed == {path for path in after if path.endswith("/kernel") and after[path].ndim == 2}


def test_energy_0_is_the_plain_step(context, tiny_model, monkeypatch):
    monkeypatch.setattr(null_space, "projections", None)  # is not called
    plain, other = trained(context, tiny_model), trained(context, tiny_model, energy=0.0, samples=1)
    assert all((plain[path] == other[path]).all() for path in plain)
    assert any(path.endswith("bias") and (plain[path] != context.params[path]).any() for path in plain)


def test_every_linear_kernel_has_the_moment_of_its_own_inputs(context, features):
    """The first layer of the projector reads the features; the language model is collected at the answer."""
    paths = methods.create("grad_diff", {}).trainable(context.params, context.model_config)
    retain = {"retain": context.sets["retain"]}
    settings = NullSpace(energy=0.9, samples=3)
    found = null_space.projections(context.graphdef, context.params, paths, retain, settings, batch_size=2, seed=0)
    shapes = null_space.projection_shapes(context.params, paths)
    assert {path: (x.shape, x.dtype) for path, x in found.items()} == {
        path: (x.shape, x.dtype) for path, x in shapes.items()
    }
    assert {"language_model/blocks/mlp/up/kernel", "projector/fc2/kernel"} < set(found)
    rows = rng(0, "null_space/retain").permutation(len(retain["retain"]))[:3]
    tokens = jax.jit(lambda p, x: bind(context.graphdef, p).encode(x)[1]["features"].values)(
        context.params, context.sets["retain"].batch(rows).images
    ).reshape(-1, context.params["projector/fc1/kernel"].shape[0])
    np.testing.assert_allclose(found["projector/fc1/kernel"], null_projection(tokens.T @ tokens, 0.9), atol=1e-4)
    for path, projection in found.items():
        assert 0 < np.trace(projection, axis1=-2, axis2=-1).min(), path
        assert np.trace(projection, axis1=-2, axis2=-1).max() < projection.shape[-1] - 0.9, path


def test_inputs_that_are_not_finite_are_refused(context):
    params = context.params | {"projector/fc1/kernel": context.params["projector/fc1/kernel"] * jnp.inf}
    with pytest.raises(NotFinite, match="inputs of the vanilla model's layers"):
        null_space.projections(
            context.graphdef, params, ["projector/fc2/kernel"], {"retain": context.sets["retain"]},
            NullSpace(energy=0.9, samples=2), batch_size=2, seed=0,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "fields", "problem"),
    [
        ("grad_diff", {"train": "lora"}, "method.null_space.energy: adapters are not projected"),
        ("vkd", {}, "method.null_space.energy: a masked update leaves the null space"),
    ],
)
def test_adapters_and_masks_of_the_update_are_refused(name, fields, problem):
    with pytest.raises(UserError, match=problem):
        methods.create(name, {**fields, "null_space": NullSpace(energy=0.9)})
