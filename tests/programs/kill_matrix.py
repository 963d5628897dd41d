"""kill_matrix.py [WORD ...]: stops and damages a short run at every stage, and prints a table of what became of it.

Each cell begins with a copy of the run at the beginning of a stage, in which a fault comes at a point that depends on
nothing but the program (see `faults`). Then the same command runs again. It must finish, and leave the same bits as a
run that nothing disturbed: weights, answers, attacks, figures, metrics of each step, plots and report.

Words select rows and columns whose name has one of them. The cells run one after another in forks of one process that
has imported everything (see `fork_server`).
"""

import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bucket import Bucket
from faults import POINTS, RENAME, SNAPSHOTS, WORKDIR, Point
from fork_server import ForkServer, Outcome
from short_run import contents, differences, state_of, write_job

SIGNALS = ("SIGKILL", "SIGTERM", "SIGINT")
FULL = "full disk"
SECONDS = 900.0  # limit of one command

SAVE = "vkd_jax.checkpoints.orbax_checkpoints:Checkpoints.save"
LIST = "vkd_jax.checkpoints.orbax_checkpoints:_write_list"
TICK = "vkd_jax.training.metric_writer:Progress.tick"
FIT = "vkd_jax.training.loop:fit"
# By stage of the config: the points of a run, in order.
ROWS: dict[str, dict[str, Point]] = {
    "finetune": {
        "start: before the lock": Point("vkd_jax.runtime.locks:_acquire"),
        "start: config.json not complete": Point(RENAME, argument="config.json"),
        "data: the third row": Point("vkd_jax.benchmarks.cache:_packed", call=3),
        "data: read, inputs not yet bound": Point("vkd_jax.runs.workdir:Workdir.bind"),
        "new base model: folder not complete": Point(RENAME, argument="base"),
        "model loading": Point("vkd_jax.checkpoints.hf:load"),
        "fine-tuning: first step": Point(TICK, argument=1),
        "fine-tuning: while a checkpoint is written": Point(SAVE, argument=2, after=True),
        "fine-tuning: checkpoint without its list": Point(LIST),
        "fine-tuning: after a checkpoint": Point(TICK, argument=3),
        "fine-tuning: last step": Point(TICK, argument=4),
        "export of vanilla: folder not complete": Point(RENAME, argument="vanilla"),
        "export of vanilla: complete, not recorded": Point(RENAME, argument="vanilla", after=True),
        "evaluation of vanilla: begins": Point("vkd_jax.evaluation.evaluate:evaluate"),
        "evaluation of vanilla: not recorded": Point(RENAME, argument="answers/vanilla.jsonl", after=True),
    },
    "all": {
        "fine-tuning of retain_only": Point(TICK, "fine-tune retain_only", 3),
        "evaluation of retain_only": Point(RENAME, argument="answers/retain_only.jsonl"),
        "attack leak": Point(RENAME, argument="attacks/leak/vanilla.jsonl"),
        "attack quantize": Point(RENAME, argument="attacks/quantize/vanilla.jsonl"),
        "attack relearn: in training": Point("vkd_jax.training.loop:NoProgress.tick", "attack vanilla: relearn", 1),
        "teacher features": Point("vkd_jax.methods.feature_targets:record_taps", "prepare"),
        "saliency": Point("vkd_jax.methods.saliency:fisher_information", "prepare"),
        "unlearning: first step": Point(TICK, "unlearn", 1),
        "unlearning: while a checkpoint is written": Point(SAVE, "unlearn", 2, after=True),
        "unlearning: checkpoint complete": Point(LIST, "unlearn", after=True),
        "unlearning: after a checkpoint": Point(TICK, "unlearn", 3),
        "export of unlearned": Point(RENAME, argument="unlearned"),
        "manifest": Point(RENAME, argument="manifest.json"),
        "evaluation of unlearned": Point(RENAME, argument="answers/unlearned.jsonl"),
        "results: file not complete": Point(RENAME, argument="results.json"),
        "results: complete, not recorded": Point(RENAME, argument="results.json", after=True),
        "plots": Point(RENAME, argument="report/losses.png"),
        "report: file not complete": Point(RENAME, argument="report.md"),
        "report: complete, not recorded": Point(RENAME, argument="report.md", after=True),
    },
}
TRAINING = "unlearning: checkpoint complete"
LAST = "report: file not complete"

# Files of a run, the point at whose stage they are damaged ("" once the run has finished, `TRAINING` when it was
# stopped there).
FILES = {
    "config.json": "saliency",
    "inputs.json": "saliency",
    "records.json": "saliency",
    "timing.json": "saliency",
    "lock.json": "saliency",
    "data/*/*/*/*.array_record*": "saliency",
    "data/*/*/*/dataset_info.json": "saliency",
    "base/model.safetensors": "fine-tuning of retain_only",
    "base/tokenizer.json": "fine-tuning of retain_only",
    "vanilla/model.safetensors": "saliency",
    "vanilla/config.json": "saliency",
    "vanilla/tokenizer.json": "saliency",
    "answers/vanilla.jsonl": "evaluation of unlearned",
    "attacks/relearn/vanilla.jsonl": "evaluation of unlearned",
    "manifest.json": "evaluation of unlearned",
    "train/checkpoints/2/files.json": TRAINING,
    "train/checkpoints/2/state/_METADATA": TRAINING,
    "train/checkpoints/2/state/d/*": TRAINING,
    "train/metrics.jsonl": "report: file not complete",
    "unlearned/model.safetensors": "evaluation of unlearned",
    "answers/unlearned.jsonl": "report: file not complete",
    "results.json": "report: file not complete",
    "results.json, finished": "",
    "report.md, finished": "",
    "report/losses.png, finished": "",
    "portraits/*, finished": "",
    "unlearned/model.safetensors, finished": "",
    "unlearned/tokenizer.json, finished": "",
    "unlearned/certificate.json, finished": "",
    "manifest.json, finished": "",
    "train/metrics.jsonl, finished": "",
}


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "emptied": lambda path: os.truncate(path, 0),
    "a bit flipped": _flip,
    "deleted": Path.unlink,
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}

# Locks that a run finds in its folder: the file, and whether the run is refused.
LOCKS: dict[str, tuple[Callable[[], dict[str, Any]], bool]] = {
    "lock of a running process": (lambda: _owner(), True),
    "lock of a process that has ended": (lambda: _owner(pid=_ended_process(), started="earlier"), False),
    "lock of another host": (lambda: _owner(host="elsewhere"), True),
    "lock of another host that was lost": (lambda: _owner(host="elsewhere", renewed=0.0), False),
}
PLACES = ("on a disk", "gs://")


def _owner(**changes: Any) -> dict[str, Any]:
    from vkd_jax.runtime import locks

    return locks.owner("another run") | changes


def _ended_process() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


# ---- The cells ----


@dataclasses.dataclass
class Cell:
    """What became of a run."""

    first: str = ""  # how the disturbed command ended
    problems: list[str] = dataclasses.field(default_factory=list)
    log: str = ""  # of a command with a problem

    def __str__(self) -> str:
        return f"**{self.first}: {'; '.join(self.problems)}**" if self.problems else f"{self.first}, same bits"


class Matrix:
    """The undisturbed runs, and the cells that are compared with them.

    Args:
        server: runs the commands.
        folder: an empty folder.
        filled: the root of a small file system in memory that may be filled; None lets no file grow instead.
        bucket: the bucket that the server's commands see, for the column gs://.
    """

    def __init__(self, server: ForkServer, folder: Path, filled: Path | None = None, bucket: Bucket | None = None):
        self._server, self._folder, self._filled, self._bucket = server, folder, filled, bucket
        self._references: dict[str, Reference] = {}
        self._finished: set[tuple] = set()  # states from which a rerun left the same bits
        write_job(folder)

    def stopped(self, row: str, column: str) -> Cell:
        """Lets a fault come at the point of a row, and runs the command again."""
        reference = self._reference_of(row)
        on_disk = self._filled if self._filled and column == FULL else self._folder
        with copied(reference.snapshot(row), on_disk) as folder:
            act = [column] if column != FULL else ["full", str(folder / "filler")] if self._filled else ["limit"]
            points = {row: dataclasses.asdict(reference.points[row])}
            outcome = self._run(reference.stage, folder, "install", points, *act)
            (folder / "filler").unlink(missing_ok=True)
            cell = judged(outcome, column)
            return self._finish(reference, folder, cell)

    def damaged(self, row: str, column: str) -> Cell:
        """Damages a file of a run, and runs the command again; a refusal must name the file or its folder."""
        point, name = FILES[row], row.partition(",")[0]
        reference = self._reference_of(point or TRAINING)
        with copied(reference.snapshot(point) if point else reference.finished, self._folder) as folder:
            if point == TRAINING:
                values = {point: dataclasses.asdict(reference.points[point])}
                self._run(reference.stage, folder, "install", values, "SIGKILL")
            if name == "lock.json":
                (folder / WORKDIR / name).write_text(json.dumps({"pid": 1, "host": "elsewhere", "renewed": 0.0}))
            path = max((folder / WORKDIR).glob(name), key=lambda path: path.stat().st_size)
            whole = path.read_bytes()
            DAMAGE[column](path)
            outcome = self._run(reference.stage, folder)
            if outcome.status == 0 and "Traceback" not in outcome.stderr:
                cell = Cell("finished", log=outcome.stderr)
                cell.problems.extend(differences(reference.expected, contents(folder / WORKDIR)))
                return cell
            cell = Cell("named", log=outcome.stderr)
            error = last_line(outcome)
            if outcome.status != 2 or "Traceback" in outcome.stderr or not error.startswith("error: "):
                cell.problems.append(f"exit status {outcome.status}: {error}")
            elif path.name not in error and path.parent.name not in error:
                cell.problems.append(f"the file is not named: {error}")
            if path.is_dir():
                path.rmdir()
            path.write_bytes(whole)
            return self._finish(reference, folder, cell)

    def locked(self, row: str, column: str) -> Cell:
        """Runs the last stage in a folder that another process uses, or used."""
        lock, is_refused = LOCKS[row]
        reference = self._reference_of(LAST)
        with copied(reference.snapshot(LAST), self._folder) as folder:
            place = Disk(folder / WORKDIR) if column == PLACES[0] else InBucket(self._bucket, folder / WORKDIR)
            place.write("lock.json", json.dumps(lock()).encode())
            before = place.read()
            outcome = self._run(reference.stage, folder, workdir=place.workdir)
            cell = Cell(("refused" if is_refused else "taken over"), log=outcome.stderr)
            if not is_refused:
                cell.problems.extend([] if outcome.status == 0 else [f"{outcome.status}: {last_line(outcome)}"])
                cell.problems.extend(differences(reference.expected, place.read()))
                return cell
            if outcome.status != 2 or "is used by process" not in last_line(outcome):
                cell.problems.append(f"exit status {outcome.status}: {last_line(outcome)}")
            cell.problems.extend(differences(before, place.read()))
            place.write("lock.json", None)
            outcome = self._run(reference.stage, folder, workdir=place.workdir)
            cell.problems.extend(differences(reference.expected, place.read()))
            cell.log += f"\n---- rerun\n{outcome.stderr}"
            return cell

    def _reference_of(self, row: str) -> "Reference":
        stage = next(stage for stage, points in ROWS.items() if row in points)
        if stage not in self._references:
            folder = self._folder / stage
            folder.mkdir()
            points = {name: dataclasses.asdict(point) for name, point in ROWS[stage].items()}
            outcome = self._run(stage, folder, "record", points)
            if outcome.status != 0:
                raise RuntimeError(f"the undisturbed run failed: {outcome.stderr[-3000:]}")
            self._references[stage] = Reference(stage, folder)
        return self._references[stage]

    def _finish(self, reference: "Reference", folder: Path, cell: Cell) -> Cell:
        """Runs the command again without a fault, and compares what it leaves.

        A state that a fault left before is not tried again, since what a command does depends on nothing else.
        """
        state = (reference.stage, *state_of(folder / WORKDIR))
        if cell.problems or state in self._finished:
            return cell
        outcome = self._run(reference.stage, folder)
        if outcome.status != 0 or "Traceback" in outcome.stderr:
            cell.problems.append(f"the rerun ended with {outcome.status}: {last_line(outcome)}")
        else:
            cell.problems.extend(differences(reference.expected, contents(folder / WORKDIR)))
        cell.log += f"\n---- rerun\n{outcome.stderr}"
        if not cell.problems:
            self._finished.add(state)
        return cell

    def _run(self, stage: str, folder: Path, *prepare: Any, workdir: str = WORKDIR) -> Outcome:
        args = [f"--config={self._folder}/config.py:{stage}", f"--workdir={workdir}"]
        return self._server.run("vkd_jax.main", args, folder, SECONDS, prepare)


class Reference:
    """An undisturbed run with a copy of its folder at the beginning of each stage.

    Args:
        stage: the stage of the config.
        folder: the folder that the command ran in.
    """

    def __init__(self, stage: str, folder: Path):
        self.stage, self.points, self._folder, self.finished = stage, ROWS[stage], folder, folder / WORKDIR
        self.expected = contents(self.finished)
        self._noted: dict[str, int] = json.loads((folder / POINTS).read_text())
        if missing := self.points.keys() - self._noted.keys():
            raise RuntimeError(f"the undisturbed run does not come to: {', '.join(missing)}")

    def snapshot(self, row: str) -> Path:
        """The run at the beginning of the stage of a point."""
        return self._folder / SNAPSHOTS / str(self._noted[row])


class Disk:
    """The folder of a run on a disk."""

    def __init__(self, folder: Path):
        self.workdir, self._folder = WORKDIR, folder

    def read(self) -> dict[str, bytes]:
        """The `contents` of the run."""
        return contents(self._folder)

    def write(self, name: str, data: bytes | None) -> None:
        """Writes a file, or deletes it if there are no data."""
        if data is None:
            (self._folder / name).unlink(missing_ok=True)
        else:
            (self._folder / name).write_bytes(data)


class InBucket:
    """The folder of a run in a bucket, as a copy of one on a disk."""

    def __init__(self, bucket: Bucket, folder: Path):
        self.workdir, self._bucket, self._folder = "gs://mine/run", bucket, folder
        bucket.clear()
        for path in folder.rglob("*"):
            if path.is_file() and path.relative_to(folder).parts[0] not in ("data", "train"):
                self.write(str(path.relative_to(folder)), path.read_bytes())
        self.write("train/metrics.jsonl", (folder / "train" / "metrics.jsonl").read_bytes())

    def read(self) -> dict[str, bytes]:
        """The `contents` of the run; what the bucket does not have of the training is that of the disk."""
        for name, data in self._bucket.objects.items():
            path = self._folder / name.removeprefix("run/")
            if data:  # others are folders
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
        if "run/lock.json" not in self._bucket.objects:
            (self._folder / "lock.json").unlink(missing_ok=True)
        return contents(self._folder)

    def write(self, name: str, data: bytes | None) -> None:
        """Writes an object, or deletes it if there are no data."""
        if data is not None:
            self._bucket.objects[f"run/{name}"] = data
        elif f"run/{name}" in self._bucket.objects:
            del self._bucket.objects[f"run/{name}"]


@contextlib.contextmanager
def copied(source: Path, root: Path) -> Iterator[Path]:
    """A temporary folder with a copy of a run."""
    with tempfile.TemporaryDirectory(dir=root, prefix="cell-") as folder:
        shutil.copytree(source, Path(folder) / WORKDIR)
        yield Path(folder)


def judged(outcome: Outcome, column: str) -> Cell:
    """What is wrong with the end of a disturbed command."""
    cell, status = Cell(log=outcome.stderr), outcome.status
    if "Traceback" in outcome.stderr:
        cell.problems.append("it printed a traceback")
    errors = [line for line in outcome.stderr.splitlines() if line.startswith("error: ")]
    expected = {"SIGKILL": (-9,), "SIGTERM": (-15, 143), "SIGINT": (130,), FULL: (2,)}[column]
    if status not in expected:
        cell.problems.append(f"exit status {status}: {last_line(outcome)}")
    if column == FULL and (len(errors) != 1 or "cannot write" not in errors[0] and "disk is full" not in errors[0]):
        cell.problems.append(f"no sentence on the disk: {last_line(outcome)}")
    elif column != FULL and errors:
        cell.problems.append(f"an error: {errors[0]}")
    cell.first = f"{status}{' saved' if 'which is saved' in outcome.stderr else ''}"
    return cell


def last_line(outcome: Outcome) -> str:
    """The last line of a log."""
    return (outcome.stderr.strip().splitlines() or [""])[-1][:200]


def main(words: list[str]) -> int:
    """Prints the tables of the selected rows and columns, and what is wrong; returns the exit status."""
    problems, cells, start = [], 0, time.monotonic()
    with contextlib.ExitStack() as stack:
        scratch, served = (Path(stack.enter_context(tempfile.TemporaryDirectory())) for _ in range(2))
        filled, bucket = stack.enter_context(small_file_system()), stack.enter_context(Bucket(served))
        variables = bucket.variables | {"XDG_CACHE_HOME": str(served), "GCS_STAT_CACHE_MAX_AGE": "0"}
        server = stack.enter_context(ForkServer(variables, bucket.packages))
        matrix = Matrix(server, scratch, filled, bucket)
        points = [row for stage in ROWS.values() for row in stage]
        for title, rows, columns, run in (
            ("point of the run", points, [*SIGNALS, FULL], matrix.stopped),
            ("file that is damaged", list(FILES), list(DAMAGE), matrix.damaged),
            ("two runs at once", list(LOCKS), list(PLACES), matrix.locked),
        ):
            columns = [name for name in columns if name in words] or columns
            chosen = [word for word in words if word not in (*SIGNALS, FULL, *DAMAGE, *PLACES)]
            rows = [row for row in rows if not chosen or any(word in row for word in chosen)]
            print(f"| {title} |", " | ".join(columns), "|\n| --- |" + " --- |" * len(columns), flush=True)
            for row in rows:
                print(f"| {row} |", end="", flush=True)
                for column in columns:
                    cell, cells = run(row, column), cells + 1
                    print(f" {cell} |", end="", flush=True)
                    if cell.problems:
                        problems.append(f"---- {row}, {column}: {'; '.join(cell.problems)}\n{cell.log[-6000:]}")
                print(flush=True)
            print()
    print(f"{cells} cells in {time.monotonic() - start:.0f} s, {len(problems)} with a problem")
    print("\n".join(problems), file=sys.stderr)
    return bool(problems)


@contextlib.contextmanager
def small_file_system() -> Iterator[Path | None]:
    """Mounts a file system of 64 MiB in memory, which only this process and its children see; None if it may not."""
    with tempfile.TemporaryDirectory() as folder:
        mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "none", folder]
        if subprocess.run(mount, capture_output=True).returncode:
            yield None
            return
        try:
            yield Path(folder)
        finally:
            subprocess.run(["umount", folder], check=True)


if __name__ == "__main__":
    if "KILL_MATRIX" not in os.environ and shutil.which("unshare"):  # mounts end with the process
        os.environ["KILL_MATRIX"] = "1"
        if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode == 0:
            os.execvp("unshare", ["unshare", "-rm", sys.executable, *sys.argv])
    sys.exit(main(sys.argv[1:]))
