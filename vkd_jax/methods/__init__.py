"""Unlearning methods, one file each. A new one is a new file and a line here."""

from collections.abc import Mapping
from typing import Any

from vkd_jax import registry
from vkd_jax.methods.base import Method

METHODS = {
    "finetune": "vkd_jax.methods.finetune:Finetune",
    "grad_ascent": "vkd_jax.methods.grad_ascent:GradAscent",
    "grad_diff": "vkd_jax.methods.grad_diff:GradDiff",
    "idk": "vkd_jax.methods.idk:IDK",
    "kl": "vkd_jax.methods.kl:KL",
    "manu": "vkd_jax.methods.manu:Manu",
    "mmunlearner": "vkd_jax.methods.mmunlearner:MMUnlearner",
    "npo": "vkd_jax.methods.npo:NPO",
    "rmu": "vkd_jax.methods.rmu:RMU",
    "vkd": "vkd_jax.methods.vkd:VKD",
}


def create(name: str, fields: Mapping[str, Any]) -> Method:
    """The method called `name` with these hyperparameters; see `registry.create`."""
    return registry.create("method", METHODS, name, fields)
