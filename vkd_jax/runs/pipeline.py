"""Runs the stages that a config asks for.

    finetune       base -> vanilla
    retain_only    base -> retain-only model, fine-tuned without the forget set
    unlearn        vanilla -> unlearned -> report
    all            finetune, retain_only, unlearn
    audit          given models -> report; only attackers train

Each stage leaves its result in the run's folder. A stage whose result exists is not run again, so an interrupted run
resumes with the same config.
"""

from pathlib import Path

import ml_collections
from absl import logging

from vkd_jax import results
from vkd_jax.config.schema import RunConfig
from vkd_jax.results import RunResults
from vkd_jax.runs import results_writer, stages
from vkd_jax.runs.job import Job, check_models
from vkd_jax.runs.workdir import Workdir


def run(
    config: ml_collections.ConfigDict,
    path: str | Path,
    command: str = "called from Python: vkd_jax.runs.pipeline.run",
) -> RunResults:
    """Runs or resumes a config of configs/; see `execute`."""
    return execute(RunConfig.from_config_dict(config), path, command)


def execute(config: RunConfig, path: str | Path, command: str) -> RunResults:
    """Runs or resumes what `config.stage` names.

    Args:
        config: the config of the run.
        path: the run's folder.
        command: how the program was started, as the results name it.

    Raises:
        UserError: the config does not fit the data or the models, or the folder has a run of another config.
        Diverged: a loss became NaN or infinite.
        Stopped: SIGTERM or SIGINT arrived during training.
    """
    workdir = Workdir(path, config, command)
    last = "report.md" if config.reports else results.FILE
    if workdir.has(last):
        logging.info("%s exists: the run is finished", workdir.path / last)
        return RunResults.read(workdir.path)
    job = Job.prepare(workdir)
    check_models(job)
    finetuned = {name: stages.finetune(job, name) for name in config.workflow.finetunes}
    if config.workflow.judges:
        stages.unlearn_and_judge(job, finetuned)
    else:
        answers = {name: stages.evaluate_model(job, name, job.load(folder)) for name, folder in finetuned.items()}
        results_writer.write(job, answers)
    return RunResults.read(workdir.path)
