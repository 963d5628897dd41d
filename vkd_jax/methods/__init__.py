"""Unlearning methods, one file each.

- `base`: the `Method` contract, and loss functions that several methods share.
- `scope`: the fields that all methods have, and defaults for the contract.
- `losses`, `saliency`, `feature_targets`: pure losses, Fisher masks, and features of a frozen model as targets.

To add a method, write a frozen dataclass that extends `scope.Scope` in a new file, implement `losses` (and
`prepare` with `cache_spec` if it caches arrays), or `edit` if it trains nothing, and add one line to
vkd_jax/registry.py.
"""

from collections.abc import Mapping
from typing import Any

from vkd_jax import registry
from vkd_jax.methods.base import Method


def create(name: str, fields: Mapping[str, Any]) -> Method:
    """The method called `name` with these hyperparameters; see `registry.create`."""
    return registry.create("method", registry.METHODS, name, fields)
