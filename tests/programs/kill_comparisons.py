"""kill_comparisons.py [WORD ...]: stops and damages a tiny comparison, and prints a table of what became of it.

Two methods that do not train are compared for one seed by one worker. A fault comes in the process of the comparison,
at a point that depends on nothing but the program (see `faults`); then the same command runs again, and must leave the
same bits as a comparison that nothing disturbed: the figures of comparison.json but for times, the plots, the answers
and the weights. comparison.md must be what comparison.json says. Words select rows.
"""

import contextlib
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from faults import RENAME, WORKDIR, Point
from fork_server import ROOT, ForkServer, Outcome
from kill_matrix import DAMAGE, FULL, SECONDS, Cell, _owner, copied, differences, judged, last_line
from short_run import contents, write_job

CONFIG = """
import importlib.util

from vkd_jax.config import defaults

spec = importlib.util.spec_from_file_location("tiny", {tiny!r})
tiny = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tiny)


def get_config():
    config = tiny.get_config("")
    config.data.source = {data!r}
    config.model.update(path="tiny_llava", base="", retain_only="")
    config.eval.update(max_items=2, batch_size=16)
    config.attacks.names = "leak"
    entrants = {{name: defaults.entrant("manu", f"method.share={{share}}") for name, share in (("a", 0.1), ("b", 0.2))}}
    config.compare = defaults.comparison(entrants, seeds=(3,))
    return config
"""
FILE = "comparison.json"
WAIT = "concurrent.futures:wait"  # the comparison waits for a run
STOPPED = {  # by point: the columns of the table
    "a worker has started": (Point(WAIT), ("SIGKILL", "SIGTERM", "SIGINT")),
    "between two entrants": (Point(WAIT, call=2, after=True), ("SIGKILL", "SIGTERM", "SIGINT")),
    "comparison.json not complete": (Point(RENAME, argument=FILE), ("SIGKILL", FULL)),
    "plots": (Point(RENAME, argument="pareto.png"), ("SIGTERM", FULL)),
}
FILES = {FILE: tuple(DAMAGE), "runs/a/3/results.json": ("truncated",), "runs/a/3/answers/unlearned.jsonl": ("emptied",)}
LOCKED = "lock of a running process"


class Comparisons:
    """The undisturbed comparison, and the cells that are compared with it.

    Args:
        server: runs the commands.
        folder: an empty folder.
    """

    def __init__(self, server: ForkServer, folder: Path):
        self._server, self._folder = server, folder
        write_job(folder)
        config = CONFIG.format(tiny=str(ROOT / "configs" / "tiny.py"), data=str(folder / "data"))
        (folder / "config.py").write_text(config)
        outcome = self._run(folder)
        if outcome.status != 0:
            raise RuntimeError(f"the undisturbed comparison failed: {outcome.stderr[-3000:]}")
        self._expected = comparison_contents(folder / WORKDIR)

    def stopped(self, row: str, column: str) -> Cell:
        """Lets a fault come at the point of a row, and runs the command again."""
        point, _ = STOPPED[row]
        with tempfile.TemporaryDirectory(dir=self._folder) as name:
            folder = Path(name)
            act = ["limit"] if column == FULL else [column]
            outcome = self._run(folder, "install", {row: dataclasses.asdict(point)}, *act)
            return self._finish(folder, judged(outcome, column))

    def damaged(self, row: str, column: str) -> Cell:
        """Damages a file of the finished comparison, and runs the command again; a refusal must name the file."""
        with copied(self._folder / WORKDIR, self._folder) as folder:
            path = folder / WORKDIR / row
            whole = path.read_bytes()
            DAMAGE[column](path)
            outcome = self._run(folder)
            if outcome.status == 0:
                return self._compared(folder, Cell("finished", log=outcome.stderr))
            cell = Cell("named", log=outcome.stderr)
            if outcome.status != 2 or path.name not in last_line(outcome):
                cell.problems.append(f"exit status {outcome.status}: {last_line(outcome)}")
            if path.is_dir():
                path.rmdir()
            path.write_bytes(whole)
            return self._finish(folder, cell)

    def locked(self, row: str, column: str) -> Cell:
        """Runs the command in the folder of a comparison that another process computes."""
        del row, column
        with copied(self._folder / WORKDIR, self._folder) as folder:
            (folder / WORKDIR / "lock.json").write_text(json.dumps(_owner()))
            outcome = self._run(folder)
            cell = Cell("refused", log=outcome.stderr)
            if outcome.status != 2 or "is used by process" not in last_line(outcome):
                cell.problems.append(f"exit status {outcome.status}: {last_line(outcome)}")
            return self._compared(folder, cell)

    def _finish(self, folder: Path, cell: Cell) -> Cell:
        """Runs the command again without a fault, and compares what it leaves."""
        if cell.problems:
            return cell
        outcome = self._run(folder)
        cell.log += f"\n---- rerun\n{outcome.stderr}"
        if outcome.status != 0 or "Traceback" in outcome.stderr:
            cell.problems.append(f"the rerun ended with {outcome.status}: {last_line(outcome)}")
            return cell
        return self._compared(folder, cell)

    def _compared(self, folder: Path, cell: Cell) -> Cell:
        cell.problems.extend(differences(self._expected, comparison_contents(folder / WORKDIR)))
        return cell

    def _run(self, folder: Path, *prepare: Any) -> Outcome:
        args = [f"--config={self._folder}/config.py", f"--workdir={WORKDIR}", "--workers=1"]
        return self._server.run("vkd_jax.compare", args, folder, SECONDS, prepare)


def comparison_contents(workdir: Path) -> dict[str, bytes]:
    """What a comparison leaves, without what differs between two undisturbed ones."""
    from vkd_jax.reporting import tables

    collected = json.loads((workdir / FILE).read_bytes())
    page = (workdir / "comparison.md").read_text()
    files = {"comparison.md": b"as comparison.json" if page == tables.document(collected) else page.encode()}
    collected["meta"].pop("commits")
    for row in collected["rows"]:
        for run in row.get("runs", ()):
            for name in ("commit", "seconds"):
                run.pop(name, None)
    files[FILE] = json.dumps(collected, sort_keys=True).encode()
    files["pareto.png"] = (workdir / "pareto.png").read_bytes()
    for folder in ("controls", "runs/a/3", "runs/b/3"):
        for name, data in contents(workdir / folder).items():
            if name.startswith(("answers/", "attacks/", "unlearned/")) and "." in name:
                files[f"{folder}/{name}"] = data
    return {name: data for name, data in files.items() if not name.endswith(("README.md", "certificate.json"))}


def main(words: list[str]) -> int:
    """Prints the table of the selected rows, and what is wrong; returns the exit status."""
    problems, count, start = [], 0, time.monotonic()
    with contextlib.ExitStack() as stack:
        scratch, cache = (Path(stack.enter_context(tempfile.TemporaryDirectory())) for _ in range(2))
        variables = {"XDG_CACHE_HOME": str(cache), "JAX_COMPILATION_CACHE_DIR": str(cache / "jax")}
        matrix = Comparisons(stack.enter_context(ForkServer(variables)), scratch)
        rows: list[tuple[str, tuple[str, ...], Callable[[str, str], Cell]]] = [
            *((row, columns, matrix.stopped) for row, (_, columns) in STOPPED.items()),
            *((row, columns, matrix.damaged) for row, columns in FILES.items()),
            (LOCKED, ("on a disk",), matrix.locked),
        ]
        for row, columns, run in rows:
            for column in columns if not words or any(word in row for word in words) else ():
                cell, count = run(row, column), count + 1
                print(f"| {row} | {column} | {cell} |", flush=True)
                if cell.problems:
                    problems.append(f"---- {row}, {column}\n{cell.log[-6000:]}")
    print(f"{count} cells in {time.monotonic() - start:.0f} s, {len(problems)} with a problem")
    print("\n".join(problems), file=sys.stderr)
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
