"""Worst-case forgetting: the attacked weights by hand, the gradient there, and what the attack leaves alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from vkd_jax import methods, registry
from vkd_jax.data.encoding import Batch
from vkd_jax.methods import base
from vkd_jax.methods.finetune import Finetune
from vkd_jax.methods.grad_diff import GradDiff
from vkd_jax.methods.scope import Unlearning
from vkd_jax.methods.vkd import VKD
from vkd_jax.methods.worst_case import Adversary, WorstCase
from vkd_jax.models import lora
from vkd_jax.models.base import bind, split_model
from vkd_jax.training.step import TrainState, make_step
from vkd_jax.types import UserError

SGD = optax.with_extra_args_support(optax.sgd(1.0))  # the update is the negative gradient
CALLS = []  # of the losses, in order


class Quadratic(nnx.Module):
    """Two trainable weights w and one frozen weight u."""

    def __init__(self):
        self.w, self.u = nnx.Param(jnp.array([1.0, -2.0])), nnx.Param(jnp.array([3.0]))


def half_square(model, batch):
    """L = 1/2 (|w|^2 + x |u|^2 |w|^2), whose gradient is w (1 + x |u|^2), as a mean over rows."""
    jax.debug.callback(lambda: CALLS.append("loss"))
    squares = jnp.sum(model.w[...] ** 2) * (1 + batch.images["x"] * jnp.sum(model.u[...] ** 2)) / 2
    return jnp.mean(squares), {}


def attack_loss(model, batch):
    """A = mean(x) + 1/2 (|w|^2 + |u|^2), whose gradient is (w, u)."""
    jax.debug.callback(lambda: CALLS.append("attack"))
    return jnp.mean(batch.images["x"]) + (jnp.sum(model.w[...] ** 2) + jnp.sum(model.u[...] ** 2)) / 2


def rows_of(values) -> Batch:
    empty = np.zeros((len(values), 1), np.int32)
    return Batch(empty, empty, empty, empty, empty, images={"x": jnp.asarray(values, jnp.float32)}, cached={})


def update(settings, paths=("w",), rows=(0.0, 0.0), loss=half_square, **options):
    """The gradient that a step of SGD takes, and its metrics."""
    graphdef, params = split_model(Quadratic())
    adversary = settings and Adversary(settings, attack_loss, paths)
    step = make_step(graphdef, {"forget": loss}, SGD, "none", adversary=adversary, **options)
    w = params["w"]
    state = TrainState({"w": w}, SGD.init({"w": w}), jnp.int32(0))
    CALLS.clear()
    state, metrics = jax.jit(step)(state, {"u": params["u"]}, None, {"forget": rows_of(rows)})
    jax.effects_barrier()
    return np.asarray(w - state.params["w"]), metrics


@pytest.mark.parametrize(
    ("settings", "paths", "gradient"),
    [
        # theta_1 = (1, -2) - 0.5 (1, -1) = (0.5, -1.5); the gradient is theta + weight * theta_1
        (WorstCase(radius=0.5), ("w",), [1.5, -3.5]),
        (WorstCase(radius=0.5, weight=2.0), ("w",), [2.0, -5.0]),
        # two steps of half the radius: (0.5, -1.5), then (0, -1)
        (WorstCase(radius=1.0, steps=2), ("w",), [1.0, -3.0]),
        # one step along (1, -2) / sqrt(5), of length sqrt(5) / 2: theta_1 = (0.5, -1)
        (WorstCase(radius=5**0.5 / 2, direction="gradient"), ("w",), [1.5, -3.0]),
        # an attack on the frozen weight alone does not change this gradient, of rows with x = 0
        (WorstCase(radius=0.5), ("u",), [2.0, -4.0]),
    ],
)
def test_the_gradient_on_a_quadratic_by_hand(settings, paths, gradient):
    np.testing.assert_allclose(update(settings, paths)[0], gradient, rtol=1e-6)


def test_an_attack_on_a_frozen_weight_reaches_the_loss():
    """With x = 1, the gradient is w (1 + u^2), first at u = 3, then at u = 2.5; u itself keeps its value."""
    gradient, metrics = update(WorstCase(radius=0.5), ("u",), rows=(1.0, 1.0))
    np.testing.assert_allclose(gradient, np.array([1.0, -2.0]) * (10 + 7.25), rtol=1e-6)
    np.testing.assert_allclose(metrics["worst_case_loss"], 5 * 7.25 / 2, rtol=1e-6)
    np.testing.assert_allclose(metrics["loss"], 5 * (10 + 7.25) / 2, rtol=1e-6)


def test_microbatches_attack_the_gradient_of_the_whole_batch():
    """The sign of a mean is not the mean of signs: with rows apart, the attack would lead elsewhere."""

    def mixed(model, batch):
        return jnp.mean(batch.images["x"] * model.w[...][0] ** 2) + 0 * jnp.sum(model.u[...]), {}

    def attack(model, batch):
        return jnp.mean(batch.images["x"] * model.w[...][0])

    graphdef, params = split_model(Quadratic())
    results = []
    for microbatches in (1, 2):
        step = make_step(
            graphdef, {"forget": mixed}, SGD, "none", microbatches=microbatches,
            adversary=Adversary(WorstCase(radius=0.5), attack, ("w",)),
        )  # fmt: skip
        state = TrainState({"w": params["w"]}, SGD.init({"w": params["w"]}), jnp.int32(0))
        batch = rows_of([-1.0, 3.0, -1.0, 3.0])
        results.append(jax.jit(step)(state, {"u": params["u"]}, None, {"forget": batch})[0].params["w"])
    np.testing.assert_allclose(results[0], results[1], rtol=1e-6)
    # mean(x) = 1: theta_1 = 0.5, and the gradient is 2 w at 1 and at 0.5
    np.testing.assert_allclose(results[0], [1.0 - 2.0 - 1.0, -2.0], rtol=1e-6)


@pytest.mark.parametrize("steps", [1, 3])
def test_k_steps_cost_k_plus_1_passes(steps):
    update(WorstCase(radius=0.5, steps=steps))
    assert (CALLS.count("attack"), CALLS.count("loss")) == (steps, 2)
    update(None)
    assert (CALLS.count("attack"), CALLS.count("loss")) == (0, 1)


def test_a_gradient_of_zero_moves_nothing():
    graphdef, params = split_model(Quadratic())
    for direction in ("sign", "gradient"):
        adversary = Adversary(WorstCase(radius=1.0, direction=direction), attack_loss, ("w",))
        weights = {"w": jnp.zeros(2, jnp.bfloat16)}
        attacked = adversary.attack(weights, lambda w: w)
        assert attacked["w"].dtype == jnp.bfloat16 and not attacked["w"].any()


# Of the real methods.


@pytest.fixture(scope="module")
def context(tiny_model, tiny_sets):
    return base.Context(
        tiny_model.graphdef, tiny_model.params, None, tiny_model.config, tiny_sets, seed=0, encode=tiny_model.encode
    )


@pytest.mark.parametrize("name", [name for name in registry.METHODS if name not in ("finetune", "manu")])
def test_every_method_that_trains_on_a_forget_set_has_the_option(context, name):
    method = methods.create(name, dict(worst_case=WorstCase(radius=1e-3)))
    assert isinstance(method, Unlearning)
    assert methods.create(name, {}).adversary(context.params, context.model_config) is None
    adversary = method.adversary(context.params, context.model_config)
    assert set(adversary.paths) == set(method.trainable(context.params, context.model_config))
    batch = context.sets["forget"].batch(np.array([0, 1]))
    loss = adversary.loss(bind(context.graphdef, context.params), batch)
    sign = -1 if name == "idk" else 1  # its forget batch has refusals as answers, which an attacker makes less likely
    np.testing.assert_allclose(loss, sign * base.cross_entropy(bind(context.graphdef, context.params), batch).mean())


@pytest.mark.parametrize(
    ("train", "moves", "language", "vision"),
    [("visual", "trained", 0, 0), ("visual", "all", 1, 1), ("all", "visual", 0, 1), ("all", "trained", 1, 1)],
)
def test_the_attacker_moves_the_weights_of_its_scope(context, train, moves, language, vision):
    method = VKD(train=train, blocks=0, worst_case=WorstCase(radius=1e-3, moves=moves))
    paths = method.adversary(context.params, context.model_config).paths
    assert any(path.startswith("language_model/") for path in paths) == language
    assert any(path.startswith("vision_tower/") for path in paths) == vision


@pytest.mark.parametrize("moves", ["all", "visual+lora", "lora"])
def test_weights_that_cannot_move_are_refused(context, moves):
    """Kernels with an adapter are not plain arrays, and a model without adapters has none to move."""
    method = GradDiff(train="lora", worst_case=WorstCase(radius=1e-3, moves=moves))
    params = context.params
    if moves == "all":
        params = lora.attach(params, rank=2, alpha=2.0, dropout=0.0, seed=0)
        message = "is quantized or has an adapter"
    else:
        params = {path: x for path, x in params.items() if path.startswith("language_model/")}
        message = "the model has no such weight"
    with pytest.raises(UserError, match=rf"method\.worst_case\.moves: moves={moves.replace('+', '.')}: .*{message}"):
        method.adversary(params, context.model_config)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(radius=-1.0), r"method\.worst_case\.radius: -1\.0 is not allowed"),
        (dict(radius=float("inf")), r"method\.worst_case\.radius: inf is not allowed"),
        (dict(steps=0), r"method\.worst_case\.steps: 0 is not allowed"),
        (dict(direction="newton"), r"method\.worst_case\.direction: 'newton' is not allowed\. Give one of sign, grad"),
        (dict(weight=0.0), r"method\.worst_case\.weight: 0\.0 is not allowed"),
        (dict(moves="head"), r"method\.worst_case\.moves: 'head' is not allowed"),
    ],
)
def test_invalid_settings_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        WorstCase(**fields)


def test_fine_tuning_has_no_adversary(context):
    assert "worst_case" not in {field.name for field in dataclasses.fields(Finetune)}
    assert Finetune().adversary(context.params, context.model_config) is None
