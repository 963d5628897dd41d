"""The folder of a run, on a disk or in a bucket: its config, its inputs, its results, and the time of each stage.

    config.json    the resolved config
    inputs.json    digests of the data and of the given models; see `inputs`
    records.json   digests of all that later stages reuse; see `records`
    timing.json    seconds of each stage
    lock.json      the process that writes the folder, while it runs; see `vkd_jax.runtime.locks`

A folder belongs to its config and its inputs. With several processes the folder must be shared by all of them. Process
0 reads and writes it; every method must be called by all processes with the same arguments, except inside the block of
`stage`.
"""

import contextlib
import datetime
import hashlib
import importlib.metadata
import itertools
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from absl import logging

from vkd_jax.config.schema import RunConfig
from vkd_jax.messages import listed
from vkd_jax.runs import inputs
from vkd_jax.runs.inputs import START_OVER
from vkd_jax.runtime import files, hub, json_files, locks, multihost, progress_bar, provenance, records, storage
from vkd_jax.runtime.outputs import check_folder
from vkd_jax.types import UserError

CONFIG = "config.json"
# Files that exist before anything depends on the config and the inputs.
PRE_RUN_FILES = {CONFIG, "timing.json", "data", "log.txt", inputs.FILE, records.FILE}
UNCLAIMED_FILES = {"log.txt"}  # files of a run that was killed before it wrote its config
PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "transformers", "numpy", "grain")
SHARED_MODELS = ("vanilla", "retain_only")  # models that are the same in every run of a comparison
# Fields that a run may have other values of when it resumes: they decide nothing that it computes.
FREE_FIELDS = {"mesh", "train.trackers", "finetune.train.trackers"}
LONGEST = 1e9  # seconds of a stage, or timing.json is damaged
TRAINING, METRICS, JUDGE_FOLDER = "train", "metrics.jsonl", "judge"
REMOVABLE = (*records.MODELS, TRAINING)  # large folders, which may be removed after the run
MOVE = "remove it, or pass another --workdir"
FOLDERS = (
    *("adapter", "answers", "attacks", "base", "data", "features", "judge", "portraits", "report"),
    *("retain_only", "train", "unlearned", "vanilla"),
)
FOLDERS_OF_A_COMPARISON = ("cache", "controls", "data", "models", "runs", "tuning")
FILE_SUFFIXES = (".json", ".jsonl", ".md", ".html", ".txt", ".png", ".jpg", ".pdf")  # of the files of runs


@contextlib.contextmanager
def exclusive(path: str | Path, command: str) -> Iterator[None]:
    """Context manager that creates the folder of a run, holds its lock, and removes unfinished files; process 0 does.

    Raises:
        UserError: the folder is used by another process, has other files, or cannot be written.
    """
    path = storage.resolve(path)

    def enter() -> None:
        prepare_folder(path)
        stack = contextlib.ExitStack()
        stack.enter_context(locks.hold(path, command))
        locked.append(stack)
        with storage.write_errors():
            files.remove_unfinished(path, recursive=True)

    locked: list[contextlib.ExitStack] = []
    multihost.run_on_process_0(enter)
    try:
        yield
    finally:
        for stack in locked:
            stack.close()


def make_folder(path: Path) -> None:
    """Creates a folder on a disk unless it exists, and checks that it can be used; buckets have no empty folders.

    Raises:
        UserError: the path is not a folder, cannot be one, or is in a model folder.
    """
    try:
        if isinstance(path, Path) and path.is_symlink() and not path.exists():
            raise UserError(f"{path} is a link to {os.readlink(path)}, which does not exist; {START_OVER}.")
        if path.exists() and not path.is_dir():
            raise UserError(f"{path} is a file; pass a folder as --workdir.")
        if isinstance(path, Path) and "\\" in str(path.absolute()):  # which TensorStore takes for a slash
            raise UserError(
                f"--workdir={path}: checkpoints cannot have a backslash in their path; pass another folder."
            )
        check_folder(path, "--workdir")
        if isinstance(path, Path):
            path.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError, RuntimeError) as error:  # a name that is too long, has NUL, or is a loop of links
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--workdir={path} cannot be used ({reason}); pass another folder.") from error


def check_links(path: Path) -> None:
    """Checks that a folder on a disk has no link in it, since a run writes nothing outside; it may be a link itself."""
    if isinstance(path, Path):
        files.check_no_links(path, "replace it by what it leads to, or make all of the --workdir a link")


def check_kinds(path: Path, folders: Iterable[str] = FOLDERS) -> None:
    """Checks that existing paths in the folder of a run have the expected type, a file or a folder.

    A conflict is found at the start of a run, not hours later.

    Args:
        path: the folder; one in a bucket has no folders that could be in the way.
        folders: the names of its folders.

    Raises:
        UserError: a file is in the place of a folder, or a folder in the place of a file.
    """
    if not isinstance(path, Path):
        return
    places = [path / name for name in folders]
    places += [
        place for name in ("attacks", "train") for place in sorted((path / name).glob("[!.]*")) if not place.suffix
    ]
    places += [place / "checkpoints" for place in (path / "train", *(path / "train").glob("[!.]*"))]
    for place in places:
        if place.exists() and not place.is_dir():
            raise UserError(f"{place} is a file, and a run has a folder there; {MOVE}.")
    for place in (path, *(place for place in places if place.name not in ("data", "cache") and place.is_dir())):
        for entry in sorted(place.iterdir()):
            if entry.suffix in FILE_SUFFIXES and entry.is_dir():
                raise UserError(f"{entry} is a folder, and a run has a file there; {MOVE}.")


def prepare_folder(path: Path) -> set[str]:
    """Creates the folder of a run unless it exists, and returns the names of the files in it.

    Raises:
        UserError: the path is not a folder, cannot be one, or has a link or files of something else.
    """
    with storage.write_errors():
        make_folder(path)
        check_kinds(path)
        entries = path.iterdir() if path.is_dir() else ()
        names = {e.name for e in entries if e.suffix != files.UNFINISHED and not e.name.startswith(locks.FILE)}
    others = {name for name in names - UNCLAIMED_FILES if not name.startswith(".")}  # .DS_Store and the like
    if others and "config.json" not in names:
        raise UserError(f"{path} is not empty and has no run of this program; pass another --workdir.")
    check_links(path)
    return names


class Workdir:
    """Opens the folder of a run. A run with the same config resumes; `FREE_FIELDS` may differ.

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
        self._has_results = False
        self._records: records.Records | None = None  # on process 0
        self._inputs: inputs.Inputs | None = None  # on process 0, after `bind`
        self.given: Mapping[str, Path] = {}  # after `bind`
        self.timing: dict[str, float] = multihost.run_on_process_0(self._claim)

    def _claim(self) -> dict[str, float]:
        """Creates the folder or checks its config; returns the seconds of each stage so far."""
        resolved = json.loads(self.config.to_json())
        known, timing = self.path / CONFIG, self.path / "timing.json"
        names = prepare_folder(self.path)
        self._has_results = bool(names - PRE_RUN_FILES)
        with storage.write_errors():
            difference = _config_difference(self.path, resolved, names)
            if difference:
                for file in (timing, self.path / inputs.FILE):
                    file.unlink(missing_ok=True)
                files.write_bytes(known, records.encode(resolved))
            self._records = records.Records(self.path)
            if difference or not self._has_results or not self._records.knows(CONFIG):
                self._records.add(CONFIG)
            seconds = records.read_or(timing, {}, "the time of earlier stages is not known")
        return {name: x for name, x in seconds.items() if type(x) in (int, float) and 0 <= x <= LONGEST}

    def bind(self, values: inputs.Inputs | None, folders: Mapping[str, Path] = {}) -> None:  # noqa: B006
        """Checks that the run has the inputs of its results so far, and saves them if there are no results.

        Args:
            values: what `inputs.describe` returned; only process 0 needs it.
            folders: the folder of each model in them; the attribute `given` afterwards.

        Raises:
            UserError: the data, a model or the file of their digests changed since the results were computed.
        """

        def check() -> None:
            self._inputs, file = values, self.path / inputs.FILE
            if self._has_results:
                inputs.check(self.path, values)
                self._records.check(inputs.FILE, f"restore that file from a copy, {START_OVER}")
            else:  # of a run that was stopped early, or of one with other data
                files.write_bytes(file, records.encode(values))
                self._records.add(inputs.FILE)

        multihost.run_on_process_0(check)
        self.given = dict(folders)

    def check_source(self, folder: Path) -> None:
        """Checks that a model that was read is still the one that the run began with, or that it wrote.

        Whatever a stage reads of a model is checked afterwards, before anything that depends on it is recorded.

        Raises:
            UserError: it changed.
        """
        multihost.run_on_process_0(lambda: self.verify_source(folder))

    def verify_source(self, folder: Path) -> None:
        """Does the work of `check_source`, in process 0 alone."""
        fields = [name for name, given in self.given.items() if given == folder]
        known = {name: inputs.without_provenance(self._records.model_digests(name)) for name in records.MODELS}
        known = {name: x for name, x in known.items() if x and storage.local_copy(self.path / name) == folder}
        known |= {name: records.mapping(self._inputs["models"]).get(name) for name in fields}
        for name, expected in known.items():
            if changed := records.changed_keys(expected, inputs.describe_model(folder)):
                raise UserError(
                    f"{folder}, {inputs.label(name) if name in fields else f'the model {name} of this run'}, changed "
                    f"during the run, in {listed(changed)}; copy the model elsewhere, and run again with another "
                    "--workdir."
                )

    def has(self, name: str) -> bool:
        """Whether this run wrote a file of this name, and the file is whole."""
        return multihost.run_on_process_0(lambda: self._records.has(name))

    def has_results(self, *names: str) -> bool:
        """Whether this run wrote files of these names, and they and all answers that they report are whole."""

        return multihost.run_on_process_0(lambda: self._records.has_results(*names))

    def is_complete(self, *names: str, without: tuple[str, ...] = ()) -> bool:
        """Whether this run wrote files of these names, and they and all else that it recorded are whole.

        Models and trainings whose folder was removed are not asked for, since a finished run does without them.

        Args:
            names: the files.
            without: what is not looked at, by the beginnings of its names.
        """
        replies = f"{JUDGE_FOLDER}/"  # they are in the answers, too

        def check() -> bool:
            return self._records.has_results(*names) and not self._records.damaged((*without, replies), REMOVABLE)

        return multihost.run_on_process_0(check)

    def check_logs(self) -> None:
        """Checks the metrics of the trainings that have ended: nothing computes them again.

        Raises:
            UserError: a file of metrics is missing or damaged.
        """
        multihost.run_on_process_0(lambda: check_logs(self.path, self._records))

    @property
    def identity(self) -> str:
        """The SHA-256 of the config, without its `FREE_FIELDS`, and of the digests of the inputs."""
        config = decisive_fields(json.loads(self.config.to_json()))
        values = multihost.run_on_process_0(lambda: self._inputs)
        return hashlib.sha256(records.encode([config, values])).hexdigest()

    @contextlib.contextmanager
    def training(self, *names: str) -> Iterator[Path]:
        """Context manager of the folder of a training, whose metrics are recorded when the training has ended."""
        folder = "/".join((TRAINING, *names))
        log = f"{folder}/{METRICS}"
        multihost.run_on_process_0(lambda: self._records.drop(log))
        yield self.path / folder
        multihost.run_on_process_0(lambda: self._records.add(log) if (self.path / log).exists() else None)

    def has_model(self, name: str) -> bool:
        """Whether this run wrote a model folder of this name, and the folder is whole."""
        return multihost.run_on_process_0(lambda: self._records.has_model(name))

    def add_record(self, *names: str) -> None:
        """Records the digests of files that were written into the folder, so that `has` knows them."""
        multihost.run_on_process_0(lambda: self._records.replace((), names))

    def replace_records(self, prefixes: tuple[str, ...], names: Callable[[], Iterable[str]]) -> None:
        """Records the digests of files in place of all whose name begins with a prefix; `names` runs on process 0."""
        multihost.run_on_process_0(lambda: self._records.replace(prefixes, names()))

    def borrow(self, lender: Path, names: Iterable[str]) -> None:
        """Copies those files of another run that this one does not have.

        Raises:
            UserError: the other run has other data, models or prompts, as far as both have them.
        """

        def copy() -> None:
            other = records.Records(lender)
            known = json_files.read_json(lender / inputs.FILE, remedy=records.AGAIN)
            # A run that fine-tuned its models does not read them as inputs.
            made = {"path": other.model_digests("vanilla"), "retain_only": other.model_digests("retain_only")}
            made = {field: inputs.without_provenance(digests) for field, digests in made.items() if digests}
            known["models"] = made | dict(records.mapping(known.get("models")))
            if changes := list(inputs.differences(*inputs.of_both(known, self._inputs))):
                raise UserError(
                    f"{lender}, whose answers {self.path} would reuse, was computed from other inputs: "
                    f"{listed(changes, '; ')}. Restore them, or {START_OVER}."
                )
            for name in names:
                if not self._records.has(name):
                    self._records.copy_from(other, name)

        multihost.run_on_process_0(copy)

    def model(self, name: str, make: Callable[[Path], Any] | None = None) -> Path:
        """The folder of a model on the local disk; if it does not exist, every process calls `make` to write it."""
        path = self.path / name
        if make and not self.has_model(name):
            folder = storage.local_copy(path)  # it may have a damaged model, or one that is no longer in the bucket
            multihost.run_on_process_0(lambda: shutil.rmtree(folder, ignore_errors=True))
            make(folder)
            multihost.run_on_process_0(lambda: storage.upload_model(path))
            multihost.run_on_process_0(lambda: self._records.add_model(name))
        return hub.fetch_model(path)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Times a stage; the seconds of interrupted runs add up."""
        logging.info("%s ...", name)
        start = time.perf_counter()
        try:
            with storage.write_errors(), progress_bar.stage(name):
                yield
        finally:
            seconds = time.perf_counter() - start
            self.timing[name] = round(self.timing.get(name, 0.0) + seconds, 3)
            if multihost.is_process_0():
                # A full disk is reported by the stage itself.
                with contextlib.suppress(OSError, UserError), storage.write_errors():
                    self._check_place()
                    files.write_bytes(self.path / "timing.json", records.encode(self.timing))
        logging.info("%s: %.1f s", name, seconds)

    def write(self, name: str, value: Any) -> Path:
        """Writes JSON atomically."""
        return self._write(name, lambda: records.encode(value))

    def write_text(self, name: str, text: str) -> Path:
        """Writes text atomically."""
        return self._write(name, text.encode)

    def write_lines(self, name: str, records: Iterable[Mapping]) -> Path:
        """Writes records atomically, one line of JSON each."""
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        return self._write(name, lambda: "".join(lines).encode())

    def _write(self, name: str, data: Callable[[], bytes]) -> Path:
        def write() -> None:
            self._check_place()
            files.write_bytes(self.path / name, data())
            self._records.add(name)

        multihost.run_on_process_0(write)
        return self.path / name

    def _check_place(self) -> None:
        """Raises a `UserError` if the folder was moved: its files would be divided between it and a new one."""
        if isinstance(self.path, Path) and not (self.path / CONFIG).exists():
            raise UserError(f"{self.path} was moved or deleted while the run wrote it; pass its new name as --workdir.")

    def read_lines(self, name: str) -> list[dict]:
        """Reads the records of `write_lines`."""
        remedy = "delete it and run the same command again"
        lines = json_files.read_json_lines(self.path / name, remedy=remedy, checked=False)
        return [record for _, record in lines]

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


def _check_packages() -> None:
    """Checks that Orbax can access buckets, before anything is computed."""
    try:
        import google.cloud.storage  # noqa: F401
    except ImportError:
        raise UserError("checkpoints in a bucket need another package: pip install google-cloud-storage.") from None


def check(path: str | Path, config: RunConfig) -> bool:
    """Checks that a run could write or resume a folder, as `exclusive` and `Workdir` do, and writes nothing.

    Args:
        path: the folder of the run.
        config: the config of the run.

    Returns:
        Whether the folder has results of this run, which it would resume.

    Raises:
        UserError: the folder is used by another process, has other files or another run, or cannot be written.
    """
    path = storage.resolve(path)
    parents = (path, *path.parents) if isinstance(path, Path) else ()
    missing = list(itertools.takewhile(lambda folder: not folder.exists(), parents))
    try:
        names = prepare_folder(path)
    finally:
        for folder in missing:
            with contextlib.suppress(OSError):
                folder.rmdir()
    if not missing:
        locks.check_free(path)
    _config_difference(path, json.loads(config.to_json()), names)
    return bool(names - PRE_RUN_FILES)


def check_logs(path: Path, written: records.Records) -> None:
    """Checks the metrics of the trainings of a run that have ended, unless the folder of all trainings was removed.

    Raises:
        UserError: a file of metrics is missing or damaged.
    """
    remedy = f"restore it from a copy, or remove {path / TRAINING} to go on without its losses"
    if (path / TRAINING).exists():
        for folder in (TRAINING, *(f"{TRAINING}/{name}" for name in SHARED_MODELS)):
            written.check(f"{folder}/{METRICS}", remedy)


def _config_difference(path: Path, resolved: dict, names: set[str]) -> str | None:
    """The first field that differs from the config in a folder, in words.

    Args:
        path: the folder.
        resolved: the config of the run.
        names: the files in the folder.

    Raises:
        UserError: the folder has results of another config, or its config is not the one that the run wrote.
    """
    if CONFIG not in names:
        return "new"
    remedy, has_results = f"restore that file from a copy, {START_OVER}", bool(names - PRE_RUN_FILES)
    try:
        saved = json_files.read_json(path / CONFIG, remedy=remedy)
    except UserError:
        if has_results:
            raise
        return "damaged"  # nothing depends on it
    old, new = decisive_fields(saved), decisive_fields(resolved)
    changed = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    difference = (
        f"{changed[0]}: {old.get(changed[0])!r} in the folder, {new.get(changed[0])!r} now" if changed else None
    )
    if difference and has_results:
        raise UserError(f"{path} has a run of another config ({difference}); {START_OVER}.")
    if has_results:  # the results do not belong to a config that was edited
        records.Records(path).check(CONFIG, remedy)
    return difference


def decisive_fields(value: Any, path: str = "") -> dict[str, Any]:
    """The fields of a config by path, without the `FREE_FIELDS`."""
    if path in FREE_FIELDS:
        return {}
    if not isinstance(value, dict):
        return {path: value}
    parts = (decisive_fields(value[key], f"{path}.{key}" if path else key) for key in sorted(value))
    return {name: x for part in parts for name, x in part.items()}
