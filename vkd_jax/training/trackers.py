"""Experiment trackers that a training sends its metrics to, besides the files in its folder; off by default.

A tracker is a class with the methods of `Tracker` and one line in `TRACKERS` of vkd_jax/registry.py, by the name of its
package. A training that resumes continues its record: the folder of the training keeps the id.
"""

import importlib
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from vkd_jax import registry
from vkd_jax.runtime import files
from vkd_jax.types import UserError

PROJECT = "vkd_jax"  # unless WANDB_PROJECT or MLFLOW_EXPERIMENT_NAME names another one


class Tracker(Protocol):
    """A record of one training in an experiment tracker; its constructor takes the folder of the training."""

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Sends the metrics of a step."""

    def close(self) -> None:
        """Ends the record."""


def check(names: Sequence[str]) -> None:
    """Checks that the packages of trackers are installed.

    Raises:
        UserError: one is not.
    """
    for name in names:
        _package(name)


def open_tracker(name: str, folder: Path) -> Tracker:
    """Opens the record of a training, or a new one.

    Args:
        name: a key of `registry.TRACKERS`.
        folder: the folder of the training.
    """
    return registry.lookup("tracker", registry.TRACKERS, name)(folder)


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(f"train.trackers={name}: its package is not installed: pip install {name}.") from None


def _title(folder: Path) -> str:
    """The name of a training: its folder in the workdir, and the name of the workdir."""
    return "/".join(Path(folder).parts[-2:])


class Wandb:
    """A run of Weights & Biases.

    wandb ignores the metrics of steps that it has already, which a training that resumes logs again.

    Source: https://docs.wandb.ai/ref/python/sdk/functions/init
    """

    def __init__(self, folder: Path):
        file = folder / "wandb_run_id.txt"
        if not file.exists():
            files.write_bytes(file, uuid.uuid4().hex.encode())
        self._run = _package("wandb").init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=_title(folder),
            id=file.read_text(),
            resume="allow",
            settings={"console": "off"},  # log lines may name people of the data
        )

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Sends the metrics of a step."""
        self._run.log(dict(scalars), step=step)

    def close(self) -> None:
        """Ends the run."""
        self._run.finish()


class Mlflow:
    """A run of MLflow, in the store that MLFLOW_TRACKING_URI names.

    The client is used, since the metrics are sent by another thread than the one that opens the run, and MLflow's
    active run belongs to a thread.

    Source: https://mlflow.org/docs/latest/python_api/mlflow.client.html
    """

    def __init__(self, folder: Path):
        self._client = _package("mlflow").MlflowClient()
        file = folder / "mlflow_run_id.txt"
        if not file.exists():
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
            experiment = self._client.get_experiment_by_name(name)
            number = experiment.experiment_id if experiment else self._client.create_experiment(name)
            run = self._client.create_run(number, run_name=_title(folder))
            files.write_bytes(file, run.info.run_id.encode())
        self._id = file.read_text()

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Sends the metrics of a step."""
        for name, value in scalars.items():
            self._client.log_metric(self._id, name, value, step=step)

    def close(self) -> None:
        """Ends the run."""
        self._client.set_terminated(self._id)
