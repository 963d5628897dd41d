"""Attacks that try to bring the forgotten back, one file each. A new one is a new file and a line here."""

from collections.abc import Mapping
from typing import Any

from vkd_jax import registry
from vkd_jax.attacks.base import Attack

ATTACKS: dict[str, str] = {}


def create(name: str, fields: Mapping[str, Any]) -> Attack:
    """The attack called `name` with these settings; see `registry.create`."""
    return registry.create("attack", ATTACKS, name, fields)
