"""Qwen3-VL as published: the checkpoint is fine-tuned on a benchmark and unlearns its forget set.

python -m vkd_jax.main --config configs/qwen3_vl.py:help              all arguments and fields
python -m vkd_jax.main --config configs/qwen3_vl.py:size=2b,stage=all --workdir DIR --config.data.source=SNAPSHOT

See `vkd_jax.config.defaults.published`. Images have at most `model.max_pixels` pixels, 262,144 by default
(256 image tokens); 0 keeps the model's own limit.
"""

import ml_collections

from vkd_jax.config import defaults
from vkd_jax.models import qwen3_vl

ONE_CHIP = "method.blocks=8"  # of 24 or 27: the whole tower and the mergers of the 8B model would nearly fill the chip


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The config of a run."""
    return defaults.published(arg, qwen3_vl.PRESETS, one_chip=ONE_CHIP, max_pixels=qwen3_vl.MAX_PIXELS)
