"""Attacks that try to recover forgotten knowledge, one file each.

`base.py` has the protocol `Attack`, the model under attack (`Subject`), and what several attacks share.

Contract: an attack is a frozen dataclass of settings. `check` validates them before anything runs, `run` attacks one
model and returns one record per question and attempt, and `summarize` turns the records of all models into cells
(`results.AttackCell`). Every attack runs alike on the vanilla, the unlearned and the retain-only model. An attack asks
for roles of evaluation sets, never for their names.

To add an attack: write a file with a dataclass that follows `base.Attack`, and add one line to `ATTACKS` in
vkd_jax/registry.py. The config, the report, the tables and the plots then know it. See tests/test_extensions.py for a
complete example.
"""

from collections.abc import Mapping
from typing import Any

from vkd_jax import registry
from vkd_jax.attacks.base import Attack


def create(name: str, fields: Mapping[str, Any]) -> Attack:
    """Creates an attack by its name; see `registry.create`."""
    return registry.create("attack", registry.ATTACKS, name, fields)
