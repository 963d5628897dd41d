"""Sequential deletion requests, recorded in a ledger.

vkd requests add LEDGER --forget 017,023            people of the data, by the IDs that it gives them
vkd requests add LEDGER --forget DIR [--test DIR]   people of a folder with images and a metadata.jsonl
vkd requests withdraw LEDGER NUMBER                 a request that was not run yet
vkd requests run LEDGER --config configs/tiny.py --workdir DIR [--config.method.blocks=2] [--baselines=naive,batch]
vkd requests show LEDGER                            the requests, their runs, and where data is stored
vkd requests purge LEDGER [NUMBER ...]              deletes cached features of these requests, and answers of all

`run` starts each request from the previous model, preserves the forgetting of earlier people, and evaluates every model
on all of them. An interrupted run resumes with the same command. See docs/requests.md.

Exit status: 0 on success, 1 if training diverged, 2 on bad input, 130 if stopped by Ctrl-C, 143 by SIGTERM.
"""

import argparse
import functools
import re
import sys
from collections.abc import Sequence

from absl import app, flags

from vkd_jax.config import command_line
from vkd_jax.runtime import commands, log, malloc
from vkd_jax.types import Diverged, UserError


@commands.guarded
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs all commands but `run`, and returns the exit status.

    Args:
        arguments: the command and its arguments; those of the process by default.
    """
    parser = command_line.ArgumentParser(prog="vkd requests", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="add|withdraw|run|show|purge")
    for name in ("add", "withdraw", "run", "show", "purge"):
        command = commands.add_parser(name)
        if name == "run":  # which has flags of its own, and is named here for messages
            continue
        command.add_argument("ledger", help="the ledger, a file of JSON lines")
        if name == "add":
            command.add_argument("--forget", required=True, help="folder of images, or IDs separated by commas")
            command.add_argument("--test", default="", help="folder of other images of these people")
        if name in ("withdraw", "purge"):
            command.add_argument("number", nargs="*" if name == "purge" else 1, help="number of the request")
    options = parser.parse_args(arguments)
    command_line.show(_answer(options))
    return 0


def _answer(options: argparse.Namespace) -> str:
    """Does what a command says, and returns what it prints."""
    from vkd_jax.runs import ledger, purging, requests

    path = ledger.local(options.ledger)
    if options.command == "add":
        request = requests.add(path, options.forget, options.test)
        return f"request {request.number}: {len(request.people)} to forget; vkd requests run does it."
    if options.command == "withdraw":
        [number] = _numbers(options.number)
        requests.withdraw(path, number)
        return f"request {number} is withdrawn."
    if options.command == "purge":
        deleted = purging.purge(path, _numbers(options.number))
        return "\n".join([*(f"deleted {path}" for path in deleted), f"{len(deleted)} files and folders were deleted."])
    return requests.shown(path)


def _numbers(texts: Sequence[str]) -> list[int]:
    """The numbers of requests.

    Raises:
        UserError: one of them is not such a number.
    """
    for text in texts:
        if not re.fullmatch("[0-9]{1,9}", text):
            raise UserError(f"{text[:20]!a} is not the number of a request; vkd requests show prints them.")
    return [int(text) for text in texts]


@commands.guarded
def run(argv: Sequence[str], values: flags.FlagValues = flags.FLAGS, line: str = "") -> int:
    """Runs the pending requests of a ledger, and returns the exit status.

    Args:
        argv: the program's name and the ledger; flags are in `values`.
        values: the parsed flags.
        line: the command line that the results name.
    """
    from vkd_jax.config.schema import RunConfig
    from vkd_jax.runs import ledger, requests
    from vkd_jax.runtime import storage
    from vkd_jax.training.preemption import Stopped

    if len(argv) > 2:
        return command_line.unexpected(argv[2])
    if len(argv) != 2 or values.config is None or values.workdir is None:
        return command_line.bad_input("pass the ledger, --config FILE and --workdir DIR.")
    if values.distributed:
        return command_line.bad_input("--distributed: requests are run by one process; leave it out.")
    if "compare" in values.config:
        return command_line.bad_input("this config compares runs: pass one without runs=compare.")
    try:
        config, workdir = RunConfig.from_config_dict(values.config), storage.resolve(values.workdir)
        requests.run(ledger.local(argv[1]), config, workdir, values.baselines, values.batch_settings, line)
    except Diverged as error:
        command_line.print_error(error)
        return 1
    except Stopped as error:
        print(error, file=sys.stderr)
        return error.status
    command_line.show((workdir / "requests.md").read_text(encoding="utf-8"))
    return 0


def define(values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines the flags of `run`."""
    command_line.define(values)
    flags.DEFINE_list("baselines", [], "What to run beside: naive, batch.", flag_values=values)
    flags.DEFINE_string("batch_settings", "", "Settings of the batch baseline: 'train.steps=300'.", flag_values=values)


if __name__ == "__main__":
    if sys.argv[1:2] != ["run"]:
        sys.exit(main())
    define()
    log.setup()
    malloc.keep_freed_memory()
    line = command_line.started_as("vkd_jax.requests")
    arguments = [sys.argv[0], *sys.argv[2:]]
    app.run(functools.partial(run, line=line), argv=arguments, flags_parser=command_line.parse)
