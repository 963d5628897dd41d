"""Attacks that try to bring the forgotten back, one file each. A new one is a new file and a line here."""

from collections.abc import Mapping
from typing import Any

import ml_collections

from vkd_jax import registry
from vkd_jax.attacks.base import Attack
from vkd_jax.types import UserError

ATTACKS: dict[str, str] = {
    "leak": "vkd_jax.attacks.leak:Leak",
    "membership": "vkd_jax.attacks.membership:Membership",
    "probe": "vkd_jax.attacks.probe:Probe",
    "prompts": "vkd_jax.attacks.prompts:Prompts",
    "quantize": "vkd_jax.attacks.quantize:Quantize",
    "relearn": "vkd_jax.attacks.relearn:Relearn",
    "rephrase": "vkd_jax.attacks.rephrase:Rephrase",
}


def create(name: str, fields: Mapping[str, Any]) -> Attack:
    """The attack called `name` with these settings; see `registry.create`."""
    return registry.create("attack", ATTACKS, name, fields)


def chosen(config: ml_collections.ConfigDict) -> dict[str, Attack]:
    """The attacks that `config.attacks.names` names, separated by commas: "" none, "all" all of them.

    Raises:
        UserError: there is no such attack.
    """
    names = [name.strip() for name in config.attacks.names.split(",") if name.strip()]
    names = list(ATTACKS) if names == ["all"] else names
    if unknown := sorted(set(names) - set(ATTACKS)):
        known = ", ".join(ATTACKS)
        raise UserError(
            f"config.attacks.names: no attack is called {', '.join(unknown)}; give all, or some of {known}."
        )
    return {name: create(name, config.attacks[name].to_dict()) for name in names}
