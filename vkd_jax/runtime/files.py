"""Atomic writes: a file or a folder is written beside its target, flushed to the disk and renamed.

Readers see either the old or the complete new content, even if the process is killed or the power fails.
Temporary names begin with a dot, end in `UNFINISHED` and are unique, so several processes may write the same target.
"""

import contextlib
import glob
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

UNFINISHED = ".tmp"  # the suffix of files and folders that are being written


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Context manager that yields a temporary path, which replaces `path` when the block ends without an error.

    Example:
        >>> with atomic_file(Path("table.csv")) as temporary:
        ...     temporary.write_text("a,b")
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        yield temporary
        _flush(temporary)
        os.replace(temporary, path)
        _flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Context manager that yields a new folder, which replaces `path` when the block ends without an error.

    Temporary folders of processes that were killed while they wrote `path` are removed first.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*{UNFINISHED}"):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary = _temporary(path)
    temporary.mkdir()
    try:
        yield temporary
        for entry in (*temporary.rglob("*"), temporary):
            _flush(entry)
        if path.exists():
            replaced = _temporary(path)
            os.replace(path, replaced)
            os.replace(temporary, path)
            shutil.rmtree(replaced)
        else:
            os.replace(temporary, path)
        _flush(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_bytes(path: Path, data: bytes) -> Path:
    """Writes a file atomically and returns its path; buckets write files atomically themselves."""
    if not isinstance(path, Path):
        path.write_bytes(data)
        return path
    with atomic_file(path) as temporary:
        temporary.write_bytes(data)
    return path


def copy(source: Path, target: Path) -> None:
    """Copies a file atomically."""
    with atomic_file(target) as temporary:
        shutil.copyfile(source, temporary)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}{UNFINISHED}")


def _flush(path: Path) -> None:
    """Flushes a file or the entries of a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
