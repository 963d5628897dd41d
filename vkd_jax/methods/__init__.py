"""Unlearning methods, one file each. A new one is a new file and a line here."""

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any

from vkd_jax.methods.base import Method
from vkd_jax.types import UserError

METHODS = {
    "finetune": "vkd_jax.methods.finetune:Finetune",
    "grad_diff": "vkd_jax.methods.grad_diff:GradDiff",
    "vkd": "vkd_jax.methods.vkd:VKD",
}


def create(name: str, fields: Mapping[str, Any]) -> Method:
    """The method called `name` with these hyperparameters; its dataclass says which there are.

    Raises:
        UserError: there is no such method, or it has no such hyperparameter.
    """
    if name not in METHODS:
        raise UserError(f"there is no method {name!r}; the methods are {', '.join(sorted(METHODS))}.")
    module, attribute = METHODS[name].split(":")
    method = getattr(importlib.import_module(module), attribute)
    known = {field.name for field in dataclasses.fields(method)}
    if unknown := sorted(set(fields) - known):
        raise UserError(
            f"method {name} has no hyperparameter {', '.join(unknown)}; it has {', '.join(sorted(known)) or 'none'}."
        )
    return method(**fields)
