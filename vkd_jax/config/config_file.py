"""The file that --config names: what it raises, or returns in place of a config, becomes one sentence."""

import inspect
import json
import re
import traceback
import types

from absl import flags
from ml_collections import ConfigDict

from vkd_jax.config.arguments import HelpShown
from vkd_jax.types import UserError

EXAMPLE = "see configs/tiny.py"
MOST_CHARACTERS = 2**24  # of a file that is not Python
# Of ml_collections, on a value that its field does not take.
_MISTYPED = re.compile(
    r"Could not override field '(.*?)' .*?\. (.*) is of original type <class '(.*?)'> .* <class '(.*?)'>"
)


class Parser(flags.ArgumentParser):
    """Reads a config file as ml_collections does.

    Args:
        parser: the parser of ml_collections.
    """

    def __init__(self, parser: flags.ArgumentParser):
        self._parser = parser
        self.config: ConfigDict | None = None  # what was read last

    def parse(self, path: str) -> ConfigDict:
        """Returns the config of FILE or FILE:ARGUMENTS.

        Raises:
            UserError: the file cannot be read, raises an error or exits, or returns something else.
            HelpShown: the arguments are `help`.
        """
        self.config, location = None, f"--config={path:.200}"
        try:
            config = self._parser.parse(path)
            stage = getattr(config, "stage", None)  # raises if the file cannot be read
        except (KeyboardInterrupt, HelpShown):
            raise
        except BaseException as error:  # a config file is a program, and may raise anything or exit
            raise UserError(f"{location}: {_sentence(path, _original(error))}") from error
        if not isinstance(config, ConfigDict) or stage is None:
            if inspect.iscoroutine(config):
                config.close()  # otherwise Python warns that it was never awaited
            kind = "None" if config is None else f"a value of the type {type(config).__name__}"
            kind = kind if not isinstance(config, ConfigDict) else "a config without it"
            raise UserError(f"{location}: get_config() returned {kind}, not a config with a field `stage`; {EXAMPLE}.")
        self.config = config
        return config

    def flag_type(self) -> str:
        """The type in the text of --help."""
        return self._parser.flag_type()


def _original(error: BaseException) -> BaseException:
    """What the file raised: ml_collections replaces some types of errors by others."""
    if isinstance(error, TypeError | ValueError) and error.__context__ is not None:
        return error.__context__
    if isinstance(error, OSError) and error.__cause__ is not None:
        return error.__cause__
    return error


def _sentence(path: str, error: BaseException) -> str:
    """What is wrong with a file, by what it raised."""
    if isinstance(error, UserError):
        return error.message
    if kind := _other_format(path.partition(":")[0]):
        return f"it is {kind}, and --config takes a Python file; give the one that the run was started with, {EXAMPLE}."
    frames = [frame.f_code.co_name for frame, _ in traceback.walk_tb(error.__traceback__)]
    in_file, message = "get_config" in frames or "<module>" in frames, " ".join(str(error).split())
    message = re.sub(r"^Failed loading config file .*?\[Errno", "[Errno", message)
    if isinstance(error, AttributeError) and error.name == "get_config" and isinstance(error.obj, types.ModuleType):
        return f"the file has no function get_config(); {EXAMPLE}."
    if isinstance(error, OSError) and not in_file and (match := re.search(r"\[Errno \d+\] (.*): '(.*)'", message)):
        if match[2] == path.partition(":")[0]:
            return f"it cannot be read ({match[1]}); pass a config file."
    if isinstance(error, TypeError) and not in_file:
        given = "the text after the colon" if ":" in path else "no argument"
        return f"get_config() cannot be called with {given} ({message}); {EXAMPLE}."
    if match := _MISTYPED.match(message):
        field, value, given, wanted = match.groups()
        return f"the field {field!a} has the value {value!a:.60} of the type {given}; give one of the type {wanted}."
    return f"the file raised {type(error).__name__}{': ' if message else ''}{message}; correct the file."


def _other_format(name: str) -> str:
    """What a file is that is no Python: JSON, such as the config.json of a run; "" if it may be Python."""
    try:
        with open(name, encoding="utf-8-sig") as file:
            value = json.loads(file.read(MOST_CHARACTERS))
    except (OSError, ValueError, RecursionError):
        return ""
    if not isinstance(value, dict):
        return ""
    return "the JSON of a run" if {"stage", "model", "method"} <= value.keys() else "a JSON file"
