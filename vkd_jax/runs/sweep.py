"""The runs of a comparison: models, controls, trials of each method, and a run of each method for each seed.

    tuning vanilla --> trials of each method --> the best settings --> a run for each seed, with attacks --> one table
    controls: the vanilla and the retain-only model, evaluated and attacked once; every run reuses the answers

Every run is a working directory of `vkd_jax.main`: controls, tuning/METHOD/NUMBER, runs/METHOD/SEED. A vanilla or
retain-only model that the config does not give is fine-tuned first, in models/. Finished runs are not run again, so an
interrupted sweep resumes.
"""

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import ml_collections

from vkd_jax import results
from vkd_jax.config.comparison import folder_of
from vkd_jax.config.schema import RunConfig
from vkd_jax.reporting import comparison, comparison_plots, tables
from vkd_jax.runs.workdir import FOLDERS_OF_A_COMPARISON, SHARED_MODELS, check_kinds, check_links, make_folder
from vkd_jax.runs.worker_pool import Task, default_workers, execute
from vkd_jax.runtime import files, locks, outputs, records, storage
from vkd_jax.types import UserError

MARKS = ("controls", "tuning", "comparison.json")  # of a folder of a comparison, beside its models


def run(
    config: ml_collections.ConfigDict,
    path: str | Path,
    workers: int = 0,
    command: str = "called from Python: vkd_jax.runs.sweep.run",
) -> dict[str, Any]:
    """Runs or resumes a comparison, writes its tables and plots, and returns the contents of comparison.json.

    Args:
        config: The config of one run with a section `compare`: see `config.comparison`.
        path: The folder of the comparison.
        workers: How many runs are computed at once, each with its share of the cores; 0 is `default_workers`.
        command: How the program was started, as the results name it.

    Raises:
        UserError: The config is not valid for a comparison, the folder has other files, or a run that all others need
            failed.
        Stopped: SIGTERM or SIGINT arrived.
    """
    if "compare" not in config:
        raise UserError(
            "this config has no section `compare`. Pass one that has it, such as configs/tiny.py:runs=compare."
        )
    if "://" in str(path):
        raise UserError(f"--workdir={path}: the runs of a comparison need a folder of this machine.")
    sweep = Sweep(RunConfig.from_config_dict(config), storage.resolve(path))
    has_models = any((sweep.path / "models" / name).is_dir() for name in SHARED_MODELS)
    outputs.check_folder(sweep.path, "--workdir", (*MARKS, *["models"] * has_models), (locks.FILE,))
    sweep.check()
    with storage.write_errors():
        make_folder(sweep.path)
        check_links(sweep.path)
        check_kinds(sweep.path, FOLDERS_OF_A_COMPARISON)
        with locks.hold(sweep.path, command):
            files.remove_unfinished(sweep.path)
            return _run(sweep, workers or default_workers(), command)


def _run(sweep: "Sweep", workers: int, command: str) -> dict[str, Any]:
    """Executes the runs of a comparison, and writes its tables and plots."""
    # Runs of one method have the same programs; without the cache each worker would compile them again for each run.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(sweep.path / "cache"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
    failures = execute(sweep.tasks(), workers, command)
    trials = {name: sweep.trials(name) for name in sweep.entrants}
    collected = comparison.collect(sweep.finished_runs(), trials, failures)
    files.write_bytes(
        sweep.path / "comparison.json", (json.dumps(collected, indent=1, ensure_ascii=False) + "\n").encode()
    )
    plots = {"pareto": comparison_plots.pareto(collected), "relearning": comparison_plots.relearning(collected)}
    for name, png in plots.items():
        if png:
            files.write_bytes(sweep.path / f"{name}.png", png)
    files.write_bytes(sweep.path / "comparison.md", tables.document(collected).encode())
    return collected


class Sweep:
    """The runs that a comparison consists of."""

    def __init__(self, config: RunConfig, path: Path):
        self.path, self.compare = path, config.compare
        data = dataclasses.replace(config.data, cache=config.data.cache or str(path / "data"))
        self.base = dataclasses.replace(config, data=data, compare=None)

    @property
    def entrants(self) -> list[str]:
        """The names of the methods that are compared, in order."""
        return list(self.compare.entrants)

    def check(self) -> None:
        """Creates the config of every run once, before anything is run.

        Raises:
            UserError: A setting is not valid.
        """
        if not self.entrants:
            raise self.compare.error("entrants", "there are none. Give the methods to compare.")
        if self.compare.tuning:
            self._config(self.compare.tuning, stage="finetune")
        for name in self.entrants:
            self._final_config(name, self.compare.seeds[0])
            for number in range(len(self._search(name))):
                self._trial_config(name, number)

    def tasks(self) -> dict[str, Task]:
        """Returns all runs by name."""
        tasks: dict[str, Task] = {}

        def add(name: str, make_config: Callable, needs: Iterable[str] = (), lender: str = "") -> None:
            required = name.startswith("models/") or name in ("controls", "tuning/vanilla")
            lent = self.path / lender if lender else None
            tasks[name] = Task(self.path / name, make_config, frozenset(needs), lent, required)

        if not self.base.model.path:
            for name, stage in zip(SHARED_MODELS, ("finetune", "retain_only"), strict=True):
                add(f"models/{name}", functools.partial(self._config, stage=stage))
        add("controls", lambda: self._with_models(self._config(stage="audit")), needs=tasks)
        if self.compare.tuning:
            add("tuning/vanilla", lambda: self._config(self.compare.tuning, stage="finetune"))
        trials: dict[str, list[str]] = {name: [] for name in self.entrants}
        for name in self.entrants:
            for number in range(len(self._search(name)) if self._tuned(name) == name else 0):
                trials[name].append(f"tuning/{folder_of(name)}/{number}")
                make_config = functools.partial(self._trial_config, name, number)
                add(trials[name][-1], make_config, ["tuning/vanilla"], lender="tuning/vanilla")
        for seed in self.compare.seeds:  # seed by seed: an interrupted comparison then has a run of every method
            for name in self.entrants:
                needs = ["controls", *trials[self._tuned(name)]]
                make_config = functools.partial(self._final_config, name, seed)
                add(f"runs/{folder_of(name)}/{seed}", make_config, needs, lender="controls")
        return tasks

    def finished_runs(self) -> dict[str, list[Path]]:
        """Returns the folders of the controls, and of the finished runs of each entrant."""
        runs = {
            name: [self.path / "runs" / folder_of(name) / str(i) for i in self.compare.seeds] for name in self.entrants
        }
        finished = {name: [f for f in folders if _is_finished(f)] for name, folders in runs.items()}
        return {"controls": [self.path / "controls"], **finished}

    def trials(self, name: str) -> list[dict[str, Any]]:
        """Returns the settings of an entrant's trials, and of finished ones `comparison.tuning_measures`."""
        trials = []
        for number, settings in enumerate(self._search(name)):
            folder = self.path / "tuning" / folder_of(name) / str(number)
            measured = comparison.tuning_measures(comparison.read_results(folder)) if _is_finished(folder) else {}
            trials.append({"settings": settings, **measured})
        return trials

    def _tuned(self, name: str) -> str:
        """The entrant whose trials decide the settings of an entrant: itself, or the one that it is a variant of."""
        return self.compare.entrants[name].variant_of or name

    def _search(self, name: str) -> tuple[str, ...]:
        """The settings that are tried for an entrant."""
        return self.compare.entrants[name].search if self.compare.tuning else ()

    def _config(self, *settings: str, entrant: str = "", stage: str = "unlearn") -> RunConfig:
        """The base config with the entrant's changes and further settings; later settings override earlier ones."""
        config = dataclasses.replace(self.base, stage=stage)
        if entrant:
            section = self.compare.entrants[entrant]
            config = dataclasses.replace(config, method=section.method)
            settings = (section.settings, *settings)
        return config.override(" ".join(settings))

    def _with_models(self, config: RunConfig) -> RunConfig:
        """The config with the models of this sweep if it gives none."""
        if config.model.path:
            return config
        vanilla, retain_only = (str(self.path / "models" / name / name) for name in SHARED_MODELS)
        return dataclasses.replace(
            config, model=dataclasses.replace(config.model, path=vanilla, retain_only=retain_only)
        )

    def _trial_config(self, name: str, number: int) -> RunConfig:
        settings = ("attacks.names=", self.compare.tuning, self._search(name)[number])
        config = self._config(*settings, entrant=name)
        vanilla = str(self.path / "tuning" / "vanilla" / "vanilla")
        return dataclasses.replace(config, model=dataclasses.replace(config.model, path=vanilla, retain_only=""))

    def _final_config(self, name: str, seed: int) -> RunConfig:
        tuned = self._tuned(name)
        best = comparison.best(self.trials(tuned))
        changes = self.compare.entrants[name].settings if name != tuned else ""
        config = self._config(best["settings"] if best else "", changes, entrant=tuned)
        return dataclasses.replace(self._with_models(config), seed=seed)


def _is_finished(folder: Path) -> bool:
    """Whether a run has results, and they and the answers that they report are as the run wrote them."""
    return (folder / results.FILE).exists() and records.Records(folder).has_results(results.FILE)
