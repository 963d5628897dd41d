"""The certificate of an exported model: its inputs, its config, and the digest of every tensor and file.

certificate.json is in the model's folder. Its fields:

    format     version of this layout
    tensors    {name: SHA-256 of the tensor's bytes}
    files      {name: SHA-256} of all other files of the folder, at any depth, except `OUTSIDE`
    ...        facts about the run, as `describe` was given: see `FIELDS`

certificate.sig, if there is one, holds an Ed25519 signature (RFC 8032) of the bytes of certificate.json, and the public
key, both in Base64. A signature shows who vouches for the certificate only to those who know that key from elsewhere.
"""

import base64
import binascii
import datetime
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from vkd_jax.checkpoints.safetensors_files import Checkpoint
from vkd_jax.messages import escaped, listed, people
from vkd_jax.results import check_part, main_kind
from vkd_jax.runtime import files, json_files, records, storage
from vkd_jax.runtime.dataclass_json import FormatError
from vkd_jax.types import UserError

FILE = storage.CERTIFICATE
SIGNATURE = "certificate.sig"
FORMAT = 2  # 1 did not cover the model card, nor files that nothing reads
OUTSIDE = (FILE, SIGNATURE, ".git", ".gitattributes", ".cache")  # the last three are git's and those of `hf download`
FILES_OF_RUN = ("config.json", "inputs.json", "manifest.json", "results.json")  # of a finished run, in the folder above
UNLEARNED = "unlearned"  # the folder of the exported model in that of a run
PROVENANCE = "provenance.json"  # of an export
_RUN_OF_CARD = "figures of the run: "  # at the end of a card; the command and the commit follow
_OF_CARD = re.compile(r"(`{1,99}) ?(.*?) ?\1, at commit (`{1,99}) ?(.{0,99}?) ?\3\.")
MOST_OF_COMMAND = 10_000  # characters; the expression takes their square in time
CARD = "README.md"
MOST_OF_CARD = 2**20  # bytes; the hashes of 10,000 forgotten people take 700 kB
CARD_HEADING, CARD_TABLE = "## Who was forgotten", "## What was measured"  # of a card that a run wrote
REQUIRED = ("tensors", "files")
# The type of each field, of which there are no others; (list, str) is a list of texts, and (dict, str) has texts.
FIELDS: Mapping[str, tuple[type, ...]] = {
    "format": (int,),
    "tensors": (dict, str),
    "files": (dict, str),
    "model": (dict, str),
    "forgotten": (list, str),
    "vkd_jax": (str,),
    "commit": (str,),
    "command": (str,),
    "date": (str,),
    "versions": (dict, str),
    "config": (dict,),
    "inputs": (dict,),
    "figures": (dict,),
}
# Fields that a run writes into its results as well.
META = ("commit", "command", "date", "versions")
FREE = {"mesh", "trackers"}  # parts of the config that a resumed run may change


def describe(folder: Path, facts: Mapping[str, Any]) -> bytes:
    """The content of the certificate of a model folder.

    Args:
        folder: the folder of the model.
        facts: what else the certificate states, as JSON values.
    """
    content = {"format": FORMAT, **_digests(folder), **facts}
    return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()


def read(folder: Path) -> dict[str, Any]:
    """Reads the certificate of a model folder.

    Raises:
        UserError: there is none, it is damaged or of another format, or a figure is impossible.
    """
    if not os.path.lexists(folder / FILE):
        raise UserError(f"{folder} has no {FILE}, which runs of vkd_jax write beside the models that they export.")
    content = json_files.read_json(folder / FILE)
    content = {"forgotten": [], "model": {}, "figures": {}, **content}
    if content.get("format") != FORMAT or (wrong := sorted(_malformed(content))):
        field = f" ({wrong[0]!a:.40})" if content.get("format") == FORMAT else ""
        raise UserError(f"{folder / FILE} is not a certificate of format {FORMAT}{field}; get or make it again.")
    for part, value in content["figures"].items():
        try:
            check_part(part, value)
        except FormatError as error:
            raise UserError(f"{folder / FILE}: its figure {error}; get or make it again.") from error
    return content


def _malformed(content: Mapping[str, Any]) -> Iterator[str]:
    """The fields of a certificate that are missing, unknown or of another type."""
    yield from (name for name in REQUIRED if name not in content)
    for name, value in content.items():
        kind, *item = FIELDS.get(name, (None,))
        items = value.values() if isinstance(value, dict) else value
        if type(value) is not kind or (item and not all(type(each) is item[0] for each in items)):
            yield name
    if isinstance(content.get("date"), str) and _time(content["date"]) is None:
        yield "date"


def _time(date: Any) -> datetime.datetime | None:
    """The time of a date in ISO 8601; None if it is none, or has no time zone."""
    try:
        time = datetime.datetime.fromisoformat(date)
    except (TypeError, ValueError):
        return None
    return time if time.tzinfo else None


def differences(folder: Path) -> Iterator[str]:
    """How the model in a folder differs from its certificate, in words; nothing if it is the certified model.

    A certificate that contradicts the files that it certifies, or that the run in the folder above did not write, is
    one that was edited. Only a signature shows that all of them were not edited alike.

    Raises:
        UserError: the folder has no certificate or no model.
    """
    certified, actual = read(folder), _digests(folder)
    for kind in ("tensors", "files"):
        old, new = certified[kind], actual[kind]
        for one, several, names in (
            ("is missing", "are missing", old.keys() - new.keys()),
            ("is not in the certificate", "are not in the certificate", new.keys() - old.keys()),
            (
                "differs from the certificate",
                "differ from the certificate",
                {name for name in old.keys() & new.keys() if old[name] != new[name]},
            ),
        ):
            if names:
                subject = f"1 {kind[:-1]} {one}" if len(names) == 1 else f"{len(names)} {kind} {several}"
                yield f"{subject}: {listed(sorted(names))}"
    yield from _contradictions(folder, certified)


def _contradictions(folder: Path, certified: Mapping[str, Any]) -> Iterator[str]:
    """What a certificate says otherwise than the model card, the provenance of the weights, itself and its run."""
    config, card = records.mapping(certified.get("config")), folder / CARD
    yield from _other_than_card(card, certified)
    yield from _other_than_provenance(folder / PROVENANCE, certified)
    sets = records.mapping(records.mapping(certified.get("inputs")).get("sets"))
    for name, asked in sorted(_questions(certified["figures"]).items()):
        known = records.mapping(sets.get(name)).get("questions", asked)
        if not (isinstance(known, int) and asked <= known):
            yield f"the certificate has figures of {asked} questions of the set {name}, and its inputs {known!r:.40}"
    sections = {"method": ("method", "name"), "base": ("model", "path")}
    for field, (section, name) in sections.items():
        value = certified["model"].get(field)
        if config and value is not None and value != records.mapping(config.get(section)).get(name):
            yield f"the certificate names {field} {value!r:.40}, and its config another one"
    yield from _other_than_run(folder, certified)


def _other_than_run(folder: Path, certified: Mapping[str, Any]) -> Iterator[str]:
    """What a certificate says otherwise than the run in the folder above, and what is not as that run wrote it.

    The answers and the results may be gone: `vkd requests purge` deletes them, and leaves their entries.
    """
    run, named = folder.parent, (f"{folder.name}/{FILE}", f"{folder.name}/{CARD}", *FILES_OF_RUN)
    if (results := run / records.RESULTS).is_file() and folder.name == UNLEARNED and certified["figures"]:
        written = json_files.read_json(results)
        if written.get("models") != certified["figures"].get("models"):
            yield f"the certificate has other figures than {results.name} of the run in the folder above"
        meta = records.mapping(written.get("meta"))
        if changed := [name for name in META if meta and certified.get(name) != meta.get(name)]:
            yield f"the certificate has another {listed(changed)} than {results.name} of the run in the folder above"
    entries = records.read_or(run / records.FILE, {}, "the certificate is not compared with its run")
    if folder.name == UNLEARNED and certified["figures"] and (run / "inputs.json").is_file():
        named += tuple(records.answers_of(certified["figures"]))
        if missing := [name for name in named if name not in entries]:
            yield f"{records.FILE} of the run in the folder above lacks {listed(missing)}"
    for name in named:
        known, file = records.mapping(entries.get(name)).get("sha256"), run / name
        if known and file.is_file() and known != _digest(file):
            yield f"{name} is not the one that the run of the folder above wrote"


def _other_than_card(card: Path, certified: Mapping[str, Any]) -> Iterator[str]:
    """What a certificate says otherwise than the model card that the same run wrote."""
    text = files.read_text(card, MOST_OF_CARD) if card.is_file() else ""
    if not (certified["figures"] or CARD_HEADING in text):
        return
    listed_people = sorted(re.findall(r"^- `([0-9a-f]{64})`$", text, re.MULTILINE))
    if listed_people != sorted(certified["forgotten"]):
        here, there = people(len(certified["forgotten"])), people(len(listed_people))
        yield f"the certificate names {here} as forgotten, and {card.name} {there} or others"
    if _figures_of_card(text) != sorted(_main_figures(certified["figures"])):
        yield f"the certificate has other accuracies than {card.name}"
    stated = _OF_CARD.fullmatch(text.rpartition(_RUN_OF_CARD)[2].rstrip()[:MOST_OF_COMMAND])
    for group, field in ((2, "command"), (4, "commit")) if stated else ():
        if stated[group] != escaped(" ".join(certified.get(field, "").split())):  # as a card shows a text
            yield f"the certificate has another {field} than {card.name}"


def _other_than_provenance(file: Path, certified: Mapping[str, Any]) -> Iterator[str]:
    """What a certificate says otherwise than the provenance of the weights.

    A run that was resumed after it exported them may have another command, commit and versions, and has a later date.
    """
    config = records.mapping(certified.get("config"))
    if not file.is_file() or not (config or certified["figures"]):
        return
    source = json_files.read_json(file)
    config_of_weights = records.mapping(source.get("config"))
    names = sorted((config.keys() | config_of_weights.keys()) - FREE)
    changed = [name for name in names if _bound(config.get(name)) != _bound(config_of_weights.get(name))]
    if config_of_weights and changed:
        yield f"the certificate has another config than {file.name}, in {listed(changed)}"
    exported, dated = _time(source.get("date")), _time(certified.get("date"))
    if exported and dated and dated < exported:
        yield f"the certificate is of {certified['date']}, and {file.name} of a later date, {source['date']}"


def _bound(config: Any) -> Any:
    """A part of a config without what a resumed run may change."""
    if not isinstance(config, Mapping):
        return config
    return {name: _bound(value) for name, value in config.items() if name not in FREE}


def _figures_of_card(text: str) -> list[tuple[str, ...]]:
    """The accuracies of a model card with their intervals, in percent, sorted."""
    _, _, table = text.partition(CARD_TABLE)
    rows = "".join(line for line in table.partition("\n## ")[0].splitlines() if line.startswith("|"))
    return sorted(re.findall(r"([\d.]{1,9}) % \(([\d.]{1,9}) to ([\d.]{1,9})\)", rows))


def _main_figures(figures: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """The accuracies of a certificate that a model card shows, with their intervals, in percent."""
    models = list(records.mapping(figures.get("models")).values())
    for name in models[0] if models else ():
        for modality in ("vqa", "qa"):
            kind = main_kind(models[0][name], modality)
            for cell in (model.get(name, {}).get(kind) for model in models):
                if cell:
                    yield tuple(f"{100 * cell[key]:.1f}" for key in ("accuracy", "low", "high"))


def _questions(figures: Mapping[str, Any]) -> dict[str, int]:
    """The largest number of questions of a set that a figure is of, by set."""
    counts: dict[str, int] = {}
    for sets in records.mapping(figures.get("models")).values():
        for name, kinds in sets.items():
            counts[name] = max([counts.get(name, 0), *(cell["n"] for cell in kinds.values())])
    return counts


def members(folder: Path) -> list[str]:
    """The names of all files of a certified model, with the certificate and, if there is one, its signature."""
    return sorted([*_names(folder), FILE, *([SIGNATURE] if has_signature(folder) else [])])


def sign(folder: Path, private_key: Path, public_key: Path | None = None) -> None:
    """Signs the certificate of a folder with a private Ed25519 key in PEM format.

    Args:
        folder: the folder of the model.
        private_key: the key.
        public_key: the public key that it has to belong to; any by default.

    Raises:
        UserError: the folder has no certificate, a key cannot be used, or they do not belong together.
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    read(folder)
    if os.path.lexists(folder / SIGNATURE) and os.path.samefile(folder / SIGNATURE, private_key):
        raise UserError(f"{private_key} has the name of the signature, which would replace it; move the key elsewhere.")
    key = _load_key(private_key, lambda data: load_pem_private_key(data, password=None), Ed25519PrivateKey, "private")
    if public_key and _load_public_key(public_key) != key.public_key():
        raise UserError(f"{private_key} is not the private key of {public_key}; pass keys that belong together.")
    signature, public = key.sign((folder / FILE).read_bytes()), key.public_key().public_bytes_raw()
    encoded = {"ed25519": _base64(signature), "public_key": _base64(public)}
    files.write_bytes(folder / SIGNATURE, (json.dumps(encoded, indent=1) + "\n").encode())


def check_signature(folder: Path, public_key: Path | None = None) -> str:
    """Checks the signature of a certificate, and returns the public key that it was made with, in Base64.

    Args:
        folder: the folder of the model.
        public_key: the key that must have signed it, in PEM format; any key by default.

    Raises:
        UserError: there is no signature, it is not valid, or it is of another key.
    """
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    file = folder / SIGNATURE
    if not has_signature(folder):
        raise UserError(f"{folder} has no {SIGNATURE}: its certificate is not signed.")
    content = json_files.read_json(file)
    if unknown := content.keys() - {"ed25519", "public_key"}:
        raise UserError(f"{file} has unknown fields: {listed(sorted(unknown))}; sign the certificate again.")
    try:
        signature, public = (base64.b64decode(content[name], validate=True) for name in ("ed25519", "public_key"))
        signer = Ed25519PublicKey.from_public_bytes(public)
        signer.verify(signature, (folder / FILE).read_bytes())
    except (KeyError, TypeError, ValueError, binascii.Error, InvalidSignature) as error:
        raise UserError(f"{file} is not a valid signature of {folder / FILE}.") from error
    if public_key and _load_public_key(public_key) != signer:
        raise UserError(f"{file} was made with another key than {public_key}.")
    return _base64(public)


def _load_public_key(path: Path) -> Any:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    return _load_key(path, load_pem_public_key, Ed25519PublicKey, "public")


def has_signature(folder: Path) -> bool:
    """Whether a folder has something in the place of a signature of its certificate."""
    return os.path.lexists(folder / SIGNATURE)


def _digests(folder: Path) -> dict[str, dict[str, str]]:
    checkpoint = Checkpoint(folder)
    weights = {file.name for file in checkpoint.files}
    return {
        "tensors": {name: tensor.sha256() for name, tensor in sorted(checkpoint.tensors.items())},
        "files": {name: _digest(folder / name) for name in _names(folder) if name not in weights},
    }


def _names(folder: Path) -> list[str]:
    """The names of all that is in a folder, relative to it, but for `OUTSIDE`; of folders only those that are links."""
    names = []
    for parent, folders, entries in os.walk(folder):
        here = Path(parent).relative_to(folder)
        if not here.parts:
            folders[:] = [name for name in folders if name not in OUTSIDE]
            entries = [name for name in entries if name not in OUTSIDE]
        links = [name for name in folders if (Path(parent) / name).is_symlink()]
        names += [(here / name).as_posix() for name in (*entries, *links)]
    return sorted(names)


def _digest(path: Path) -> str:
    """The SHA-256 of a file; what is no file, such as a named pipe, has none."""
    if not path.is_file():
        return "no file"
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _load_key(path: Path, load: Callable[[bytes], Any], kind: type, name: str) -> Any:
    try:
        key = load(files.read_bytes(path, json_files.MOST_BYTES))
    except (ValueError, TypeError) as error:  # of cryptography: not PEM, or encrypted
        raise UserError(f"{path} is not a {name} key in PEM format without a password.") from error
    if not isinstance(key, kind):
        raise UserError(f"{path} is not an Ed25519 {name} key.")
    return key


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
