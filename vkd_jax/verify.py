"""Checks a model folder against its certificate.

python -m vkd_jax.verify FOLDER [--public_key PUBLIC.pem]     is this the certified model, and who signed for it?
python -m vkd_jax.verify FOLDER --sign PRIVATE.pem            signs the certificate, if the model is the certified one
python -m vkd_jax.verify FOLDER --pdf FILE.pdf                writes it as one page, if the model is the certified one

Runs write certificate.json beside the models that they export: digests of all tensors and files, config, inputs and
figures. Keys are Ed25519 keys in PEM format:

openssl genpkey -algorithm ed25519 -out PRIVATE.pem && openssl pkey -in PRIVATE.pem -pubout -out PUBLIC.pem

Exit status: 0 if the folder is what its certificate says, 1 if it is not, 2 on bad input.
"""

import argparse
import sys
from pathlib import Path

from vkd_jax.checkpoints import certificate
from vkd_jax.config import command_line
from vkd_jax.messages import listed
from vkd_jax.reporting import certificate_page
from vkd_jax.runtime import files, hub, storage
from vkd_jax.runtime.interrupts import interruptible
from vkd_jax.types import UserError, located


@interruptible
def main() -> int:
    """Runs the command line and returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m vkd_jax.verify", description=__doc__.splitlines()[0])
    parser.add_argument("model", help="model folder with certificate.json, or id on the Hugging Face Hub")
    parser.add_argument("--public_key", help="key that must have signed the certificate, PEM")
    parser.add_argument("--sign", help="private key to sign the certificate with, PEM")
    parser.add_argument("--pdf", help="file to write the certificate to as one page, PDF")
    args = parser.parse_args()
    try:
        with storage.write_errors("folder"):
            public_key, private_key = _file("--public_key", args.public_key), _file("--sign", args.sign)
            return _verify(hub.fetch_model(args.model), public_key, private_key, _file("--pdf", args.pdf))
    except UserError as error:
        return command_line.bad_input(error)


def _file(flag: str, name: str | None) -> Path | None:
    with located(flag):
        return None if name is None else storage.resolve(name)


def _verify(folder: Path, public_key: Path | None, private_key: Path | None, pdf: Path | None) -> int:
    content = certificate.read(folder)
    if differences := list(certificate.differences(folder)):
        command_line.print_error(f"{folder} is not the certified model: {listed(differences, '; ')}.")
        return 1
    if private_key:
        certificate.sign(folder, private_key)
    lines = [
        f"{folder} is the certified model: {len(content['tensors'])} tensors and {len(content['files'])} files.",
        f"Unlearned: {len(content['forgotten'])} people, with {content['model'].get('method', '?')}.",
        "Not signed.",
    ]
    signer = None
    if public_key or certificate.has_signature(folder):
        signer = certificate.check_signature(folder, public_key)
        lines[-1] = f"Signed with the Ed25519 key {signer}."
    if pdf:
        page = certificate_page.render(content, (folder / certificate.FILE).read_bytes(), signer)
        lines.append(f"{files.write_bytes(pdf, page)} has the certificate as one page.")
    command_line.show("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
