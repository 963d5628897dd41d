"""LLaVA-1.5 as published: unlearn people of MLLMU-Bench from a fine-tuned 7B or 13B.

python -m vkd_jax.main --config configs/llava.py:7b --workdir DIR \\
    --config.model.path=MODEL --config.data.folder=SNAPSHOT

configs/llava.py:7b            llava-hf/llava-1.5-7b-hf       (also without the colon)
configs/llava.py:13b           llava-hf/llava-1.5-13b-hf
configs/llava.py:7b,grad_diff  another method, see vkd_jax/methods
configs/llava.py:7b,forget=5   another share of the people, in per cent

MODEL is the vanilla model: the published checkpoint fine-tuned on the people, as a folder or an id on the Hugging
Face hub. Without it the published checkpoint itself is taken, which has never met them.
"""

import ml_collections

from vkd_jax import defaults
from vkd_jax.models import llava


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The config of one of the runs above."""
    return defaults.published(arg, llava.PRESETS)
