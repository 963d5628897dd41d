"""Faults at points of a run that depend on nothing but the program: a signal, or a disk that is full from there on.

`install` wraps functions of the package in a fork of `fork_server`; the package has no hooks of its own. A point is a
call of a function, or the moment before or after a file or folder is renamed to its final name.
"""

import contextlib
import dataclasses
import functools
import importlib
import json
import os
import resource
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

RENAME = "os:replace"  # how the package completes every file and folder
WORKDIR = "run"  # the folder of the run, in the folder that the command runs in
POINTS, SNAPSHOTS = "points.json", "snapshots"  # what `record` writes


@dataclasses.dataclass(frozen=True)
class Point:
    """A moment of a run.

    Attributes:
        function: "module:name" or "module:Class.name".
        stage: only calls in a stage of this name count; "" counts all.
        argument: only calls with this positional argument count; for `RENAME` the target, relative to `WORKDIR`.
        call: the number of the call, from 1.
        after: whether the moment is after the call, not before it.
    """

    function: str
    stage: str = ""
    argument: int | str | None = None
    call: int = 1
    after: bool = False


def install(points: dict[str, dict[str, Any]], act: str, *values: str) -> None:
    """Wraps the functions of all points, given as fields of `Point` by name; `act` is a key of `ACTS`."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts programs in the background without it
    _follow_stages()
    for name, fields in points.items():
        _wrap(Point(**fields), functools.partial(ACTS[act], name, *values))


def _wrap(point: Point, act: Callable[[], None]) -> None:
    module, _, path = point.function.partition(":")
    owner = importlib.import_module(module)
    *outer, attribute = path.split(".")
    for name in outer:
        owner = getattr(owner, name)
    call, calls = getattr(owner, attribute), []

    def matches(args: tuple) -> bool:
        if point.stage and point.stage not in _stages:
            return False
        if point.function == RENAME:
            return os.path.relpath(args[1], WORKDIR) == point.argument
        return point.argument is None or point.argument in args

    @functools.wraps(call)
    def wrapped(*args: Any, **options: Any) -> Any:
        if matches(args):
            calls.append(args)
        is_now = matches(args) and len(calls) == point.call
        if is_now and not point.after:
            act()
        result = call(*args, **options)
        if is_now and point.after:
            act()
        return result

    setattr(owner, attribute, wrapped)


def _signal(number: int, name: str) -> None:
    """Sends this process a signal; in the main thread it has been handled when this returns."""
    del name
    if threading.current_thread() is threading.main_thread() and number != signal.SIGKILL:
        signal.raise_signal(number)
    else:
        os.kill(os.getpid(), number)


def _fill(name: str, filler: str) -> None:
    """Fills the file system of the working directory."""
    del name
    block = bytes(1 << 12)
    with open(filler, "ab", buffering=0) as file:
        try:
            while True:
                file.write(block)
        except OSError:
            pass


def _limit(name: str) -> None:
    """Lets no file grow any more: every write of this process fails, also those of libraries in C++."""
    del name
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))


def _record(name: str) -> None:
    """Notes which of the folders that `take_snapshots` copied a run is in at a point."""
    file = Path(POINTS)
    noted = json.loads(file.read_text()) if file.exists() else {}
    noted[name] = len(list(Path(SNAPSHOTS).iterdir())) - 1
    file.write_text(json.dumps(noted))


_stages: list[str] = []  # the stages that a run is in


def _follow_stages() -> None:
    """Keeps `_stages`."""
    from vkd_jax.runs.workdir import Workdir

    stage = Workdir.stage

    @contextlib.contextmanager
    def followed(workdir: Workdir, name: str) -> Iterator[None]:
        with stage(workdir, name):
            _stages.append(name)
            try:
                yield
            finally:
                _stages.pop()

    Workdir.stage = followed


def take_snapshots() -> None:
    """Copies the folder of a run at the beginning of each stage, when no thread writes; the first copy is empty."""
    from vkd_jax.runs.workdir import Workdir

    stage = Workdir.stage

    @functools.wraps(stage)
    def copied(workdir: Workdir, name: str) -> Any:
        target = Path(SNAPSHOTS) / str(len(list(Path(SNAPSHOTS).iterdir())))
        shutil.copytree(workdir.path, target, ignore=shutil.ignore_patterns("lock.json*", "*.lock", ".*.tmp"))
        return stage(workdir, name)

    (Path(SNAPSHOTS) / "0").mkdir(parents=True)
    Workdir.stage = copied


def record(points: dict[str, dict[str, Any]]) -> None:
    """Takes snapshots, and notes the snapshot of each point."""
    take_snapshots()
    install(points, "record")


ACTS: dict[str, Callable[..., None]] = {
    "SIGKILL": functools.partial(_signal, signal.SIGKILL),
    "SIGTERM": functools.partial(_signal, signal.SIGTERM),
    "SIGINT": functools.partial(_signal, signal.SIGINT),
    "full": _fill,
    "limit": _limit,
    "record": _record,
}
