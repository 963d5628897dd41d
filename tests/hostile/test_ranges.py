"""Every numeric field of every section, method, benchmark and attack has a range, and refuses what is outside of it.

The fields are read off the declarations, so that a new one is tested without a line here.
"""

import dataclasses
import math
import typing
from collections.abc import Mapping

import pytest

from vkd_jax import registry
from vkd_jax.config import comparison, fields, schema, training
from vkd_jax.config.fields import FieldError

TABLES = {"method": registry.METHODS, "benchmark": registry.BENCHMARKS, "attack": registry.ATTACKS}
SECTIONS = [schema.ModelConfig, schema.MeshConfig, schema.EvalConfig, schema.AttacksConfig, schema.RunConfig]
SECTIONS += [training.TrainConfig, comparison.CompareConfig]
SECTIONS += [registry.lookup(kind, table, name) for kind, table in TABLES.items() for name in table]


def numeric_fields(section):
    """Name, type of number and rules of each field that holds numbers, and how a number becomes its value."""
    for field in dataclasses.fields(section):
        kind = fields.annotations(section)[field.name]
        origin, args = typing.get_origin(kind), typing.get_args(kind)
        wrap = lambda number: number  # noqa: E731
        if origin is tuple:
            kind, wrap = args[0], lambda number: (number,)
        elif isinstance(origin, type) and issubclass(origin, Mapping):
            kind, wrap = args[1], lambda number: {"key": number}
        elif fields.optional(kind):
            kind = next(arg for arg in args if arg is not type(None))
        if kind in (int, float):
            yield field.name, kind, field.metadata, wrap


def outside(kind, rules):
    """Numbers that the rules do not allow, and other things that are no number of this kind."""
    if "choices" in rules:
        numbers = [min(rules["choices"]) - 1, max(rules["choices"]) + 1]
    else:
        numbers = [rules[key] - 1 for key in ("minimum", "above") if key in rules]
        numbers += [rules["above"]] if "above" in rules else []
        numbers += [rules[key] + 1 for key in ("maximum", "below") if key in rules]
        numbers += [rules["below"]] if "below" in rules else []
    numbers = [kind(number) for number in numbers]
    infinite = [] if rules.get("infinity") else [math.inf, -math.inf]
    return [*numbers, *infinite, math.nan, "1", True, False, [1], {}, b"1", 1j, *([0.5, 1e30] if kind is int else [])]


FIELDS = [(section, *field) for section in SECTIONS for field in numeric_fields(section)]


@pytest.mark.parametrize(
    ("section", "name", "kind", "rules", "wrap"),
    FIELDS,
    ids=[f"{section.__name__}.{name}" for section, name, *_ in FIELDS],
)
def test_a_numeric_field_refuses_what_is_outside_of_its_range(section, name, kind, rules, wrap):
    assert set(rules) & {"choices", "minimum", "above", "maximum", "below"}, "declare a range"
    for value in outside(kind, rules):
        with pytest.raises(FieldError) as error:
            section(**{name: wrap(value)})
        message = str(error.value)
        assert name in message and "is not allowed. Give " in message and len(message) < 600, message


def test_all_numeric_fields_are_there():
    assert len(FIELDS) > 80
    assert {"seed", "learning_rate", "weight_decay", "mask_keep", "cap", "shares", "seeds", "batch_size"} <= {
        name for _, name, *_ in FIELDS
    }
