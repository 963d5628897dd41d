"""Creates model folders with random weights."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vkd_jax.checkpoints import export, hf
from vkd_jax.data.processor import create_processor
from vkd_jax.models import llava
from vkd_jax.runtime import files
from vkd_jax.types import Example, UserError


def create_llava(folder: Path, examples: Sequence[Example], shape: Mapping[str, Any], seed: int) -> Path:
    """Creates a LLaVA model with random weights and a tokenizer for the texts of `examples`, unless the folder exists.

    Args:
        folder: the folder to create.
        examples: examples whose questions and answers define the vocabulary of the tokenizer.
        shape: `ModelConfig.create`: vocab_size, and the fields of vision_config and text_config in config.json.
        seed: seed of the weights.

    Raises:
        UserError: the sizes are impossible, or the weights do not fit in memory.
    """
    if folder.exists():
        return folder
    vision = _llava_config(shape, shape.get("vocab_size", 0)).vision_config  # checked before anything is written
    with files.atomic_folder(folder) as new:
        tokenizer = create_processor(
            new,
            [f"USER: {e.question} ASSISTANT: {e.answer}" for e in examples],
            vocab_size=shape["vocab_size"],
            image_size=vision.image_size,
            patch_size=vision.patch_size,
        )
        ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
        hf_config = _llava_config(
            shape, len(tokenizer), image_token_index=tokenizer.convert_tokens_to_ids("<image>"), **ids
        )
        _, params = hf.init_params(llava.Config.from_hf(hf_config), seed)
        export.create(new, hf_config, params)
    return folder


def _llava_config(shape: Mapping[str, Any], vocab_size: int, **ids: int) -> Any:
    """Returns the transformers configuration of a new LLaVA, and checks its sizes.

    Raises:
        UserError: a size is missing, unknown or impossible.
    """
    from transformers import LlavaConfig

    image_token_index = ids.pop("image_token_index", 0)
    try:
        hf_config = LlavaConfig(
            vision_config=dict(model_type="clip_vision_model", **shape["vision"]),
            text_config=dict(model_type="llama", vocab_size=vocab_size, **ids, **shape["text"]),
            image_token_index=image_token_index,
        )
    except Exception as error:  # transformers raises many types of errors here
        raise UserError(f"config.model.create is not a LLaVA: {' '.join(str(error).split())}") from error
    config = llava.Config.from_hf(hf_config)
    # Some versions of transformers 4 take a prompt with fewer image tokens for one whose image token is not repeated.
    hf_config.image_seq_length = config.vision.patches
    return hf_config
