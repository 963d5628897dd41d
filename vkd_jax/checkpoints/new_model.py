"""Creates model folders with random weights."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vkd_jax import models
from vkd_jax.checkpoints import export, hf
from vkd_jax.data.processor import create_processor
from vkd_jax.runtime import files
from vkd_jax.types import Example


def create_llava(folder: Path, examples: Sequence[Example], shape: Mapping[str, Any], seed: int) -> Path:
    """Creates a LLaVA model with random weights and a tokenizer for the texts of `examples`, unless the folder exists.

    Args:
        folder: the folder to create.
        examples: examples whose questions and answers define the vocabulary of the tokenizer.
        shape: `ModelConfig.create`: vocab_size, and the fields of vision_config and text_config in config.json.
        seed: seed of the weights.
    """
    from transformers import LlavaConfig

    if folder.exists():
        return folder
    with files.atomic_folder(folder) as new:
        tokenizer = create_processor(
            new,
            [f"USER: {e.question} ASSISTANT: {e.answer}" for e in examples],
            vocab_size=shape["vocab_size"],
            image_size=shape["vision"]["image_size"],
            patch_size=shape["vision"]["patch_size"],
        )
        ids = dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
        hf_config = LlavaConfig(
            vision_config=dict(model_type="clip_vision_model", **shape["vision"]),
            text_config=dict(
                model_type="llama",
                vocab_size=len(tokenizer),
                pad_token_id=tokenizer.pad_token_id,
                **ids,
                **shape["text"],
            ),
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
            # Some versions of transformers 4 take a prompt with fewer image tokens for one that is not expanded.
            image_seq_length=(shape["vision"]["image_size"] // shape["vision"]["patch_size"]) ** 2,
        )
        _, params = hf.init_params(models.module_for("llava").Config.from_hf(hf_config), seed)
        export.create(new, hf_config, params)
    return folder
