"""Experiment trackers, with stand-ins of their packages: what they are sent, how they resume, and what is refused."""

import dataclasses
import json
import logging
import sys
import types

import pytest

from vkd_jax.config.schema import RunConfig
from vkd_jax.config.training import TrainConfig
from vkd_jax.runs.job import check_config
from vkd_jax.training.metric_writer import Progress, TrackerWriter
from vkd_jax.types import UserError


class Wandb(types.ModuleType):
    """Stand-in of the package: keeps what it is called with."""

    def __init__(self):
        super().__init__("wandb")
        self.calls = []

    def init(self, **options):
        self.calls.append(("init", options))
        return self

    def log(self, scalars, step):
        self.calls.append(("log", step, scalars))

    def finish(self):
        self.calls.append(("finish",))


class Mlflow(types.ModuleType):
    """Stand-in of the package and of its client."""

    def __init__(self):
        super().__init__("mlflow")
        self.calls, self.experiments = [], {}

    def MlflowClient(self):  # noqa: N802 (the name in MLflow)
        return self

    def get_experiment_by_name(self, name):
        return self.experiments.get(name)

    def create_experiment(self, name):
        self.experiments[name] = types.SimpleNamespace(experiment_id=str(len(self.experiments)))
        return self.experiments[name].experiment_id

    def create_run(self, experiment_id, run_name):
        self.calls.append(("run", experiment_id, run_name))
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id=f"id{len(self.calls)}"))

    def log_metric(self, run_id, key, value, step):
        self.calls.append((run_id, key, value, step))

    def set_terminated(self, run_id):
        self.calls.append((run_id, "end"))


@pytest.fixture(autouse=True)
def packages(monkeypatch):
    for variable in ("WANDB_PROJECT", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(variable, raising=False)
    fakes = types.SimpleNamespace(wandb=Wandb(), mlflow=Mlflow())
    for name, fake in vars(fakes).items():
        monkeypatch.setitem(sys.modules, name, fake)
    return fakes


def train(folder, steps, *trackers):
    """Writes the metrics of these steps, as a training does."""
    progress = Progress(folder, steps=10, log_seconds=1e9, trackers=trackers)
    for step in steps:
        progress.tick(step)
        progress.write(step, {"loss": 1 / step})
    progress.close()


def test_metrics_are_sent_to_both_and_written_as_before(packages, tmp_path):
    train(tmp_path / "run" / "train", (1, 2), "wandb", "mlflow")
    rows = [json.loads(line) for line in (tmp_path / "run/train/metrics.jsonl").read_text().splitlines()]
    assert rows == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}]
    (name, options), *logged = packages.wandb.calls
    assert (name, options["project"], options["name"], options["resume"]) == ("init", "vkd_jax", "run/train", "allow")
    assert options["settings"] == {"console": "off"}
    assert logged == [("log", 1, {"loss": 1.0}), ("log", 2, {"loss": 0.5}), ("finish",)]
    run, *logged = packages.mlflow.calls
    assert run == ("run", "0", "run/train")
    assert logged == [("id1", "loss", 1.0, 1), ("id1", "loss", 0.5, 2), ("id1", "end")]


def test_a_training_that_resumes_continues_its_record(packages, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "ours")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "ours")
    for steps in ((1,), (2,)):
        train(tmp_path, steps, "wandb", "mlflow")
    train(tmp_path / "other", (1,), "wandb", "mlflow")
    first, second, other = (call[1] for call in packages.wandb.calls if call[0] == "init")
    assert first == second and first["id"] != other["id"] and first["project"] == "ours"
    runs = [call for call in packages.mlflow.calls if call[0] == "run"]
    assert len(runs) == 2 and list(packages.mlflow.experiments) == ["ours"]


def test_without_trackers_nothing_is_sent(packages, tmp_path):
    train(tmp_path, (1,))
    assert not packages.wandb.calls and not packages.mlflow.calls and TrainConfig().tracker_names == ()


def test_a_failing_tracker_is_a_warning(caplog):
    class Offline:
        def log(self, step, scalars):
            raise ConnectionError("no network")

        close = None

    writer = TrackerWriter("wandb", Offline())
    with caplog.at_level(logging.WARNING):
        writer.write_scalars(1, {"loss": 1.0})
        writer.close()
    assert "metrics could not be sent to wandb: no network" in caplog.text


@pytest.mark.parametrize("section", ["train", "finetune"])
def test_a_missing_package_is_refused_before_anything_is_read(section, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    changed = TrainConfig(trackers="wandb, mlflow")
    config = RunConfig().override("model.path=tiny_llava")
    if section == "train":
        config = dataclasses.replace(config, train=changed)
    else:
        config = dataclasses.replace(config, finetune=dataclasses.replace(config.finetune, train=changed))
    with pytest.raises(UserError, match="train.trackers=mlflow: its package is not installed: pip install mlflow"):
        check_config(config)


def test_an_unknown_tracker_is_refused():
    with pytest.raises(UserError, match="train.trackers: unknown tracker comet. Available: mlflow, wandb"):
        TrainConfig(trackers="wandb,comet")
