"""LLaVA-1.6 as published: the checkpoint is fine-tuned on a benchmark and unlearns its forget set.

python -m vkd_jax.main --config configs/llava_next.py:help              all arguments and fields
python -m vkd_jax.main --config configs/llava_next.py:size=7b,stage=all --workdir DIR --config.data.source=SNAPSHOT

See `vkd_jax.config.defaults.published`. The language models of 7b and 13b are Vicuna, that of mistral-7b is Mistral. An
image has at most `model.max_pixels` pixels besides the whole image in one tile: 451,584 by default, which allows all
published grids and at most 2,928 image tokens. With 225,792, grids have two tiles, and images at most 1,776 tokens.
"""

import ml_collections

from vkd_jax.config import defaults
from vkd_jax.models import llava_next

MAX_PIXELS = 672 * 672
ONE_CHIP = f"model.max_pixels={336 * 672} train.microbatches=4"


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The config of a run."""
    return defaults.published(arg, llava_next.PRESETS, one_chip=ONE_CHIP, max_pixels=MAX_PIXELS)
