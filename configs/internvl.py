"""InternVL3 as published: the checkpoint is fine-tuned on a benchmark and unlearns its forget set.

python -m vkd_jax.main --config configs/internvl.py:help              all arguments and fields
python -m vkd_jax.main --config configs/internvl.py:size=1b,stage=all --workdir DIR --config.data.source=SNAPSHOT

See `vkd_jax.config.defaults.published`. An image becomes a grid of tiles of at most `model.max_pixels` pixels, 802,816
by default: at most four tiles, and the whole image in one more tile. 0 keeps the 12 tiles of the published image
processors.
"""

import ml_collections

from vkd_jax.config import defaults
from vkd_jax.models import internvl


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The config of a run."""
    return defaults.published(arg, internvl.PRESETS, max_pixels=internvl.MAX_PIXELS)
