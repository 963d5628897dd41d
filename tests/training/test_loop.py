"""The training loop: the weights that change, the compiled step, and the rows of each step."""

import dataclasses
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_training import (
    MASK,
    ROWS,
    SETS,
    Taught,
    ToyMethod,
    assert_same_bits,
    at_step,
    changes,
    config,
    fit,
    logged,
    rows,
)

from vkd_jax.data.sampler import Sampler
from vkd_jax.methods.base import Context
from vkd_jax.methods.vkd import VKD
from vkd_jax.training import loop
from vkd_jax.training.preemption import Stopped
from vkd_jax.types import UserError

# The weights that change.


def test_with_scope_both_masked_weights_keep_their_bits(toy, tmp_path):
    after = fit(toy, tmp_path, ToyMethod(mask_scope="both"), mask=MASK)
    for path, changed in changes(toy[1], after).items():
        np.testing.assert_array_equal(changed, MASK[path])


def test_with_scope_forget_the_retain_gradient_changes_masked_weights(toy, tmp_path):
    after = fit(toy, tmp_path, ToyMethod(mask_scope="forget"), mask=MASK, weight_decay=0.0)
    assert all(changed.all() for changed in changes(toy[1], after).values())


def test_with_scope_forget_only_retain_gradient_and_decay_change_masked_weights(toy, tmp_path):
    """Weight decay is not masked."""
    method = ToyMethod(mask_scope="forget", weight_retain=0.0)
    after = fit(toy, tmp_path / "no decay", method, mask=MASK, weight_decay=0.0)
    for path, changed in changes(toy[1], after).items():
        np.testing.assert_array_equal(changed, MASK[path])
    after = fit(toy, tmp_path / "decay", method, mask=MASK, schedule="constant", warmup_steps=0, steps=2)
    path, masked = "visual/kernel", ~np.asarray(MASK["visual/kernel"])
    decayed = toy[1][path] * (1 - 0.05 * 0.5) ** 2
    np.testing.assert_allclose(after[path][masked], decayed[masked], rtol=1e-6)
    np.testing.assert_array_equal(changes(toy[1], after)["visual/bias"], MASK["visual/bias"])  # biases do not decay


def test_without_a_mask_every_trainable_weight_changes(toy, tmp_path):
    assert all(changed.all() for changed in changes(toy[1], fit(toy, tmp_path)).values())


@pytest.mark.parametrize("scope", ["forget", "both"])
def test_microbatches_do_not_change_the_trained_weights(toy, scope):
    whole, *split = (fit(toy, None, ToyMethod(mask_scope=scope), mask=MASK, microbatches=n) for n in (1, 2, 4))
    for after in split:
        for path, value in after.items():
            np.testing.assert_allclose(value, whole[path], rtol=1e-5)


def test_batches_that_do_not_divide_into_microbatches_are_refused(toy):
    with pytest.raises(UserError, match="batch_size.forget: 4 examples do not divide over 1 devices in 3 micro"):
        fit(toy, None, microbatches=3)
    with pytest.raises(UserError, match="train.microbatches: 0 is not allowed"):
        fit(toy, None, microbatches=0)


def test_weights_in_bfloat16_are_trained_in_float32(toy, tmp_path):
    graphdef, params = toy
    stored = {path: value.astype(jnp.bfloat16) for path, value in params.items()}
    after = fit((graphdef, stored), tmp_path, learning_rate=1e-5, weight_decay=0.0)
    for path, value in after.items():
        step = np.abs(value - stored[path].astype(jnp.float32))
        assert value.dtype == jnp.float32 and 0 < step.max() < 1e-4
        assert (value.astype(jnp.bfloat16) == stored[path]).mean() > 0.5


def test_vkd_changes_neither_the_language_model_nor_the_unused_block(tiny_model, tiny_sets, tmp_path):
    """Compares all weights after steps with weight decay; masked elements keep their bits, too."""
    before = {path: np.array(value) for path, value in tiny_model.params.items()}
    method = VKD(forget="none", taps=("projector",), mask_scope="both", blocks=1)
    context = Context(tiny_model.graphdef, tiny_model.params, None, tiny_model.config, tiny_sets, seed=0)
    prepared = dataclasses.replace(method, mask_scope="none").prepare(context)
    random = np.random.default_rng(0)
    mask = {p: random.random(before[p].shape) < 0.5 for p in method.trainable(before, tiny_model.config)}
    prepared = dataclasses.replace(prepared, mask=mask)
    trained = loop.fit(
        tiny_model,
        method,
        prepared,
        config(steps=3),
        seed=0,
        folder=tmp_path,
    )
    assert_same_bits(dict(tiny_model.params), before)  # the arguments are neither donated nor changed
    assert all(path.startswith(("projector/", "vision_tower/blocks/0/")) for path in trained)  # block 1 is not in use
    changed = changes(before, trained)
    assert sum(c.sum() for c in changed.values()) > 0.9 * sum(m.sum() for m in mask.values())
    for path, c in changed.items():
        assert not (c & ~mask[path]).any(), path


# The step.


def test_the_state_is_donated_and_the_model_is_not(toy, tmp_path, states):
    fit(toy, tmp_path, steps=1)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(states[0]))
    assert not any(value.is_deleted() for value in toy[1].values())
    assert all(np.isfinite(value).all() for value in toy[1].values())


def test_the_optimizer_state_covers_only_trainable_weights(toy, tmp_path, states):
    fit(toy, tmp_path, steps=1)
    assert states[0].params.keys() == {"visual/kernel", "visual/bias"}
    shapes = {leaf.shape for leaf in jax.tree.leaves(states[0].opt_state)}
    assert shapes == {(), (3, 4), (4,)}  # (4, 2) and (2,) would be the frozen layer's


@pytest.fixture
def compilations(caplog):
    """A function that returns the number of compilations of a step since the start of the test."""
    loop._program.cache_clear()
    with jax.log_compiles(), caplog.at_level("WARNING"):
        yield lambda: sum("Compiling jit(step)" in record.getMessage() for record in caplog.records)


def test_equal_fits_compile_the_step_once(toy, tmp_path, compilations, monkeypatch):
    """Also after a resume, with other weights and rows of the same shapes, without a folder, and at another rate."""
    graphdef, params = toy
    with monkeypatch.context() as patch:
        at_step(patch, 3, lambda: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(Stopped):
            fit(toy, tmp_path)
    assert compilations() == 1
    fit(toy, tmp_path)
    others = {path: value + 1 for path, value in params.items()}
    fit((graphdef, others), None, ToyMethod(), {"forget": rows(2), "retain": rows(3)})
    fit(toy, None, learning_rate=0.1, schedule="constant", steps=3, seed=1)
    assert compilations() == 1
    fit(toy, None, weight_decay=0.1)
    assert compilations() == 2


@pytest.mark.parametrize(
    "change",
    [
        dict(method=ToyMethod(weight_retain=2.0)),
        dict(method=ToyMethod(mask_scope="both"), mask=MASK),
        dict(mask=MASK),
        dict(sets={"forget": SETS["forget"]}),
        dict(seed=1),
        dict(steps=6),
        dict(learning_rate=0.1),
    ],
    ids=", ".join,
)
def test_fits_that_differ_do_not_share_a_step(toy, tmp_path, uninterrupted, change):
    """The result does not depend on the fits before it."""
    loop._program.cache_clear()
    alone = fit(toy, None, **change)
    loop._program.cache_clear()
    assert_same_bits(fit(toy, None), uninterrupted[1])
    after = fit(toy, None, **change)
    assert_same_bits(after, alone)
    same = "mask" in change and "method" not in change  # scope "none" ignores the mask
    assert all((after[path] == value).all() for path, value in uninterrupted[1].items()) == same


def test_teachers_that_differ_do_not_share_a_step(toy):
    """The teachers differ only in a hyperparameter of the method."""
    sets = {"forget": SETS["forget"]}
    first, second, again = (fit(toy, None, Taught(weight=weight), sets) for weight in (1.0, -1.0, 1.0))
    assert_same_bits(again, first)
    assert all(changed.any() for changed in changes(first, second).values())


def test_the_learning_rate_follows_the_step(toy, tmp_path, uninterrupted):
    """The warmup starts at 0, so the first step changes no weight and the second one does."""
    first, second = (fit(toy, tmp_path / str(steps), steps=steps) for steps in (1, 2))
    assert not any(changed.any() for changed in changes(toy[1], first).values())
    assert all(changed.all() for changed in changes(toy[1], second).values())
    counts = {int(leaf) for leaf in jax.tree.leaves(uninterrupted[2].opt_state) if leaf.ndim == 0}
    assert counts == {8} == {int(uninterrupted[2].step)}


# The rows of each step.


def test_both_streams_advance_with_the_step_and_have_each_row_once_per_epoch(uninterrupted):
    metrics = logged(uninterrupted[0])
    assert sorted(metrics) == list(range(1, 9))
    for name in SETS:
        rows_of_steps = [int(metrics[step][f"{name}_rows"]) for step in range(1, 9)]
        stream = Sampler(SETS[name], 4, seed=0, name=name)
        assert rows_of_steps == [sum(2 ** int(row) for row in stream[step].tokens[:, 0]) for step in range(8)]
        epochs = list(zip(rows_of_steps[::2], rows_of_steps[1::2], strict=True))
        assert all(first + second == 2**ROWS - 1 for first, second in epochs)  # one bit per row: no row twice
        assert len(set(epochs)) > 1  # a new order for each epoch
