"""The digests of what a run has computed: records.json.

Every file and model folder that a later stage or a resumed run reuses has an entry with its size and SHA-256. What has
no entry, or differs from it, counts as missing and is computed again: a file that was cut at the end of a line is never
taken for a complete one.
"""

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from absl import logging

from vkd_jax.runtime import files, hub, json_files, storage
from vkd_jax.types import UserError

FILE = "records.json"
RESULTS = "results.json"
AGAIN = "run the command of that run again"
MODELS = ("vanilla", "retain_only", "base", "unlearned")  # whose answers a run may record


class Records:
    """The entries of a workdir; only process 0 uses them.

    Args:
        path: the folder of the run.
    """

    def __init__(self, path: Path):
        self._path = path
        self._entries: dict[str, Any] = read_or(path / FILE, {}, "what it describes is computed again")

    def add(self, name: str) -> None:
        """Adds or replaces the entry of a file."""
        self.replace((), [name])

    def replace(self, prefixes: tuple[str, ...], names: Iterable[str]) -> None:
        """Adds or replaces the entries of files, and drops all other entries whose name begins with a prefix."""
        added = {name: _file_entry((self._path / name).read_bytes()) for name in names}
        self._write({name: x for name, x in self._entries.items() if not name.startswith(prefixes)} | added)

    def drop(self, name: str) -> None:
        """Drops the entry of a file that is about to change."""
        if name in self._entries:
            self._write({other: x for other, x in self._entries.items() if other != name})

    def add_model(self, name: str) -> None:
        """Adds or replaces the entry of a model folder."""
        self._write(self._entries | {name: {"files": storage.model_digests(storage.local_copy(self._path / name))}})

    def knows(self, name: str) -> bool:
        """Whether a file or model folder was added."""
        return name in self._entries

    def has(self, name: str) -> bool:
        """Whether a file exists and is the one that was added."""
        return self._is_whole(name, lambda: _file_entry(files.read_bytes(self._path / name, json_files.MOST_BYTES)))

    def has_results(self, *names: str) -> bool:
        """Whether files exist and are those that were added, and so are all answers of models."""
        return all(map(self.has, names)) and all(map(self.has, self._answers))

    def check_results(self, *names: str, remedy: str) -> None:
        """Checks that files were added, and that they and all answers of models are as they were added.

        Raises:
            UserError: one of them is missing or differs from its entry; the sentence ends with the remedy.
        """
        for name in names:
            check(self._path, name, remedy)
        for name in self._answers:
            check(self._path, name, remedy)

    @property
    def _answers(self) -> list[str]:
        """The files of answers that have an entry, and those that should have one: figures or models have them."""
        listed = [name for name in self._entries if name.startswith(("answers/", "attacks/"))]
        folders = {"answers", *(name.rpartition("/")[0] for name in listed)}
        found = (f"{folder}/{model}.jsonl" for folder in sorted(folders) for model in MODELS)
        reported = answers_of(read_or(self._path / RESULTS, {}, "it is not known which answers it reports"))
        return list(dict.fromkeys([*listed, *(name for name in found if (self._path / name).exists()), *reported]))

    def damaged(self, without: tuple[str, ...] = (), optional: Collection[str] = ()) -> list[str]:
        """The names of the files and model folders that are not as they were added.

        Args:
            without: what is not looked at, by the beginnings of its names.
            optional: folders that may be gone with all that was in them.
        """
        gone = [name for name in optional if not (self._path / name).exists()]
        known = {
            name: entry
            for name, entry in self._entries.items()
            if not name.startswith(without) and name.partition("/")[0] not in gone
        }
        models = {name for name, entry in known.items() if "files" in mapping(entry)}
        return [name for name in known if not (self.has_model(name) if name in models else self.has(name))]

    def check(self, name: str, remedy: str) -> None:
        """Checks that a file is as it was added, unless it was not added.

        Raises:
            UserError: the file is missing, or differs from its entry; the sentence ends with the remedy.
        """
        if name in self._entries:
            check(self._path, name, remedy)

    def model_digests(self, name: str) -> dict[str, str]:
        """The digests of the files of a model folder when it was added; {} if it was not."""
        return dict(mapping(mapping(self._entries.get(name)).get("files")))

    def has_model(self, name: str) -> bool:
        """Whether a model folder exists and is the one that was added."""
        marker = f"{name}/{storage.MODEL_MARKER}"
        return self._is_whole(
            name, lambda: {"files": storage.model_digests(hub.fetch_model(self._path / name))}, marker
        )

    def copy_from(self, other: "Records", name: str) -> None:
        """Copies a file of another run, if that run has it."""
        if other.has(name):
            files.write_bytes(self._path / name, (other._path / name).read_bytes())
            self.add(name)

    def _is_whole(self, name: str, compute: Any, marker: str = "") -> bool:
        try:
            if not (self._path / (marker or name)).exists():
                return False
        except OSError:  # a name that no file has, in a damaged list
            return False
        expected = self._entries.get(name)
        if expected is None:
            logging.warning("%s has no entry in %s; it is computed again", self._path / name, FILE)
            return False
        try:
            entry = compute()
        except (OSError, UserError) as error:
            logging.warning("%s cannot be read (%s); it is computed again", self._path / name, error)
            return False
        if entry != expected:
            logging.warning("%s %s; it is computed again", self._path / name, _difference(expected, entry))
        return entry == expected

    def _write(self, entries: dict[str, Any]) -> None:
        self._entries = entries
        files.write_bytes(self._path / FILE, encode(self._entries))


def read_lines(folder: Path, name: str) -> list[dict]:
    """Reads a file of JSON lines of another run that has ended, and checks that it is what that run wrote.

    Args:
        folder: the folder of that run.
        name: the name of the file in it.

    Raises:
        UserError: the file is missing or damaged, or differs from its entry.
    """
    check(folder, name)
    lines = json_files.read_json_lines(folder / name, remedy=AGAIN, checked=False)
    return [record for _, record in lines]


def check(folder: Path, name: str, remedy: str = AGAIN) -> None:
    """Checks that a file of a run is what that run wrote.

    Args:
        folder: the folder of the run.
        name: the name of the file in it.
        remedy: what to do otherwise.

    Raises:
        UserError: the file or its entry is missing, or they differ.
    """
    entries = json_files.read_json(folder / FILE, remedy=remedy)
    if not (folder / name).exists():
        raise UserError(f"{folder / name} is missing; {remedy}.")
    entry = _file_entry(files.read_bytes(folder / name, json_files.MOST_BYTES))
    if name not in entries:
        raise UserError(f"{folder / name} has no entry in {FILE}; remove it if that run did not write it, or {remedy}.")
    if entry != entries[name]:
        raise UserError(f"{folder / name} {_difference(entries[name], entry)}; {remedy}.")


def answers_of(figures: Mapping[str, Any]) -> list[str]:
    """The files of answers and attacks from which the fields `models` and `attacks` of results were computed."""
    folders = ["answers", *(f"attacks/{name}" for name in mapping(figures.get("attacks")))]
    return [f"{folder}/{model}.jsonl" for folder in folders for model in mapping(figures.get("models"))]


def encode(value: Any) -> bytes:
    """Encodes a JSON file of a run."""
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def read_or(file: Path, default: Any, consequence: str) -> Any:
    """Reads a JSON object of a run that can be made again; the default if the file is missing or damaged.

    Args:
        file: the file.
        default: what a missing file stands for.
        consequence: what happens if the file is damaged, for the log.
    """
    if not file.exists():
        return default
    try:
        return json_files.read_json(file)
    except UserError as error:
        logging.warning("%s So %s.", error, consequence)
        return default


def _file_entry(data: bytes) -> dict[str, Any]:
    return {"lines": data.count(b"\n"), "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _difference(expected: Any, entry: dict[str, Any]) -> str:
    """How a file or folder differs from its entry, in words."""
    old = mapping(expected)
    if "files" in entry:
        changed = changed_keys(old.get("files"), entry["files"])
        return f"differs from what this run wrote in {', '.join(changed[:3])}"
    if entry["lines"] == old.get("lines"):
        return "is damaged or was changed"
    return f"is damaged or was changed: it has {entry['lines']} lines of {old.get('lines')}"


def changed_keys(old: Any, new: Any) -> list[str]:
    """The keys whose values differ between two mappings; what is no mapping counts as an empty one."""
    old, new = mapping(old), mapping(new)
    return [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]


def mapping(value: Any) -> Mapping[str, Any]:
    """A JSON object; {} in place of anything else."""
    return value if isinstance(value, Mapping) else {}
