"""Whether a folder is what its certificate says."""

from pathlib import Path

from vkd_jax.checkpoints import certificate
from vkd_jax.config import command_line
from vkd_jax.messages import listed, people
from vkd_jax.reporting import certificate_page
from vkd_jax.runtime import files, outputs


def verify(folder: Path, public_key: Path | None, private_key: Path | None, pdf: Path | None) -> int:
    """Compares a folder with its certificate, signs and draws it if it is the certified model, and prints the result.

    Args:
        folder: folder of the model.
        public_key: file of the key that must have signed the certificate; None for any.
        private_key: file of the key to sign with; None to sign nothing.
        pdf: file to write the certificate to as one page; None to write none.

    Returns:
        The exit status.

    Raises:
        UserError: the folder has no certificate, a key cannot be used, or the page or the signature would replace
            something else.
    """
    keys = [key for key in (public_key, private_key) if key]
    if pdf:
        outputs.check_file(pdf, "--pdf", outputs.PDF, [folder, *keys])
    content = certificate.read(folder)
    if differences := list(certificate.differences(folder)):
        command_line.print_error(f"{folder} is not the certified model: {listed(differences, '; ')}.")
        return 1
    if private_key:
        certificate.sign(folder, private_key, public_key)
    lines = [
        f"{folder} is the certified model: {len(content['tensors'])} tensors and {len(content['files'])} files.",
        f"Unlearned: {people(len(content['forgotten']))}, with {listed([content['model'].get('method', '?')])}.",
        "Not signed: the certificate is only as trustworthy as the source of the folder.",
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
