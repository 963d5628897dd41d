"""Model folders by name: a folder of this machine, or an id on the Hugging Face hub."""

import os
import pathlib
import re

from vkd_jax.types import UserError

# Weights as safetensors, and what says how to use them; never pickles, which can run code when read.
PATTERNS = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "*.tiktoken")


def fetch(name: str | os.PathLike[str]) -> pathlib.Path:
    """The folder of a model.

    Args:
        name: a folder, or an id on the hub, "org/name" or "org/name@revision", which is downloaded unless it is in
            the hub's cache already; a folder of that name goes first.

    Returns:
        The folder itself, or the one in the hub's cache.

    Raises:
        UserError: there is neither; or the model cannot be reached, is not on the hub, or only for the admitted.
    """
    folder, parts = pathlib.Path(name), re.fullmatch(r"(\w[\w.-]*/\w[\w.-]*)(?:@(.+))?", os.fspath(name), re.ASCII)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise UserError(f"{name} is a file; pass the model folder that it lies in.")
    problem = f"There is no model folder {name}"
    if parts:
        folder, reason = _download(*parts.groups())
        if folder:
            return folder
        revision = f" --revision {parts[2]}" if parts[2] else ""
        raise UserError(
            f"{problem} here, and {reason}; get it with `hf download {parts[1]}{revision} --local-dir DIR` where that "
            "works, and pass the folder, with config.json and safetensors in it, as --config.model.path=DIR."
        )
    raise UserError(
        f"{problem}; pass one with config.json and safetensors in it, or an id on the Hugging Face hub, ORG/NAME."
    )


def _download(repo: str, revision: str | None) -> tuple[pathlib.Path | None, str]:
    """The folder in the hub's cache, complete and up to date if the hub can be reached; or None and why not."""
    import huggingface_hub
    from huggingface_hub import errors

    try:
        folder = pathlib.Path(
            huggingface_hub.snapshot_download(
                repo,
                revision=revision,
                allow_patterns=list(PATTERNS),
                ignore_patterns=["*/*"],  # subfolders: other formats of the same weights
            )
        )
    except errors.LocalEntryNotFoundError:
        state = "HF_HUB_OFFLINE is set" if huggingface_hub.is_offline_mode() else "the hub cannot be reached"
        return None, f"the hub's cache does not hold all of {repo} while {state}"
    except errors.GatedRepoError:
        return None, f"{repo} is open only to those who accepted its terms on the hub and ran `hf auth login`"
    except errors.RepositoryNotFoundError:
        return None, f"the hub shows no model {repo} (private ones need `hf auth login`)"
    except errors.RevisionNotFoundError:
        return None, f"{repo} has no revision {revision} on the hub"
    except Exception as error:  # whatever the network, the disk or a proxy raises
        first = (str(error).strip().splitlines() or [""])[0]
        return None, f"{repo} could not be fetched from the hub ({type(error).__name__}: {first})"
    lacking = [pattern for pattern in ("config.json", "*.safetensors") if not any(folder.glob(pattern))]
    if lacking:
        return None, f"what the hub or its cache holds of {repo} lacks {' and '.join(lacking)}"
    return folder, ""
