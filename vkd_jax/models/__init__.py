"""Models: one module per family, selected by the `model_type` of a Hugging Face `config.json`.

What is in it
- `llava`, `llava_next`, `vipllava`, `gemma3`, `qwen2_vl`, `qwen2_5_vl`, `qwen3_vl`, `smolvlm`, `idefics3` and
  `internvl`: the families. `clip_vit` and `qwen_vit` are vision towers of several, `decoder` is their language model,
  `layers` has the layers that several use.
- `base`: `ModelConfig` and `VisionLanguageModel`, which all families extend, and `split_model` and `bind`, which
  convert a module to (graphdef, params) and back.
- `fixed_size`: base of families whose images are squares of one size; `tiled`: base of those that cut images into such
  squares.
- `generate`: greedy decoding and option scores, with a key/value cache and prefix caching.
- `lora` and `quantize`: adapters and low-bit weights of the language model. `observed` records what passes through it.
- `conversion`: rows of the conversion tables and sharding rules that families share.

Contract: a family's module has
- `Config`, a `base.ModelConfig` with `from_hf(hf_config, **changes)` and three methods for images:
  `extract_images(output)` takes them from the output of the Hugging Face image processor, `image_tokens(height, width)`
  is the number of tokens of one, and `pack(rows, min_tokens)` turns the images of each prompt into arrays of one shape.
  Variants of the decoder are fields of `DecoderConfig`. `image_markup` returns the text that replaces the placeholder
  of an image in the chat template, `placeholder_id`. If images differ in size, their sides are multiples of
  `image_step`, and `pixel_limits` and `limit_pixels` bound their numbers of pixels. A family whose `pack` makes room
  for more tokens than an image has overrides `packed_tokens`.
  A family whose projector reads more than the last vision block overrides `feature_blocks`, or `taps_before` if its
  images differ in size, and one that adds features to the outputs of the decoder's first blocks returns them as
  `Embedded.deepstack` from `Model.embed`;
- `Model(config, *, rngs, param_dtype)`, a `base.VisionLanguageModel`. Its parameters are
  `vision_tower/patch_embedding`, `vision_tower/blocks/<i>/...`, `vision_tower/post_norm/...` (see `uses_post_norm`),
  in some families `vision_tower/pre_norm/...`, `projector/...` and `language_model/...`;
- the conversion: `hf_table(config)`, `HF_ALIASES`, `HF_SKIP` and `HF_ARCHITECTURE`, which `checkpoints.hf` reads;
- `SHARDING`, exactly one rule (pattern, PartitionSpec) for every parameter;
- `PRESETS`, {size: (id on the Hugging Face Hub, fields of its config.json)}.

To add a family, write such a module, add it to `MODELS`, and write a config in `configs/`. tests/models/test_presets.py
checks the names and shapes of its tensors, and a test in tests/parity its numbers against PyTorch.
"""

import importlib
import types

from vkd_jax import messages
from vkd_jax.types import UserError

MODELS = {
    "llava": "vkd_jax.models.llava",
    "llava_next": "vkd_jax.models.llava_next",
    "vipllava": "vkd_jax.models.vipllava",
    "gemma3": "vkd_jax.models.gemma3",
    "qwen2_vl": "vkd_jax.models.qwen2_vl",
    "qwen2_5_vl": "vkd_jax.models.qwen2_5_vl",
    "qwen3_vl": "vkd_jax.models.qwen3_vl",
    "internvl": "vkd_jax.models.internvl",
    "idefics3": "vkd_jax.models.idefics3",
    "smolvlm": "vkd_jax.models.smolvlm",
}

# Model types whose code the releases bring themselves, and a release of the same model that transformers reads.
CONVERTED = {"internvl_chat": "OpenGVLab/InternVL3-1B-hf"}


def module_for(model_type: str) -> types.ModuleType:
    """Imports the module of a family.

    Args:
        model_type: the `model_type` of a Hugging Face config.json.

    Raises:
        UserError: the type is not supported.
    """
    if isinstance(model_type, str) and model_type in CONVERTED:
        raise UserError(
            f"Model type {model_type!r} is that of original checkpoints, which bring their own code. Use a converted "
            f"model, such as {CONVERTED[model_type]}."
        )
    if not isinstance(model_type, str) or model_type not in MODELS:  # config.json may hold any type
        supported = messages.choices(sorted(MODELS))
        raise UserError(f"Model type {model_type!r} is not supported. Supported types: {supported}.")
    return importlib.import_module(MODELS[model_type])
