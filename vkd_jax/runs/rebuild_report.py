"""Writes the report of a finished run again, with the current version.

vkd report /tmp/vkd-tiny

Results and answers are those of the run, verified by their digests; no model is loaded. The images are read from the
data of the run. If that data is gone or has changed, the report has empty frames in their places.

Exit status: 0 on success, 2 on bad input, which includes the folder of a run that is not finished.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import logging

from vkd_jax import messages
from vkd_jax.checkpoints import certificate
from vkd_jax.config import command_line, defaults
from vkd_jax.config.schema import RunConfig
from vkd_jax.reporting import report, terminal
from vkd_jax.results import FILE, RunResults
from vkd_jax.runs import inputs
from vkd_jax.runs.job import read_data
from vkd_jax.runs.workdir import CONFIG, METRICS, TRAINING, check_logs, exclusive
from vkd_jax.runtime import commands, json_files, log, records, storage
from vkd_jax.types import UserError

CERTIFICATE = f"{certificate.UNLEARNED}/{certificate.FILE}"


def rebuild(path: str | Path, command: str) -> RunResults:
    """Writes report.md with its plots, and report.html, from the results in the folder of a finished run.

    Args:
        path: the folder of the run.
        command: how the program was started, for the lock of the folder.

    Returns:
        The results of the run.

    Raises:
        UserError: the folder has no run, its run is not finished or has no unlearned model, its config, answers
            or metrics are damaged, or another process uses it.
    """
    path = storage.resolve(path)
    if not (path / CONFIG).exists():
        raise UserError(f"{path} has no run; give the --workdir of a finished one.")
    json_files.read_json(path / CONFIG, remedy="restore it from a copy")
    if not (path / records.FILE).exists() and any(path.glob("*.safetensors")):
        raise UserError(f"{path} is the folder of a model; give the --workdir of the run that wrote it.")
    with storage.write_errors("WORKDIR"), exclusive(path, command):
        written = records.Records(path)
        if not (written.knows(FILE) and (path / FILE).exists()):
            raise UserError(f"{path} has a run that is not finished; run its command again, which resumes it.")
        written.check_results(FILE, remedy="run its command again, which computes it again")
        for name in (CONFIG, inputs.FILE):
            written.check(name, "restore it from a copy")
        check_logs(path, written)
        if written.knows(f"{TRAINING}/{METRICS}") and not (path / TRAINING).exists():
            logging.warning("the report has no losses of training: %s was removed", path / TRAINING)
        results = RunResults.read(path)
        if "unlearned" not in results.models:
            raise UserError(f"{path} has a run without an unlearned model, which has no report: see {path / FILE}.")
        if (path / CERTIFICATE).exists():  # of another run, if its results were put here
            records.check(path, CERTIFICATE, "run the command of this run again, or restore its files from a copy")
        report.write(path, _images(path))
        written.replace(report.PREFIXES, report.files_of(path))
    return results


def _images(path: Path) -> dict[str, bytes]:
    """The images of the run's data by `image_id`; {} if the data cannot be read or is not what the run read."""
    try:
        config = json_files.read_json(path / "config.json")
        if "request" in config:
            return {}  # the folders of requests hold no image of anybody
        sets = read_data(_data_config(config), path)
        saved = records.mapping(json_files.read_json(path / inputs.FILE).get("sets"))
        read = inputs.describe(sets, {})["sets"]
        if changed := [name for name in read if read[name] != saved.get(name)]:
            raise UserError(f"the data has changed since the run, in {messages.listed(changed)}")
    except UserError as error:
        logging.warning("the report has no images: %s", error)
        return {}
    return {e.image_id: e.image for examples in sets.values() for e in examples if e.image is not None}


def _data_config(saved: Mapping[str, Any]) -> RunConfig:
    """A config with the data of a run of any version, whose config may lack fields that were added since."""
    config = RunConfig().to_dict()
    data, evaluation = (records.mapping(saved.get(section)) for section in ("data", "eval"))
    known = defaults.benchmark(str(data.get("benchmark")), str(data.get("cache", ""))).to_dict()
    config["data"] = known | {name: value for name, value in data.items() if name in known}
    config["eval"] |= {name: x for name, x in evaluation.items() if name in ("general", "general_source")}
    return RunConfig.from_dict(config)


@commands.guarded
def main() -> int:
    """Runs the command line and returns its exit status."""
    parser = command_line.ArgumentParser(prog="vkd report", description=__doc__)
    parser.add_argument("workdir", help="folder of a finished run")
    workdir = parser.parse_args().workdir
    results = rebuild(workdir, command_line.started_as("vkd_jax.runs.rebuild_report"))
    command_line.show(terminal.summary(results, workdir))
    return 0


if __name__ == "__main__":
    log.setup()
    sys.exit(main())
