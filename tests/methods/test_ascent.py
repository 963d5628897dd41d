"""Ascent on the forget set: its bounds by hand, and the methods that have them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vkd_jax import methods
from vkd_jax.methods import base, feature_targets, losses
from vkd_jax.methods.ascent import BOUNDS, Ascent
from vkd_jax.methods.grad_diff import GradDiff
from vkd_jax.methods.vkd import VKD
from vkd_jax.models.base import bind
from vkd_jax.types import UserError

ASCENDING = ("grad_ascent", "grad_diff", "kl", "mmunlearner", "vkd")
FISHER = dict(fisher_samples=4, fisher_chunk=4)
SLOW = ("mmunlearner",)  # which trains adapters, whose programs test_baselines.py compiles
BOUND_OF_EACH = [
    pytest.param(name, bound, marks=[pytest.mark.slow] * (name in SLOW))
    for name, bound in zip(ASCENDING, BOUNDS[1:] * 3, strict=False)
]


@pytest.fixture(scope="module")
def context(tiny_model, tiny_sets):
    sets = {"forget": tiny_model.encode(tiny_sets["forget"].examples[:3]), "retain": tiny_sets["retain"]}
    return base.Context(
        tiny_model.graphdef, tiny_model.params, None, tiny_model.config, sets, seed=0, encode=tiny_model.encode
    )


@pytest.mark.parametrize(("name", "bound"), BOUND_OF_EACH)
def test_every_ascending_method_caches_the_bounds_that_it_declares(context, name, bound):
    method = methods.create(
        name, dict(bound=bound, bound_images=2, cap=float("inf"), **(FISHER if "mm" in name else {}))
    )
    assert isinstance(method, Ascent)
    if name == "vkd":
        method = dataclasses.replace(method, augment_forget=2, mask_scope="none")
    forget = method.prepare(context).sets["forget"]
    bounds = forget.per_example["bound"]
    assert bounds.shape == (len(forget),) and bounds.dtype == np.float32
    spec = method.cache_spec("forget", base.tap_shapes(context, forget), context.model_config)
    assert spec.per_example.keys() == {"bound"}
    assert (
        "bound" not in method.cache_spec("retain", base.tap_shapes(context, forget), context.model_config).per_example
    )
    # The bounds of augmented copies are those of the originals.
    np.testing.assert_array_equal(bounds, np.tile(bounds[:3], len(forget) // 3))


def cross_entropy_among(context, example, images):
    """-log of the mean probability of the answer if the model is shown these images, per answer token."""
    rows = context.encode([dataclasses.replace(example, image=e.image, image_id=e.image_id) for e in images])
    batch = rows.batch(np.arange(len(rows)))
    logits, _ = base.answer_logits(bind(context.graphdef, context.params), batch)
    p = np.exp(np.asarray(losses.sequence_log_prob(logits, batch.targets, batch.target_mask), np.float64))
    return -np.log(p.mean()) / batch.target_mask[0].sum()


def test_the_bound_is_the_cross_entropy_of_the_answer_among_other_people(context):
    """With all images of the retain set, no draw is left to chance."""
    retain = list({e.image_id: e for e in context.sets["retain"].examples}.values())
    method = GradDiff(bound="others", bound_images=1000, cap=float("inf"))
    expected = [cross_entropy_among(context, example, retain) for example in context.sets["forget"].examples]
    np.testing.assert_allclose(method.bounds(context)["bound"], expected, rtol=1e-4)
    assert np.all(dataclasses.replace(method, cap=1e-3).bounds(context)["bound"] == np.float32(1e-3))


@pytest.fixture(scope="module")
def disguised(context):
    """The context with a forget set of two people, each with the image of a person of the retain set."""
    retain = {e.person: e for e in context.sets["retain"].examples}
    doubles = dict(zip(("Ada", "Bo"), sorted(retain)[:2], strict=True))
    examples = [
        dataclasses.replace(retain[other], person=person, image_id=f"{person}'s image")
        for person, other in doubles.items()
    ]
    sets = {**context.sets, "forget": context.encode(examples)}
    return dataclasses.replace(context, sets=sets), doubles


def test_the_look_alike_of_a_person_is_who_has_the_same_image(disguised):
    assert feature_targets.look_alikes(disguised[0]) == disguised[1]


def test_with_the_look_alike_answers_and_features_become_those_of_the_look_alike(disguised):
    """The question about a double has the cross-entropy of the same question about the look-alike."""
    context, doubles = disguised
    fields = dict(augment_forget=1, augment_retain=0, mask_scope="none", cap=float("inf"))
    forget = VKD(bound="look_alike", target="look_alike", **fields).prepare(context).sets["forget"]
    images = {e.image_id: e for e in context.sets["retain"].examples}.values()
    expected = [
        cross_entropy_among(context, example, [e for e in images if e.person == doubles[example.person]])
        for example in context.sets["forget"].examples
    ]
    np.testing.assert_allclose(forget.per_example["bound"], np.tile(expected, 2), rtol=1e-4)
    taps = feature_targets.record_taps(context.graphdef, context.params, context.sets["retain"].images, ["projector"])[
        "projector"
    ].values
    people = {
        row: e.person for e, row in zip(context.sets["retain"].examples, context.sets["retain"].image_rows, strict=True)
    }
    for example, row in zip(forget.examples, forget.image_rows, strict=True):
        target = forget.per_image["target/projector"][row]
        matches = [people[i] for i, features in enumerate(taps) if np.array_equal(features, target)]
        assert matches == [doubles[example.person]]


def test_the_loss_has_its_minimum_at_the_bound_where_its_gradient_vanishes(context):
    batch = dataclasses.replace(
        context.sets["forget"].batch(np.arange(3)), cached={"bound": jnp.array([1.0, 2.0, 3.0])}
    )
    ce = jnp.array([0.5, 2.0, 5.0])
    # Differences of -0.5, 0 and 2 nats: 0.5^2 / 2, 0, and 2 - 1/2 beyond one nat, with a gradient of at most 1.
    others = GradDiff(bound="others")
    np.testing.assert_allclose(others.ascent(ce, batch), [0.125, 0.0, 1.5])
    np.testing.assert_allclose(jax.grad(lambda x: jnp.sum(others.ascent(x, batch)))(ce), [-0.5, 0.0, 1.0])
    without = dataclasses.replace(batch, cached={})
    np.testing.assert_allclose(GradDiff(cap=4.0).ascent(ce, without), [-0.5, -2.0, -4.0])


def test_a_forget_loss_that_does_not_ascend_computes_no_bounds(context):
    method = VKD(forget="npo", bound="others", augment_forget=0, mask_scope="none")
    assert method.prepare(context).sets["forget"].per_example.keys() == {"reference"}


def test_invalid_bounds_are_refused():
    with pytest.raises(
        UserError, match=r"method\.bound: 'median' is not allowed\. Give one of cap, others, look_alike"
    ):
        GradDiff(bound="median")
    with pytest.raises(UserError, match=r"method\.bound_images: 0 is not allowed"):
        GradDiff(bound_images=0)
