"""Models, one module per family, found by the `model_type` of a Hugging Face `config.json`.

A model module offers `Config` (a frozen dataclass with `from_hf`), `Model(config, *, rngs, param_dtype)`, and
its side of the conversion, `hf_table(config)`, `HF_ALIASES`, `HF_SKIP`, `HF_ARCHITECTURE` (see
`vkd_jax.convert`).
"""

import importlib
import types

from vkd_jax.types import UserError

MODELS = {
    "llava": "vkd_jax.models.llava",
}


def module_for(model_type: str) -> types.ModuleType:
    """Imports the module of a Hugging Face `model_type`; a `UserError` names the supported ones."""
    if model_type not in MODELS:
        known = ", ".join(sorted(MODELS))
        raise UserError(f"Model type {model_type!r} is not supported; supported are: {known}.")
    return importlib.import_module(MODELS[model_type])
