"""Reads JSON from untrusted files and texts, and refuses whatever later code cannot use.

A value that this module returns is finite, nested at most `MOST_LEVELS` levels deep, its texts can be written as UTF-8,
and its objects have each key once. Everything else is a `UserError` that names the file and the location in it.
"""

import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import regex

from vkd_jax.runtime import files
from vkd_jax.types import UserError

MOST_LEVELS = 64  # of arrays and objects within each other; no file of a model or data set comes near it
MOST_BYTES = 2**30  # of a JSON file
MOST_MARKS = 200  # in a row; Unicode's own limit for streams is 30
REMEDY = "correct it or get it again"

_MARKS = regex.compile(rf"\p{{M}}{{{MOST_MARKS + 1}}}")
_NAMES = {
    dict: "object",
    list: "array",
    str: "text",
    bytes: "byte string",
    bool: "boolean",
    int: "number",
    float: "number",
    type(None): "null",
}


def read_json(path: os.PathLike[str], expected: type | None = dict, *, remedy: str = REMEDY) -> Any:
    """Reads a JSON file.

    Args:
        path: a file on a disk or in a bucket.
        expected: `dict` or `list`, the type of the whole; None for any.
        remedy: what to do about a damaged file, for messages.

    Raises:
        UserError: the file cannot be read or is not what `parse_json` accepts.

    Example:
        >>> read_json(folder / "config.json")["model_type"]
    """
    return parse_json(files.read_bytes(path, MOST_BYTES), os.fspath(path), expected, remedy=remedy)


def read_json_lines(
    path: os.PathLike[str], *, remedy: str = REMEDY, checked: bool = True
) -> Iterator[tuple[int, dict]]:
    """Yields each line of a JSON Lines file as (line number, object); blank lines are skipped.

    Args:
        path: a file on a disk or in a bucket.
        remedy: what to do about a damaged file, for messages.
        checked: whether the values are checked, too; the answers of a model, which a run wrote, may contain any text.

    Raises:
        UserError: the file cannot be read, or a line is not a JSON object that `parse_json` accepts.
    """
    text = files.read_bytes(path, MOST_BYTES)
    yield from parse_json_lines(text, os.fspath(path), remedy=remedy, checked=checked)


def parse_json_lines(
    text: bytes, location: str, *, remedy: str = REMEDY, checked: bool = True
) -> Iterator[tuple[int, dict]]:
    """Yields each line of JSON Lines; see `read_json_lines`."""
    for number, line in enumerate(files.decode(text, location, remedy).split("\n"), start=1):
        if line.strip():  # only "\n" ends a line: texts may contain other line separators
            try:
                value = parse_json(line, f"{location}, line {number}", dict, remedy=remedy, checked=checked)
            except UserError as error:
                if "\r" not in line.strip():
                    raise
                problem = "it has carriage returns (CR) alone, which end no line; end lines with LF or CR LF"
                raise UserError(f"{location}, line {number}: {problem}.") from error
            yield number, value


def parse_json(
    text: str | bytes,
    location: str,
    expected: type | None = None,
    *,
    remedy: str = REMEDY,
    checked: bool = True,
) -> Any:
    """Parses a JSON text, and checks all that it holds.

    Args:
        text: the JSON text; bytes are UTF-8, with or without a byte order mark.
        location: the file, and the line or row in it, for messages.
        expected: `dict` or `list`, the type of the whole; None for any.
        remedy: what to do about a damaged text, for messages.
        checked: whether levels, numbers and texts are checked; see `check_value`.

    Raises:
        UserError: the text is not JSON, is nested too deeply, has another type than expected, has two values for a key,
            or has a number that is not finite or a text that is not Unicode.
    """
    if isinstance(text, bytes):
        text = files.decode(text, location, remedy)
    try:
        value = json.loads(text, object_pairs_hook=unique_keys)
    except KeyTwiceError as error:
        raise UserError(f"{location}: {error}; {remedy}.") from None
    except RecursionError as error:
        raise UserError(f"{location}: it is nested more than {MOST_LEVELS} levels deep; {remedy}.") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{location}: it is not JSON ({error}); {remedy}.") from error
    except ValueError as error:
        digits = f"more than {sys.get_int_max_str_digits():,} digits"
        raise UserError(f"{location}: it has a whole number of {digits}; {remedy}.") from error
    if expected is not None and not isinstance(value, expected):
        raise UserError(f"{location}: expected an {_NAMES[expected]}, not {describe(value)}; {remedy}.")
    if checked:
        check_value(value, location, remedy=remedy)
    return value


class KeyTwiceError(Exception):
    """An object has a key twice, so that readers may disagree on its value."""

    def __str__(self) -> str:
        return f"an object has the key {self.args[0]!a:.40} twice, with two values"


def unique_keys(pairs: Sequence[tuple[Any, Any]]) -> dict[Any, Any]:
    """The object of these pairs of key and value.

    Raises:
        KeyTwiceError: two of them have the same key and different values.
    """
    made = dict(pairs)
    if len(made) < len(pairs):
        seen: dict[Any, Any] = {}
        for key, value in pairs:
            if key in seen and repr(seen[key]) != repr(value):  # 1 == True
                raise KeyTwiceError(key)
            seen[key] = value
    return made


def check_value(value: Any, location: str, *, remedy: str = REMEDY) -> None:
    """Checks nested values of JSON's types: levels, numbers and texts.

    Raises:
        UserError: a value is nested too deeply, a number is not finite, or a text is not Unicode or contains NUL.
    """
    stack: list[tuple[Any, tuple]] = [(value, ())]
    while stack:
        item, keys = stack.pop()
        problem = ""
        if len(keys) > MOST_LEVELS:
            raise UserError(f"{location}: it is nested more than {MOST_LEVELS} levels deep; {remedy}.")
        if isinstance(item, dict):
            problem = next(filter(None, (text_problem(key) for key in item if isinstance(key, str))), "")
            stack.extend((child, (*keys, key)) for key, child in item.items())
        elif isinstance(item, (list, tuple)):
            stack.extend((child, (*keys, number)) for number, child in enumerate(item))
        elif isinstance(item, str):
            problem = text_problem(item)
        elif isinstance(item, float) and not math.isfinite(item):
            problem = f"has the number {item}, which is not finite"
        if problem:
            field = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys).removeprefix(".")
            raise UserError(f"{location}: {field or 'it'} {problem}; {remedy}.")


def text_problem(text: str) -> str:
    """What makes a text unusable, "" if nothing does.

    It is NUL, half of a surrogate pair, which UTF-8 cannot express, or many combining marks, which take a time that
    grows with the square of their number to normalize.
    """
    if "\0" in text:
        return "contains the character NUL"
    if text.isascii():
        return ""
    if _MARKS.search(text):
        return f"has more than {MOST_MARKS} combining marks in a row"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"is not Unicode: {text[error.start]!a} is half of a surrogate pair"
    return ""


def describe(value: Any) -> str:
    """A value for messages: its type, and the value itself if it is short."""
    name = _NAMES.get(type(value), type(value).__name__)
    if value is None:
        return name
    shown = "" if isinstance(value, (dict, list)) else f" {value!a}"
    return f"the {name}{shown}" if 0 < len(shown) <= 40 else f"{'an' if name[0] in 'aeio' else 'a'} {name}"
