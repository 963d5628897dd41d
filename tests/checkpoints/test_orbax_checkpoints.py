"""Checkpoints: their contents, and those that are damaged; training/test_kills.py has runs that are killed."""

import errno
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from vkd_jax.checkpoints import orbax_checkpoints
from vkd_jax.checkpoints.orbax_checkpoints import Checkpoints
from vkd_jax.types import UserError


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
    with pytest.raises(UserError, match="those of a run with another config, other data or another model; restore"):
        Checkpoints(tmp_path, seed=0, every=1, run="of another config").restore(state)


def test_a_path_may_lead_through_another_folder(tmp_path):
    (tmp_path / "other").mkdir()
    state = {"x": jnp.arange(3.0)}
    for _ in range(2):
        checkpoints = Checkpoints(tmp_path / "other" / ".." / "run", seed=0, every=1)
        checkpoints.save(1, state)
        checkpoints.wait()
    assert checkpoints.latest == 1 and (tmp_path / "run" / "1" / orbax_checkpoints.FILE_LIST).is_file()
    np.testing.assert_array_equal(checkpoints.restore(state)["x"], state["x"])


@pytest.mark.parametrize("name", ["\u0663", "03"])  # 3 in Arabic
def test_a_folder_that_is_named_by_other_digits_is_no_checkpoint(tmp_path, name):
    checkpoints, state = Checkpoints(tmp_path, seed=0, every=1), {"x": jnp.arange(3.0)}
    checkpoints.save(1, state)
    checkpoints.close()
    shutil.copytree(tmp_path / "1", tmp_path / name)
    assert Checkpoints(tmp_path, seed=0, every=1).latest == 1


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


@pytest.mark.parametrize(
    ("steps", "damage"),
    [((3,), damage) for damage in DAMAGE]
    + [(steps, damage) for steps in ((3, 2), (3, 2, 1), (2,)) for damage in ("truncated", "list missing")],
    ids=str,
)
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
