"""Whether an output may be written where a user says: the one place that decides it, for all commands.

An output is written only if nothing else is lost or changed by it:

    model folders      nothing is written into one, at any depth: its certificate covers every file
    inputs             a file or a folder that the command reads, such as a key, is never an output
    existing files     only one that such a command wrote is replaced, by its first bytes
    existing folders   only one that is empty, or that such a command has used, by the names in it
"""

import fnmatch
import os
from collections.abc import Collection, Iterable
from pathlib import Path

from vkd_jax.messages import listed
from vkd_jax.runtime import files, hub, storage
from vkd_jax.types import UserError, located

PDF, JSON_OBJECT, JSON_LIST = (b"%PDF-",), (b"{",), (b"[",)  # how files begin that a command may replace


def check_file(path: os.PathLike[str], flag: str, begins: tuple[bytes, ...], inputs: Iterable[Path] = ()) -> Path:
    """Checks that a file may be written, before anything is computed; returns its path.

    Args:
        path: the file, which may exist.
        flag: the flag that names it, for messages.
        begins: how an existing file begins that may be replaced.
        inputs: files and folders that the command reads.

    Raises:
        UserError: the file is in a bucket, in a model folder or in an input, is an input, or exists and is something
            else than the command writes.
    """
    if not isinstance(path, Path):
        raise UserError(f"{flag}={path}: it is written to a file of this machine; pass another name.")
    _check_place(path, flag, inputs)
    if os.path.lexists(path):
        with located(f"{flag}={path}"), files.reading(path):
            files.check_regular(path, None)
            with path.open("rb") as stream:
                first = stream.read(max(map(len, begins)))
        if first and not first.startswith(begins):
            raise UserError(
                f"{flag}={path}: a file of another kind has that name, and would be lost; pass another name."
            )
    return path


def check_folder(
    path: os.PathLike[str],
    flag: str,
    marks: Collection[str] = ("*",),
    besides: Collection[str] = (),
) -> None:
    """Checks that a folder may be written to, before anything is computed; it need not exist.

    Args:
        path: the folder; of one in a bucket nothing is checked.
        flag: the flag that names it, for messages.
        marks: patterns of names, as of `fnmatch`, one of which a folder has that such a command has used.
        besides: names that do not count.

    Raises:
        UserError: the folder is in a model folder, is one itself, or has files of something else.
    """
    if not isinstance(path, Path):
        return
    _check_place(path, flag, ())
    names = sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []
    names = [name for name in names if not name.startswith(".") and name not in besides]
    if names and not any(fnmatch.fnmatch(name, mark) for name in names for mark in marks):
        raise UserError(f"{flag}={path}: it has other files ({listed(names)}); pass a new folder.")


def _check_place(path: Path, flag: str, inputs: Iterable[Path]) -> None:
    """Checks that a path is neither an input nor in one, nor in a model folder, also after links are resolved.

    Raises:
        UserError: it is.
    """
    try:
        targets = (path.parent.resolve() / path.name, path.resolve())
    except (OSError, RuntimeError) as error:  # a loop of links; a RuntimeError before Python 3.13
        raise UserError(f"{flag}={path}: it cannot be resolved ({error}); pass another name.") from error
    for given in inputs:
        if any(target.is_relative_to(given.resolve()) for target in targets) or _is_same(path, given):
            raise UserError(f"{flag}={path}: nothing is written to {given}, which is read; pass another name.")
    for target in targets:
        for folder in (target, *target.parents):
            if _is_model(folder):
                raise UserError(
                    f"{flag}={path}: nothing is written into the model folder {folder}, whose certificate covers every "
                    "file; pass another name."
                )


def _is_same(path: Path, other: Path) -> bool:
    """Whether two names are of one file, such as two hard links."""
    return path.exists() and other.exists() and os.path.samefile(path, other)


def _is_model(folder: Path) -> bool:
    """Whether a folder has a model or an adapter."""
    if not os.path.isfile(folder / storage.MODEL_MARKER):
        return os.path.isfile(folder / hub.ADAPTER_CONFIG)
    return any(folder.glob("*.safetensors"))
