"""Declaration and validation of settings: one validator and one wording for every section, method and attack.

A section is a frozen dataclass whose fields are declared with `setting`, together with their meaning and range:

>>> @dataclasses.dataclass(frozen=True)
... class Adam(Section):
...     SECTION = "adam"
...     b2: float = setting(0.999, "Decay rate of the second moment.", minimum=0, below=1)
>>> Adam(b2=1.0)
Traceback (most recent call last):
vkd_jax.config.fields.FieldError: adam.b2: 1.0 is not allowed. Give a number of at least 0 and below 1.
"""

import dataclasses
import difflib
import functools
import math
import re
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import ml_collections
from flax.core import FrozenDict

from vkd_jax import messages
from vkd_jax.types import UserError

INLINE = "inline"  # metadata of a field whose subfields are on the same level in a ConfigDict
SEED = {"minimum": 0, "maximum": 2**31 - 1}  # rules of a seed: an integer of 32 bits, which every generator takes
RULES = {"choices", "minimum", "above", "maximum", "below", "infinity", "nonempty", "pattern", "expected"}


class FieldError(UserError):
    """A setting that is not allowed: "train.steps: -1 is not allowed. Give a whole number of at least 0."."""

    def __init__(self, path: str, problem: str):
        super().__init__(path, problem)
        self.path, self.problem = path, problem

    @property
    def message(self) -> str:
        """The field and what is wrong with it."""
        return f"{self.path}: {self.problem}"

    def at(self, location: str) -> "FieldError":
        """The same error with a location before its message; see `types.located`."""
        return FieldError(f"{location}: {self.path}", self.problem)

    def within(self, section: str) -> "FieldError":
        """The same error of a section that is nested in another one."""
        return FieldError(f"{section}.{self.path}", self.problem)


def value_of(config: ml_collections.ConfigDict, name: str) -> Any:
    """The value of a field of a ConfigDict by its dotted name, such as "train.steps".

    Raises:
        FieldError: there is no such field.
    """
    value, section = config, ""
    for part in name.split("."):
        if not isinstance(value, ml_collections.ConfigDict):
            raise FieldError(name, f"{section} is a value and has no field {part!r:.40}.")
        if part not in value:
            similar = difflib.get_close_matches(part.strip().lower(), value.keys(), 1)
            remedy = f"Did you mean {similar[0]!r}?" if similar else f"Available: {messages.choices(value.keys())}."
            raise FieldError(name or "settings", f"unknown field {part!r:.40}. {remedy}")
        value, section = value[part], f"{section}.{part}" if section else part
    return value


def setting(default: Any, help: str, **rules: Any) -> Any:
    """Declares a documented field of a section.

    Args:
        default: default value.
        help: meaning of the field, as a sentence.
        **rules: allowed values. `choices` is the closed set of values (of the items, if the field is a tuple).
            `minimum`, `above`, `maximum` and `below` bound numbers. `infinity=True` allows infinite numbers.
            `nonempty=True` refuses empty tuples. `pattern` is a regular expression that strings match, and `expected`
            describes it.

    Raises:
        TypeError: a rule has another name than those above.
    """
    if unknown := set(rules) - RULES:
        raise TypeError(f"unknown rules of a setting: {sorted(unknown)}")
    metadata = {"help": help, **rules}
    if isinstance(default, dict):
        default = FrozenDict(default)
    return dataclasses.field(default=default, metadata=metadata)


class Section:
    """Base class of the frozen dataclasses of settings. A section that exists is valid."""

    SECTION: ClassVar[str] = ""  # path of the section in the config, for messages: "train", "attacks.relearn"

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if isinstance(value := getattr(self, field.name), Mapping):  # immutable and hashable, as the section is
                object.__setattr__(self, field.name, FrozenDict(value))
        self.validate()

    def validate(self) -> None:
        """Checks type and range of each field; sections extend it with checks that involve several fields.

        Raises:
            FieldError: the first field with a value that is not allowed.
        """
        types_of_fields = annotations(type(self))
        for field in dataclasses.fields(self):
            value, kind = getattr(self, field.name), types_of_fields[field.name]
            if not _allowed(value, kind, field.metadata):
                shown = value.unfreeze() if isinstance(value, FrozenDict) else value
                raise self.error(field.name, f"{shown!r} is not allowed. Give {_expected(kind, field.metadata)}.")

    def error(self, field: str, problem: str) -> FieldError:
        """An error of one of the fields, to be raised."""
        return FieldError(f"{self.SECTION}.{field}".lstrip("."), problem)


@functools.cache
def annotations(section: type) -> Mapping[str, Any]:
    """Type of each field of a dataclass."""
    hints = typing.get_type_hints(section)
    return {field.name: hints[field.name] for field in dataclasses.fields(section)}


def optional(kind: Any) -> bool:
    """Whether None is a value of the type."""
    return type(None) in typing.get_args(kind)


def describe(section: Any, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """(path, value, meaning) of each field of a section and of the sections in it."""
    for field in dataclasses.fields(section):
        value, path = getattr(section, field.name), f"{prefix}{field.name}"
        inner = prefix if field.metadata.get(INLINE) else f"{path}."
        if dataclasses.is_dataclass(value):
            yield from describe(value, inner)
        elif field.metadata.get(INLINE):
            for name, item in value.items():
                yield from describe(item, f"{inner}{name}.")
        else:
            yield path, value, documentation(field, annotations(type(section))[field.name])


def documentation(field: dataclasses.Field, kind: Any) -> str:
    """Meaning and allowed values of a field, in one line."""
    help, restricted = field.metadata["help"], RULES & set(field.metadata)
    return f"{help} Allowed: {_expected(kind, field.metadata)}." if restricted else help


def _allowed(value: Any, kind: Any, rules: Mapping[str, Any]) -> bool:
    """Whether a value has the type and satisfies the rules."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return _is_plain(value)
    if origin in (types.UnionType, typing.Union):
        return value is None or _allowed(value, next(arg for arg in args if arg is not type(None)), rules)
    if origin is tuple:
        full = isinstance(value, tuple) and (len(value) > 0 or not rules.get("nonempty"))
        valid = full and all(_allowed(item, args[0], rules) for item in value)
        if not valid or args[0] is Any:
            return valid
        # Tables could not tell floats that print alike.
        return len({f"{item:g}" if args[0] is float else item for item in value}) == len(value)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return isinstance(value, Mapping) and all(_allowed(item, args[1], rules) for item in value.values())
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if isinstance(kind, type) and not (isinstance(value, kind) and isinstance(value, bool) <= (kind is bool)):
        return False
    if "choices" in rules:
        return value in rules["choices"]
    if kind is str and not _is_plain(value):
        return False
    if kind in (int, float):
        return _in_range(value, rules)
    return "pattern" not in rules or re.fullmatch(rules["pattern"], value) is not None


def _is_plain(value: Any) -> bool:
    """Whether a value can be written as JSON in UTF-8; a component, which has its own fields, can."""
    if isinstance(value, Mapping):
        return all(isinstance(name, str) and _is_plain(name) and _is_plain(item) for name, item in value.items())
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    if isinstance(value, str):
        return "\0" not in value and not any("\ud800" <= character <= "\udfff" for character in value)
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or isinstance(value, int) or dataclasses.is_dataclass(value)


def _in_range(value: float, rules: Mapping[str, Any]) -> bool:
    if math.isnan(value) or (math.isinf(value) and not rules.get("infinity")):
        return False
    return (
        rules.get("minimum", -math.inf) <= value <= rules.get("maximum", math.inf)
        and ("above" not in rules or value > rules["above"])
        and ("below" not in rules or value < rules["below"])
    )


def _expected(kind: Any, rules: Mapping[str, Any]) -> str:
    """The allowed values in words: "a whole number of at least 1"."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return _expected(next(arg for arg in args if arg is not type(None)), rules) + ", or None"
    if origin is tuple:
        return (
            f"a {'nonempty ' * bool(rules.get('nonempty'))}tuple of different items, each {_expected(args[0], rules)}"
        )
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return f"a mapping, each value {_expected(args[1], rules)}"
    if "choices" in rules:
        return f"one of {messages.choices(str(choice) or repr(choice) for choice in rules['choices'])}"
    if "expected" in rules:
        return rules["expected"]
    names = {int: "a whole number", float: "a number", str: "a text", bool: "True or False"}
    name = names.get(kind, "a value that JSON has")
    words = {"minimum": "of at least", "above": "greater than", "maximum": "at most", "below": "below"}
    bounds = [f"{word} {_shown(rules[key])}" for key, word in words.items() if key in rules]
    return f"{name} {' and '.join(bounds)}".strip()


def _shown(number: float) -> str:
    return f"{number:,}" if isinstance(number, int) else f"{number:g}"


def comma_separated(text: str) -> list[str]:
    """The items of a text that separates them by commas.

    Example:
        >>> comma_separated("pope, gqa,")
        ['pope', 'gqa']
    """
    return [item.strip() for item in text.split(",") if item.strip()]
