"""Unlearning methods, one file each.

To add one, write its file and a line in vkd_jax/registry.py.
"""

from collections.abc import Mapping
from typing import Any

from vkd_jax import registry
from vkd_jax.methods.base import Method


def create(name: str, fields: Mapping[str, Any]) -> Method:
    """The method called `name` with these hyperparameters; see `registry.create`."""
    return registry.create("method", registry.METHODS, name, fields)
