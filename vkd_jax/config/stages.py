"""The values of `config.stage`, and what a run with each of them does."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Stage:
    """A value of `config.stage`."""

    help: str
    finetunes: tuple[str, ...] = ()  # models that are fine-tuned from `model.base` first
    unlearns: bool = False
    attacks: bool = False  # whether models are attacked, and a report is written if one is unlearned


STAGES = {
    "unlearn": Stage("vanilla -> unlearned -> report", unlearns=True, attacks=True),
    "finetune": Stage("base -> vanilla", finetunes=("vanilla",)),
    "retain_only": Stage("base -> retain-only", finetunes=("retain_only",)),
    "all": Stage(
        "base -> vanilla -> retain-only -> unlearned -> report",
        finetunes=("vanilla", "retain_only"),
        unlearns=True,
        attacks=True,
    ),
    "audit": Stage("evaluates and attacks the given models and trains none -> report", attacks=True),
}
