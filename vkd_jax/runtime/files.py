"""Files: atomic writes, and reads of files that others wrote.

A file or a folder is written beside its target, flushed to the disk and renamed. Readers see either the old or the
complete new content, even if the process is killed or the power fails. Temporary names begin with a dot, end in
`UNFINISHED` and are unique, so several processes may write the same target.

Files that data names are found by `inside`, and files that others wrote are read by `read_bytes`.
"""

import contextlib
import glob
import os
import shutil
import stat
import unicodedata
import uuid
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from vkd_jax.types import UserError

LONGEST_NAME, LONGEST_PATH = 255, 4095  # bytes that Linux takes
LINKS = "--config.data.symlinks=True"  # the flag of runs that allows links out of the folders of the data
UNFINISHED = ".tmp"  # the suffix of files and folders that are being written


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Context manager that yields a temporary path, which replaces `path` when the block ends without an error.

    Example:
        >>> with atomic_file(Path("table.csv")) as temporary:
        ...     temporary.write_text("a,b")

    Raises:
        UserError: something else than a regular file is in its place, such as a device, which must not be replaced.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        check_regular(path, None)
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
        if os.path.lexists(path):
            replaced = _temporary(path)
            os.replace(path, replaced)
            os.replace(temporary, path)
            remove(replaced)
        else:
            os.replace(temporary, path)
        _flush(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove(path: Path) -> None:
    """Removes a file, a folder with its content, or a link but not what it points to.

    Raises:
        OSError: it cannot be removed; the error names `path`, not the entry of the folder that stays.
    """
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def remove_unfinished(folder: Path, *, recursive: bool = False) -> None:
    """Removes what processes that were killed while they wrote a file or a folder in `folder` left behind.

    No other process may be writing there, so the caller holds a lock.

    Args:
        folder: the folder; those in buckets have nothing unfinished.
        recursive: whether to look into its subfolders as well.
    """
    if not isinstance(folder, Path):
        return
    pattern = f".*.{'[0-9a-f]' * 32}{UNFINISHED}"
    for leftover in list(folder.rglob(pattern) if recursive else folder.glob(pattern)):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


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


def inside(folder: Path, name: str, *, links: bool = False, flag: str = LINKS) -> Path:
    """The file that data names, which must be in a folder.

    Args:
        folder: the folder of the data.
        name: the name of the file, relative to the folder.
        links: whether symbolic links in the folder may lead out of it.
        flag: the flag that allows such links, for messages; "" if there is none.

    Returns:
        The path of the file within the folder; the file may be missing.

    Raises:
        UserError: the name is no file name, leads out of the folder, or follows a link out of it.

    Example:
        >>> inside(Path("request/forget"), "otto/1.jpg")
        PosixPath('request/forget/otto/1.jpg')
    """
    path = folder / check_name(os.fspath(folder), name)
    try:
        if not links and not path.resolve().is_relative_to(_root(folder)):
            allow = f", or allow links out of it with {flag}" if flag else ""
            raise UserError(f"{name!r} is a symbolic link out of {folder}; copy the file into the folder{allow}.")
    except (OSError, RuntimeError) as error:  # a loop of links; a RuntimeError before Python 3.13
        raise UserError(f"{name!r} in {folder} cannot be resolved ({error}); name a file in the folder.") from error
    return path


def check_no_links(folder: Path, remedy: str) -> None:
    """Checks that no entry of a folder, at any depth, is a symbolic link, which leads to other folders.

    The folder itself may be one.

    Args:
        folder: the folder.
        remedy: what to do about a link, for messages.

    Raises:
        UserError: there is a link.
    """
    for parent, folders, names in os.walk(folder):  # which follows no link
        for entry in (Path(parent, name) for name in sorted((*folders, *names))):
            if entry.is_symlink():
                target = os.readlink(entry)
                raise UserError(f"{entry} is a link to {target}, where nothing may be written or deleted; {remedy}.")


def check_name(folder: str, name: str) -> str:
    """Checks by its text alone that a name stays within a folder, on a disk or in a bucket; returns the name.

    Raises:
        UserError: the name is no file name, or leads out of the folder.
    """
    if not name.strip() or "\0" in name or not _encodable(name):
        raise UserError(f"{name!a} is not a file name; name a file in {folder}.")
    check_length(name)
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise UserError(f"{name!r} leads out of {folder}; move the file into the folder and name it relative to it.")
    return name


def check_length(path: str) -> None:
    """Checks that a path is one that the operating system takes, before it raises an error of its own.

    Raises:
        UserError: the path, or a name in it, is too long.
    """
    longest = max(path.split("/"), key=len)
    for text, most in ((longest, LONGEST_NAME), (path, LONGEST_PATH)):
        if (size := len(text.encode("utf-8", "surrogatepass"))) > most:
            raise UserError(f"{text[:40]!a}... is too long for a file name: {size:,} bytes, and {most:,} are allowed.")


def read_bytes(path: os.PathLike[str], most: int) -> bytes:
    """Reads a regular file that others wrote, of at most `most` bytes; devices, pipes and folders are never opened.

    Args:
        path: a file on a disk or in a bucket.
        most: the largest size that is read.

    Raises:
        UserError: the file is missing, is not a regular file, is too large, or may not be read.
    """
    with reading(path):
        if isinstance(path, Path):  # in a bucket all files are regular
            check_regular(path, most)
        return path.read_bytes()


def read_text(path: os.PathLike[str], most: int) -> str:
    """Reads a text in UTF-8, with or without a byte order mark; see `read_bytes`.

    Raises:
        UserError: as of `read_bytes`, or the file is not UTF-8.
    """
    return decode(read_bytes(path, most), os.fspath(path))


def decode(data: bytes, name: str, remedy: str = "correct it or get it again") -> str:
    """The text of UTF-8, with or without a byte order mark.

    Args:
        data: the bytes.
        name: the file, for messages.
        remedy: what to do about a damaged file, for messages.

    Raises:
        UserError: the bytes are not UTF-8.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = f"byte {error.start} is 0x{data[error.start]:02x}"
        raise UserError(f"{name}: it is not UTF-8: {byte}; {remedy}.") from error


def check_regular(path: Path, most: int | None) -> None:
    """Checks before a file is opened that reading it will end.

    Raises:
        UserError: it is not a regular file, or larger than `most` bytes (None: of any size).
        OSError: it is missing, or may not be looked at.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        kind = next(name for is_kind, name in _KINDS.items() if is_kind(status.st_mode))
        raise UserError(f"{path} is {kind}; pass a regular file.")
    check_size(os.fspath(path), status.st_size, most)


def check_size(name: str, size: int, most: int | None) -> None:
    """Checks the size of a file, in bytes, before it is read.

    Raises:
        UserError: it is larger than `most` bytes (None: of any size).
    """
    if most is not None and size > most:
        raise UserError(f"{name} has {size / 2**20:,.1f} MiB, and at most {most / 2**20:,.0f} MiB are read.")


LFS_POINTER = b"version https://git-lfs.github.com/spec/"  # the beginning of what a clone without Git LFS has as files


@contextlib.contextmanager
def reading(path: os.PathLike[str]) -> Iterator[None]:
    """Turns a file that is missing or may not be read into a `UserError`."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as error:
        if os.path.islink(path):
            raise UserError(
                f"{path} is a link to {os.readlink(path)}, which is gone: get what it belongs to again, or make a new "
                "link."
            ) from error
        raise UserError(f"There is no file {path}{_similar_name(path)}.") from error
    except PermissionError as error:
        raise UserError(f"{path} may not be read (permission denied); change its permissions.") from error
    except OSError as error:
        reason = " ".join(str(error.strerror or error).split())
        raise UserError(f"{path} cannot be read ({reason[:200]}).") from error


def _similar_name(path: os.PathLike[str]) -> str:
    """Says that a folder has a file whose name looks the same, as after unpacking an archive of another system."""
    with contextlib.suppress(OSError):
        wanted = unicodedata.normalize("NFC", os.path.basename(path))
        for name in os.listdir(os.path.dirname(path) or "."):
            if name != os.path.basename(path) and unicodedata.normalize("NFC", name) == wanted:
                return f", but one of the same letters in another Unicode form, {name!a}; rename it"
    return ""


_KINDS = {
    stat.S_ISDIR: "a folder",
    stat.S_ISFIFO: "a named pipe",
    stat.S_ISSOCK: "a socket",
    stat.S_ISCHR: "a device",
    stat.S_ISBLK: "a device",
    (lambda mode: True): "a special file",
}


def _root(folder: Path) -> Path:
    """The folder that links may not leave: in the hub's cache, the files of a snapshot are links to blobs beside it."""
    folder = folder.resolve()
    is_snapshot = folder.parent.name == "snapshots" and (folder.parents[1] / "blobs").is_dir()
    return folder.parents[1] if is_snapshot else folder


def _encodable(name: str) -> bool:
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return False
    return True


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}{UNFINISHED}")


def _flush(path: Path) -> None:
    """Flushes a file or the entries of a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
