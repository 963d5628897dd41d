"""Deletes what the runs of a ledger's requests hold of people, and records it only when it is seen to be gone.

Everything is checked before anything is deleted: that each run of the ledger is where the ledger says, that its records
can be read, that features which it wrote are there, and that nothing to be deleted is or has a link, since what a link
points to would be kept. An interrupted purge is resumed by the same command: the entries of cached features in
records.json are dropped before the features, so features without an entry need not be there.
"""

import os
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from vkd_jax.runs import features
from vkd_jax.runs.ledger import Ledger, Request, append, check_workdir, hold
from vkd_jax.runtime import files, json_files, locks, records
from vkd_jax.types import UserError, located

COMMAND = "vkd requests purge"
# What a run's folder holds of people beside its model: questions, answers, and figures that name people.
PERSONAL = ("answers", "features", "judge", "portraits", "report", "report.md", "report.html", "results.json", "data")
PARTS = ("", "naive", "batch")  # where the runs of a workdir are, by their numbers
_NUMBER = re.compile("[0-9]{4}|[1-9][0-9]{4,}")
RESTORE = "move it back, mount its disk or restore it from a copy; nothing was deleted"


def purge(path: Path, numbers: Sequence[int]) -> list[Path]:
    """Deletes what is held of the people of some requests: cached features, and all answers of the ledger's models.

    Later requests can neither train against the return of these people nor ask about them.

    Args:
        path: the ledger.
        numbers: the requests; () for all that were run, or were withdrawn after a run of them had started.

    Returns:
        What was deleted.

    Raises:
        UserError: a request was not run, waits to be run, or is being run; or a run of the ledger, its records or its
            features are missing or damaged, are or have links, or cannot be deleted. The ledger is then not changed.
    """
    Ledger.read(path)
    with hold(path, COMMAND):
        ledger = Ledger.read(path)
        wanted = [ledger.get(number) for number in dict.fromkeys(numbers)]
        wanted = wanted or [request for request in ledger.requests if request.purgeable]
        for request in wanted:
            if request.pending and request.begun:
                raise UserError(f"request {request.number} has a run that has not ended; run it, or withdraw it first.")
            if not request.purgeable:
                raise UserError(f"request {request.number} was not run, so nothing of its people is held.")
        folders = {folder for request in wanted for folder in request.folders}
        for request in ledger.requests:
            with located(f"request {request.number}"):
                _check_runs(request)
        workdirs = sorted({folder.parent for request in ledger.requests for folder in request.folders})
        workdirs = [workdir for workdir in workdirs if workdir.is_dir()]  # others are of purged requests
        for workdir in workdirs:
            check_workdir(workdir, ledger)
            _check_known(workdir, ledger)
            for item in _held(workdir, folders):
                _check_links(item)
        deleted: list[Path] = []
        for workdir in workdirs:
            with locks.hold(workdir, COMMAND):
                deleted += _delete(workdir, folders)
        for request in ledger.requests:
            _check_gone(request, folders)
        for request in wanted:
            if not request.purged:
                ledger = append(path, lambda _, number=request.number: ("purge", number, {}), ledger)
    return deleted


def _check_runs(request: Request) -> None:
    """Checks that the runs of a request are where the ledger says, with the features that they wrote.

    The folders of a purged request may be gone.

    Raises:
        UserError: a folder, its records or its features are missing or damaged.
    """
    for folder in request.folders:
        finished = request.done is not None and folder == Path(request.done["run"])
        if not folder.is_dir():
            if request.purged:
                continue
            empty = "" if finished else ", or create an empty folder if you deleted it"
            raise UserError(f"there is no folder {folder}, in which it was run; {RESTORE}{empty}.")
        known = records.FILE in os.listdir(folder)
        if not finished and not known and not any(os.path.lexists(folder / name) for name in PERSONAL):
            continue  # it was stopped before it wrote anything
        entries = json_files.read_json(folder / records.FILE, remedy=RESTORE)
        for name in request.done["features"] if finished and not request.purged else ():
            if name in entries and not (folder / name).is_file():
                raise UserError(f"{folder / name} is missing, although its run wrote it; {RESTORE}.")


def _runs(workdir: Path) -> list[Path]:
    """The folders of runs in a workdir, those of the baselines included; other folders are the user's.

    Raises:
        UserError: the folder of a baseline holds answers, but no records.
    """
    runs, *baselines = ([x for x in sorted((workdir / name).glob("*")) if _NUMBER.fullmatch(x.name)] for name in PARTS)
    for run in (baselines := sum(baselines, [])):
        if any(os.path.lexists(run / name) for name in PERSONAL):
            json_files.read_json(run / records.FILE, remedy=RESTORE)
    return [run for run in (*runs, *baselines) if (run / records.FILE).is_file()]


def _check_known(workdir: Path, ledger: Ledger) -> None:
    """Checks that the runs in a workdir that hold something of people are those that a ledger names.

    Raises:
        UserError: one of them is not.
    """
    known = {folder for request in ledger.requests for folder in request.folders}
    others = [run for run in _runs(workdir) if run.parent == workdir and run not in known]
    if others := [run for run in others if any(os.path.lexists(run / name) for name in PERSONAL)]:
        raise UserError(
            f"{others[0]} is a run that no line of {ledger.path} names; move it out of {workdir} if it is another one, "
            "or restore the ledger from a copy; nothing was deleted."
        )


def _held(workdir: Path, folders: Collection[Path]) -> list[Path]:
    """What the runs in a workdir hold of people, cached features only of the runs in `folders`."""
    runs = _runs(workdir)
    held = [run / name for run in runs for name in PERSONAL if name != features.FOLDER or run in folders]
    held += [workdir / "data"] * bool(runs)  # the data of a run that was killed
    return [item for item in held if os.path.lexists(item)]


def _check_links(item: Path) -> None:
    """Checks that a file or folder that is to be deleted is no link and has none.

    Raises:
        UserError: there is a link.
    """
    remedy = "replace it by what it leads to, so that purge deletes that; nothing was deleted"
    if item.is_symlink():
        raise UserError(f"{item} is a link to {os.readlink(item)}, where nothing may be deleted; {remedy}.")
    files.check_no_links(item, remedy)


def _delete(workdir: Path, folders: Collection[Path]) -> Iterator[Path]:
    """Deletes what `_held` returns, and yields each file or folder when it is deleted.

    Raises:
        UserError: something cannot be deleted.
    """
    for item in _held(workdir, folders):
        if item.name == features.FOLDER:
            records.Records(item.parent).replace((f"{features.FOLDER}/",), ())
        try:
            files.remove(item)
        except OSError as error:
            reason = f"{error.filename}: {error.strerror}"
            raise UserError(f"{item} cannot be deleted ({reason}); change its permissions and purge again.") from error
        yield item


def _check_gone(request: Request, folders: Collection[Path]) -> None:
    """Checks that the folders of a request hold nothing more of people, except for features that are not purged.

    Raises:
        UserError: something is left.
    """
    for folder in request.folders:
        for name in PERSONAL:
            if (name != features.FOLDER or folder in folders) and os.path.lexists(folder / name):
                raise UserError(
                    f"{folder / name} is still there after it was deleted; end what writes it and purge again."
                )
