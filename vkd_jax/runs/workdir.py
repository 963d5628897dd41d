"""The folder of a run, on a disk or in a bucket: its config, its results, and the time of each stage.

With several processes the folder must be shared by all of them. Process 0 reads and writes it; every method must be
called by all processes with the same arguments, except inside the block of `stage`.
"""

import contextlib
import datetime
import importlib.metadata
import json
import platform
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from absl import logging

from vkd_jax.config.schema import RunConfig
from vkd_jax.runtime import files, hub, multihost, provenance, storage
from vkd_jax.types import UserError

PRE_RUN_FILES = {"config.json", "timing.json", "data"}  # files that exist before anything depends on the config
PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "transformers", "numpy", "grain")


class Workdir:
    """Opens the folder of a run. A run with the same config resumes; `config.mesh` may differ.

    Args:
        path: a folder on a disk, or gs://BUCKET/FOLDER.
        config: the config of the run.
        command: how the program was started, as the results name it.

    Raises:
        UserError: the folder has a run of another config, or cannot be written.
    """

    def __init__(self, path: str | Path, config: RunConfig, command: str = ""):
        self.path = storage.resolve(path)
        if isinstance(self.path, Path):
            self.path = self.path.absolute()  # Orbax requires an absolute path
        else:
            _check_packages()
        self.config, self.command = config, command
        self.timing: dict[str, float] = multihost.run_on_process_0(self._claim)

    def _claim(self) -> dict[str, float]:
        """Creates the folder or checks its config; returns the seconds of each stage so far."""
        resolved = json.loads(self.config.to_json())
        known, timing = self.path / "config.json", self.path / "timing.json"
        with storage.write_errors():
            if self.path.exists() and not self.path.is_dir():
                raise UserError(f"{self.path} is a file; pass a folder as --workdir.")
            if isinstance(self.path, Path):  # a bucket has no empty folders
                self.path.mkdir(parents=True, exist_ok=True)
            entries = self.path.iterdir() if self.path.is_dir() else ()
            names = {entry.name for entry in entries if entry.suffix != files.UNFINISHED}
            if names and not known.exists():
                raise UserError(f"{self.path} is not empty and has no run of this program; pass another --workdir.")
            difference = next(_differences(json.loads(known.read_text()), resolved), None) if names else "new"
            if difference and names - PRE_RUN_FILES:
                raise UserError(
                    f"{self.path} has a run of another config ({difference}); "
                    "pass another --workdir, or remove that folder to start over."
                )
            if difference:
                timing.unlink(missing_ok=True)
                files.write_bytes(known, _json(resolved))
        return json.loads(timing.read_text()) if timing.exists() else {}

    def has(self, name: str) -> bool:
        """Whether a file or folder of this name exists."""
        return multihost.run_on_process_0((self.path / name).exists)

    def has_model(self, name: str) -> bool:
        """Whether a complete model folder of this name exists."""
        return self.has(f"{name}/{storage.MODEL_MARKER}")

    def model(self, name: str, make: Callable[[Path], Any] | None = None) -> Path:
        """The folder of a model on the local disk; if it does not exist, every process calls `make` to write it."""
        path = self.path / name
        if make and not self.has_model(name):
            folder = storage.local_copy(path)
            if folder != path:  # the cache may have a model of an earlier run that is no longer in the bucket
                multihost.run_on_process_0(lambda: shutil.rmtree(folder, ignore_errors=True))
            make(folder)
            multihost.run_on_process_0(lambda: storage.upload_model(path))
        return hub.fetch_model(path)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Times a stage; the seconds of interrupted runs add up."""
        logging.info("%s ...", name)
        start = time.perf_counter()
        try:
            with storage.write_errors():
                yield
        finally:
            seconds = time.perf_counter() - start
            self.timing[name] = round(self.timing.get(name, 0.0) + seconds, 3)
            if multihost.is_process_0():
                # A full disk is reported by the stage itself.
                with contextlib.suppress(OSError, UserError), storage.write_errors():
                    files.write_bytes(self.path / "timing.json", _json(self.timing))
        logging.info("%s: %.1f s", name, seconds)

    def write(self, name: str, value: Any) -> Path:
        """Writes JSON atomically."""
        return self._write(name, lambda: _json(value))

    def write_text(self, name: str, text: str) -> Path:
        """Writes text atomically."""
        return self._write(name, text.encode)

    def write_lines(self, name: str, records: Iterable[Mapping]) -> Path:
        """Writes records atomically, one line of JSON each."""
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        return self._write(name, lambda: "".join(lines).encode())

    def _write(self, name: str, data: Callable[[], bytes]) -> Path:
        multihost.run_on_process_0(lambda: files.write_bytes(self.path / name, data()))
        return self.path / name

    def read_lines(self, name: str) -> list[dict]:
        """Reads the records of `write_lines`."""
        text = (self.path / name).read_text(encoding="utf-8")
        return [json.loads(line) for line in text.split("\n") if line]  # answers may contain other line separators

    def meta(self) -> dict[str, Any]:
        """What makes a figure reproducible: command, config, seed, commit, versions, machine."""
        return {
            "command": self.command,
            "config": json.loads(self.config.to_json()),
            "seed": self.config.seed,
            "commit": provenance.commit(),
            "versions": {"python": platform.python_version()}
            | {name: importlib.metadata.version(name) for name in PACKAGES},
            "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
            "protocol": self.config.eval.protocol,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def _check_packages() -> None:
    """Checks that Orbax can access buckets, before anything is computed."""
    try:
        import google.cloud.storage  # noqa: F401
    except ImportError:
        raise UserError("checkpoints in a bucket need another package: pip install google-cloud-storage.") from None


def _differences(old: Any, new: Any, path: str = "") -> Iterator[str]:
    if path == "mesh":
        return
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from _differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
    elif old != new:
        yield f"{path}: {old!r} in the folder, {new!r} now"
