"""Orbax checkpoints of a training state; the only module that knows Orbax."""

from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from vkd_jax.types import UserError


class Checkpoints:
    """The committed checkpoints of one run, newest last.

    A save is asynchronous and becomes visible by a rename, so a process killed at any moment leaves the last
    committed step intact. Data order and randomness are functions of (seed, step), so the state's step is the data
    position and the random state at once; the seed is kept beside it and must agree on resume.
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
        """The newest step that was saved; after `wait` it is committed."""
        newest = self._checkpointer.latest
        return None if newest is None else newest.step

    def save(self, step: int, state: Any, *, force: bool = False) -> bool:
        """Saves if `step` is due or `force`; returns at once, with the state safe to donate."""
        if self.latest == step:
            return False
        return bool(
            self._checkpointer.save_checkpointables_async(
                step, {"state": state, "run": {"seed": self._seed}}, force=force
            )
        )

    def restore(self, state: Any) -> Any:
        """The newest committed state, with the shardings of `state`, whose values are not used."""
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        loaded = self._checkpointer.load_checkpointables(self._checkpointer.latest, {"state": abstract, "run": None})
        if loaded["run"]["seed"] != self._seed:
            raise UserError(f"the checkpoints were made with seed {loaded['run']['seed']}, not {self._seed}.")
        return loaded["state"]

    def wait(self) -> None:
        """Blocks until everything asked for is committed."""
        self._checkpointer.wait()

    def close(self) -> None:
        """Commits what is under way and frees threads."""
        self._checkpointer.close()


class NoCheckpoints:
    """Stands in for `Checkpoints` where a training run keeps none."""

    latest = None

    def save(self, step: int, state: Any, *, force: bool = False) -> bool:
        """Saves nothing."""
        del step, state, force
        return False

    def wait(self) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""
