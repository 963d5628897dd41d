"""Checkpoints: their contents, and bit-identical resumption of killed runs."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from vkd_jax.checkpoints import orbax_checkpoints
from vkd_jax.checkpoints.orbax_checkpoints import Checkpoints
from vkd_jax.types import UserError

ROOT = Path(__file__).parents[2]
STEPS = 20


def test_a_checkpoint_has_the_state_of_its_step_although_training_continues(tmp_path):
    """Saving is asynchronous, and each state is donated to the next step while it is still being written."""
    size = 1 << 20
    advance = jax.jit(lambda state: {"x": state["x"] + 1, "step": state["step"] + 1}, donate_argnums=0)
    state = {"x": jnp.arange(size, dtype=jnp.float32), "step": jnp.int32(0)}
    checkpoints = Checkpoints(tmp_path, seed=0, every=1, keep=100)
    for step in range(1, 9):
        before, state = state, advance(state)
        assert before["x"].is_deleted()
        assert checkpoints.save(step, state)
        for _ in range(3):  # overwrites the buffers of the saved state
            state = advance(state)
        state = {"x": state["x"] - 3, "step": state["step"] - 3}
    checkpoints.close()
    for step in range(1, 9):
        loaded = ocp.load_checkpointables(tmp_path / str(step), {"state": like(state)})["state"]
        assert int(loaded["step"]) == step
        np.testing.assert_array_equal(loaded["x"], np.arange(size, dtype=np.float32) + step)


def like(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def test_due_and_forced_steps_are_saved_once_and_the_last_two_remain(tmp_path):
    checkpoints, state = Checkpoints(tmp_path, seed=0, every=2), {"x": jnp.ones(3)}
    assert checkpoints.latest is None
    assert [checkpoints.save(step, state) for step in (1, 2, 2, 3, 4)] == [False, True, False, False, True]
    assert checkpoints.save(5, state, force=True) and not checkpoints.save(5, state, force=True)
    checkpoints.wait()
    assert checkpoints.latest == 5
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["4", "5"]
    checkpoints.close()


def test_the_rest_of_a_killed_save_is_not_a_checkpoint(tmp_path):
    checkpoints, state = Checkpoints(tmp_path, seed=0, every=1), {"x": jnp.arange(3.0)}
    checkpoints.save(1, state)
    checkpoints.close()
    (tmp_path / "2.orbax-checkpoint-tmp").mkdir()
    again = Checkpoints(tmp_path, seed=0, every=1)
    assert again.latest == 1
    np.testing.assert_array_equal(again.restore(state)["x"], state["x"])
    again.close()
    with pytest.raises(UserError, match="made with seed 0, not 7"):
        Checkpoints(tmp_path, seed=7, every=1).restore(state)


# Damaged checkpoints.


def largest(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "truncated": lambda folder: os.truncate(largest(folder), 100),
    "empty file": lambda folder: os.truncate(largest(folder), 0),
    "bit flipped": lambda folder: flip_a_bit(largest(folder)),
    "bit of the metadata flipped": lambda folder: flip_a_bit(folder / "state" / "_METADATA"),
    "data missing": lambda folder: largest(folder).unlink(),
    "metadata missing": lambda folder: (folder / "_CHECKPOINT_METADATA").unlink(),
    "list missing": lambda folder: (folder / "files.json").unlink(),
    "list truncated": lambda folder: os.truncate(folder / "files.json", 50),
    "list of nothing": lambda folder: (folder / "files.json").write_text("{}"),
    "list of another kind": lambda folder: (folder / "files.json").write_text('{"a": 1}'),
    "empty folder": lambda folder: (shutil.rmtree(folder), folder.mkdir()),
    "a file": lambda folder: (shutil.rmtree(folder), folder.write_text("")),
}


@pytest.fixture(scope="module")
def three_saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    checkpoints = Checkpoints(folder, seed=0, every=1, keep=3)
    for step in (1, 2, 3):
        checkpoints.save(step, {"x": jnp.arange(1000.0) + step})
    checkpoints.close()
    return folder


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("steps", [(3,), (3, 2), (3, 2, 1), (2,)], ids=str)
def test_the_newest_whole_checkpoint_is_used(three_saved, tmp_path, caplog, steps, damage):
    folder = shutil.copytree(three_saved, tmp_path / "checkpoints")
    for step in steps:
        DAMAGE[damage](folder / str(step))
    whole = {(3,): 2, (3, 2): 1, (3, 2, 1): None, (2,): 3}[steps]
    checkpoints, like = Checkpoints(folder, seed=0, every=1, keep=3), {"x": jnp.zeros(1000)}
    assert checkpoints.latest == whole
    warnings = [record.getMessage() for record in caplog.records if "Training resumes" in record.getMessage()]
    if steps == (2,):
        assert not warnings
    else:
        assert len(warnings) == 1 and all(f"the checkpoint of step {step} is damaged" in warnings[0] for step in steps)
        resumes = f"at the whole checkpoint of step {whole}" if whole else "from the beginning"
        assert f"Training resumes {resumes}" in warnings[0]
    if whole:
        np.testing.assert_array_equal(checkpoints.restore(like)["x"], jnp.arange(1000.0) + whole)
    next_step = (whole or 0) + 1
    assert checkpoints.save(next_step, {"x": jnp.full(1000, 7.0)})
    checkpoints.close()
    again = Checkpoints(folder, seed=0, every=1, keep=3)
    assert again.latest == next_step and again.restore(like)["x"][0] == 7
    again.close()


def test_an_error_while_a_checkpoint_is_completed_is_raised(tmp_path, monkeypatch):
    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(orbax_checkpoints, "_write_list", full)
    checkpoints = Checkpoints(tmp_path, seed=0, every=1)
    checkpoints.save(1, {"x": jnp.ones(3)})
    with pytest.raises(OSError, match="No space left"):
        checkpoints.wait()
    checkpoints.close()


def start(folder):
    """Starts a run that prints its steps, and resumes from the last checkpoint."""
    return subprocess.Popen(
        [sys.executable, "-W", "error", ROOT / "tests/programs/kill_me.py", folder, str(STEPS)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def finish(process):
    """Waits for a run and returns its printed metrics by step."""
    out, _ = process.communicate()
    assert process.returncode == 0
    return by_step(out.splitlines())


def by_step(lines):
    return {line["step"]: line for line in map(json.loads, lines)}


def kill(process, step, delay):
    """Kills a run `delay` seconds after a step, in a save or in the next step, and returns its metrics by step."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        process.stdin.write("\n")
        process.stdin.flush()
        if json.loads(line)["step"] == step:
            time.sleep(delay)
            process.send_signal(signal.SIGKILL)
            break
    lines += process.stdout.readlines()
    process.stdout.close()
    process.stdin.close()
    assert process.wait() == -signal.SIGKILL
    return by_step(lines)


def final_state(folder):
    """Returns the arrays of the last checkpoint by path."""
    path = folder / "checkpoints" / str(STEPS)
    target = ocp.checkpointables_metadata(path).metadata["state"]
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=CPU), target)
    loaded = ocp.load_checkpointables(path, {"state": target})["state"]
    return {jax.tree_util.keystr(key): np.asarray(x) for key, x in jax.tree.leaves_with_path(loaded)}


CPU = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    return finish(start(folder)), final_state(folder)


@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_repeatedly_ends_with_the_same_bits(tmp_path, uninterrupted, kills):
    """After SIGKILL at random times, the metrics of all steps, weights and optimizer state are those of one run."""
    metrics, state = uninterrupted
    draw, seen, resumed = random.Random(kills), {}, []
    steps = sorted(draw.sample(range(5, STEPS - 1), kills))
    for step in steps:
        lines = kill(start(tmp_path), step, delay=draw.uniform(0, 0.05))
        resumed.append(min(lines))
        seen |= lines
    last = finish(start(tmp_path))
    resumed.append(min(last))
    assert resumed[0] == 1 and min(resumed[1:]) > 1  # each run resumed
    assert seen | last == metrics
    after = final_state(tmp_path)
    assert after.keys() == state.keys() and any("opt_state" in path for path in after)
    for path in state:
        np.testing.assert_array_equal(after[path], state[path], err_msg=path)
