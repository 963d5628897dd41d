"""vkd unlearn --config configs/tiny.py --workdir DIR [--config.train.steps=300 ...]

`python -m vkd_jax.main` is the same command.

Without --workdir the whole config is printed and nothing is run. `--dry_run` makes all checks, prints the config, the
size of the data and what a training step requires, and writes nothing. `--config configs/tiny.py:help` prints all
arguments and fields.

Exit status: 0 on success, 1 if the run diverged or failed, 2 on bad input, 130 if stopped by Ctrl-C, 143 if stopped by
SIGTERM with its state saved. During training both save the state; a second Ctrl-C stops at once.
"""

import functools
import sys
from collections.abc import Sequence

import jax
from absl import app, flags, logging

from vkd_jax.config import command_line, unused
from vkd_jax.config.command_line import bad_input, print_error
from vkd_jax.config.schema import RunConfig
from vkd_jax.runtime import commands, log, malloc
from vkd_jax.types import Diverged, UserError

SHUTDOWN_SECONDS = 60  # a process that has finished waits so long for the others


def define(values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines the flags of all commands, and --dry_run."""
    command_line.define(values)
    flags.DEFINE_boolean("dry_run", False, "Check the run and describe it, without running it.", flag_values=values)


@commands.guarded
def main(argv: Sequence[str], values: flags.FlagValues = flags.FLAGS, line: str = "") -> int:
    """Runs the command, and returns its exit status.

    Args:
        argv: the program's name; flags are in `values`.
        values: the parsed flags.
        line: the command line that the results name; "" if no command line started the program.
    """
    if len(argv) > 1:
        return command_line.unexpected(argv[1])
    if values.config is None:
        return bad_input("pass --config FILE and --workdir DIR.")
    if "compare" in values.config:
        return bad_input("this config compares runs: use python -m vkd_jax.compare instead of vkd_jax.main.")
    if values.workdir is None:
        print(values.config)
        print("nothing was run: pass --workdir DIR as well.", file=sys.stderr)
        return 0
    if values.distributed and not values.dry_run:
        _connect()
    unused.warn_of_unused(RunConfig.from_config_dict(values.config), values["config"].override_values)
    if values.dry_run:
        return _describe(values, line)
    return _run(values, line or "called from Python: vkd_jax.main.main")


def _connect() -> None:
    """Connects the processes of a run, before a device is used."""
    jax.config.update("jax_enable_preemption_service", False)  # the training loop handles SIGTERM
    try:  # detects the other processes on TPUs and under Slurm, Open MPI and Kubernetes
        jax.distributed.initialize(shutdown_timeout_seconds=SHUTDOWN_SECONDS)
    except ValueError as error:
        raise UserError(f"--distributed: JAX finds no other processes, so leave it out: {error}") from error
    if jax.process_index() > 0:
        logging.set_verbosity(logging.WARNING)  # only process 0 logs progress


def _describe(values: flags.FlagValues, command: str) -> int:
    """Makes the checks of the run and describes it, and returns the exit status."""
    from vkd_jax.runs import dry_run

    if values.distributed:
        raise UserError("--dry_run describes a run in one process: leave out --distributed.")
    command_line.show(dry_run.describe(values.config, values.workdir, command))
    return 0


def _run(values: flags.FlagValues, command: str) -> int:
    """Runs the pipeline, and returns the exit status."""
    from vkd_jax.reporting import terminal
    from vkd_jax.runs import pipeline
    from vkd_jax.training.preemption import Stopped

    try:
        results = pipeline.run(values.config, values.workdir, command)
    except Diverged as error:
        print_error(error)
        return 1
    except Stopped as error:
        print(error, file=sys.stderr)
        return error.status
    if jax.process_index() == 0:
        command_line.show(terminal.summary(results, values.workdir))
    return 0


if __name__ == "__main__":
    define()
    log.setup()
    malloc.keep_freed_memory()
    line = command_line.started_as("vkd_jax.main")
    app.run(functools.partial(main, line=line), flags_parser=command_line.parse)
