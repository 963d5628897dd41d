"""python -m vkd_jax.main --config configs/tiny.py --workdir DIR [--config.train.steps=300 ...]

Without --workdir nothing is run, and the whole config is printed.

Exit status: 0 done, 1 the run diverged or broke, 2 bad input (one sentence says what), 143 stopped by SIGTERM with its
state saved.
"""

import sys
import traceback
from collections.abc import Sequence

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from vkd_jax.runtime import log, malloc
from vkd_jax.types import UserError

SHUTDOWN = 60  # seconds that a process which ends waits for the others, should they hang


def define(values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines --config, with an override for each of its fields, --workdir and --distributed."""
    config_flags.DEFINE_config_file(
        "config", None, "A file with get_config(), e.g. configs/tiny.py.", flag_values=values, lock_config=True
    )
    flags.DEFINE_string("workdir", None, "Where everything the run makes is written.", flag_values=values)
    flags.DEFINE_boolean("distributed", False, "This is one of several processes, say of a pod.", flag_values=values)


def parse(argv: Sequence[str], values: flags.FlagValues = flags.FLAGS) -> list[str]:
    """absl's flag parsing, with every complaint in one sentence and exit status 2."""
    try:
        rest = values(argv)
        # A file that could not be read raises only when its config is first used.
        if values.config is not None and getattr(values.config, "stage", None) is None:
            raise UserError("get_config() returned no config: it has no field `stage`; see configs/tiny.py.")
        return rest
    except Exception as error:  # a config file is a program, and may raise anything
        sys.exit(bad_input(_complaint(error)))


def main(argv: Sequence[str], values: flags.FlagValues = flags.FLAGS) -> int:
    """Runs what the config says."""
    if len(argv) > 1:
        return bad_input(f"unexpected argument {argv[1]!r}; flags begin with --")
    if values.config is None:
        return bad_input("pass --config FILE and --workdir DIR.")
    if "compare" in values.config:
        return bad_input("this config compares runs: use python -m vkd_jax.compare in the place of vkd_jax.main.")
    if values.workdir is None:
        print(values.config)
        print("nothing was run: pass --workdir DIR as well.", file=sys.stderr)
        return 0
    if values.distributed:  # before anything asks for a device
        jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM, which `train` hears itself
        try:  # finds the others by itself on TPUs, under Slurm, Open MPI and Kubernetes
            jax.distributed.initialize(shutdown_timeout_seconds=SHUTDOWN)
        except ValueError as error:
            return bad_input(f"JAX finds no other processes, so leave --distributed out: {error}")
        if jax.process_index() > 0:
            logging.set_verbosity(logging.WARNING)  # one log: that of process 0
    from vkd_jax.runs import pipeline
    from vkd_jax.training import loop
    from vkd_jax.training.preemption import Stopped

    try:
        pipeline.run(values.config, values.workdir)
    except UserError as error:
        return bad_input(str(error))
    except loop.Diverged as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except Stopped as error:
        print(error, file=sys.stderr)
        return 143
    return 0


def _complaint(error: Exception) -> str:
    ran = any(frame.f_code.co_name in ("get_config", "<module>") for frame, _ in traceback.walk_tb(error.__traceback__))
    if isinstance(error, (AttributeError, KeyError)) and not ran:
        return "an override names a field that the config does not have: " + str(error.args[0]).strip('"')
    last = (str(error).strip().splitlines() or [""])[-1].strip()  # what stands before it is a traceback
    if isinstance(error, (flags.Error, OSError, UserError)):
        return last
    return f"the config file raised {type(error).__name__}: {last}"


def bad_input(message: str) -> int:
    """Says what is wrong; the exit status."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    define()
    log.setup()
    malloc.keep_freed_memory()
    app.run(main, flags_parser=parse)
