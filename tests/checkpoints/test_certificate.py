"""Certificates: what they say of a folder, what they find, and who signed them."""

import base64
import functools
import json
import os
import re
import subprocess
import sys

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from llava_folders import hf_config

from vkd_jax.checkpoints import certificate, export
from vkd_jax.checkpoints.safetensors_files import Checkpoint
from vkd_jax.models import llava
from vkd_jax.types import UserError
from vkd_jax.verify import __main__ as verify

UNSIGNED = "Not signed: the certificate is only as trustworthy as the source of the folder."
PEM = serialization.Encoding.PEM
PKCS8, SPKI = serialization.PrivateFormat.PKCS8, serialization.PublicFormat.SubjectPublicKeyInfo


@pytest.fixture
def certified(copy):
    (copy / "README.md").write_text("# A card\n")
    (copy / certificate.FILE).write_bytes(certificate.describe(copy, {"forgotten": ["0" * 64]}))
    return copy


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """Files of two key pairs, and of a private key of another kind."""
    folder = tmp_path_factory.mktemp("keys")
    for name in ("one", "two"):
        key = ed25519.Ed25519PrivateKey.generate()
        private = key.private_bytes(PEM, PKCS8, serialization.NoEncryption())
        (folder / f"{name}.private").write_bytes(private)
        (folder / f"{name}.public").write_bytes(key.public_key().public_bytes(PEM, SPKI))
    other = ec.generate_private_key(ec.SECP256R1())
    (folder / "ec.private").write_bytes(other.private_bytes(PEM, PKCS8, serialization.NoEncryption()))
    (folder / "locked.private").write_bytes(
        ed25519.Ed25519PrivateKey.generate().private_bytes(PEM, PKCS8, serialization.BestAvailableEncryption(b"x"))
    )
    (folder / "text.private").write_text("no key")
    return folder


def test_it_holds_the_digest_of_every_tensor_and_file(certified):
    content = certificate.read(certified)
    assert content["tensors"].keys() == Checkpoint(certified).tensors.keys()
    assert all(len(digest) == 64 for kind in ("tensors", "files") for digest in content[kind].values())
    assert "config.json" in content["files"] and not {"model.safetensors", certificate.FILE} & content["files"].keys()
    assert content["forgotten"] == ["0" * 64] and not list(certificate.differences(certified))


def add(name, folder):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("{}")


def change_a_weight(folder):
    tensor = next(iter(Checkpoint(folder).tensors.values()))
    with tensor.file.open("r+b") as stream:
        stream.seek(tensor.start)
        byte = stream.read(1)[0]
        stream.seek(tensor.start)
        stream.write(bytes([byte ^ 1]))


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (change_a_weight, "1 tensor differs from the certificate: "),
        (lambda folder: (folder / "config.json").write_text("{}"), "1 file differs .*: config.json"),
        (lambda folder: (folder / "generation_config.json").unlink(), "1 file is missing: generation_config.json"),
        (lambda folder: (folder / "vocab.json").write_text("{}"), "1 file is not in the certificate: vocab.json"),
        (lambda folder: (folder / "README.md").write_text("all forgotten"), "1 file differs .*: README.md"),
        (lambda folder: (folder / "README.md").unlink(), "1 file is missing: README.md"),
        *(
            (functools.partial(add, name), f"1 file is not in the certificate: {name}")
            for name in (
                "pytorch_model.bin",
                "modeling_evil.py",
                "more/config.json",
                "more/.cache/x",
                ".hidden",
                "LICENSE",
            )
        ),
        (lambda folder: (folder / "link").symlink_to("/"), "1 file is not in the certificate: link"),
        (lambda folder: os.mkfifo(folder / "pipe"), "1 file is not in the certificate: pipe"),
    ],
)
def test_every_change_is_found(certified, change, found, capsys, monkeypatch, tmp_path):
    change(certified)
    [difference] = certificate.differences(certified)
    assert re.match(found, difference), difference
    monkeypatch.setattr(sys, "argv", ["verify", str(certified), "--certificate", f"--pdf={tmp_path / 'page.pdf'}"])
    assert verify.main() == 1 and not (tmp_path / "page.pdf").exists()
    assert difference in capsys.readouterr().err


def test_what_git_and_the_hub_add_is_no_part_of_the_model(certified):
    for name in (".gitattributes", ".git/config", ".cache/huggingface/CACHEDIR.TAG"):
        add(name, certified)
    assert not list(certificate.differences(certified))
    assert certificate.members(certified) == sorted({*certificate.read(certified)["files"], *(
        file.name for file in Checkpoint(certified).files
    ), certificate.FILE})  # fmt: skip


@pytest.mark.parametrize(
    "text",
    [
        f"{certificate.CARD_TABLE}\n| {'1' * 400_000} |",
        f"{certificate.CARD_HEADING}\nfigures of the run: {'`' * 100_000}",
        f"{certificate.CARD_HEADING}\n{'figures of the run: `x`, at commit `y' * 10_000}",
    ],
)
def test_a_crafted_card_is_compared_at_once(certified, text):
    """Expressions that try every beginning would take hours."""
    card = certified / "README.md"
    card.write_text(text)
    found = list(certificate._other_than_card(card, {"figures": {"models": {}}, "forgotten": ["x"]}))
    assert "the certificate names 1 person as forgotten, and README.md 0 people or others" in found


def test_an_export_has_neither_certificate_nor_signature_of_its_source(certified, tmp_path):
    (certified / certificate.SIGNATURE).write_text("{}")
    export.export({}, certified, tmp_path / "out", llava.LlavaConfig.from_hf(hf_config()))
    assert not {certificate.FILE, certificate.SIGNATURE} & {file.name for file in (tmp_path / "out").iterdir()}


def test_a_signature_is_checked_with_the_key_that_is_expected(certified, keys, tmp_path, monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["verify", str(certified), "--certificate", *map(str, arguments)])
        status = verify.main()
        return status, "".join(capsys.readouterr())

    counts = f"{len(Checkpoint(certified).tensors)} tensors and {len(certificate.read(certified)['files'])} files"
    assert run() == (
        0, f"{certified} is the certified model: {counts}.\nUnlearned: 1 person, with ?.\n{UNSIGNED}\n"
    )  # fmt: skip
    status, shown = run("--public_key", keys / "one.public")
    assert status == 2 and "its certificate is not signed" in shown
    status, shown = run("--sign", keys / "one.private", "--public_key", keys / "two.public")
    assert (
        status == 2 and "one.private is not the private key of " in shown and not certificate.has_signature(certified)
    )
    status, shown = run("--sign", keys / "one.private")
    assert status == 0 and "Signed with the Ed25519 key " in shown
    assert run("--public_key", keys / "one.public") == run() and run()[0] == 0
    status, shown = run("--pdf", tmp_path / "page.pdf")
    assert status == 0 and shown.endswith(f"{tmp_path}/page.pdf has the certificate as one page.\n")
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF-")
    status, shown = run("--public_key", keys / "two.public")
    assert status == 2 and "was made with another key than" in shown
    (certified / certificate.FILE).write_bytes((certified / certificate.FILE).read_bytes() + b" ")
    status, shown = run()
    assert status == 2 and "is not a valid signature" in shown


def test_openssl_accepts_the_signature(certified, keys, tmp_path):
    certificate.sign(certified, keys / "one.private")
    content = json.loads((certified / certificate.SIGNATURE).read_text())
    (tmp_path / "signature").write_bytes(base64.b64decode(content["ed25519"]))
    command = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", keys / "one.public", "-rawin"]
    command += ["-in", certified / certificate.FILE, "-sigfile", tmp_path / "signature"]
    try:
        outcome = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("openssl is not installed")
    assert "Verified Successfully" in outcome.stdout, outcome


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("ec.private", "is not an Ed25519 private key"),
        ("one.public", "is not a private key in PEM format without a password"),
        ("text.private", "is not a private key in PEM format without a password"),
        ("locked.private", "is not a private key in PEM format without a password"),
        ("none.private", "none.private"),
    ],
)
def test_keys_that_cannot_sign_are_refused(certified, keys, name, problem):
    with pytest.raises(UserError, match=problem):
        certificate.sign(certified, keys / name)
    assert not certificate.has_signature(certified)


@pytest.mark.parametrize(
    "content",
    [
        *("", "[]", "{}", '{"format": 1}', "\0"),
        '{"format": 2, "tensors": {}, "files": {}, "forgotten": [1]}',
        '{"format": 2, "tensors": {}, "files": {}, "figures": []}',
        '{"format": 2, "tensors": {}, "files": {}, "figures": {"model": {}}}',
        '{"format": 2, "tensors": {}, "files": {}, "figures": {"models": {"unlearned": {"forget": {"vqa": 0}}}}}',
        *(
            '{"format": 2, "tensors": {}, "files": {}, "figures": {"models": {"unlearned": {"forget": {"vqa": '
            f'{{"accuracy": {accuracy}, "correct": {correct}, "n": 4, "low": 0, "high": 1}}}}}}}}}}}}'
            for accuracy, correct in ((0.25, 2), (-0.5, -2), (1.25, 5), ('"0 %"', 1))
        ),
        *(
            f'{{"format": 2, "tensors": {{}}, "files": {{}}, {field}}}'
            for field in (
                *('"date": []', '"date": "today"', '"date": "2026-11-30"', '"commit": ["a"]', '"command": null'),
                *('"versions": [1]', '"versions": {"jax": 1}', '"inputs": null', '"config": []', '"vkd_jax": 1'),
                *('"model": {"method": 1}', '"note": "x"', '"tensors": {"a": 1}', '"format": 2.0'),
            )
        ),
        *('{"format": 1, "tensors": {}, "files": {}}', '{"format": true, "tensors": {}, "files": {}}'),
    ],
)
def test_what_is_no_certificate_is_refused(copy, content):
    (copy / certificate.FILE).write_text(content)
    with pytest.raises(UserError, match=certificate.FILE):
        certificate.read(copy)


@pytest.mark.parametrize(
    "content",
    ["", "{}", '{"ed25519": 1, "public_key": "x"}', '{"ed25519": "AA==", "public_key": "AA=="}', '{"more": 1}'],
)
def test_what_is_no_signature_is_refused(certified, content):
    (certified / certificate.SIGNATURE).write_text(content)
    with pytest.raises(UserError, match=certificate.SIGNATURE):
        certificate.check_signature(certified)


def test_a_folder_without_a_certificate_is_refused(copy):
    with pytest.raises(UserError, match="has no certificate.json, which runs of vkd_jax write"):
        certificate.read(copy)
