"""Components that a config chooses by name. A new component is a new file and one line here.

Each table maps a name to "module:Dataclass"; a module is imported when its component is created.

Model families and metrics are not here, since no config names them: a family follows from the `model_type` of a model
folder (`vkd_jax.models.MODELS`), and all metrics that apply are computed (`vkd_jax.evaluation.metrics.METRICS`).
"""

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any

from vkd_jax import messages
from vkd_jax.types import UserError

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
ATTACKS = {
    "benign": "vkd_jax.attacks.benign:Benign",
    "depth": "vkd_jax.attacks.depth:Depth",
    "in_context": "vkd_jax.attacks.in_context:InContext",
    "leak": "vkd_jax.attacks.leak:Leak",
    "membership": "vkd_jax.attacks.membership:Membership",
    "pixel_noise": "vkd_jax.attacks.pixel_noise:PixelNoise",
    "probe": "vkd_jax.attacks.probe:Probe",
    "prompts": "vkd_jax.attacks.prompts:Prompts",
    "quantize": "vkd_jax.attacks.quantize:Quantize",
    "relearn": "vkd_jax.attacks.relearn:Relearn",
    "rephrase": "vkd_jax.attacks.rephrase:Rephrase",
    "soft_tokens": "vkd_jax.attacks.soft_tokens:SoftTokens",
    "typographic": "vkd_jax.attacks.typographic:Typographic",
}
BENCHMARKS = {
    "clear": "vkd_jax.benchmarks.clear:Clear",
    "covubench": "vkd_jax.benchmarks.covubench:CovuBench",
    "fiubench": "vkd_jax.benchmarks.fiubench:FiuBench",
    "folder": "vkd_jax.benchmarks.folder:Folder",
    "mllmu": "vkd_jax.benchmarks.mllmu:Mllmu",
    "offside": "vkd_jax.benchmarks.offside:Offside",
    "ppu": "vkd_jax.benchmarks.ppu:Ppu",
    "safeeraser": "vkd_jax.benchmarks.safeeraser:SafeEraser",
    "umu": "vkd_jax.benchmarks.umu:Umu",
}
SUITES = {
    "gqa": "vkd_jax.benchmarks.general.short_answer:Gqa",
    "mmbench": "vkd_jax.benchmarks.general.choice:MMBench",
    "mme": "vkd_jax.benchmarks.general.yes_no:Mme",
    "mmvet": "vkd_jax.benchmarks.general.short_answer:MMVet",
    "pope": "vkd_jax.benchmarks.general.yes_no:Pope",
    "scienceqa": "vkd_jax.benchmarks.general.choice:ScienceQA",
    "textvqa": "vkd_jax.benchmarks.general.short_answer:TextVQA",
    "vizwiz": "vkd_jax.benchmarks.general.short_answer:VizWiz",
    "vqav2": "vkd_jax.benchmarks.general.short_answer:VQAv2",
}
TRACKERS = {
    "mlflow": "vkd_jax.training.trackers:Mlflow",
    "wandb": "vkd_jax.training.trackers:Wandb",
}


def lookup(kind: str, table: Mapping[str, str], name: str) -> type:
    """Looks up the dataclass of a component by its name.

    Raises:
        UserError: the name is unknown.
    """
    if not isinstance(name, str) or name not in table:
        raise UserError(f"{kind}: unknown name {name!r}. Available: {messages.choices(sorted(table))}.")
    module, attribute = table[name].split(":")
    return getattr(importlib.import_module(module), attribute)


def create(kind: str, table: Mapping[str, str], name: str, fields: Mapping[str, Any]) -> Any:
    """Creates a component by its name and hyperparameters; other hyperparameters keep their defaults.

    Args:
        kind: kind of component for messages, e.g. "method".
        table: one of the tables above.
        name: its key.
        fields: hyperparameters.

    Raises:
        UserError: the name or a hyperparameter is unknown, or a value is not allowed.
    """
    cls = lookup(kind, table, name)
    known = [field.name for field in dataclasses.fields(cls)]
    if unknown := sorted(set(fields) - set(known)):
        raise UserError(
            f"{kind} {name}: unknown hyperparameter {messages.listed(unknown)}. Available: {messages.choices(known)}."
        )
    return cls(**fields)


def name_of(table: Mapping[str, str], component: Any) -> str:
    """The name of a component's class in a table."""
    cls = type(component)
    return next(name for name, value in table.items() if value == f"{cls.__module__}:{cls.__qualname__}")


def doc(kind: str, table: Mapping[str, str], name: str) -> str:
    """The first line of a component's docstring, without its final period."""
    return lookup(kind, table, name).__doc__.splitlines()[0].rstrip(".")
