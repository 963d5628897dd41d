"""Checkpoints of a training state, written by Orbax; no other module imports Orbax.

Orbax commits a checkpoint by a rename, and does not notice if its files are damaged later. A list of the files of a
checkpoint, with their sizes and digests, is therefore written into its folder as soon as it is committed. A checkpoint
that differs from its list, or has none, is damaged: it is removed, and the newest whole one is used instead.
"""

import concurrent.futures
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from absl import logging
from orbax.checkpoint import v1 as ocp

from vkd_jax.runtime import files, multihost
from vkd_jax.types import UserError

FILE_LIST = "files.json"  # {name: [bytes, digest]} of the other files in the folder of a checkpoint
_START_OVER = "restore those of this run, or remove the folder to train from the beginning"


class Checkpoints:
    """The committed checkpoints of one run, newest last.

    Saving is asynchronous, and a rename commits it, so a process that is killed at any moment leaves the last committed
    step intact. Data order and randomness are functions of (seed, step). The step in the state therefore restores the
    data position and the random state as well. The seed and the identity of the run are saved with it and must be the
    same on resume.

    Opening removes damaged checkpoints that are newer than the newest whole one. Process 0 decides for all.
    """

    def __init__(self, folder: Path, *, seed: int, every: int, keep: int = 2, run: str = ""):
        folder = folder.resolve() if isinstance(folder, Path) else folder  # TensorStore refuses paths with ".."
        self._folder, self._run = folder, {"seed": seed, "run": run}
        self._executor = concurrent.futures.ThreadPoolExecutor(1)
        self._listing: concurrent.futures.Future | None = None
        multihost.run_on_process_0(lambda: _remove_damaged(folder))
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
        if self.latest == step or not (force or self._checkpointer.should_save(step)):
            return False
        self._wait_for_list()
        saving = self._checkpointer.save_checkpointables_async(step, {"state": state, "run": self._run}, force=force)

        def complete() -> None:
            saving.result()
            _write_list(self._folder / str(step))

        if multihost.is_process_0():
            self._listing = self._executor.submit(complete)
        return True

    def restore(self, state: Any) -> Any:
        """Loads the newest committed state with the shardings of `state`, whose values are not used.

        Raises:
            UserError: the checkpoints are of a run with another seed, config or inputs.
        """
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        loaded = self._checkpointer.load_checkpointables(self._checkpointer.latest, {"state": abstract, "run": None})
        if (seed := loaded["run"]["seed"]) != self._run["seed"]:
            raise UserError(
                f"{self._folder}: the checkpoints were made with seed {seed}, not {self._run['seed']}; {_START_OVER}."
            )
        if loaded["run"] != self._run:
            raise UserError(
                f"{self._folder}: the checkpoints are those of a run with another config, other data or another model; "
                f"{_START_OVER}."
            )
        return loaded["state"]

    def wait(self) -> None:
        """Blocks until all saves are committed and complete."""
        self._checkpointer.wait()
        self._wait_for_list()

    def close(self) -> None:
        """Commits pending saves and stops the threads."""
        self._checkpointer.close()
        self._executor.shutdown()

    def _wait_for_list(self) -> None:
        """Raises in every process what the thread of process 0 raised."""
        listing, self._listing = self._listing, None
        multihost.run_on_process_0(lambda: listing.result() if listing else None)


def _remove_damaged(folder: Path) -> None:
    """Removes the checkpoints that are newer than the newest whole one, and logs which."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    steps = sorted((int(x) for x in names if x.isascii() and x.isdecimal() and str(int(x)) == x), reverse=True)
    damaged: dict[int, str] = {}
    for step in steps:
        if not (damage := _damage(folder / str(step))):
            break
        damaged[step] = damage
    if not damaged:
        return
    for step in damaged:
        _remove(folder / str(step))
    whole = [step for step in steps if step not in damaged]
    logging.warning(
        "%s: %s. Training resumes %s.",
        folder,
        "; ".join(f"the checkpoint of step {step} is damaged and was removed: {x}" for step, x in damaged.items()),
        f"at the whole checkpoint of step {whole[0]}" if whole else "from the beginning, as no checkpoint is whole",
    )


def _damage(folder: Path) -> str:
    """Returns how a checkpoint differs from its list of files, or "" if it is whole."""
    if not (folder / FILE_LIST).is_file():
        return f"it has no {FILE_LIST}, so it was not completed"
    try:
        listed = json.loads((folder / FILE_LIST).read_text())
        entries = {name: (int(size), str(digest)) for name, (size, digest) in listed.items()}
    except (ValueError, TypeError, AttributeError):
        return f"{FILE_LIST} cannot be read"
    paths = dict(_files(folder))
    for name, (size, digest) in entries.items():
        if name not in paths:
            return f"{name} is missing"
        if _size(paths[name]) != size:
            return f"{name} has {_size(paths[name])} bytes instead of {size}"
        if _digest(paths[name]) != digest:
            return f"{name} has other content than was written"
    return "" if entries else f"{FILE_LIST} lists no file"


def _write_list(folder: Path) -> None:
    """Writes the list of the files of a checkpoint, which completes it."""
    entries = {name: (_size(path), _digest(path)) for name, path in _files(folder)}
    files.write_bytes(folder / FILE_LIST, json.dumps(entries, indent=1).encode())


def _files(folder: Path, prefix: str = "") -> Iterator[tuple[str, Path]]:
    """Yields (name relative to the folder, path) of all files but the list itself."""
    for path in folder.iterdir():
        name = f"{prefix}{path.name}"
        if path.is_dir():
            yield from _files(path, f"{name}/")
        elif name != FILE_LIST and not name.endswith(files.UNFINISHED):
            yield name, path


def _size(path: Path) -> int:
    return path.stat().st_size if isinstance(path, Path) else path.stat().length


def _digest(path: Path) -> str:
    """The SHA-256 of a file; "" for an object of a bucket, which its service protects by checksums."""
    if not isinstance(path, Path):
        return ""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remove(path: Path) -> None:
    """Removes a file or a folder, on a disk or in a bucket."""
    if isinstance(path, Path):
        files.remove(path)
    elif path.is_dir():
        path.rmtree()
    else:
        path.unlink()


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
