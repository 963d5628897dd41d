"""vkd compare --config configs/tiny.py:compare --workdir DIR [--workers 2]

`python -m vkd_jax.compare` is the same command.

Compares methods on one benchmark over several seeds. Each method is tuned with the same number of trials, on people who
are not reported. `vkd_jax.runs.sweep` describes the runs and their folders. Finished runs are not run again, so an
interrupted comparison resumes with the same command.

Writes comparison.json (all figures, see `comparison.collect`), comparison.md, pareto.png and relearning.png.

Exit status: 0 on success, 1 if a run failed (the table says which), 2 on bad input, 130 if stopped by Ctrl-C and 143 if
stopped by SIGTERM, both with all states saved. A second Ctrl-C stops at once.
"""

import functools
import sys
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool

from absl import app, flags

from vkd_jax.config import command_line
from vkd_jax.runs import sweep
from vkd_jax.runs.worker_pool import Stopped
from vkd_jax.runtime import commands, log, storage


def define(values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines the flags of all commands, and --workers."""
    command_line.define(values)
    text = "Runs at once; 0 is one for each CPU core, or one on an accelerator."
    flags.DEFINE_integer("workers", 0, text, 0, flag_values=values)


@commands.guarded
def command(argv: Sequence[str], values: flags.FlagValues = flags.FLAGS, line: str = "") -> int:
    """Runs the command, and returns its exit status.

    Args:
        argv: The program's name; flags are in `values`.
        values: The parsed flags.
        line: The command line that the results name; "" if no command line started the program.
    """
    if len(argv) > 1:
        return command_line.unexpected(argv[1])
    if values.config is None or values.workdir is None:
        return command_line.bad_input("pass --config FILE:compare and --workdir DIR.")
    try:
        results = sweep.run(
            values.config, values.workdir, values.workers, line or "called from Python: vkd_jax.compare.command"
        )
    except Stopped as error:
        print(error, file=sys.stderr)
        return error.status
    except BrokenProcessPool:
        command_line.print_error("a worker died, perhaps out of memory; try again with --workers 1.")
        return 1
    command_line.show((storage.resolve(values.workdir) / "comparison.md").read_text(encoding="utf-8"))
    return 1 if results["failures"] else 0


if __name__ == "__main__":
    define()
    log.setup()
    line = command_line.started_as("vkd_jax.compare")
    app.run(functools.partial(command, line=line), flags_parser=command_line.parse)
