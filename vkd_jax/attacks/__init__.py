"""Attacks that try to bring the forgotten back, one file each.

To add one, write its file and a line in vkd_jax/registry.py.
"""

from collections.abc import Mapping
from typing import Any

from vkd_jax import registry
from vkd_jax.attacks.base import Attack


def create(name: str, fields: Mapping[str, Any]) -> Attack:
    """The attack called `name` with these settings; see `registry.create`."""
    return registry.create("attack", registry.ATTACKS, name, fields)
