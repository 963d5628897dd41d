"""Gemma-3 as published: the checkpoint is fine-tuned on a benchmark and unlearns its forget set.

python -m vkd_jax.main --config configs/gemma3.py:help              all arguments and fields
python -m vkd_jax.main --config configs/gemma3.py:size=4b,stage=all --workdir DIR --config.data.source=SNAPSHOT

See `vkd_jax.config.defaults.published`. Pan-and-scan must be off in the image processor, as published.
"""

import ml_collections

from vkd_jax.config import defaults
from vkd_jax.models import gemma3

ONE_CHIP = "method.blocks=8"  # of 27: with 4 + 4 images of 4,096 patches, the planner finds 14.1 GiB for the 4B model


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The config of a run."""
    return defaults.published(arg, gemma3.PRESETS, one_chip=ONE_CHIP)
