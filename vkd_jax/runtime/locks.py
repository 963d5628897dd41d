"""Locks of folders on a disk or in a bucket, so that two programs never write one folder at the same time.

A lock is a JSON file that names its owner: host, process, time and command. Its owner renews it once a minute. A lock
is stale if its owner ran on this host and has ended, or if it has not been renewed for `EXPIRES` seconds, which only
happens if another host or container was lost. A stale lock is taken over.
"""

import contextlib
import datetime
import json
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from absl import logging

from vkd_jax.runtime import storage
from vkd_jax.types import UserError

FILE = "lock.json"
RENEWS = 60  # seconds between two renewals
EXPIRES = 600  # seconds without a renewal after which the lock of another host is stale
FARTHEST_CLOCK = 86_400  # seconds that the clock of another host may be ahead

_held: dict[str, int] = {}  # how many blocks of this process hold each lock


@contextlib.contextmanager
def hold(folder: Any, command: str, file_name: str = "") -> Iterator[None]:
    """Context manager that holds the lock of a folder or of a file in it; blocks of one process may be nested.

    Args:
        folder: an existing folder on a disk, or a folder in a bucket.
        command: the command line of this process, for the message that others see.
        file_name: the file that is locked; "" for the whole folder.

    Raises:
        UserError: another process holds the lock.

    Example:
        >>> with hold(Path("run"), "python -m vkd_jax.main --workdir run"):
        ...     ...
    """
    path = folder / (f".{file_name}.lock" if file_name else FILE)
    name = os.fspath(path)
    if name in _held:
        _held[name] += 1
        try:
            yield
        finally:
            _held[name] -= 1
        return
    file = storage.VersionedFile(path)
    version, ended = _acquire(file, name, command, os.fspath(folder / file_name)), threading.Event()
    renewal = threading.Thread(target=_renew, args=(file, name, version, command, ended), daemon=True)
    renewal.start()
    _held[name] = 1
    try:
        yield
    finally:
        del _held[name]
        ended.set()
        renewal.join()
        _release(file)


def check_free(folder: Any) -> None:
    """Checks that no process holds the lock of a folder.

    Raises:
        UserError: another process holds the lock.
    """
    text, _ = storage.VersionedFile(folder / FILE).read()
    _check_ended(_parsed(text), text, os.fspath(folder))


def owner(command: str) -> dict[str, Any]:
    """The description of this process in a lock."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": process_start(os.getpid()),
        "namespace": _namespace(),
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "renewed": time.time(),
    }


def process_start(pid: int) -> str | None:
    """Identifies a running process of this host by its boot and start time; None if it has ended.

    A process with the same number that was started later has another start time.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None
    return None if fields[0] in "ZX" else f"{boot}/{fields[19]}"  # a zombie has ended


def is_stale(lock: Any) -> bool:
    """Whether the owner of a lock has ended; so has that of a lock that is damaged."""
    if not isinstance(lock, dict) or not isinstance(lock.get("pid"), int):
        return True
    if lock.get("host") == socket.gethostname() and not _is_of_another_container(lock):
        return (started := process_start(lock["pid"])) is None or started != lock.get("started")
    renewed, now = lock.get("renewed"), time.time()
    # Neither NaN nor a time that the clock of no other host can have.
    return not (isinstance(renewed, int | float) and now - EXPIRES <= renewed <= now + FARTHEST_CLOCK)


def _namespace() -> str | None:
    """Names the processes that this one can see; containers may share the name of a host, but not its processes."""
    with contextlib.suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return None


def _is_of_another_container(lock: Mapping[str, Any]) -> bool:
    """Whether the owner of a lock was started on this host since it was booted, where this process cannot see it."""
    boot = (process_start(os.getpid()) or "").partition("/")[0]
    same_boot = boot and str(lock.get("started")).startswith(f"{boot}/")
    return bool(same_boot) and lock.get("namespace") not in (None, _namespace())


def _acquire(file: storage.VersionedFile, name: str, command: str, locked: str) -> bytes:
    """Writes the lock of a file or a folder and returns its version."""
    while True:
        text, version = file.read()
        _check_ended(_parsed(text), text, locked)
        if text is not None:
            logging.warning("%s is the lock of a process that has ended; it is taken over", name)
        if (new := file.write(_encoded(command), version)) is not None:
            return new


def _check_ended(lock: Any, text: bytes | None, locked: str) -> None:
    """Raises a `UserError` if the owner of a lock, if there is one, still writes the file or folder."""
    if text is not None and not is_stale(lock):
        raise UserError(
            f"{locked} is used by process {lock['pid']} on {lock.get('host')} since {lock.get('date')} "
            f"({lock.get('command')}). Wait until it ends, or use another one."
        )


def _renew(file: storage.VersionedFile, name: str, version: bytes, command: str, ended: threading.Event) -> None:
    """Renews the lock until `ended` is set."""
    while not ended.wait(RENEWS):
        try:
            renewed = file.write(_encoded(command), version)
        except Exception as error:  # the disk or the network; the next attempt may succeed
            logging.warning("%s could not be renewed: %s", name, error)
            continue
        if renewed is None:
            logging.error("%s was taken over by another process, which may change the files of this run", name)
            return
        version = renewed


def _release(file: storage.VersionedFile) -> None:
    """Deletes the lock if it is still that of this process."""
    with contextlib.suppress(UserError, OSError, ValueError):  # a lock that remains is stale when this process ends
        text, version = file.read()
        lock = _parsed(text)
        if isinstance(lock, dict) and (lock.get("host"), lock.get("pid")) == (socket.gethostname(), os.getpid()):
            file.write(None, version)


def _encoded(command: str) -> bytes:
    return (json.dumps(owner(command), indent=1) + "\n").encode()


def _parsed(text: bytes | None) -> Any:
    try:
        return json.loads(text or b"null")
    except (ValueError, RecursionError):
        return None
