"""Arguments after a config's colon: `configs/llava.py:size=7b,benchmark=mllmu,forget=5,stage=all`.

An argument has a closed set of values, each with a meaning. A bare word is the value of the argument that has it, if no
other argument does: `7b` is `size=7b`. The word `help` prints all arguments.
"""

import dataclasses
from collections.abc import Mapping, Sequence

from vkd_jax import messages
from vkd_jax.config import fields, schema
from vkd_jax.types import UserError


class HelpShown(SystemExit):
    """The text after the colon was `help`: the command prints all arguments and ends with status 0."""

    def __init__(self, text: str):
        super().__init__(0)
        self.text = text


@dataclasses.dataclass(frozen=True)
class Argument:
    """A key with its closed set of values."""

    key: str
    help: str
    values: Mapping[str, str]  # value -> meaning
    default: str
    needs_key: frozenset[str] = frozenset()  # values that are not accepted as bare words
    bare_key: str = ""  # value that the key alone selects; "" if the key requires a value

    def __post_init__(self):
        if self.default not in self.values:
            raise ValueError(f"{self.key}: the default {self.default!r} is not among {list(self.values)}")


def parse(text: str, arguments: Sequence[Argument], run_fields: bool = True) -> dict[str, str]:
    """Value of each argument by its key.

    Args:
        text: text after the colon.
        arguments: arguments of the config.
        run_fields: whether `help` also prints the fields of a run's config.

    Raises:
        UserError: unknown key or value, a bare word that several arguments take, or two values for one key.
        HelpShown: the text is `help`.
    """
    if text == "help":
        raise HelpShown(usage(arguments, run_fields))
    by_key, given = {argument.key: argument for argument in arguments}, {}
    for word in filter(None, text.split(",")):
        key, _, value = word.rpartition("=")
        if not key and word in by_key and by_key[word].bare_key:
            key, value = word, by_key[word].bare_key
        argument = by_key.get(key) if key else _only(word, arguments)
        if argument is None:
            raise UserError(f"{word}: unknown argument. Available: {_available(arguments)}.")
        if value not in argument.values:
            raise UserError(f"{word}: unknown value. Available for {key}: {messages.choices(argument.values)}.")
        if given.setdefault(argument.key, value) != value:
            raise UserError(f"{text}: two values for {argument.key}, {given[argument.key]} and {value}. Keep one.")
    return {argument.key: given.get(argument.key, argument.default) for argument in arguments}


def usage(arguments: Sequence[Argument], run_fields: bool = True) -> str:
    """All arguments, and the fields of a run's config if asked for, with their meanings."""
    lines = ["Arguments after the colon, separated by commas, as key=value or a bare value:"]
    for argument in arguments:
        lines += ["", f"{argument.key}: {argument.help}"]
        width = max(map(len, argument.values))
        for value, meaning in argument.values.items():
            notes = [meaning, "(default)" * (value == argument.default)]
            if value == argument.bare_key:
                notes += [f"(also: {argument.key})"]
            elif value in argument.needs_key:
                notes += [f"(only as {argument.key}={value})"]
            lines.append(f"  {value:{width}}  {' '.join(filter(None, notes))}".rstrip())
    if run_fields:
        lines += ["", "Fields, set by --config.FIELD=VALUE; other methods and benchmarks have other fields:"]
        lines += [f"  {path}: {help}" for path, _, help in fields.describe(schema.RunConfig())]
    return "\n".join(lines)


def _only(word: str, arguments: Sequence[Argument]) -> Argument | None:
    """The only argument that has a bare word among its values, or None."""
    takers = [a for a in arguments if word in a.values and word not in a.needs_key]
    if len(takers) > 1:
        keys = " or ".join(f"{argument.key}={word}" for argument in takers)
        raise UserError(f"{word}: several arguments take this value. Give {keys}.")
    return takers[0] if takers else None


def _available(arguments: Sequence[Argument]) -> str:
    return "; ".join(f"{argument.key}={'|'.join(argument.values)}" for argument in arguments)
