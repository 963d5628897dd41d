"""ViP-LLaVA as published: the checkpoint is fine-tuned on a benchmark and unlearns its forget set.

python -m vkd_jax.main --config configs/vipllava.py:help              all arguments and fields
python -m vkd_jax.main --config configs/vipllava.py:size=7b,stage=all --workdir DIR --config.data.source=SNAPSHOT

See `vkd_jax.config.defaults.published`.
"""

import ml_collections

from vkd_jax.config import defaults
from vkd_jax.models import vipllava


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The config of a run."""
    return defaults.published(arg, vipllava.PRESETS)
