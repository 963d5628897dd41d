"""Stopping, bit-identical resumption, and trainings that diverge."""

import dataclasses
import errno
import os
import signal
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_training import (
    ROWS,
    SETS,
    ToyMethod,
    assert_same_bits,
    at_step,
    fit,
    logged,
    restored,
    rows,
    saved_steps,
)

from vkd_jax.data.sampler import Sampler
from vkd_jax.reporting.report import json_lines
from vkd_jax.runtime import memory
from vkd_jax.training import loop
from vkd_jax.training.metric_writer import JsonLinesWriter
from vkd_jax.training.preemption import Stopped
from vkd_jax.types import Diverged, UserError


@pytest.fixture(autouse=True)
def ctrl_c_is_not_ignored():
    """A shell starts programs in the background with Ctrl-C ignored."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@dataclasses.dataclass(frozen=True)
class Unbounded(ToyMethod):
    """Its loss grows with the weights without end."""

    def losses(self):
        def loss(model, batch):
            return jnp.mean(jnp.square(model.visual(batch.images["x"]))), {}

        return {"forget": loss}


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


LINES = [b'{"step": %d, "loss": %d.5}\n' % (step, step) for step in range(1, 5)]
SPEED = b'{"step": 2, "steps_per_sec": 9.0}\n'
DAMAGED_METRICS = {  # lines of a training that resumes at step 3, and the steps whose metrics are lost
    "nothing": (LINES[:3], []),
    "missing": ([], [1, 2, 3]),
    "a later line": (LINES, []),
    "a cut later line": ([*LINES[:3], LINES[3][:9]], []),
    "a cut line": ([*LINES[:2], LINES[2][:-1]], [3]),
    "cut at the end of a line": (LINES[:1], [2, 3]),
    "garbage at the end": ([*LINES[:3], bytes(range(256))], []),
    "garbage in the middle": ([LINES[0], b"\x00\xff\r\n\x80\n", *LINES[1:3]], []),
    "garbage in a line": ([LINES[0], LINES[1][:5] + b"\xff" + LINES[1][6:], LINES[2]], [2]),
    "two lines that became one": ([LINES[0], LINES[1][:-1], LINES[2]], [2, 3]),
    "another JSON": ([LINES[0], b"[2]\n", b'"x"\n', b"null\n", LINES[2]], [2]),
    "a step that is a text": ([LINES[0], b'{"step": "2", "loss": 1}\n', LINES[2]], [2]),
    "a step that is true": ([b'{"step": true, "loss": 1}\n', *LINES[1:3]], [1]),
    "a loss that is null": ([LINES[0], b'{"step": 2, "loss": null}\n', LINES[2]], [2]),
    "a loss that is NaN": ([LINES[0], b'{"step": 2, "loss": NaN}\n', LINES[2]], [2]),
    "nested deeply": ([LINES[0], b"[" * 100_000 + b"\n", *LINES[1:3]], []),
    "speed on a line of its own": ([LINES[0], SPEED, *LINES[1:3]], []),
    "speed alone": ([LINES[0], SPEED, LINES[2]], [2]),
}


@pytest.mark.parametrize("damage", DAMAGED_METRICS)
def test_resuming_loses_and_repeats_no_metrics_without_a_word(tmp_path, caplog, damage):
    lines, lost = DAMAGED_METRICS[damage]
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b"".join(lines)) if lines else None
    JsonLinesWriter(file, 3).write_scalars(4, {"loss": 4.5})
    rows = [row for row in json_lines(file) if "loss" in row]
    assert rows == [{"step": step, "loss": step + 0.5} for step in range(1, 5) if step not in lost]
    assert (file.read_bytes().count(SPEED) == 1) == ("speed" in damage)
    warning = f"metrics.jsonl is damaged: the metrics of step {', '.join(map(str, lost))} are lost" if lost else ""
    assert warning in caplog.text and bool(caplog.text) == bool(lost)


def test_metrics_are_expected_at_the_steps_that_are_logged(tmp_path, caplog):
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(LINES[1] + LINES[3])
    JsonLinesWriter(file, 5, every=2)
    assert not caplog.text and file.read_bytes() == LINES[1] + LINES[3]
    JsonLinesWriter(file, 6, every=2)
    assert "the metrics of step 6 are lost" in caplog.text


def test_a_line_that_a_full_disk_cut_is_ended_before_the_next_one(tmp_path, monkeypatch):
    file = tmp_path / "metrics.jsonl"
    writer = JsonLinesWriter(file)
    writer.write_scalars(1, {"loss": 1.5})
    with monkeypatch.context() as patch:
        patch.setattr(type(file), "open", full_disk(type(file).open))
        writer.write_scalars(2, {"loss": 2.5})
    with pytest.raises(OSError, match="full"):
        writer.check()
    writer.write_scalars(3, {"loss": 3.5})
    assert json_lines(file, torn=True) == [{"step": step, "loss": step + 0.5} for step in (1, 3)]


def full_disk(open_file):
    """A method `open` of paths whose files take half of what is written."""

    def cut(path, *args, **options):
        file = open_file(path, *args, **options)
        write = file.write

        def half(text):
            write(text[: len(text) // 2])
            file.flush()
            raise OSError(errno.ENOSPC, "the disk is full")

        file.write = half
        return file

    return cut


@pytest.mark.parametrize("damage", ["cut", "garbage", "events"])
def test_damaged_metrics_change_no_weight(toy, uninterrupted, tmp_path, monkeypatch, damage):
    """Of a training that was stopped at step 3; TensorBoard reads the events, and no training does."""
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        at_step(patch, 3, lambda: signal.raise_signal(signal.SIGTERM))
        fit(toy, tmp_path)
    file = tmp_path / "metrics.jsonl"
    if damage == "events":
        for events in tmp_path.glob("events.out.tfevents.*"):
            events.write_bytes(events.read_bytes()[:40] + b"\xff" * 40)
    else:
        file.write_bytes(b"\x00\xff" + file.read_bytes() if damage == "garbage" else file.read_bytes()[:-5])
    assert_same_bits(fit(toy, tmp_path), uninterrupted[1])
    steps = [row["step"] for row in json_lines(file) if "loss" in row]
    assert steps == sorted(set(steps)) and len(logged(uninterrupted[0])) - len(steps) == (damage != "events")


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


def test_the_check_of_the_last_update_needs_no_more_memory_than_a_step(toy, monkeypatch):
    """And it changes no bit of the state, of which there is no copy."""
    sizes, losses = [], loop._Step.losses

    def measured(self, state, batches):
        program = self.losses_fn.lower(state.params, self.frozen, batches, self.start).compile()
        sizes.append((memory.program_bytes(program), self.memory(1, state, batches)))
        return losses(self, state, batches)

    monkeypatch.setattr(loop._Step, "losses", measured)
    checked = fit(toy, None, steps=3)
    assert len(sizes) == 1 and sizes[0][0] < sizes[0][1]
    monkeypatch.setattr(loop._Step, "losses", lambda *_: {})
    assert_same_bits(fit(toy, None, steps=3), checked)


def test_a_step_that_exceeds_the_memory_is_refused(toy, monkeypatch):
    """Before it runs, by the compiler's account: texts of any length decide its size."""
    monkeypatch.setattr(memory, "device_bytes", lambda devices: 100)
    monkeypatch.setattr(loop._Step, "__call__", lambda *_: pytest.fail("a step ran"))
    monkeypatch.setattr(Sampler, "check_memory", lambda *_: None)
    with pytest.raises(UserError, match=r"^training steps need .* GiB of memory.*; decrease train\.batch_size"):
        fit(toy, None, sets={name: rows(7, np.zeros(ROWS, np.float32)) for name in SETS})


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
