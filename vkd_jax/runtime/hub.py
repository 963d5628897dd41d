"""Models and data sets by name: a folder of this machine or of a bucket, or an id on the Hugging Face hub."""

import os
import pathlib
import re
from collections.abc import Sequence

from vkd_jax.runtime import storage
from vkd_jax.types import UserError

SHIPPED = pathlib.Path(__file__).parents[1] / "assets"  # models that come with the package
_ID = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:@(.+))?", re.ASCII)


def is_id(name: str) -> bool:
    """Whether that reads as an id on the hub, "org/name" or "org/name@revision"."""
    return bool(_ID.fullmatch(name))


def fetch_model(name: str | os.PathLike[str]) -> pathlib.Path:
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
    folder = storage.resolve(name)
    if not isinstance(folder, pathlib.Path):
        return storage.download_model(folder)
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
    found, reason = _download(repo, revision, "model", storage.MODEL_FILES, ["*/*"], ("config.json", "*.safetensors"))
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
