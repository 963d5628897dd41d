"""The ledger of deletion requests: append-only JSON Lines, each of which has the hash of the previous one.

Every line has these fields, and those of its kind:

    line       its number, from 1
    kind       add, begin, withdraw, done or purge
    request    the number of the request, from 1
    time       when the line was written, UTC
    previous   the hash of the line before it; 64 zeros in the first line
    hash       the SHA-256 of the line without this field, as JSON with sorted keys and no spaces

    add        people (SHA-256 of what the data calls each), forget and test (folders that have their images; "" if the
               data of the config has them)
    begin      run (the folder of a run that starts, so that purge finds it even if the run never ends)
    withdraw   nothing; no run of the request has ended
    done       run (its folder), model_before and model_after (see `requests.model_digest`), config, figures, data
               (digests of the sets), features (digests of the cached features), versions and commit
    purge      nothing; the cached features of the request, and the answers and reports of all runs, were deleted

Anyone who can write to the ledger can recompute all hashes. To prove later that nobody did, store the last hash
elsewhere.
"""

import codecs
import collections
import contextlib
import dataclasses
import datetime
import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vkd_jax.config.request import DIGEST
from vkd_jax.reporting import requests_page
from vkd_jax.runtime import files, json_files, locks, outputs, storage
from vkd_jax.types import UserError, located

START = "0" * 64  # stands for the hash of the line before the first one
OWNER = "ledger.json"  # in a folder of runs: {"first": the hash of the first line of their ledger}
REMEDY = "restore the ledger from a copy"
COMMON: Mapping[str, type] = {"line": int, "kind": str, "request": int, "time": str, "previous": str, "hash": str}
_DONE = dict.fromkeys(("run", "model_before", "model_after", "commit"), str)
_DONE |= dict.fromkeys(("config", "figures", "data", "features", "versions"), dict)
KINDS: Mapping[str, Mapping[str, type]] = {
    "add": {"people": list, "forget": str, "test": str},
    "begin": {"run": str},
    "withdraw": {},
    "done": _DONE,
    "purge": {},
}


@dataclasses.dataclass(frozen=True)
class Request:
    """A request, as the lines of the ledger describe it.

    Attributes:
        number: its number, from 1.
        people: the digests of the people to forget.
        forget: the folder of their images; "" if the data of the config has them.
        test: the folder of other images of them, or "".
        time: when the request was added.
        done: the line of its run; None before the run.
        begun: the folders of runs that started.
        withdrawn: whether it was withdrawn.
        purged: whether its cached features were deleted.
    """

    number: int
    people: tuple[str, ...]
    forget: str
    test: str
    time: str
    done: Mapping[str, Any] | None = None
    begun: tuple[str, ...] = ()
    withdrawn: bool = False
    purged: bool = False

    @property
    def pending(self) -> bool:
        """Whether it waits to be run."""
        return self.done is None and not self.withdrawn

    @property
    def folders(self) -> list[Path]:
        """The folders of its runs, which may hold data of its people."""
        return [Path(run) for run in dict.fromkeys((*self.begun, *([self.done["run"]] if self.done else [])))]

    @property
    def purgeable(self) -> bool:
        """Whether its features can be deleted: it was run, or a run of it started before it was withdrawn."""
        return bool(self.folders) and not self.pending


class Ledger:
    """The checked lines of a ledger.

    Args:
        path: the file.
        text: its content.

    Raises:
        UserError: a line is cut, edited, missing, out of order, or contradicts those before it.
    """

    def __init__(self, path: Path, text: bytes):
        self.path, self.head, self.lines = path, START, 0
        self.first = ""  # the hash of the first line, by which folders of runs name the ledger
        self._hashes = {START}  # of all lines
        self._requests: dict[int, Request] = {}
        self._waiting: collections.deque[int] = collections.deque()  # the numbers of pending requests
        self._owners: dict[str, int] = {}  # the request of each person, unless it was withdrawn
        if text.startswith(codecs.BOM_UTF8):
            raise UserError(f"{path}, line 1: it begins with a byte order mark; {REMEDY}.")
        if text and not text.endswith(b"\n"):
            line = text.count(b"\n") + 1
            raise UserError(f"{path}, line {line}: it is cut, since it does not end with a newline; {REMEDY}.")
        for number, entry in json_files.parse_json_lines(text, str(path), remedy=REMEDY):
            with located(f"{path}, line {number}"):
                self._add(number, entry)
        if text.count(b"\n") > self.lines:
            raise UserError(f"{path}, line {self.lines + 1}: it is blank; {REMEDY}.")

    @classmethod
    def read(cls, path: Path) -> "Ledger":
        """Reads a ledger.

        Raises:
            UserError: there is none, or it is invalid.
        """
        return cls(path, files.read_bytes(path, json_files.MOST_BYTES))

    @property
    def requests(self) -> list[Request]:
        """All requests, in order."""
        return list(self._requests.values())

    @property
    def pending(self) -> list[Request]:
        """The requests that wait to be run, in order."""
        return [self._requests[number] for number in self._waiting]

    @property
    def finished(self) -> list[Request]:
        """The requests that were run, in order."""
        return [request for request in self.requests if request.done]

    def get(self, number: int) -> Request:
        """A request by its number.

        Raises:
            UserError: there is none.
        """
        if number not in self._requests:
            raise UserError(f"request {number} is not in the ledger, which has {len(self._requests)} requests.")
        return self._requests[number]

    def check_continues(self, head: str) -> None:
        """Checks that this is the ledger that was read before, perhaps with more lines.

        Args:
            head: the hash of the last line then.

        Raises:
            UserError: a line is gone: the file was moved, or another one was put in its place.
        """
        if head not in self._hashes:
            raise UserError(
                f"{self.path} is not the ledger that was there when this command began; move it back, and run the same "
                "command again."
            )

    def check_new(self, people: Sequence[str]) -> None:
        """Checks the people of a new request.

        Raises:
            UserError: there are none, or one of them was requested before or is named twice.
        """
        if not people:
            raise UserError("the request is empty; name at least one person.")
        if len(set(people)) < len(people):
            raise UserError("a person is named twice in one request; name each once.")
        owners = collections.Counter(self._owners[person] for person in people if person in self._owners)
        if owners:
            request, count = next(iter(owners.items()))
            raise UserError(
                f"{count} of the {len(people)} people were already requested, in request {request}; leave them out."
            )

    def extend(self, line: bytes) -> None:
        """Adds a line that the file does not have yet.

        Raises:
            UserError: the line would make the ledger invalid; the message names the file alone.
        """
        entry = json_files.parse_json(line, str(self.path), dict, remedy=REMEDY)
        with located(str(self.path)):
            self._add(self.lines + 1, entry)

    def _add(self, number: int, entry: Mapping[str, Any]) -> None:
        """Checks a line, and changes the requests as it says."""
        self._check(number, entry)
        self._apply(entry)
        self.head, self.lines = entry["hash"], number
        self._hashes.add(self.head)
        self.first = self.first or self.head

    def _check(self, number: int, entry: Mapping[str, Any]) -> None:
        """Checks the fields of a line and that it follows the line before it."""
        content = {name: value for name, value in entry.items() if name != "hash"}
        if entry.get("hash") != line_hash(content):
            raise UserError(f"it was edited, since its hash does not match its content; {REMEDY}.")
        if entry.get("previous") != self.head or entry.get("line") != number:
            raise UserError(f"it does not follow the line before it: lines were removed, added or moved; {REMEDY}.")
        kind = entry.get("kind")
        if not isinstance(kind, str) or kind not in KINDS:
            raise UserError(f"its kind is {kind!r}, and the kinds are {', '.join(KINDS)}; {REMEDY}.")
        known = {**COMMON, **KINDS[kind]}
        wrong = sorted(
            {name for name, expected in known.items() if type(entry.get(name)) is not expected} | entry.keys() - known
        )
        if wrong:
            raise UserError(f"its field {wrong[0]!r} is missing, unknown or of another type; {REMEDY}.")
        for name in ("run", "forget", "test"):
            files.check_length(entry.get(name, ""))
        if not _is_time(entry["time"]):
            raise UserError(f"its time is {json_files.describe(entry['time'])}, not one of ISO 8601; {REMEDY}.")
        if kind == "done" and (problem := requests_page.figures_problem(entry["figures"])):
            raise UserError(f"its figures {problem}; {REMEDY}.")

    def _apply(self, entry: Mapping[str, Any]) -> None:
        """Changes the requests as a line says."""
        kind, number = entry["kind"], entry["request"]
        if kind == "add":
            people = entry["people"]
            if number != len(self._requests) + 1:
                raise UserError(f"request {number} is added after {len(self._requests)} requests; {REMEDY}.")
            if not all(isinstance(person, str) and re.fullmatch(DIGEST, person) for person in people):
                raise UserError(f"its people are not digests of IDs; {REMEDY}.")
            self.check_new(people)
            fields = {name: entry[name] for name in ("forget", "test", "time")}
            self._requests[number] = Request(number, tuple(people), **fields)
            self._waiting.append(number)
            self._owners |= dict.fromkeys(people, number)
            return
        request = self.get(number)
        if kind == "purge":
            if not request.purgeable:
                raise UserError(f"request {number} was not run, so no features of its people are held.")
            self._requests[number] = dataclasses.replace(request, purged=True)
            return
        if not request.pending:
            raise UserError(f"request {number} was already {'run' if request.done else 'withdrawn'}.")
        if kind == "withdraw":
            self._requests[number] = dataclasses.replace(request, withdrawn=True)
            self._waiting.remove(number)
            for person in request.people:
                del self._owners[person]
            return
        if number != self._waiting[0]:
            raise UserError(f"request {number} was run before request {self._waiting[0]}; {REMEDY}.")
        if kind == "begin":
            self._requests[number] = dataclasses.replace(request, begun=(*request.begun, entry["run"]))
            return
        self._requests[number] = dataclasses.replace(request, done=dict(entry))
        self._waiting.popleft()


def _is_time(value: Any) -> bool:
    """Whether a value is a text such as 2026-01-01T00:00:00+00:00."""
    try:
        return datetime.datetime.fromisoformat(value).tzinfo is not None
    except (TypeError, ValueError):
        return False


def local(name: str) -> Path:
    """The path of a ledger that a user names.

    Raises:
        UserError: it is in a bucket, which cannot be written without losing what another process appends, it is
            standard input, no file can have the name, or it is a link to nothing, in whose place a new one would begin.
    """
    if "://" in name:
        raise UserError(f"{name}: the ledger must be a file of this machine.")
    if name == "-":
        raise UserError("-: the ledger must be a file, not the standard input; pass its name.")
    path = storage.resolve(name)
    files.check_length(os.fspath(path.absolute()))
    if path.is_symlink() and not path.exists():
        raise UserError(
            f"{path} is a link to {os.readlink(path)}, which does not exist; restore it or remove the link."
        )
    return path.resolve() if path.is_symlink() else path  # a file that is replaced must not replace a link to it


def hold(path: Path, command: str) -> contextlib.AbstractContextManager[None]:
    """Context manager in which no other process runs, withdraws or purges requests of a ledger; it may add some.

    Raises:
        UserError: another process does, or the file has a second name, under which another process could.
    """
    _check_one_name(path)
    return locks.hold(path.absolute().parent, command, path.name)


def check_workdir(workdir: Path, ledger: Ledger) -> None:
    """Checks that the runs in a folder are those of a ledger: another one would purge or replace them.

    Raises:
        UserError: they are not, or the file that records the ledger is damaged.
    """
    file = workdir / OWNER
    if file.exists():
        foreign = json_files.read_json(file, remedy=f"restore it from a copy of {workdir}").get("first") != ledger.first
    else:
        known = {folder for request in ledger.requests for folder in request.folders}
        foreign = any(folder not in known for folder in workdir.absolute().glob("[0-9]" * 4))
    if foreign:
        raise UserError(f"{workdir} has the runs of another ledger than {ledger.path}; pass that ledger or folder.")


def claim_workdir(workdir: Path, ledger: Ledger) -> None:
    """Records in a folder of runs which ledger they belong to; see `check_workdir`."""
    check_workdir(workdir, ledger)
    files.write_bytes(workdir / OWNER, json.dumps({"first": ledger.first}).encode())


def line_hash(content: Mapping[str, Any]) -> str:
    """The hash of a line from its other fields."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def encoded(ledger: Ledger, kind: str, request: int, fields: Mapping[str, Any]) -> bytes:
    """The line that follows the last one of a ledger."""
    time = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    content = {"line": ledger.lines + 1, "kind": kind, "request": request, "time": time, **fields}
    content["previous"] = ledger.head
    return json.dumps({**content, "hash": line_hash(content)}, ensure_ascii=False).encode() + b"\n"


def read_or_new(path: Path) -> Ledger:
    """Reads the ledger at a path; an empty one if there is no file."""
    return Ledger.read(path) if path.exists() else Ledger(path, b"")


def append(path: Path, make: Callable[[Ledger], tuple[str, int, Mapping[str, Any]]], known: Ledger) -> Ledger:
    """Appends a line; the file is replaced atomically, and another process that appends at the same time is not lost.

    Args:
        path: the file, which is created if it does not exist.
        make: returns kind, request and fields of the line that follows the lines of a ledger; it may be called again
            if another process was faster.
        known: the ledger as it was when the command began.

    Returns:
        The ledger with the new line.

    Raises:
        UserError: the ledger is invalid, or the new line would make it so; the file has a second name, or is not the
            ledger that is known.
    """
    path = path.absolute()
    if not path.parent.is_dir():
        raise UserError(f"{path}: there is no folder {path.parent}; create it.")
    outputs.check_file(path, "the ledger", outputs.JSON_OBJECT)
    head = known.head
    while True:
        if path.exists():
            files.read_bytes(path, json_files.MOST_BYTES)  # checks that it is a regular file, before it is opened
            _check_one_name(path)
        file = storage.VersionedFile(path)
        text, version = file.read()
        ledger = Ledger(path, text or b"")
        ledger.check_continues(head)
        head = ledger.head
        line = encoded(ledger, *make(ledger))
        ledger.extend(line)
        if file.write((text or b"") + line, version) is not None:
            return ledger


def _check_one_name(path: Path) -> None:
    """Checks that a file has no second name: the new line would be in a copy, and each name have another ledger.

    Raises:
        UserError: it has hard links.
    """
    if (names := path.stat().st_nlink) > 1:
        raise UserError(
            f"{path} has {names} names (hard links), and a new line would be added to one of them only; remove the "
            "others, or make them symbolic links."
        )
