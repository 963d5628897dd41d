"""The training loop: the weights that change, the rows of each step, stopping, and bit-identical resumption."""

import dataclasses
import json
import os
import signal
import threading
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vkd_jax.checkpoints.bundle import ModelBundle
from vkd_jax.checkpoints.orbax_checkpoints import Checkpoints
from vkd_jax.config.training import TrainConfig
from vkd_jax.data.encoding import EncodedSet
from vkd_jax.data.images import PackedImages
from vkd_jax.data.sampler import Sampler
from vkd_jax.methods.base import Context, Prepared
from vkd_jax.methods.vkd import VKD
from vkd_jax.models.base import split_model
from vkd_jax.runtime.mesh import make_mesh, replicated
from vkd_jax.training import loop
from vkd_jax.training.metric_writer import Progress
from vkd_jax.training.preemption import Stopped
from vkd_jax.types import Diverged, Example, UserError

ROWS = 8


class Toy(nnx.Module):
    """y = tanh(x W + b) U, of which U is frozen."""

    def __init__(self):
        values = np.random.default_rng(0)
        self.visual = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
        self.language = nnx.Linear(4, 2, rngs=nnx.Rngs(1))
        self.visual.bias[...] = jnp.asarray(values.normal(size=4), jnp.float32)

    def __call__(self, x):
        return self.language(jnp.tanh(self.visual(x)))


@dataclasses.dataclass(frozen=True)
class ToyMethod:
    """Increases outputs on forget rows and decreases them on retain rows; logs the rows of each batch."""

    mask_scope: str = "none"
    weight_retain: float = 1.0

    def trainable(self, paths, model_config):
        return [path for path in paths if path.startswith("visual/")]

    def prepare(self, context):
        return Prepared(sets=context.sets)

    def teachers(self):
        return {}

    def adversary(self, params, model_config):
        return None

    def losses(self):
        return {"forget": self._loss("forget", -1.0), "retain": self._loss("retain", self.weight_retain)}

    def _loss(self, name, weight):
        def loss(model, batch):
            term = jnp.mean(jnp.square(model(batch.images["x"])).sum(-1) + batch.cached["extra"])
            return weight * term, {f"{name}_term": term, f"{name}_rows": jnp.sum(2.0 ** batch.tokens[:, 0])}

        return loss


@dataclasses.dataclass(frozen=True)
class Taught(ToyMethod):
    """Trains on the sign of its teacher's outputs."""

    weight: float = 1.0

    def teachers(self):
        return {"forget": lambda model, batch: {"extra": self.weight * model(batch.images["x"]).sum(-1)}}

    def losses(self):
        def loss(model, batch):
            return jnp.mean(batch.cached["extra"] * model(batch.images["x"]).sum(-1)), {}

        return {"forget": loss}


@dataclasses.dataclass(frozen=True)
class Unbounded(ToyMethod):
    """Its loss grows with the weights without end."""

    def losses(self):
        def loss(model, batch):
            return jnp.mean(jnp.square(model.visual(batch.images["x"]))), {}

        return {"forget": loss}


class ToyConfig:
    """The configuration of a model whose images are three numbers."""

    @staticmethod
    def image_tokens(height, width):
        return 1

    @staticmethod
    def pack(rows, tokens):
        return {"x": np.concatenate([row[0] for row in rows])}


def rows(seed, extra=None) -> EncodedSet:
    """A set whose images are three random numbers and whose `tokens` are the row numbers."""
    numbers = np.arange(ROWS, dtype=np.int32)[:, None]
    return EncodedSet(
        examples=tuple(Example(str(i), "", b"", str(i), "", "") for i in range(ROWS)),
        tokens=numbers,
        mask=numbers >= 0,
        target_positions=numbers,
        targets=numbers,
        target_mask=numbers >= 0,
        prompt_length=np.ones(ROWS, np.int32),
        image_rows=np.arange(ROWS, dtype=np.int32),
        images=PackedImages.of(np.random.default_rng(seed).normal(size=(ROWS, 1, 3)).astype(np.float32), ToyConfig),
        per_example={"extra": np.zeros(ROWS, np.float32) if extra is None else extra},
    )


SETS = {"forget": rows(0), "retain": rows(1)}
MASK = {
    "visual/kernel": jnp.asarray(np.random.default_rng(3).random((3, 4)) < 0.5),
    "visual/bias": jnp.array([True, False, True, False]),
}


@pytest.fixture(scope="module")
def toy():
    graphdef, params = split_model(Toy())
    sharding = replicated(make_mesh())
    return graphdef, {path: jax.device_put(np.asarray(value), sharding) for path, value in params.items()}


def config(**changes):
    fields = dict(steps=8, batch_size=dict(forget=4, retain=4), learning_rate=0.05, warmup_steps=2, weight_decay=0.5)
    fields |= dict(b2=0.99, log_every=1, checkpoint_every=2)
    return TrainConfig(**fields | changes)


def fit(toy, folder, method=ToyMethod(), sets=SETS, mask=None, seed=0, **changes):  # noqa: B008 (frozen)
    graphdef, params = toy
    return loop.fit(
        ModelBundle(graphdef, params, types.SimpleNamespace(used_blocks=0), None, make_mesh()),
        method,
        Prepared(sets=sets, mask=mask),
        config(**changes),
        seed=seed,
        folder=folder,
    )


def logged(folder):
    """The metrics of each step; the last line counts for a step that was logged twice."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    speed = {"data_wait_share", "examples_per_second", "step_bytes"}
    return {line["step"]: {k: v for k, v in line.items() if k not in speed} for line in lines}


def saved_steps(folder):
    return sorted(int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdigit())


def restored(folder, like, seed=0):
    """The newest checkpoint."""
    checkpoints = Checkpoints(folder / "checkpoints", seed=seed, every=2)
    try:
        return checkpoints.restore(like)
    finally:
        checkpoints.close()


def assert_same_bits(a, b):
    a, b = jax.tree.leaves_with_path(a), jax.tree.leaves_with_path(b)
    assert [path for path, _ in a] == [path for path, _ in b]
    for (path, x), (_, y) in zip(a, b, strict=True):
        np.testing.assert_array_equal(x, y, err_msg=jax.tree_util.keystr(path))


def changes(before, after):
    """The elements that differ: {path: bool array}."""
    return {path: np.asarray(before[path] != after[path]) for path in after}


@pytest.fixture
def states(monkeypatch):
    """The initial state of each `fit`, which is donated to its first step."""
    states, init_state = [], loop.init_state
    monkeypatch.setattr(loop, "init_state", lambda *args: states.append(init_state(*args)) or states[-1])
    return states


def at_step(monkeypatch, step, act):
    """Calls `act` after that step."""
    tick = Progress.tick
    monkeypatch.setattr(Progress, "tick", lambda self, now: (tick(self, now), act() if now == step else None))


@pytest.fixture(scope="module")
def uninterrupted(toy, tmp_path_factory):
    """A run of eight steps: its folder, trained weights, last saved state and initial state."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    params = fit(toy, folder)
    tx = loop.optimizer.create(config())
    like = loop.init_state(tx, {path: toy[1][path] for path in params}, make_mesh())
    return folder, params, restored(folder, like), like


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
    assert all(path.startswith(("projector/", "vision_tower/blocks/2/")) for path in trained)  # block 3 is not in use
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


# Stopping and resuming.


@pytest.mark.parametrize("step", [3, 4, 8], ids=["between checkpoints", "at a checkpoint", "at the last step"])
def test_a_run_resumed_after_sigterm_is_bit_identical(toy, tmp_path, monkeypatch, uninterrupted, step):
    folder, params, state, like = uninterrupted
    with monkeypatch.context() as patch:
        at_step(patch, step, lambda: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(Stopped, match=f"stopped at step {step}"):
            fit(toy, tmp_path)
    assert saved_steps(tmp_path)[-1] == step
    assert_same_bits(fit(toy, tmp_path), params)
    assert_same_bits(restored(tmp_path, like), state)
    assert logged(tmp_path) == logged(folder)


@pytest.mark.parametrize("damaged", [1, 2], ids=["the newest checkpoint", "all checkpoints"])
def test_a_run_resumed_without_a_damaged_checkpoint_is_bit_identical(
    toy, tmp_path, monkeypatch, uninterrupted, damaged
):
    folder, params, state, like = uninterrupted
    with monkeypatch.context() as patch:
        at_step(patch, 5, lambda: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(Stopped):
            fit(toy, tmp_path)
    assert saved_steps(tmp_path) == [4, 5]
    for step in saved_steps(tmp_path)[-damaged:]:
        for path in (tmp_path / "checkpoints" / str(step) / "state" / "d").iterdir():
            path.write_bytes(path.read_bytes()[:-1])
    assert_same_bits(fit(toy, tmp_path), params)
    assert_same_bits(restored(tmp_path, like), state)
    assert logged(tmp_path) == logged(folder)


@pytest.mark.parametrize("calls", [1, 2, 3, 4, 5])
def test_the_step_that_stopped_names_is_saved_whenever_the_signal_arrives(toy, tmp_path, monkeypatch, calls):
    class Late(threading.Event):
        """An event that is set from a certain call on."""

        times = 0

        def is_set(self):
            self.times += 1
            return self.times >= calls

    class Signal(loop.StopSignals):
        def __enter__(self):
            should_stop = super().__enter__()
            self._event = Late()
            return should_stop

    monkeypatch.setattr(loop, "StopSignals", Signal)
    with pytest.raises(Stopped) as stopped:
        fit(toy, tmp_path, checkpoint_every=100)
    assert str(saved_steps(tmp_path)[-1]) in str(stopped.value)


def test_a_fit_without_a_folder_trains_the_same_and_writes_nothing(toy, tmp_path, monkeypatch, uninterrupted):
    monkeypatch.chdir(tmp_path)
    assert_same_bits(fit(toy, None), uninterrupted[1])
    with monkeypatch.context() as patch:
        patch.setattr(loop.NoProgress, "tick", lambda self, step: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(Stopped, match="stopped at step 1, which is not saved; run"):
            fit(toy, None)
    with pytest.raises(Diverged, match="step 1: .*none was saved yet"):
        fit(toy, None, sets=SETS | {"forget": rows(0, np.full(ROWS, np.nan, np.float32))})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_handlers_of_signals_are_restored(toy, tmp_path, number):
    before = signal.getsignal(number)
    fit(toy, tmp_path, steps=1)
    assert signal.getsignal(number) is before


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_each_signal_saves_the_state_and_has_its_status(toy, tmp_path, monkeypatch, number, status):
    at_step(monkeypatch, 3, lambda: signal.raise_signal(number))
    with pytest.raises(Stopped, match="stopped at step 3, which is saved; run the same command") as stopped:
        fit(toy, tmp_path)
    assert stopped.value.status == status and saved_steps(tmp_path)[-1] == 3


def test_a_second_ctrl_c_ends_training_at_once(toy, monkeypatch):
    class Exit(BaseException):
        pass

    def stop_at_once(status):
        raise Exit(status)

    monkeypatch.setattr(os, "_exit", stop_at_once)
    monkeypatch.setattr(
        loop.NoProgress, "tick", lambda self, step: [signal.raise_signal(signal.SIGINT) for _ in range(2)]
    )
    with pytest.raises(Exit, match="130"):
        fit(toy, None)


def test_a_finished_run_does_not_train_again(toy, uninterrupted):
    folder, params, _, _ = uninterrupted
    lines = (folder / "metrics.jsonl").read_text()
    assert_same_bits(fit(toy, folder), params)
    assert (folder / "metrics.jsonl").read_text() == lines


def test_checkpoints_of_another_seed_are_refused(toy, tmp_path):
    fit(toy, tmp_path, steps=2)
    with pytest.raises(UserError, match="made with seed 0, not 1"):
        fit(toy, tmp_path, seed=1)


@pytest.mark.parametrize("step", [1, 5, 6, 8])
def test_a_loss_that_is_not_finite_stops_training_at_its_step(toy, tmp_path, step):
    """One row is NaN, and the data order determines its step, with and without a checkpoint due at that step."""
    stream = Sampler(SETS["forget"], 1, seed=0, name="forget")
    extra = np.zeros(ROWS, np.float32)
    extra[stream[step - 1].tokens[0, 0]] = np.nan
    good = (step - 1) // 2 * 2
    with pytest.raises(Diverged) as stopped:
        fit(
            toy,
            tmp_path,
            sets=SETS | {"forget": rows(0, extra)},
            batch_size=dict(forget=1, retain=4),
            log_every=100,
        )
    message = str(stopped.value)
    assert message.startswith(f"step {step}: forget_loss, forget_term")
    assert "retain" not in message
    assert (f"step {good}." if good else "none was saved yet") in message
    assert saved_steps(tmp_path) == [s for s in (2, 4, 6, 8) if good - 2 <= s <= good]


@pytest.mark.parametrize(
    ("rate", "message"),
    [
        (1e30, r"step 1: .*forget_loss.* is not finite after the update; the last checkpoint: none was saved yet\. "),
        (3e38, r"step 1: weights/visual/\w+.* is not finite after the update; the last checkpoint: none"),
    ],
    ids=["weights that are too large", "weights that are not finite"],
)
@pytest.mark.parametrize("saves", [True, False], ids=["with a folder", "without"])
def test_the_last_update_is_checked_as_well(toy, tmp_path, rate, message, saves):
    """A loss is that of the weights before the update, and the last update has no loss after it."""
    changes = dict(learning_rate=rate, weight_decay=10.0, steps=1, warmup_steps=0, schedule="constant", log_every=100)
    changes |= dict(clip_norm=1e9, checkpoint_every=100)
    with pytest.raises(Diverged, match=message + r".*decrease train\.learning_rate"):
        fit(toy, tmp_path if saves else None, Unbounded(), **changes)
    assert not saves or saved_steps(tmp_path) == []


def test_a_state_that_is_not_finite_is_not_saved(toy, tmp_path, monkeypatch):
    """Neither are moments, with which every later update is zero or NaN."""
    step = loop._Step.__call__

    def overflow(self, number, state, batches):
        state, metrics = step(self, number, state, batches)
        broken = jax.tree.map(lambda x: x * jnp.inf if x.ndim and number == 4 else x, state.opt_state)
        return dataclasses.replace(state, opt_state=broken), metrics

    monkeypatch.setattr(loop._Step, "__call__", overflow)
    with pytest.raises(Diverged, match="step 4: moments/.* is not finite after the update; .*: step 2"):
        fit(toy, tmp_path)
    assert saved_steps(tmp_path) == [2]
