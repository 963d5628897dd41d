"""Flags that the commands share: --config with an override for each field, --workdir and --distributed.

Flags of libraries, such as --flagfile of absl, and flags that are given twice with different values are refused.
"""

import argparse
import difflib
import itertools
import os
import re
import shlex
import signal
import stat
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from absl import flags
from ml_collections import ConfigDict, config_flags
from ml_collections.config_flags import config_path

from vkd_jax import messages
from vkd_jax.config import config_file
from vkd_jax.config.arguments import HelpShown
from vkd_jax.types import UserError

HELP = {"--help", "-h", "-help", "--helpshort"}
READ_FIRST = {"flagfile", "undefok"}  # flags that absl reads before all others
COMPONENTS = {"--config.method": "method", "--config.data": "benchmark"}  # the argument that chooses each
NUMBERS = {r"invalid literal for int\(\)": "a whole number", "could not convert string to float": "a number"}


def define(values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines the flags; exits with status 2 if one names a file of flags, which the definition of --config reads."""
    for name, _ in _flags(sys.argv, values):
        if name in READ_FIRST:
            sys.exit(bad_input(_foreign(name)))
    config_flags.DEFINE_config_file(
        "config", None, "A file with get_config(), e.g. configs/tiny.py.", flag_values=values, lock_config=True
    )
    values["config"].parser = config_file.Parser(values["config"].parser)
    flags.DEFINE_string("workdir", None, "Folder for everything that the run writes.", flag_values=values)
    flags.DEFINE_boolean("distributed", False, "One of several processes, e.g. of a TPU pod.", flag_values=values)


class ArgumentParser(argparse.ArgumentParser):
    """Parses the arguments of the commands that have no config; what is wrong is one sentence, as everywhere."""

    def __init__(self, **options: Any):
        self.given: dict[str, Any] = {}  # values of flags by their name
        self.arguments: list[str] = []  # that it parses
        self.known: set[str] = set()  # its flags
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)
        for name in (None, "store"):
            self.register("action", name, _Once)

    def add_argument(self, *names: Any, **options: Any) -> argparse.Action:
        """Adds an argument, as argparse does."""
        action = super().add_argument(*names, **options)
        self.known.update(action.option_strings)
        return action

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[argparse.Namespace, list[str]]:
        """Parses arguments, as argparse does."""
        self.arguments = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Ends the process with exit status 2 and one sentence."""
        if message.startswith("the following arguments are required"):  # perhaps because the name of one is misspelled
            message = self._unknown_flag() or message
        sys.exit(bad_input(f"{message}; {self.prog} --help shows the arguments."))

    def _unknown_flag(self) -> str | None:
        """Names the first given flag that does not exist, and the most similar one; None if all exist."""
        given = [argument.partition("=")[0] for argument in self.arguments if argument.startswith("--")]
        unknown = [flag for flag in given if not any(name.startswith(flag) for name in self.known)]
        if not unknown:
            return None
        similar = difflib.get_close_matches(unknown[0], self.known, 1)
        return f"{unknown[0]:.40} is no flag" + (f"; did you mean {similar[0]}?" if similar else "")


class _Once(argparse.Action):
    """Stores a value that may not be given again as another one."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None):
        if option_string and parser.given.setdefault(self.dest, values) != values:
            parser.error(_twice(option_string, str(parser.given[self.dest]), str(values)))
        if values == "":  # of an unset variable of a shell
            parser.error(f"{option_string or self.dest} is empty")
        setattr(namespace, self.dest, values)


def started_as(program: str) -> str:
    """The command line of this process, for a program that was started by `python -m`."""
    return shlex.join(["python", "-m", program, *sys.argv[1:]])


def parse(argv: Sequence[str], values: flags.FlagValues = flags.FLAGS) -> list[str]:
    """Parses flags as absl does; exits with status 2 and one sentence if they are wrong, and with 0 after --help."""
    if HELP & set(argv[1:]):
        show(help_text(sys.modules["__main__"].__doc__ or "", values))
        sys.exit(0)
    try:
        _check_flags(argv, values)
        _check_config_file(argv, values)
        return values(argv)
    except HelpShown as shown:
        show(shown.text)
        raise
    except KeyboardInterrupt:
        print("stopped by Ctrl-C before anything was run", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except Exception as error:  # absl and ml_collections raise many types of errors
        sys.exit(bad_input(_sentence(error, argv, values)))


def unexpected(argument: str) -> int:
    """Prints that an argument is no flag, and returns the exit status."""
    if argument.startswith("-") and argument != "-":
        return bad_input(f"{argument}: what follows -- is no flag; leave out the --.")
    return bad_input(f"unexpected argument {argument!r}; flags begin with --")


def help_text(text: str, values: flags.FlagValues) -> str:
    """A description of a command with the flags of this package."""
    own = _own(values)
    width = max((len(flag.name) for flag in own), default=0)
    return "\n".join([text.rstrip(), "", "Flags:", *(f"  --{flag.name:{width}}  {flag.help}" for flag in own)])


def _own(values: flags.FlagValues) -> list[flags.Flag]:
    """The flags of this package."""
    by_module = values.flags_by_module_dict()
    return [f for name in by_module if name == sys.argv[0] or name.startswith("vkd_jax.") for f in by_module[name]]


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
    """Prints a text of one or more lines on stdout, in which nothing steers the terminal or fails to be encoded.

    If the reader has closed it, as `head` does, the rest is dropped; if it cannot be written, the process exits with 2.
    """
    if sys.stdout is None:  # the process was started without one
        sys.exit(bad_input("the output cannot be written (stdout is closed); write it to another place."))
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        print(messages.escaped(text, keep="\n\t").encode(encoding, "backslashreplace").decode(encoding), flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left in its buffer
        if not isinstance(error, BrokenPipeError):
            sys.exit(bad_input(f"the output cannot be written ({error.strerror}); write it to another place."))


def _check_config_file(argv: Sequence[str], values: flags.FlagValues) -> None:
    """Checks before the config file is opened that reading it will end; a missing one is reported by `values(argv)`.

    Raises:
        UserError: it is a folder, a named pipe or a device, or may not be looked at.
    """
    for flag, value in _flags(argv, values):
        name = value.partition(":")[0]
        if flag != "config" or not name:
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


def _flags(argv: Sequence[str], values: flags.FlagValues) -> Iterator[tuple[str, str]]:
    """(name, value) of each flag of a command line, without opening a config; "" for a value that is not there."""
    arguments = list(itertools.takewhile(lambda argument: argument != "--", argv[1:]))
    for argument, following in itertools.pairwise([*arguments, ""]):
        name, separator, value = argument.lstrip("-").partition("=")
        if not argument.startswith("-") or not name:
            continue
        if name not in values and name.startswith("no") and name[2:] in values and values[name[2:]].boolean:
            yield name[2:], "false"
        elif separator:
            yield name, value
        elif name in values and values[name].boolean:
            yield name, "true"
        else:
            yield name, "" if following.startswith("-") else following


def _check_flags(argv: Sequence[str], values: flags.FlagValues) -> None:
    """Checks that no flag is one of a library, and that each has one value; unknown ones are found later.

    Raises:
        UserError: this is not the case.
    """
    own, given = {flag.name for flag in _own(values)}, {}
    for name, value in _flags(argv, values):
        if name in values and name not in own:
            raise UserError(_foreign(name))
        setting = name
        if field := re.fullmatch(r"(?:no)?config\.(.*)", name, re.DOTALL):
            if not (parts := _parts(field[1])):
                raise UserError(f"--{name}: {field[1]!r:.60} is not the name of a field; give one such as train.steps.")
            setting = ".".join(parts)  # of train['steps'], too
        if given.setdefault(setting, value) != value:
            raise UserError(f"{_twice(f'--{name}', given[setting], value)}.")
        if name in ("config", "workdir") and not value:  # of an unset variable of a shell
            raise UserError(f"--{name} is empty; pass its path.")


def _parts(name: str) -> Sequence[str]:
    """The parts of the name of a field: words with dots between them, or keys in brackets; () if it can be none."""
    try:
        parts = config_path.split(name)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return ()
    return parts if all(isinstance(part, str) for part in parts) else ()


def _foreign(name: str) -> str:
    return f"--{name} is no flag of this command; --help shows its flags."


def _twice(flag: str, first: str, second: str) -> str:
    return f"{flag} is given twice, as {first:.40} and {second:.40}; keep one"


def _sentence(error: Exception, argv: Sequence[str], values: flags.FlagValues) -> str:
    """What is wrong with the flags."""
    if isinstance(error, UserError):
        return error.message
    if isinstance(error, flags.UnrecognizedFlagError):
        similar = re.search(r"Did you mean: (.+?) \?", str(error))
        return _foreign(error.flagname) + (f" Did you mean --{similar[1]}?" if similar else "")
    last = (str(error).strip().splitlines() or [""])[-1].strip()  # what precedes it is a traceback
    if isinstance(error, flags.IllegalFlagValueError) and (
        match := re.fullmatch(r"flag (--[^\s=]+)(=.*?): (.*)", last)
    ):
        return f"{match[1]}{match[2]} is not allowed. Give {_allowed(match[1], match[3])}."
    if match := re.fullmatch(r"--no([^\s=]+)(=.*) does not take an argument", last):
        return f"--no{match[1]}{match[2]}: a flag with --no takes no value; give --no{match[1]} or --{match[1]}=false."
    if match := re.fullmatch(r"Missing value for flag (--\S+)", last):
        return f"{match[1]} has no value; give {match[1]}=VALUE."
    if isinstance(error, (AttributeError, KeyError, TypeError)):
        return _wrong_field(str(error.args[0]) if error.args else "", argv, values)
    return last


def _allowed(flag: str, problem: str) -> str:
    """The values that a flag takes, from the message on one that it does not take."""
    if "Non-boolean argument to boolean flag" in problem:
        return "true or false"
    if "as a ConfigDict" in problem:
        argument = COMPONENTS.get(flag)
        other = f", {argument}=NAME after the colon of --config" if argument else ""
        return f"a field of this section, as in {flag}.FIELD=VALUE{other}, or a dict"
    return next((remedy for wrong, remedy in NUMBERS.items() if re.match(wrong, problem)), f"another value ({problem})")


def _wrong_field(message: str, argv: Sequence[str], values: flags.FlagValues) -> str:
    """The sentence on a flag for a field that does not exist, from the message of ml_collections."""
    for name, _ in _flags(argv, values):
        if not (field := re.fullmatch(r"(?:no)?config\.(.*)", name, re.DOTALL)):
            continue
        section = values["config"].parser.config
        for part in field[1].split("."):
            if not isinstance(section, ConfigDict):
                return f"--{name}: a value has no fields; docs/configuration.md lists the fields."
            if part not in section:
                similar = difflib.get_close_matches(part, section.keys(), 1)
                return f"--{name}: unknown field {part!a:.60}. " + (
                    f"Did you mean {similar[0]!a}?" if similar else "docs/configuration.md lists the fields."
                )
            section = section[part]
    return f"--config: {message}"
