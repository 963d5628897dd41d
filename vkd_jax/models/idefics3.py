"""Idefics3, the model type of the first SmolVLM models: SmolVLM under another name."""

import dataclasses

from vkd_jax.models import smolvlm
from vkd_jax.models.smolvlm import BASE_TOWER, IDS, LARGE, LARGE_TOWER, MIDDLE, SMALL, IdeficsConfig, published_config


@dataclasses.dataclass(frozen=True)
class Idefics3Config(IdeficsConfig):
    """Configuration of a model with `model_type` idefics3."""


Config, Model = Idefics3Config, smolvlm.Idefics

HF_ALIASES, HF_SKIP, HF_ARCHITECTURE = smolvlm.HF_ALIASES, smolvlm.HF_SKIP, "Idefics3ForConditionalGeneration"
hf_table, SHARDING = smolvlm.hf_table, smolvlm.SHARDING

# Fields of the published config.json files, by size.
PRESETS = {
    "256m": ("HuggingFaceTB/SmolVLM-256M-Instruct", published_config(BASE_TOWER, SMALL, scale=4, **IDS)),
    "500m": ("HuggingFaceTB/SmolVLM-500M-Instruct", published_config(BASE_TOWER, MIDDLE, scale=4, **IDS)),
    "2.2b": (
        "HuggingFaceTB/SmolVLM-Instruct",
        published_config(
            LARGE_TOWER,
            LARGE | dict(max_position_embeddings=16384, rope_theta=273768.0),
            scale=3,
            vocab=49155,
            image_token=49153,
        ),
    ),
}
