"""Models, one module per family, found by the `model_type` of a Hugging Face `config.json`.

A model module offers

- `Config`, a frozen dataclass: `from_hf(hf_config, **changes)`; `text` (a `DecoderConfig`), `image_token_id`,
  `used_blocks`, `compute_dtype`, `remat`; and how its pictures are laid out: `images(output)` takes them from what the
  Hugging Face image processor returns, `image_tokens(height, width)` counts the tokens of one, `pack(rows, tokens)`
  turns the pictures of each prompt into arrays of one shape, with room for so many tokens;
- `Model(config, *, rngs, param_dtype)`, a `base.VisionLanguageModel`: `encode(pictures)` gives `base.VisualTokens` and
  the taps, by name;
  `model(tokens, mask, features=, at=, cache=)` gives logits. Parameters are `vision_tower/patch_embedding`,
  `vision_tower/blocks/<i>/...`, `vision_tower/post_norm/...` (feeds nothing), `projector/...`, `language_model/...`;
- its side of the conversion, `hf_table(config)`, `HF_ALIASES`, `HF_SKIP`, `HF_ARCHITECTURE` (`checkpoints.hf`);
- `SHARDING`, a rule for every parameter, and `PRESETS`, {size: (id on the hub, fields of config.json)}.
"""

import importlib
import types

from vkd_jax.types import UserError

MODELS = {
    "llava": "vkd_jax.models.llava",
    "qwen2_vl": "vkd_jax.models.qwen2_vl",
    "qwen2_5_vl": "vkd_jax.models.qwen2_5_vl",
}


def module_for(model_type: str) -> types.ModuleType:
    """Imports the module of a Hugging Face `model_type`; a `UserError` names the supported ones."""
    if model_type not in MODELS:
        known = ", ".join(sorted(MODELS))
        raise UserError(f"Model type {model_type!r} is not supported; supported are: {known}.")
    return importlib.import_module(MODELS[model_type])
