"""Folders on a disk or in a bucket of Google Cloud Storage: one way to name, read and write both."""

import concurrent.futures
import contextlib
import fnmatch
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence

from vkd_jax.types import UserError

# Weights as safetensors, and what says how to use them; never pickles, which can run code when read.
MODEL_FILES = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "*.tiktoken")
TEXTS = ("*.md", "LICENSE*", "NOTICE*")  # what an exported model has beside that
BUCKET = "gs://"  # what the name of a folder in Google Cloud Storage begins with
CACHE = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "vkd_jax"
MODEL_MARKER = "config.json"  # what every reader of a model folder looks for
STREAMS = 8  # files of a bucket under way at once


def resolve(path: str | os.PathLike[str]) -> pathlib.Path:
    """A path on a disk or, as gs://BUCKET/FOLDER, in a bucket; one has the methods of the other.

    Raises:
        UserError: it is of another kind of place.
    """
    name = os.fspath(path)
    if "://" not in name:
        return pathlib.Path(name)
    if not name.startswith(BUCKET) or not name.removeprefix(BUCKET).strip("/"):
        raise UserError(f"{name} is no place that is known: pass a folder on a disk, or {BUCKET}BUCKET/FOLDER.")
    from etils import epath

    return epath.Path(name)  # as in Orbax; at the first look into the bucket it imports TensorFlow, which takes seconds


def local_copy(path: str | os.PathLike[str]) -> pathlib.Path:
    """Where a bucket's folder is kept on this machine's disk, for what reads disks alone; else the folder itself."""
    path = resolve(path)
    return path if isinstance(path, pathlib.Path) else CACHE / os.fspath(path).replace("://", "/")


def upload_model(folder: pathlib.Path) -> None:
    """Writes a model folder from its `local_copy` to the bucket; one on a disk is where it belongs.

    A bucket has no folder that could be renamed when it is complete, so this one grows file by file, each of which
    comes whole or not at all. `MODEL_MARKER` comes last: a folder without it is none, and who finds it finds the rest.
    """
    source = local_copy(folder)
    if source == folder:
        return

    def copy(name: str) -> None:
        type(folder)(source / name).copy(folder / name, overwrite=True)
        _date(source / name, folder / name)

    with bucket_errors():
        _each(copy, [file.name for file in source.iterdir() if file.name != MODEL_MARKER])
        copy(MODEL_MARKER)


def download_model(folder: pathlib.Path) -> pathlib.Path:
    """The `local_copy` of a model folder in a bucket, of which only what changed is fetched."""
    target = local_copy(folder)
    with bucket_errors(), _alone(target):
        there = {file.name: file for file in folder.iterdir()} if folder.is_dir() else {}
        if MODEL_MARKER not in there:
            raise UserError(f"There is no model folder {folder}; pass one with {MODEL_MARKER} and safetensors in it.")
        names = [name for name in there if any(fnmatch.fnmatch(name, pattern) for pattern in (*MODEL_FILES, *TEXTS))]
        target.mkdir(parents=True, exist_ok=True)
        for file in target.iterdir():
            if file.name not in names:  # of an earlier model, or the part of a file that was broken off
                file.unlink()

        def copy(name: str) -> None:
            about, file = there[name].stat(), target / name
            if file.exists() and (file.stat().st_size, int(file.stat().st_mtime)) == (about.length, about.mtime):
                return
            there[name].copy(new := target / f".{name}.tmp", overwrite=True)
            _date(new, there[name])
            os.replace(new, file)

        copy(MODEL_MARKER)  # first: a folder with it is a model's, and may be written over
        _each(copy, [name for name in names if name != MODEL_MARKER])
    return target


@contextlib.contextmanager
def _alone(target: pathlib.Path) -> Iterator[None]:
    """Lets one process of this machine after the other fill a folder; who comes later finds what the first one made."""
    import fcntl  # not on Windows, from where nobody reads buckets

    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.parent / f".{target.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _date(copy: pathlib.Path, original: pathlib.Path) -> None:
    """Gives a copy the time of what it is a copy of: with its size, what tells it from a copy of something else."""
    os.utime(copy, (original.stat().mtime,) * 2)


def _each(work: Callable[[str], None], names: Sequence[str]) -> None:
    """Several at a time: one connection does not fill the line."""
    with concurrent.futures.ThreadPoolExecutor(STREAMS) as pool:
        list(pool.map(work, names))


@contextlib.contextmanager
def bucket_errors() -> Iterator[None]:
    """Turns what TensorFlow says of a bucket that it cannot read or write into a `UserError`."""
    try:
        yield
    except Exception as error:  # TensorFlow's own are no OSErrors, and cannot be named before it is imported
        if not type(error).__module__.startswith("tensorflow."):
            raise
        reason = " ".join(str(error).split())
        raise UserError(
            f"the bucket cannot be used: {reason[:300]}; check its name, and that this machine may read and write it."
        ) from error
