"""Flags that the commands share: --config with an override for each field, --workdir and --distributed."""

import itertools
import os
import re
import shlex
import signal
import stat
import sys
import traceback
from collections.abc import Sequence

from absl import flags
from ml_collections import config_flags

from vkd_jax import messages
from vkd_jax.config.arguments import HelpShown
from vkd_jax.types import UserError

HELP = {"--help", "-h", "-help", "--helpshort"}
NO_CONFIG = "--config: get_config() returned None; return a config, as configs/tiny.py does."


def define(values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines the flags."""
    config_flags.DEFINE_config_file(
        "config", None, "A file with get_config(), e.g. configs/tiny.py.", flag_values=values, lock_config=True
    )
    flags.DEFINE_string("workdir", None, "Folder for everything that the run writes.", flag_values=values)
    flags.DEFINE_boolean("distributed", False, "One of several processes, e.g. of a TPU pod.", flag_values=values)


def started_as(program: str) -> str:
    """The command line of this process, for a program that was started by `python -m`."""
    return shlex.join(["python", "-m", program, *sys.argv[1:]])


def parse(argv: Sequence[str], values: flags.FlagValues = flags.FLAGS) -> list[str]:
    """Parses flags as absl does; exits with status 2 and one sentence if they are wrong, and with 0 after --help."""
    if HELP & set(argv[1:]):
        show(help_text(sys.modules["__main__"].__doc__ or "", values))
        sys.exit(0)
    try:
        _check_config_file(argv)
        rest = values(argv)
        if values["config"].present and values.config is None:
            raise UserError(NO_CONFIG)
        # A file that could not be read raises only when its config is first used.
        if values.config is not None and getattr(values.config, "stage", None) is None:
            raise UserError("--config: get_config() returned no config with a field `stage`; see configs/tiny.py.")
        return rest
    except HelpShown:
        raise
    except KeyboardInterrupt:
        print("stopped by Ctrl-C before anything was run", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except BaseException as error:  # a config file is a program, and may raise anything or exit
        sys.exit(bad_input(_sentence(error)))


def help_text(text: str, values: flags.FlagValues) -> str:
    """A description of a command with the flags of this package."""
    by_module = values.flags_by_module_dict()
    own = [f for name in by_module if name == sys.argv[0] or name.startswith("vkd_jax.") for f in by_module[name]]
    width = max((len(flag.name) for flag in own), default=0)
    return "\n".join([text.rstrip(), "", "Flags:", *(f"  --{flag.name:{width}}  {flag.help}" for flag in own)])


def bad_input(problem: Exception | str) -> int:
    """Prints what is wrong, and returns the exit status."""
    print_error(problem)
    return 2


def print_error(problem: Exception | str) -> None:
    """Prints an error as one line on stderr; a message that is too long for one is written to a temporary file."""
    message = problem.message if isinstance(problem, UserError) else str(problem)
    most, note = messages.MOST_CHARACTERS - len("error: "), ""
    if len(messages.escaped(message)) > most and (path := messages.write_lines([message])):
        note = f" (the whole message is in {path})"
    print(f"error: {messages.sentence(message, most, note)}", file=sys.stderr)


def show(text: str) -> None:
    """Prints a text of one or more lines on stdout, in which nothing steers the terminal or fails to be encoded."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    print(messages.escaped(text, keep="\n\t").encode(encoding, "backslashreplace").decode(encoding))


def _check_config_file(argv: Sequence[str]) -> None:
    """Checks before the config file is opened that reading it will end; a missing one is reported by `values(argv)`.

    Raises:
        UserError: it is a folder, a named pipe or a device, or may not be looked at.
    """
    for argument, following in itertools.pairwise([*argv, ""]):
        flag, separator, value = argument.partition("=")
        name = (value if separator else following).partition(":")[0]
        if flag not in ("--config", "-config") or not name:
            continue
        try:
            is_file = stat.S_ISREG(os.stat(name).st_mode)
        except (FileNotFoundError, NotADirectoryError, ValueError):
            continue
        except OSError as error:
            raise UserError(
                f"--config={name[:40]}: it cannot be read ({error.strerror}); pass a config file."
            ) from error
        if not is_file:
            raise UserError(f"--config={name}: it is not a regular file; pass a config file.")


def _sentence(error: BaseException) -> str:
    """What is wrong with the flags, or what a config file raised."""
    frames = [frame.f_code.co_name for frame, _ in traceback.walk_tb(error.__traceback__)]
    in_file = "get_config" in frames or "<module>" in frames
    if not in_file and re.search(r"Attribute <class 'NoneType'>\.(\w+) .*lookup: \1\b", str(error.args[:1]), re.DOTALL):
        return NO_CONFIG  # an override of a field of None
    if isinstance(error, (AttributeError, KeyError)) and not in_file:
        return _unknown_field(str(error.args[0]))
    last = (str(error).strip().splitlines() or [""])[-1].strip()  # what precedes it is a traceback
    if isinstance(error, (flags.Error, OSError, UserError)):
        return last
    return f"--config: the file raised {type(error).__name__}: {last}"


def _unknown_field(message: str) -> str:
    """The sentence on an override of an unknown field, from the message of ml_collections."""
    if match := re.match(r"""["']+(\w+)["']+\s*(?:Did you mean "(\w+)")?""", message):
        name, similar = match.groups()
        return f"--config: unknown field '{name}'." + (f" Did you mean '{similar}'?" if similar else "")
    return f"--config: {message}"
