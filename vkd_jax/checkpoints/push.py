"""Uploads an unlearned model to the Hugging Face Hub, with its model card and its certificate.

vkd push /tmp/vkd-tiny ORG/NAME --private

The first argument is the folder of a finished run, or of a model that a run exported. Before anything is uploaded, the
model is checked against its certificate, and refused if its folder has any other file, or if the certificate disagrees
with the model card, its own config or its run. The certified files are uploaded with the certificate and its signature.
A certificate that nobody signed is named. Log in with `hf auth login` first, or set HF_TOKEN.

Exit status: 0 on success, 2 on bad input, which includes a model that is not the certified one.
"""

import sys
from pathlib import Path

from vkd_jax.checkpoints import certificate
from vkd_jax.config import command_line
from vkd_jax.messages import listed
from vkd_jax.runtime import commands, hub, storage
from vkd_jax.types import UserError

CARD = "README.md"


def push(workdir: str | Path, repo: str, private: bool = False) -> str:
    """Uploads the exported model of a run as one commit.

    Args:
        workdir: folder of a finished run, or of its exported model.
        repo: id of the model on the hub, "org/name"; it is created if it does not exist.
        private: whether only its owners may see it.

    Returns:
        The address of the commit.

    Raises:
        UserError: the folder has no finished export, the model is not the certified one, the model on the hub is public
            although `private` is asked for, or the hub cannot be reached or refuses.
    """
    if storage.BUCKET in str(workdir):
        raise UserError(f"{workdir} is in a bucket: download its folder {certificate.UNLEARNED}, and give that.")
    folder = _export(storage.resolve(workdir))
    if not hub.is_id(repo) or "@" in repo:
        raise UserError(f"{repo!r:.100} is no id on the Hugging Face Hub; give ORG/NAME.")
    if differences := list(certificate.differences(folder)):
        raise UserError(f"{folder} is not the certified model: {listed(differences, '; ')}.")
    if certificate.has_signature(folder):
        certificate.check_signature(folder)
    return _upload(folder, certificate.members(folder), repo, private)


def _export(workdir: Path) -> Path:
    """The folder of the exported model."""
    folder = workdir / certificate.UNLEARNED if (workdir / certificate.UNLEARNED).is_dir() else workdir
    if missing := [name for name in ("config.json", CARD, certificate.FILE) if not (folder / name).is_file()]:
        raise UserError(
            f"{folder} is no finished export: it has no {listed(missing, ' and ')}. Let its run finish, or give the "
            "folder of another run."
        )
    return folder


def _upload(folder: Path, names: list[str], repo: str, private: bool) -> str:
    from huggingface_hub import HfApi, errors

    api = HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        if private and not api.model_info(repo).private:  # it existed, and creating it changed nothing
            raise UserError(
                f"{repo} exists and is public, and --private was asked for. Make it private on the hub first."
            )
        message = "Upload an unlearned model and its certificate"
        commit = api.upload_folder(repo_id=repo, folder_path=folder, allow_patterns=names, commit_message=message)
    except UserError:
        raise
    except errors.LocalTokenNotFoundError as error:
        raise UserError("uploads need a login: run `hf auth login`, or set HF_TOKEN.") from error
    except Exception as error:  # whatever the hub, the network or a proxy raises
        first = (str(error).strip().splitlines() or [""])[0]
        raise UserError(
            f"{repo} could not be uploaded ({type(error).__name__}: {first}). Check the login (`hf auth whoami`), the "
            "name and the network, and run the command again."
        ) from error
    return str(commit.commit_url)


@commands.guarded
def main() -> int:
    """Runs the command line and returns its exit status."""
    parser = command_line.ArgumentParser(prog="vkd push", description=__doc__)
    parser.add_argument("workdir", help="folder of a finished run, or of a model that a run exported")
    parser.add_argument("repo", help="id of the model on the hub, ORG/NAME")
    parser.add_argument("--private", action="store_true", help="only its owners may see the model")
    args = parser.parse_args()
    address = push(args.workdir, args.repo, args.private)
    folder = _export(storage.resolve(args.workdir))
    command_line.show(f"The certified model was uploaded: {address}\n{_signature(folder)}")
    return 0


def _signature(folder: Path) -> str:
    """Who signed for a certificate, or that nobody did, as a sentence."""
    if certificate.has_signature(folder):
        return f"Its certificate is signed with the Ed25519 key {certificate.check_signature(folder)}."
    return (
        "Its certificate is not signed: whoever could write the folder could have written it. To vouch for it, run vkd "
        f"verify {folder} --certificate --sign KEY, and upload it again."
    )


if __name__ == "__main__":
    sys.exit(main())
