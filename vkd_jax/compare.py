"""python -m vkd_jax.compare --config configs/tiny.py:compare --workdir DIR [--workers 2]

Methods x seeds on one benchmark, each method tuned with an equal number of tries on people who are not reported:

    tuning vanilla --> trials of each method --> the best settings --> a run for each seed, with attacks --> one table
    controls: the vanilla and the retain-only model, evaluated and attacked once, lent to every run

Every run is a folder of `vkd_jax.main`, and can be read as one: controls, tuning/METHOD/NUMBER, runs/METHOD/SEED. What
is finished is not run again, so that the same command goes on where it stood. A model that the config does not give is
fine-tuned first, in models/. The outcome: comparison.json (all figures, see `comparison.collect`), comparison.md,
pareto.png and relearning.png.

Exit status: 0 done, 1 some run failed (the table says which), 2 bad input, 143 stopped by SIGTERM, all states saved.
"""

import concurrent.futures
import concurrent.futures.process
import contextlib
import dataclasses
import functools
import json
import multiprocessing
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections
from absl import app, flags, logging

from vkd_jax.config import command_line, schema
from vkd_jax.reporting import charts, comparison, tables
from vkd_jax.runs import workdir
from vkd_jax.runtime import files, log, malloc, storage
from vkd_jax.types import UserError

LENT = ("vanilla", "retain_only")  # models that are the same in every run


@dataclasses.dataclass(frozen=True)
class Task:
    """A run of the pipeline that can begin when others have ended; its config may depend on what they found."""

    name: str  # and folder
    needs: frozenset[str]
    make: Callable[[], ml_collections.ConfigDict]
    root: Path
    lender: str  # a run whose answers of the given models are taken over

    def run(self) -> "Run":
        """The run itself, now that it can begin."""
        return Run(self.root / self.name, self.make(), self.root / self.lender if self.lender else None)


@dataclasses.dataclass(frozen=True)
class Run:
    """What a worker is given."""

    path: Path
    config: ml_collections.ConfigDict
    lender: Path | None


def run(config: ml_collections.ConfigDict, path: str | Path, workers: int = 0) -> dict[str, Any]:
    """Runs or continues a comparison, and returns what stands in comparison.json.

    Args:
        config: of one run, with a section `compare`: see `schema.CompareConfig`.
        path: the folder.
        workers: runs at once, each with its share of the cores; 0 is one a core on CPUs and one at all elsewhere.

    Raises:
        UserError: the config is not one of a comparison.
        Stopped: SIGTERM arrived.
    """
    if "compare" not in config:
        raise UserError("this config compares nothing: it has no section `compare`; see configs/tiny.py:compare.")
    if "://" in str(path):
        raise UserError(f"--workdir={path} is no folder of this machine, where all runs of a comparison are made.")
    plan = Plan(config, Path(path))
    plan.check()
    with storage.write_errors():
        plan.path.mkdir(parents=True, exist_ok=True)
    # Runs of one method share their programs; each worker would compile them anew for each run.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(plan.path / "cache"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
    failures = execute(plan.tasks(), workers or default_workers())
    trials = {name: plan.trials(name) for name in plan.names}
    found = comparison.collect(plan.folders(), trials, failures)
    files.write_bytes(plan.path / "comparison.json", (json.dumps(found, indent=1, ensure_ascii=False) + "\n").encode())
    for name, png in (("pareto", charts.pareto(found)), ("relearning", charts.relearning(found))):
        if png:
            files.write_bytes(plan.path / f"{name}.png", png)
    files.write_bytes(plan.path / "comparison.md", tables.document(found).encode())
    return found


class Plan:
    """Which runs a comparison consists of."""

    def __init__(self, config: ml_collections.ConfigDict, path: Path):
        self.path, self.compare = path, config.compare
        self.base = config.copy_and_resolve_references()
        with self.base.unlocked():
            del self.base.compare
        self.base.data.cache = self.base.data.cache or str(path / "data")

    def check(self) -> None:
        """Makes every config once, before anything is run.

        Raises:
            UserError: a seed or a setting cannot be, or the folder is a file.
        """
        seeds = self.compare.seeds
        if not seeds or len(set(seeds)) < len(seeds) or not all(isinstance(seed, int) and seed >= 0 for seed in seeds):
            raise UserError(f"config.compare.seeds={seeds!r}: give numbers from 0 on, each once, such as (0, 1, 2).")
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path} is a file; pass a folder as --workdir.")
        for name, entrant in self.compare.entrants.items():
            self._final(name, seeds[0])
            for number in range(len(entrant.search) if self.compare.tuning else 0):
                self._trial(name, number)

    def tasks(self) -> dict[str, Task]:
        """All runs by name."""
        tasks = {}
        for name in LENT if not self.base.model.path else ():
            stage = "finetune" if name == "vanilla" else name
            tasks[f"models/{name}"] = self._task((), lambda stage=stage: self._config(stage=stage))
        tasks["controls"] = self._task(tasks, lambda: self._given(self._config(stage="audit")))
        if self.compare.tuning:
            tasks["tuning/vanilla"] = self._task((), lambda: self._config(self.compare.tuning, stage="finetune"))
        for name, entrant in self.compare.entrants.items():
            trials = [f"tuning/{_folder(name)}/{i}" for i in range(len(entrant.search) if self.compare.tuning else 0)]
            for i, trial in enumerate(trials):
                make = functools.partial(self._trial, name, i)
                tasks[trial] = self._task(["tuning/vanilla"], make, lender="tuning/vanilla")
            for seed in self.compare.seeds:
                make = functools.partial(self._final, name, seed)
                tasks[f"runs/{_folder(name)}/{seed}"] = self._task(["controls", *trials], make, lender="controls")
        return {name: dataclasses.replace(task, name=name) for name, task in tasks.items()}

    def folders(self) -> dict[str, list[Path]]:
        """The finished runs of each entrant, and of the controls."""
        named = {name: [self.path / "runs" / _folder(name) / str(i) for i in self.compare.seeds] for name in self.names}
        finished = {name: [f for f in paths if (f / "results.json").exists()] for name, paths in named.items()}
        return {"controls": [self.path / "controls"], **finished}

    def trials(self, name: str) -> list[dict[str, Any]]:
        """The trials of an entrant with what they kept and forgot; a failed one has neither."""
        found = []
        for i, settings in enumerate(self.compare.entrants[name].search if self.compare.tuning else ()):
            file = self.path / "tuning" / _folder(name) / str(i) / "results.json"
            measured = comparison.judged(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else {}
            found.append({"settings": settings, **measured})
        return found

    @property
    def names(self) -> list[str]:
        """The entrants, in order."""
        return list(self.compare.entrants)

    def _task(self, needs: Iterable[str], make: Callable[[], ml_collections.ConfigDict], lender: str = "") -> Task:
        return Task("", frozenset(needs), make, self.path, lender)

    def _config(self, *settings: str, entrant: str = "", stage: str = "unlearn") -> ml_collections.ConfigDict:
        """The config of a run: the base, what the entrant changes, and more settings, the last one counting."""
        config = self.base.copy_and_resolve_references()
        config.stage = stage
        if entrant:
            section = self.compare.entrants[entrant]
            config.method = section.method
            settings = (section.settings, *settings)
        for text in settings:
            schema.override(config, text)
        return config

    def _given(self, config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
        """With the models that were made first, if the config gives none."""
        if not config.model.path:
            config.model.path, config.model.retain_only = (str(self.path / "models" / n / n) for n in LENT)
        return config

    def _trial(self, name: str, number: int) -> ml_collections.ConfigDict:
        config = self._config(self.compare.tuning, self.compare.entrants[name].search[number], entrant=name)
        config.model.path, config.model.retain_only = str(self.path / "tuning" / "vanilla" / "vanilla"), ""
        config.attacks.names = ""
        return config

    def _final(self, name: str, seed: int) -> ml_collections.ConfigDict:
        chosen = comparison.best(self.trials(name))
        config = self._given(self._config(chosen["settings"] if chosen else "", entrant=name))
        config.seed = seed
        return config


def _folder(name: str) -> str:
    return re.sub(r"\W+", "_", name).strip("_")


class Stopped(Exception):
    """SIGTERM arrived; every run's state is on disk."""

    def __init__(self):
        super().__init__("stopped; what was done is saved: run the same command again to go on")


def execute(tasks: Mapping[str, Task], workers: int) -> dict[str, str]:
    """Runs all tasks, as many at once as there are workers, and returns why those that failed did.

    A trial that failed is a bad trial, and its method has others; where a model or the controls fail, nothing goes on.
    """
    waiting, ended, failures = dict(tasks), set(), {}
    needed = {name for name in tasks if name.endswith("vanilla") or name.startswith("models/") or name == "controls"}
    context = multiprocessing.get_context("spawn")
    cores = context.Queue()
    for share in _shares(workers):
        cores.put(share)
    pool = concurrent.futures.ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(cores,))
    running: dict[concurrent.futures.Future, str] = {}
    with _passing_on_sigterm() as stopped:
        try:
            while waiting or running:
                ready = [name for name, task in waiting.items() if task.needs <= ended]
                # No more than can run: what is queued could not be stopped.
                for name in ready[: workers - len(running)]:
                    running[pool.submit(_work, waiting.pop(name).run())] = name
                done, _ = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
                for future in done:
                    name, failure = running.pop(future), future.result()
                    if stopped:
                        raise Stopped
                    ended.add(name)
                    logging.info("%d of %d: %s%s", len(ended), len(tasks), name, f": {failure}" if failure else "")
                    if failure and name in needed:
                        raise UserError(f"{name}: {failure}")
                    if failure:
                        failures[name] = failure
        except concurrent.futures.process.BrokenProcessPool:
            if stopped:
                raise Stopped from None
            raise
        finally:
            pool.shutdown(wait=not stopped, cancel_futures=True)
    return failures


def default_workers() -> int:
    """One for each core on CPUs; an accelerator is not shared."""
    import jax

    return len(os.sched_getaffinity(0)) if jax.default_backend() == "cpu" else 1


def _shares(workers: int) -> list[set[int]]:
    """The cores of each worker."""
    cores = sorted(os.sched_getaffinity(0))
    return [set(cores[i::workers]) or set(cores) for i in range(workers)]


def _begin(cores: Any) -> None:
    os.sched_setaffinity(0, cores.get())
    flags.FLAGS.mark_as_parsed()  # the threads that make batches read them
    log.setup()
    malloc.keep_freed_memory()


def _work(run: Run) -> str:
    """Runs the pipeline in a worker; returns "" or why it failed. What it says goes to log.txt beside its results."""
    from vkd_jax.runs import pipeline
    from vkd_jax.training import loop
    from vkd_jax.training.preemption import Stopped

    try:
        workdir.Workdir(run.path, run.config)
        with open(run.path / "log.txt", "a", encoding="utf-8") as log_file:
            os.dup2(log_file.fileno(), sys.stderr.fileno())
        if run.lender:
            _lend(run.lender, run.path)
        pipeline.run(run.config, run.path)
    except (UserError, loop.Diverged, Stopped) as error:
        return str(error)
    return ""


def _lend(lender: Path, borrower: Path) -> None:
    """Takes over the answers and records of models that are the same in both runs."""
    for model in LENT:
        for file in [lender / "answers" / f"{model}.jsonl", *lender.glob(f"attacks/*/{model}.jsonl")]:
            target = borrower / file.relative_to(lender)
            if file.exists() and not target.exists():
                files.copy(file, target)


@contextlib.contextmanager
def _passing_on_sigterm():
    """A list that is no longer empty once SIGTERM arrived, which is passed on to the workers."""
    stopped: list[int] = []

    def stop(number, _):
        stopped.append(number)
        for child in multiprocessing.active_children():
            child.terminate()

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGTERM, previous)


def command(argv: Sequence[str], values: flags.FlagValues = flags.FLAGS) -> int:
    """Runs what the flags say."""
    if values.config is None or values.workdir is None:
        return command_line.bad_input("pass --config FILE:compare and --workdir DIR.")
    try:
        found = run(values.config, values.workdir, values.workers)
    except UserError as error:
        return command_line.bad_input(str(error))
    except Stopped as error:
        print(error, file=sys.stderr)
        return 143
    except concurrent.futures.process.BrokenProcessPool:
        print("error: a worker died, for want of memory perhaps; try again with --workers 1.", file=sys.stderr)
        return 1
    print((Path(values.workdir) / "comparison.md").read_text(encoding="utf-8"))
    return 1 if found["failures"] else 0


if __name__ == "__main__":
    command_line.define()
    flags.DEFINE_integer("workers", 0, "Runs at once; 0 is one for each CPU core, or one on an accelerator.", 0)
    log.setup()
    app.run(command, flags_parser=command_line.parse)
