"""SmolVLM as published: the checkpoint is fine-tuned on a benchmark and unlearns its forget set.

python -m vkd_jax.main --config configs/smolvlm.py:help              all arguments and fields
python -m vkd_jax.main --config configs/smolvlm.py:size=256m,stage=all --workdir DIR --config.data.source=SNAPSHOT

See `vkd_jax.config.defaults.published`. The sizes v2-... are those of SmolVLM2. Images are resized to at most
`model.max_pixels` pixels, 1,048,576 by default: a grid of at most 2 x 2 tiles, and the whole image in one more tile.
0 keeps the 4 x 4 tiles of the published image processors.
"""

import ml_collections

from vkd_jax.config import defaults
from vkd_jax.models import idefics3, smolvlm

MAX_PIXELS = 1024 * 1024
PRESETS = {**idefics3.PRESETS, **smolvlm.PRESETS}


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The config of a run."""
    return defaults.published(arg, PRESETS, max_pixels=MAX_PIXELS)
