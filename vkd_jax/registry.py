"""How a name in a config becomes an object: tables of lazily imported dataclasses."""

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any

from vkd_jax.types import UserError


def create(kind: str, table: Mapping[str, str], name: str, fields: Mapping[str, Any]) -> Any:
    """The object called `name` with these hyperparameters; its dataclass says which there are.

    Args:
        kind: of what the table holds, for messages: "method".
        table: name -> "module:Dataclass"; only the module that is asked for is imported.
        name: the key.
        fields: hyperparameters; others keep their defaults.

    Raises:
        UserError: there is no such name, or it has no such hyperparameter.
    """
    if name not in table:
        raise UserError(f"there is no {kind} {name!r}; the {kind}s are {', '.join(sorted(table))}.")
    module, attribute = table[name].split(":")
    cls = getattr(importlib.import_module(module), attribute)
    known = {field.name for field in dataclasses.fields(cls)}
    if unknown := sorted(set(fields) - known):
        raise UserError(
            f"{kind} {name} has no hyperparameter {', '.join(unknown)}; it has {', '.join(sorted(known)) or 'none'}."
        )
    return cls(**fields)
