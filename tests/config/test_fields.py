"""Declared fields: allowed values, and the wording of errors."""

import dataclasses
import math
from collections.abc import Mapping
from typing import ClassVar

import pytest

from vkd_jax.config.fields import FieldError, Section, describe, setting
from vkd_jax.types import located


@dataclasses.dataclass(frozen=True)
class Toy(Section):
    """A section with a field of each kind."""

    SECTION: ClassVar[str] = "toy"
    count: int = setting(3, "Number of things.", minimum=1)
    rate: float = setting(0.1, "Rate.", above=0)
    share: float = setting(0.5, "Share.", minimum=0, below=1)
    limit: float = setting(1.0, "Limit.", above=0, infinity=True)
    kind: str = setting("a", "Kind.", choices=("", "a", "b"))
    name: str = setting("", "Name.", pattern="x*", expected="a row of x")
    flag: bool = setting(False, "Flag.")
    names: tuple[str, ...] = setting(("a",), "Names.", choices=("a", "b"), nonempty=True)
    maybe: float | None = setting(None, "Optional number.", maximum=1)
    sizes: Mapping[str, int] = setting({"a": 1}, "Sizes.", minimum=1)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("count", 0, "a whole number of at least 1"),
        ("count", 1.0, "a whole number of at least 1"),
        ("count", True, "a whole number of at least 1"),
        ("count", None, "a whole number of at least 1"),
        ("rate", math.nan, "a number greater than 0"),
        ("rate", math.inf, "a number greater than 0"),
        ("rate", 0, "a number greater than 0"),
        ("rate", "1", "a number greater than 0"),
        ("share", 1.0, "a number of at least 0 and below 1"),
        ("share", -0.1, "a number of at least 0 and below 1"),
        ("limit", math.nan, "a number greater than 0"),
        ("kind", "c", "one of '', a, b"),
        ("name", "xy", "a row of x"),
        ("name", 1, "a row of x"),
        ("flag", 1, "True or False"),
        ("names", (), "a nonempty tuple of different items, each one of a, b"),
        ("names", ("a", "c"), "a nonempty tuple of different items, each one of a, b"),
        ("names", ("a", "b", "a"), "a nonempty tuple of different items, each one of a, b"),
        ("names", "a", "a nonempty tuple of different items, each one of a, b"),
        ("maybe", 2.0, "a number at most 1, or None"),
        ("maybe", math.nan, "a number at most 1, or None"),
    ],
)
def test_an_error_names_the_value_and_the_allowed_values(field, value, expected):
    with pytest.raises(FieldError) as error:
        Toy(**{field: value})
    assert str(error.value) == f"toy.{field}: {value!r} is not allowed. Give {expected}."


@pytest.mark.parametrize("sizes", [{"a": 0}, {"a": 1, "b": 1.5}, [1]])
def test_each_value_of_a_mapping_is_checked(sizes):
    with pytest.raises(FieldError, match=r"toy.sizes: .* Give a mapping, each value a whole number of at least 1\."):
        Toy(sizes=sizes)


def test_allowed_values_stay_and_mappings_are_frozen():
    toy = Toy(count=1, rate=2, limit=math.inf, kind="", name="xx", names=("b", "a"), maybe=1, sizes={"b": 2})
    assert (toy.rate, toy.maybe, dict(toy.sizes)) == (2, 1, {"b": 2})
    assert toy == dataclasses.replace(toy) and hash(toy) == hash(dataclasses.replace(toy))
    with pytest.raises(ValueError, match="immutable"):
        toy.sizes["b"] = 3


def test_an_error_names_the_sections_around_it():
    error = FieldError("train.steps", "-1 is not allowed.")
    assert str(error.within("finetune")) == "finetune.train.steps: -1 is not allowed."


def test_an_error_of_a_field_can_be_located():
    with pytest.raises(FieldError, match="^request 2: train.steps: -1 is not allowed"), located("request 2"):
        raise FieldError("train.steps", "-1 is not allowed")


def test_a_misspelled_rule_is_refused():
    with pytest.raises(TypeError, match=r"\['minimun'\]"):
        setting(1, "A number.", minimun=0)


def test_fields_are_described_with_value_meaning_and_range():
    rows = {path: (value, help) for path, value, help in describe(Toy(), "outer.")}
    assert rows["outer.count"] == (3, "Number of things. Allowed: a whole number of at least 1.")
    assert rows["outer.flag"] == (False, "Flag.") and list(rows)[0] == "outer.count"
