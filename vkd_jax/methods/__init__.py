"""Unlearning methods, one file each. A new one is a new file and a line here."""

from collections.abc import Mapping
from typing import Any

from vkd_jax import registry
from vkd_jax.methods.base import Method

METHODS = {
    "finetune": "vkd_jax.methods.finetune:Finetune",
    "grad_diff": "vkd_jax.methods.grad_diff:GradDiff",
    "vkd": "vkd_jax.methods.vkd:VKD",
}


def create(name: str, fields: Mapping[str, Any]) -> Method:
    """The method called `name` with these hyperparameters; see `registry.create`."""
    return registry.create("method", METHODS, name, fields)
