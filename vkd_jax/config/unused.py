"""Settings that were given for a part of the config that the run does not use."""

from collections.abc import Iterable

from absl import logging

from vkd_jax import messages
from vkd_jax.config.schema import RunConfig


def warn_of_unused(config: RunConfig, names: Iterable[str]) -> None:
    """Warns of settings that change nothing, since the stage or the chosen attacks do not read them.

    Args:
        config: the config with the settings.
        names: the fields that the command line sets, such as "train.steps".
    """
    unused = [(name, reason) for name in names if (reason := _reason(config, name))]
    if unused:
        logging.warning(
            "%s changes nothing: %s.", messages.listed([f"--config.{name}" for name, _ in unused]), unused[0][1]
        )


def _reason(config: RunConfig, name: str) -> str:
    """Why the run does not use a field; "" if it may."""
    section, _, field = name.partition(".")
    attack = field.partition(".")[0]
    if section == "finetune" and not config.workflow.finetunes:
        return f"config.stage={config.stage} does not fine-tune"
    if section in ("method", "train") and not config.workflow.unlearns:
        return f"config.stage={config.stage} does not unlearn"
    if section == "attacks" and not config.workflow.attacks:
        return f"config.stage={config.stage} attacks no model"
    if section == "attacks" and attack in config.attacks.settings and attack not in config.attacks.selected:
        return f"config.attacks.names={config.attacks.names!r} does not name {attack}"
    return ""
