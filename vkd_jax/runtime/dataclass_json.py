"""Dataclasses as JSON objects, by their annotated types."""

import dataclasses
import enum
import types
import typing
from collections.abc import Mapping
from typing import Any

SIBLINGS = {"siblings": True}  # metadata of a mapping field whose items stand among the fields in JSON


class FormatError(ValueError):
    """A file does not follow the documented schema."""


def encode(value: Any) -> Any:
    """Encodes dataclasses, mappings and sequences as JSON-compatible values; fields that are None are left out.

    Example:
        >>> encode(MeasuredSet(name="forget", role=Role.FORGET, title="to forget", short="forget", people=6))
        {'name': 'forget', 'role': 'forget', 'title': 'to forget', 'short': 'forget', 'people': 6}
    """
    if dataclasses.is_dataclass(value):
        fields: dict[str, Any] = {}
        for field in dataclasses.fields(value):
            item = getattr(value, field.name)
            fields |= item if field.metadata == SIBLINGS else {field.name: item}
        return {name: encode(item) for name, item in fields.items() if item is not None}
    if isinstance(value, Mapping):
        return {str(name): encode(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [encode(item) for item in value]
    return value


def decode(kind: Any, value: Any, path: str = "") -> Any:
    """Decodes a parsed JSON value.

    Args:
        kind: the annotated type: a dataclass, an optional type, a mapping, a tuple, an enumeration of strings, a
            number, `str`, `bool` or `Any`.
        value: what `json.loads` returned.
        path: where the value is in the file, for errors.

    Raises:
        FormatError: a field is missing, is unknown, or has another type; the message names it.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        (kind,) = (argument for argument in arguments if argument is not type(None))
        return None if value is None else decode(kind, value, path)
    if dataclasses.is_dataclass(kind):
        return _decoded_object(kind, value, path)
    if origin is not None and issubclass(origin, Mapping):
        _check(isinstance(value, dict), path, "an object", value)
        return {name: decode(arguments[1], item, f"{path}.{name}".lstrip(".")) for name, item in value.items()}
    if origin is tuple:
        _check(isinstance(value, list), path, "a list", value)
        return tuple(decode(arguments[0], item, f"{path}[{i}]") for i, item in enumerate(value))
    if issubclass(kind, enum.StrEnum):
        _check(value in list(kind), path, f"one of {', '.join(kind)}", value)
        return kind(value)
    right = isinstance(value, int | float if kind is float else kind)
    _check(right and (kind is bool or not isinstance(value, bool)), path, kind.__name__, value)
    return value


def _decoded_object(kind: Any, value: Any, path: str) -> Any:
    _check(isinstance(value, dict), path, "an object", value)
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for name in (name for name, field in fields.items() if field.metadata == SIBLINGS):
        known = fields.keys() - {name}
        siblings = {key: item for key, item in value.items() if key not in known}
        value = {key: item for key, item in value.items() if key in known} | {name: siblings}
    if unknown := sorted(value.keys() - fields.keys()):
        raise FormatError(f"{path or 'the file'} has an unknown field {unknown[0]!r}")
    missing = dataclasses.MISSING
    for name, field in fields.items():
        if name not in value and field.default is missing and field.default_factory is missing:
            raise FormatError(f"{path or 'the file'} lacks the field {name!r}")
    return kind(**{name: decode(hints[name], item, f"{path}.{name}".lstrip(".")) for name, item in value.items()})


def _check(valid: bool, path: str, expected: str, value: Any) -> None:
    if not valid:
        raise FormatError(f"{path} is {value!r}, expected {expected}")
