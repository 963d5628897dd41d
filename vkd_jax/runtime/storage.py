"""Folders on a disk or in a bucket of Google Cloud Storage: the only module that knows how they are accessed.

Two libraries are behind it. `etils.epath` writes runs and models, since it has the methods of `pathlib.Path` and Orbax
uses it for checkpoints; it imports TensorFlow for gs://. `pyarrow.fs` reads data sets, since it streams ranges of
parquet files, and the data path must not load TensorFlow. One layer on fsspec could replace both.
"""

import concurrent.futures
import contextlib
import errno
import fnmatch
import hashlib
import os
import pathlib
import posixpath
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import pyarrow as pa
from pyarrow import fs

from vkd_jax.runtime import files
from vkd_jax.types import Missing, UserError

# Weights as safetensors, configuration and tokenizer; never pickles, which can run code when they are loaded.
MODEL_FILES = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "*.tiktoken")
TEXTS = ("*.md", "LICENSE*", "NOTICE*", "*.sig")  # further files of an exported model
CERTIFICATE = "certificate.json"  # of an exported model; it contains the digests of the others, so it is none of them
BUCKET = "gs://"  # the prefix of folders in Google Cloud Storage
CACHE = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "vkd_jax"
MODEL_MARKER = "config.json"  # every model folder has this file, and a bucket receives it last
GCS_TIMEOUT = 60  # seconds until a bucket that does not answer is given up; pyarrow's default is 15 minutes
STREAMS = 8  # concurrent transfers
SETTLED = 2.0  # seconds, more than the resolution of the times of any file system
_digests: dict[tuple[int, ...], str] = {}  # by `_state`, of the files that this process has read


def resolve(path: str | os.PathLike[str]) -> pathlib.Path:
    """Returns a path on a disk or, for gs://BUCKET/FOLDER, in a bucket. Both have the methods of `pathlib.Path`.

    A leading ~ is the home folder, since shells do not expand it within a flag such as --workdir=~/run.

    Raises:
        UserError: the name is empty, or the kind of URI is not supported.
    """
    name = os.fspath(path)
    if not name.strip():  # of an unset variable of a shell, which must not mean the current folder
        raise UserError("an empty name is given for a folder or a file; pass its path, or . for the current folder.")
    if "://" not in name:
        files.check_length(name)
        return pathlib.Path(os.path.expanduser(name))
    if not name.startswith(BUCKET) or not name.removeprefix(BUCKET).strip("/"):
        raise UserError(f"{name} is not supported: pass a folder on a disk, or {BUCKET}BUCKET/FOLDER.")
    from etils import epath

    return epath.Path(name)  # as in Orbax; the first access imports TensorFlow, which takes seconds


def local_copy(path: str | os.PathLike[str]) -> pathlib.Path:
    """The copy of a bucket's folder on the local disk, for code that reads disks only; else the folder itself."""
    path = resolve(path)
    return path if isinstance(path, pathlib.Path) else CACHE / os.fspath(path).replace("://", "/")


class SourceFolder:
    """A folder on a disk or in a bucket, for reading.

    Reads through `pyarrow.fs`: it streams ranges of parquet files and reads gs:// without TensorFlow. Files are named
    relative to the folder, and each is checked before it is opened: it is in the folder, and a regular file.

    Args:
        uri: a path, or a URI that pyarrow supports, such as gs://bucket/folder.
        links: whether symbolic links in the folder may lead out of it.
        flag: the flag that allows such links, for messages; "" if there is none.

    Raises:
        UserError: the kind of URI is not supported.
    """

    def __init__(self, uri: str, *, links: bool = False, flag: str = files.LINKS):
        scheme, separator, folder = uri.partition("://")
        folder = folder.partition("?")[0]  # options of the file system may have addresses
        self._scheme, self._links, self._flag = scheme + separator if separator else "", links, flag
        if not separator:
            self._system, self.path = fs.LocalFileSystem(), os.path.expanduser(uri).rstrip("/") or "/"
            return
        if scheme in ("gs", "gcs") and "retry_limit_seconds" not in uri:
            uri += f"{'&' if '?' in uri else '?'}retry_limit_seconds={GCS_TIMEOUT}"
        try:
            if not folder.strip("/"):
                raise ValueError("it does not name a folder")
            self._system, self.path = fs.FileSystem.from_uri(uri)
        except (pa.ArrowException, OSError, ValueError) as error:
            uri = self._scheme + folder
            raise UserError(f"{uri} cannot be read ({first_line(error)}); pass a folder or gs://...") from error
        self.path = self.path.rstrip("/")

    def display(self, name: str = "") -> str:
        """Formats the name of a file of this folder, or the folder itself, as a user would write it."""
        return self._scheme + (posixpath.join(self.path, name) if name else self.path)

    def files(self, folder: str = "") -> list[fs.FileInfo]:
        """Lists this folder or a subfolder, sorted by path; [] if it does not exist.

        Raises:
            UserError: the folder cannot be read.
        """
        return self._list(folder, recursive=False)

    def matching(self, patterns: Iterable[str]) -> list[str]:
        """Names of the files in this folder and its subfolders that match a pattern, as of `fnmatch`; sorted."""
        names = [self._name(info) for info in self._list("", recursive=True) if info.type == fs.FileType.File]
        return [name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]

    def state(self, names: Iterable[str]) -> list[tuple]:
        """Name, size and times of files; they differ if a file changed. Missing files have none.

        The times of a file on a disk are those of the last change of its content, which copies of old files keep, and
        of the last change of content or attributes, which no program can set back.
        """
        names = sorted(names)
        if isinstance(self._system, fs.LocalFileSystem):
            return [(name, *self._status(name)) for name in names]
        # One request for many files.
        infos = {self._name(info): info for info in self._list("", recursive=True)}
        missing = fs.FileInfo("missing", fs.FileType.NotFound)
        found = [infos.get(posixpath.normpath(name), missing) for name in names]
        return [(name, info.size, info.mtime_ns) for name, info in zip(names, found, strict=True)]

    def _status(self, name: str) -> tuple[int, ...]:
        files.check_length(name)
        try:
            status = os.stat(posixpath.join(self.path, name))
        except (OSError, ValueError):  # also for a name that is none, such as with a zero byte: reading it says so
            return ()
        return status.st_size, status.st_mtime_ns, status.st_ctime_ns

    def open(self, name: str) -> pa.NativeFile:
        """Opens a file of this folder for random access.

        Raises:
            UserError: the file is missing, outside of the folder, not a regular file, or may not be read.
        """
        return self._open(name, None)

    def read(self, name: str, most: int) -> bytes:
        """Reads a file of this folder of at most `most` bytes.

        Raises:
            UserError: as of `open`, or the file is too large.
        """
        with files.reading(self.display(name)), self._open(name, most) as file:
            return file.read()

    def _open(self, name: str, most: int | None) -> pa.NativeFile:
        with files.reading(self.display(name)):
            if isinstance(self._system, fs.LocalFileSystem):
                path = files.inside(pathlib.Path(self.path), name, links=self._links, flag=self._flag)
                files.check_regular(path, most)
            else:
                path = posixpath.join(self.path, posixpath.normpath(files.check_name(self.display(), name)))
                if most is not None:
                    files.check_size(self.display(name), self._system.get_file_info(path).size or 0, most)
            return self._system.open_input_file(os.fspath(path))

    def _list(self, folder: str, recursive: bool) -> list[fs.FileInfo]:
        path = posixpath.join(self.path, folder) if folder else self.path
        try:
            infos = self._system.get_file_info(fs.FileSelector(path, allow_not_found=True, recursive=recursive))
        except (pa.ArrowException, OSError) as error:
            name = self.display(folder)
            if isinstance(error, NotADirectoryError):
                raise UserError(f"{name} is a file; pass the folder that contains it.") from error
            raise UserError(f"{name} cannot be read ({first_line(error)}); check its name.") from error
        return sorted(infos, key=lambda info: info.path)

    def _name(self, info: fs.FileInfo) -> str:
        return posixpath.relpath(info.path, self.path)


class VersionedFile:
    """A small file that several processes write; a write fails if another process wrote the file since it was read.

    Google Cloud Storage compares the object's generation. On a disk, TensorStore compares inode and time of the file
    while it locks it, and renames a flushed file.

    Args:
        path: a file in an existing folder on a disk, or in a bucket.

    Raises:
        UserError: the path is a folder, a named pipe or a device.
    """

    def __init__(self, path: pathlib.Path):
        import tensorstore

        folder, _, self._key = os.fspath(path).rpartition("/")
        on_disk = isinstance(path, pathlib.Path)
        if on_disk and path.exists() and not path.is_file():  # opening a named pipe would never end
            kind = "a folder" if path.is_dir() else "not a regular file"
            raise UserError(f"{path} is {kind}, and a file belongs there; remove it and run the same command again.")
        # TensorStore refuses paths with "..".
        spec = {"driver": "file", "path": f"{path.parent.resolve()}/".replace("//", "/")} if on_disk else f"{folder}/"
        self._path = path
        with write_errors("folder", path):
            self._store = tensorstore.KvStore.open(spec).result()

    def read(self) -> tuple[bytes | None, bytes]:
        """Returns the content, None if there is no file, and its version."""
        with write_errors("folder", self._path):
            result = self._store.read(self._key).result()
        return (result.value if result.state == "value" else None), result.stamp.generation

    def write(self, data: bytes | None, version: bytes) -> bytes | None:
        """Writes the file, or deletes it if `data` is None.

        Returns:
            The new version; None, and the file stays as it is, if its version is not `version`.
        """
        with write_errors("folder", self._path):
            return self._store.write(self._key, data, if_equal=version).result().generation or None


def model_digests(folder: pathlib.Path) -> dict[str, str]:
    """SHA-256 of each file of a model folder on a disk, by name; these files are all that is read of a model.

    A file that this process has read before is read again only if it changed, see `file_digest`.
    """
    names = [file.name for file in folder.iterdir() if file.is_file() and _is_model_file(file.name)]
    digests: dict[str, str] = {}

    def read(name: str) -> None:
        digests[name] = file_digest(folder / name)

    _each(read, names)
    return dict(sorted(digests.items()))


def file_digest(path: pathlib.Path) -> str:
    """SHA-256 of a file on a disk; of one that this process has read before, the digest that it had then.

    A file has changed if its device, inode, size, or the time of its last change of content or attributes differ. The
    kernel sets the last one (ctime), and programs cannot set it back. A digest is kept only if these were the same
    before and after the file was read, and `SETTLED` seconds old: a later change has another time then, whatever the
    resolution of the clock. What changes without a write to the file, such as a bit on the disk, is found by another
    process only.
    """
    before, now = _state(path), time.time_ns()
    if (digest := _digests.get(before)) is not None:
        return digest
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if before == _state(path) and now - before[-1] > SETTLED * 10**9:
        _digests[before] = digest
    return digest


def _state(path: pathlib.Path) -> tuple[int, ...]:
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _is_model_file(name: str) -> bool:
    return name != CERTIFICATE and any(fnmatch.fnmatch(name, pattern) for pattern in MODEL_FILES)


def upload_model(folder: pathlib.Path, marker: str = MODEL_MARKER) -> None:
    """Uploads a model folder from its `local_copy` to the bucket; a no-op for a folder on a disk.

    A bucket has no folders that could be renamed, so the files are uploaded one by one, each atomically, and the file
    `marker` last: a folder that has it is complete.
    """
    source = local_copy(folder)
    if source == folder:
        return

    def copy(name: str) -> None:
        type(folder)(source / name).copy(folder / name, overwrite=True)
        _date(source / name, folder / name)

    with bucket_errors():
        _each(copy, [file.name for file in source.iterdir() if file.name != marker])
        copy(marker)


def download_model(folder: pathlib.Path) -> pathlib.Path:
    """Downloads the files of a model folder in a bucket that changed, and returns its `local_copy`.

    Raises:
        UserError: the folder is not a model folder, or the bucket cannot be read.
    """
    target = local_copy(folder)
    with bucket_errors(), locked(target):
        remote = {file.name: file for file in folder.iterdir()} if folder.is_dir() else {}
        if MODEL_MARKER not in remote:
            raise Missing(f"There is no model folder {folder}; pass one with {MODEL_MARKER} and safetensors in it.")
        names = [name for name in remote if any(fnmatch.fnmatch(name, pattern) for pattern in (*MODEL_FILES, *TEXTS))]
        target.mkdir(parents=True, exist_ok=True)
        for file in target.iterdir():
            if file.name not in names:  # of an earlier model, or of an interrupted download
                file.unlink()

        def copy(name: str) -> None:
            status, file = remote[name].stat(), target / name
            if file.exists() and (file.stat().st_size, int(file.stat().st_mtime)) == (status.length, status.mtime):
                return
            with files.atomic_file(file) as temporary:
                remote[name].copy(temporary, overwrite=True)
                _date(temporary, remote[name])

        copy(MODEL_MARKER)  # first: a folder that has it is a model folder, which may be overwritten
        _each(copy, [name for name in names if name != MODEL_MARKER])
    return target


@contextlib.contextmanager
def locked(target: pathlib.Path) -> Iterator[None]:
    """Lets only one process of this machine at a time fill a folder of the cache.

    Raises:
        UserError: the cache cannot be written.
    """
    import fcntl  # not available on Windows

    with write_errors("folder of caches as XDG_CACHE_HOME"):
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
        except FileNotFoundError as error:  # of a file system without folders, such as /proc
            raise PermissionError(errno.EACCES, error.strerror, os.fspath(target.parent)) from error
        with open(target.parent / f".{target.name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _date(copy: pathlib.Path, original: pathlib.Path) -> None:
    """Sets the modification time of a copy to that of its original; with the size, it identifies the original."""
    os.utime(copy, (original.stat().mtime,) * 2)


def _each(work: Callable[[str], None], names: Sequence[str]) -> None:
    """Runs `work` for several names at a time, since one connection does not use the whole bandwidth."""
    with concurrent.futures.ThreadPoolExecutor(STREAMS) as pool:
        list(pool.map(work, names))


@contextlib.contextmanager
def bucket_errors() -> Iterator[None]:
    """Turns TensorFlow's errors about a bucket into a `UserError`."""
    try:
        yield
    except Exception as error:  # not OSErrors, and TensorFlow must not be imported to name them
        if not type(error).__module__.startswith("tensorflow.") or _write_problem(error):
            raise
        reason = " ".join(str(error).split())
        raise UserError(
            f"the bucket cannot be used: {reason[:300]}; check its name, and that this machine may read and write it."
        ) from error


@contextlib.contextmanager
def write_errors(flag: str = "--workdir", place: os.PathLike[str] | None = None) -> Iterator[None]:
    """Turns a full disk, or a folder or bucket that cannot be written, into a `UserError`.

    Every command runs in such a block. Libraries raise errors of other types with the system's words in the message, or
    with the system's error as their cause.

    Args:
        flag: the flag that names the folder, for the message.
        place: what is written, for errors that do not name it.
    """
    try:
        with bucket_errors():
            yield
    except UserError:
        raise
    except Exception as error:
        if (problem := _write_problem(error, place)) is None:
            raise
        raise UserError(f"cannot write{problem}; free some space or pass another {flag}.") from error


_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_NOT_WRITABLE = (*_DISK_FULL, errno.EACCES, errno.EPERM, errno.EBUSY, errno.ENOTDIR, errno.EISDIR, errno.EEXIST)
_CODE_IN_TENSORSTORE = re.compile(r"os_error_code='(\d+)'")


def _write_problem(error: BaseException | None, place: os.PathLike[str] | None = None) -> str | None:
    """The location, if it is known, and the reason why something could not be written; None for other errors."""
    known = f" at {place}" if place else ""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _NOT_WRITABLE:
            file = error.filename2 or error.filename  # the second one is the target of a copy
            return f"{f' at {file}' if file else known}: {error.strerror}"
        if isinstance(error, FileNotFoundError) and error.filename:
            file = os.fsdecode(error.filename)
            if not os.path.isdir(os.path.dirname(file) or "."):
                return f" at {file}: its folder was moved or deleted while it was in use"
        if match := _CODE_IN_TENSORSTORE.search(str(error)):
            return f"{known}: {os.strerror(int(match[1]))}"
        for words in map(os.strerror, _DISK_FULL):
            if words in str(error):
                return f"{known}: {words}"
        error = error.__cause__
    return None


def first_line(error: Exception) -> str:
    """The first line of an error's message, or the name of its type if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
