"""Models and data sets by name: a folder of this machine or of a bucket, or an id on the Hugging Face hub."""

import concurrent.futures
import contextlib
import fnmatch
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence

from vkd_jax.types import UserError

# Weights as safetensors, and what says how to use them; never pickles, which can run code when read.
PATTERNS = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "*.tiktoken")
SHIPPED = pathlib.Path(__file__).parents[1] / "assets"  # models that come with the package
TEXTS = ("*.md", "LICENSE*", "NOTICE*")  # what an exported model has beside that
BUCKET = "gs://"  # what the name of a folder in Google Cloud Storage begins with
CACHE = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "vkd_jax"
LAST = "config.json"  # what every reader of a model folder looks for
STREAMS = 8  # files of a bucket under way at once
_ID = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:@(.+))?", re.ASCII)


def is_id(name: str) -> bool:
    """Whether that reads as an id on the hub, "org/name" or "org/name@revision"."""
    return bool(_ID.fullmatch(name))


def fetch(name: str | os.PathLike[str]) -> pathlib.Path:
    """The folder of a model.

    Args:
        name: a folder, also gs://BUCKET/FOLDER; a model that comes with the package, such as "tiny_llava"; or an id
            on the hub, "org/name" or "org/name@revision". A folder goes first. What is not on this machine is
            downloaded, unless it was before and is the same still.

    Returns:
        The folder itself, or its copy in a cache.

    Raises:
        UserError: there is neither; or the model cannot be reached, is not on the hub, or only for the admitted.
    """
    folder = place(name)
    if not isinstance(folder, pathlib.Path):
        return _downloaded(folder)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise UserError(f"{name} is a file; pass the model folder that it lies in.")
    if folder.name == os.fspath(name) and (SHIPPED / name).is_dir():
        return SHIPPED / name
    problem = f"There is no model folder {name}"
    if not is_id(os.fspath(name)):
        raise UserError(
            f"{problem}; pass one with config.json and safetensors in it, or an id on the Hugging Face hub, ORG/NAME."
        )
    repo, revision = _ID.fullmatch(os.fspath(name)).groups()
    # Subfolders are left out: they hold other formats of the same weights.
    found, reason = _download(repo, revision, "model", PATTERNS, ["*/*"], ("config.json", "*.safetensors"))
    if found is None:
        command = _command(repo, revision)
        raise UserError(
            f"{problem} here, and {reason}; get it with `{command}` where that works, and pass the folder, with "
            "config.json and safetensors in it, as --config.model.path=DIR."
        )
    return found


def fetch_dataset(name: str, configs: Sequence[str]) -> pathlib.Path:
    """The folder of a data set on the hub, <config>/*.parquet in it, with no more than the configs asked for.

    Args:
        name: "org/name" or "org/name@revision".
        configs: the folders of the data set that are wanted.

    Returns:
        The folder in the hub's cache; its name is the revision's.

    Raises:
        UserError: the data set cannot be reached, is not on the hub, only for the admitted, or lacks a config.
    """
    repo, revision = _ID.fullmatch(name).groups()
    patterns = [f"{config}/*.parquet" for config in configs]
    found, reason = _download(repo, revision, "dataset", patterns, None, patterns)
    if found is None:
        command = _command(repo, revision, "--repo-type dataset ")
        raise UserError(
            f"There is no data folder {name} here, and {reason}; get it with `{command}` where that works, and pass "
            "the folder as --config.data.source=DIR."
        )
    return found


def _command(repo: str, revision: str | None, kind: str = "") -> str:
    return f"hf download {repo} {kind}{f'--revision {revision} ' if revision else ''}--local-dir DIR"


def _download(
    repo: str, revision: str | None, kind: str, wanted: Sequence[str], unwanted: Sequence[str] | None, needed
) -> tuple[pathlib.Path | None, str]:
    """The folder in the hub's cache, complete and up to date if the hub can be reached; or None and why not.

    `wanted`, `unwanted` and `needed` are patterns of file names; each of the last must have a file.
    """
    import huggingface_hub
    from huggingface_hub import errors

    try:
        folder = pathlib.Path(
            huggingface_hub.snapshot_download(
                repo, repo_type=kind, revision=revision, allow_patterns=list(wanted), ignore_patterns=unwanted
            )
        )
    except errors.LocalEntryNotFoundError:
        state = "HF_HUB_OFFLINE is set" if huggingface_hub.is_offline_mode() else "the hub cannot be reached"
        return None, f"the hub's cache does not hold all of {repo} while {state}"
    except errors.GatedRepoError:
        return None, f"{repo} is open only to those who accepted its terms on the hub and ran `hf auth login`"
    except errors.RepositoryNotFoundError:
        what = {"model": "model", "dataset": "data set"}[kind]
        return None, f"the hub shows no {what} {repo} (private ones need `hf auth login`)"
    except errors.RevisionNotFoundError:
        return None, f"{repo} has no revision {revision} on the hub"
    except Exception as error:  # whatever the network, the disk or a proxy raises
        first = (str(error).strip().splitlines() or [""])[0]
        return None, f"{repo} could not be fetched from the hub ({type(error).__name__}: {first})"
    lacking = [pattern for pattern in needed if not any(folder.glob(pattern))]
    if lacking:
        return None, f"what the hub or its cache holds of {repo} lacks {' and '.join(lacking)}"
    return folder, ""


# ---- Buckets ----


def place(path: str | os.PathLike[str]) -> pathlib.Path:
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


def mirror(path: str | os.PathLike[str]) -> pathlib.Path:
    """Where a bucket's folder is kept on this machine's disk, for what reads disks alone; else the folder itself."""
    path = place(path)
    return path if isinstance(path, pathlib.Path) else CACHE / os.fspath(path).replace("://", "/")


def upload(folder: pathlib.Path) -> None:
    """Writes a model folder from its `mirror` to the bucket; one on a disk is where it belongs.

    A bucket has no folder that could be renamed when it is complete, so this one grows file by file, each of which
    comes whole or not at all. `LAST` comes last: a folder without it is none, and who finds it finds the rest.
    """
    source = mirror(folder)
    if source == folder:
        return

    def copy(name: str) -> None:
        type(folder)(source / name).copy(folder / name, overwrite=True)
        _date(source / name, folder / name)

    with bucket_errors():
        _each(copy, [file.name for file in source.iterdir() if file.name != LAST])
        copy(LAST)


def _downloaded(folder: pathlib.Path) -> pathlib.Path:
    """The `mirror` of a model folder in a bucket, of which only what changed is fetched."""
    target = mirror(folder)
    with bucket_errors(), _alone(target):
        there = {file.name: file for file in folder.iterdir()} if folder.is_dir() else {}
        if LAST not in there:
            raise UserError(f"There is no model folder {folder}; pass one with {LAST} and safetensors in it.")
        names = [name for name in there if any(fnmatch.fnmatch(name, pattern) for pattern in (*PATTERNS, *TEXTS))]
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

        copy(LAST)  # first: a folder with it is a model's, and may be written over
        _each(copy, [name for name in names if name != LAST])
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
