"""Runs the stages that a config asks for.

    finetune       base -> vanilla
    retain_only    base -> retain-only model, fine-tuned without the forget set
    unlearn        vanilla -> unlearned -> report
    all            finetune, retain_only, unlearn
    audit          given models -> report; only attackers train

Each stage leaves its result in the run's folder. A stage whose result exists is not run again, so an interrupted run
resumes with the same config.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import ml_collections
from absl import logging

from vkd_jax import results
from vkd_jax.config.schema import RunConfig
from vkd_jax.reporting import report
from vkd_jax.results import RunResults
from vkd_jax.runs import inputs, judging, results_writer, stages
from vkd_jax.runs.job import Job, check_models, describe_inputs, given_models, models_read, read_data
from vkd_jax.runs.workdir import SHARED_MODELS, Workdir, exclusive
from vkd_jax.runtime import json_files, memory, storage
from vkd_jax.types import PATH, Missing, check_argument

T = TypeVar("T")


def run(
    config: ml_collections.ConfigDict,
    path: str | Path,
    command: str = "called from Python: vkd_jax.runs.pipeline.run",
) -> RunResults:
    """Runs or resumes a config of configs/; see `execute`."""
    check_argument("workdir", path, PATH, "the path of a folder for what the run writes")
    return execute(RunConfig.from_config_dict(config), path, command)


def execute(config: RunConfig, path: str | Path, command: str, lender: Path | None = None) -> RunResults:
    """Runs or resumes what `config.stage` names.

    Args:
        config: the config of the run.
        path: the run's folder.
        command: how the program was started, as the results name it.
        lender: the folder of a run with the same data whose records of `SHARED_MODELS` are reused.

    Raises:
        UserError: the config does not fit the data, the models or the memory; or the folder has a run of another config
            or of other inputs, is used by another process, or cannot be written.
        Diverged: a loss became NaN or infinite.
        Stopped: SIGTERM or SIGINT arrived during training.
    """
    with memory.exhausted(), storage.write_errors(), exclusive(path, command):
        return _execute(Workdir(path, config, command), lender)


def _execute(workdir: Workdir, lender: Path | None) -> RunResults:
    config = workdir.config
    computed = (results.FILE, stages.MANIFEST) if config.reports else (results.FILE,)
    outputs = (*computed, *report.FILES) if config.reports else computed
    workdir.check_logs()
    if workdir.is_complete(*outputs):
        _check_inputs(workdir)
        logging.info("%s exists: the run is finished", workdir.path / outputs[-1])
        return RunResults.read(workdir.path)
    job = Job.prepare(workdir)
    models = check_models(job)
    with workdir.stage("check inputs"):
        workdir.bind(describe_inputs(config, job.sets | job.held_out_set, models), models_read(config, models))
    if not workdir.is_complete(*computed, without=(*report.PREFIXES, *stages.DOCUMENTS)):
        _compute(job, lender)
    if config.reports:
        if config.workflow.unlearns and (workdir.path / "unlearned").exists():
            stages.document_model(job)
        stages.write_report(job)
    return RunResults.read(workdir.path)


def _compute(job: Job, lender: Path | None) -> None:
    """Trains, evaluates and attacks what the config asks for, and writes results.json."""
    config, workdir = job.config, job.workdir
    if lender:
        workdir.borrow(lender, _shared_records(lender))
    finetuned = {name: stages.finetune(job, name) for name in config.workflow.finetunes}
    if config.workflow.attacks:
        stages.unlearn_and_evaluate(job, finetuned)
    else:
        answers = {name: stages.evaluate_model(job, name, job.load(folder)) for name, folder in finetuned.items()}
        results_writer.write(job, judging.ask_judge(job, answers))


def _check_inputs(workdir: Workdir) -> None:
    """Checks that a finished run has the inputs that its config names now, except data or models that are gone."""
    config = workdir.config
    sets = _unless_missing("data", lambda: read_data(config, workdir.path))
    models = _unless_missing("models", lambda: given_models(config))
    values = describe_inputs(config, sets or {}, models or {})
    missing = [name for name, found in (("sets", sets), ("models", models)) if found is None]
    if values is not None and missing:
        saved = json_files.read_json(workdir.path / inputs.FILE)
        values |= {name: saved.get(name) for name in missing}
    workdir.bind(values, models_read(config, models or {}))


def _unless_missing(what: str, read: Callable[[], T]) -> T | None:
    try:
        return read()
    except Missing as error:
        logging.warning("the %s of this finished run are not compared: %s", what, error)
        return None


def _shared_records(lender: Path) -> list[str]:
    """The names of a run's records of `SHARED_MODELS`."""
    attacks = sorted(file for model in SHARED_MODELS for file in lender.glob(f"attacks/*/{model}.jsonl"))
    return [f"answers/{model}.jsonl" for model in SHARED_MODELS] + [str(x.relative_to(lender)) for x in attacks]
