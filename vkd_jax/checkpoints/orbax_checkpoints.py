"""Checkpoints of a training state, written by Orbax; no other module imports Orbax."""

from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from vkd_jax.types import UserError


class Checkpoints:
    """The committed checkpoints of one run, newest last.

    Saving is asynchronous, and a rename commits it, so a process that is killed at any moment leaves the last committed
    step intact. Data order and randomness are functions of (seed, step). The step in the state therefore restores the
    data position and the random state as well. The seed is saved with it and must be the same on resume.
    """

    def __init__(self, folder: Path, *, seed: int, every: int, keep: int = 2):
        self._seed = seed
        self._checkpointer = ocp.training.Checkpointer(
            folder,
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(every),
            preservation_policy=ocp.training.preservation_policies.LatestN(keep),
            cleanup_tmp_directories=True,
        )

    @property
    def latest(self) -> int | None:
        """The newest step that was saved, or None; it is committed after `wait`."""
        newest = self._checkpointer.latest
        return None if newest is None else newest.step

    def save(self, step: int, state: Any, *, force: bool = False) -> bool:
        """Starts to save if `step` is due or `force`; on return the state can be donated."""
        if self.latest == step:
            return False
        return bool(
            self._checkpointer.save_checkpointables_async(
                step, {"state": state, "run": {"seed": self._seed}}, force=force
            )
        )

    def restore(self, state: Any) -> Any:
        """Loads the newest committed state with the shardings of `state`, whose values are not used.

        Raises:
            UserError: the checkpoints are of a run with another seed.
        """
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        loaded = self._checkpointer.load_checkpointables(self._checkpointer.latest, {"state": abstract, "run": None})
        if loaded["run"]["seed"] != self._seed:
            raise UserError(f"The checkpoints were made with seed {loaded['run']['seed']}, not {self._seed}.")
        return loaded["state"]

    def wait(self) -> None:
        """Blocks until all saves are committed."""
        self._checkpointer.wait()

    def close(self) -> None:
        """Commits pending saves and stops the threads."""
        self._checkpointer.close()


class NoCheckpoints:
    """The interface of `Checkpoints` for a run that saves none."""

    latest = None

    def save(self, step: int, state: Any, *, force: bool = False) -> bool:
        """Saves nothing."""
        del step, state, force
        return False

    def wait(self) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""
