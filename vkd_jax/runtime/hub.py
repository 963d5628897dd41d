"""Models and data sets by name: a local folder, a folder in a bucket, or an id on the Hugging Face hub."""

import os
import pathlib
import re
from collections.abc import Sequence

from vkd_jax import messages
from vkd_jax.runtime import storage
from vkd_jax.types import Missing, UserError

SHIPPED = pathlib.Path(__file__).parents[1] / "assets"  # models that are part of the package
ADAPTER_CONFIG = "adapter_config.json"
SECONDS = 30.0  # in which the hub has to answer a question about a repository
_ID = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:@(.+))?", re.ASCII)


def is_id(name: str) -> bool:
    """Whether a name has the form of an id on the hub, "org/name" or "org/name@revision"."""
    return bool(_ID.fullmatch(name))


def fetch_model(name: str | os.PathLike[str]) -> pathlib.Path:
    """Returns the folder of a model, after downloading it if necessary.

    Args:
        name: a local folder; gs://BUCKET/FOLDER; a model of the package, such as "tiny_llava"; or an id on the hub,
            "org/name" or "org/name@revision". A local folder takes precedence.

    Returns:
        The folder itself, or its up-to-date copy in a cache. It may be an adapter, which `checkpoints.sources` merges.

    Raises:
        UserError: the model does not exist, cannot be downloaded, or is gated.

    Example:
        >>> folder = fetch_model("tiny_llava")
    """
    folder = storage.resolve(name)
    if not isinstance(folder, pathlib.Path):
        return storage.download_model(folder)
    if folder.is_dir():
        return folder
    if folder.exists() and folder.suffix.lower() == ".gguf":
        raise UserError(f"{name} is a GGUF file, which is not read; pass the model folder that it was made from.")
    if folder.exists():
        raise UserError(f"{name} is a file; pass the model folder that contains it.")
    if folder.name == os.fspath(name) and (SHIPPED / name).is_dir():
        return SHIPPED / name
    problem = f"There is no model folder {name}"
    if not is_id(os.fspath(name)):
        raise Missing(
            f"{problem}; pass one with config.json and safetensors in it, or an id on the Hugging Face hub, ORG/NAME."
        )
    repo, revision = _ID.fullmatch(os.fspath(name)).groups()
    # Subfolders are skipped: they have other formats of the same weights.
    patterns = (*storage.MODEL_FILES, *storage.TEXTS)  # a certificate has the digests of all of them
    folder, reason = _download(repo, revision, "model", patterns, ["*/*"], ("config.json", "*.safetensors"))
    if folder is None:
        command = _command(repo, revision)
        raise Missing(
            f"{problem} here, and {reason}; get it with `{command}` where that works, and pass the folder, with "
            "config.json and safetensors in it, in its place."
        )
    return folder


def is_adapter(folder: pathlib.Path) -> bool:
    """Whether a folder is a PEFT adapter, which needs a base model."""
    return (folder / ADAPTER_CONFIG).is_file() and not (folder / storage.MODEL_MARKER).is_file()


def check_not_adapter(folder: pathlib.Path) -> None:
    """Checks that a folder is not a PEFT adapter, and has none beside its weights.

    Raises:
        UserError: the folder has an adapter. transformers would apply one that is beside full weights.
    """
    weights = [file.name for file in sorted(folder.glob("adapter_model*")) if file.suffix in (".safetensors", ".bin")]
    is_model = (folder / storage.MODEL_MARKER).is_file()
    if not weights and (is_model or not (folder / ADAPTER_CONFIG).is_file()):
        return
    merge = "merge it into its base model with merge_and_unload() of peft, save that model, and pass its folder"
    if is_model:
        raise UserError(f"{folder} has a PEFT adapter ({weights[0]}) beside its weights; {merge}, or remove it.")
    raise UserError(
        f"{folder} is a PEFT adapter, not a model; --config.model.path and vkd_jax.load merge it into its base, where "
        "its adapter_config.json and its base are complete."
    )


def fetch_dataset(
    name: str, required: Sequence[str], optional: Sequence[str] = (), *, field: str = "data.source=DIR"
) -> pathlib.Path:
    """Downloads files of a data set on the hub.

    Args:
        name: "org/name" or "org/name@revision".
        required: patterns of files to download, such as "forget10/*.parquet"; each must match one.
        optional: patterns of files that are downloaded if there are any.
        field: the field of the config that gives the folder, for messages.

    Returns:
        The folder in the hub's cache, with these files in it; its name is that of the revision.

    Raises:
        UserError: the data set does not exist, cannot be downloaded, is gated, or lacks a required file.
    """
    repo, revision = _ID.fullmatch(name).groups()
    folder, reason = _download(repo, revision, "dataset", [*required, *optional], None, required)
    if folder is None:
        command = _command(repo, revision, "--repo-type dataset ")
        raise Missing(
            f"There is no data folder {name} here, and {reason}; get it with `{command}` where that works, and pass "
            f"the folder as --config.{field}."
        )
    return folder


def _is_silent(repo: str, revision: str | None, kind: str) -> bool:
    """Whether the hub accepts a question and does not answer it, for which `snapshot_download` would wait forever."""
    import huggingface_hub

    try:
        huggingface_hub.HfApi().repo_info(repo, repo_type=kind, revision=revision, timeout=SECONDS)
    except Exception as error:  # of one of several libraries for HTTP; the download says what else is wrong
        return "Timeout" in type(error).__name__
    return False


def _command(repo: str, revision: str | None, kind: str = "") -> str:
    return f"hf download {repo} {kind}{f'--revision {revision} ' if revision else ''}--local-dir DIR"


def _download(
    repo: str, revision: str | None, kind: str, allowed: Sequence[str], ignored: Sequence[str] | None, required
) -> tuple[pathlib.Path | None, str]:
    """Downloads a snapshot into the hub's cache; returns its folder and "", or None and a reason.

    `allowed`, `ignored` and `required` are patterns of file names; each pattern in `required` must match a file.
    """
    import huggingface_hub
    from huggingface_hub import errors

    silent = not huggingface_hub.is_offline_mode() and _is_silent(repo, revision, kind)
    try:
        folder = pathlib.Path(
            huggingface_hub.snapshot_download(
                repo,
                repo_type=kind,
                revision=revision,
                allow_patterns=list(allowed),
                ignore_patterns=ignored,
                local_files_only=silent,
            )
        )
    except errors.LocalEntryNotFoundError:
        state = "HF_HUB_OFFLINE is set" if huggingface_hub.is_offline_mode() else "the hub cannot be reached"
        state = f"the hub did not answer in {SECONDS:.0f} s" if silent else state
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
    if kind == "model" and is_adapter(folder):
        return folder, ""
    if kind == "model":
        check_not_adapter(folder)
    missing = [pattern for pattern in required if not any(folder.glob(pattern))]
    if missing:
        return None, f"what the hub or its cache holds of {repo} lacks {messages.listed(missing, ' and ')}"
    return folder, ""
