"""A run's folder, on a disk or in a bucket: whose config it is, what is already there, and how long each stage took.

With several processes the folder is one that all of them see. Process 0 looks and writes; a call is one of all
processes, with the same arguments, but for those of `stage`'s block.
"""

import contextlib
import datetime
import importlib.metadata
import json
import platform
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_collections
from absl import logging

from vkd_jax.runtime import files, hub, multihost, provenance, storage
from vkd_jax.types import UserError

UNBEGUN = {"config.json", "timing.json", "data"}  # what may be there before anything depends on the config
PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "transformers", "numpy", "grain")


class Workdir:
    """Opens a folder for one config; a folder of another config is refused, one of the same is continued.

    On how many devices a run goes on is another matter: `config.mesh` may differ.
    """

    def __init__(self, path: str | Path, config: ml_collections.ConfigDict):
        self.path = storage.resolve(path)
        if isinstance(self.path, Path):
            self.path = self.path.absolute()  # as Orbax wants it
        else:
            _check_packages()
        self.config = config
        self.timing: dict[str, float] = multihost.run_on_process_0(self._claim)

    def _claim(self) -> dict[str, float]:
        """Makes the folder, or checks whose it is; the seconds of each stage so far."""
        resolved = json.loads(self.config.to_json_best_effort())
        known, timing = self.path / "config.json", self.path / "timing.json"
        with files.disk_errors():
            if self.path.exists() and not self.path.is_dir():
                raise UserError(f"{self.path} is a file; pass a folder as --workdir.")
            if isinstance(self.path, Path):  # a bucket has no folders but by what lies in them
                self.path.mkdir(parents=True, exist_ok=True)
            entries = self.path.iterdir() if self.path.is_dir() else ()
            there = {entry.name for entry in entries if entry.suffix != ".tmp"}
            if there and not known.exists():
                raise UserError(f"{self.path} is not empty and holds no run of this program; pass another --workdir.")
            difference = next(_differences(json.loads(known.read_text()), resolved), None) if there else "new"
            if difference and there - UNBEGUN:
                raise UserError(
                    f"{self.path} holds a run of another config ({difference}); "
                    "pass another --workdir, or remove that folder to start over."
                )
            if difference:
                timing.unlink(missing_ok=True)
                files.write_bytes(known, _json(resolved))
        return json.loads(timing.read_text()) if timing.exists() else {}

    def has(self, name: str) -> bool:
        """Whether a file or folder of that name is there."""
        return multihost.run_on_process_0((self.path / name).exists)

    def has_model(self, name: str) -> bool:
        """Whether a model folder of that name is there, whole."""
        return self.has(f"{name}/{storage.MODEL_MARKER}")

    def model(self, name: str, make: Callable[[Path], Any] | None = None) -> Path:
        """The folder of that model on this machine's disk; `make` writes it, in every process, where there is none."""
        place = self.path / name
        if make and not self.has_model(name):
            folder = storage.local_copy(place)
            if folder != place:  # a cache may hold one of an earlier run, though the bucket no longer does
                multihost.run_on_process_0(lambda: shutil.rmtree(folder, ignore_errors=True))
            make(folder)
            multihost.run_on_process_0(lambda: storage.upload_model(place))
        return hub.fetch_model(place)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Times a stage; the seconds of interrupted runs add up."""
        logging.info("%s ...", name)
        start = time.perf_counter()
        try:
            with files.disk_errors():
                yield
        finally:
            seconds = time.perf_counter() - start
            self.timing[name] = round(self.timing.get(name, 0.0) + seconds, 3)
            if multihost.is_process_0():
                # A full disk is reported by the stage itself.
                with contextlib.suppress(OSError, UserError), files.disk_errors():
                    files.write_bytes(self.path / "timing.json", _json(self.timing))
        logging.info("%s: %.1f s", name, seconds)

    def write(self, name: str, value: Any) -> Path:
        """Writes JSON beside and renames, so that a file is either whole or absent."""
        return self._write(name, lambda: _json(value))

    def write_text(self, name: str, text: str) -> Path:
        """As `write`, for text."""
        return self._write(name, text.encode)

    def write_lines(self, name: str, records: Iterable[Mapping]) -> Path:
        """As `write`, for records, a line of JSON each."""
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        return self._write(name, lambda: "".join(lines).encode())

    def _write(self, name: str, data: Callable[[], bytes]) -> Path:
        multihost.run_on_process_0(lambda: files.write_bytes(self.path / name, data()))
        return self.path / name

    def read_lines(self, name: str) -> list[dict]:
        """The records of `write_lines`."""
        text = (self.path / name).read_text(encoding="utf-8")
        return [json.loads(line) for line in text.split("\n") if line]  # other line separators may stand in answers

    def meta(self) -> dict[str, Any]:
        """What makes a figure reproducible: command, config, seed, commit, versions, machine."""
        program = "compare" if Path(sys.argv[0]).stem == "compare" else "main"
        return {
            "command": shlex.join(["python", "-m", f"vkd_jax.{program}", *sys.argv[1:]]),
            "config": json.loads(self.config.to_json_best_effort()),
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
    """Refuses buckets before anything is made where Orbax would lack what it asks them with."""
    try:
        import google.cloud.storage  # noqa: F401
    except ImportError:
        raise UserError("checkpoints in a bucket need one more package: pip install google-cloud-storage.") from None


def _differences(old: Any, new: Any, path: str = "") -> Iterator[str]:
    if path == "mesh":
        return
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from _differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
    elif old != new:
        yield f"{path}: {old!r} there, {new!r} now"
