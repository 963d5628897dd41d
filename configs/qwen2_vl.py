"""Qwen2-VL as published: unlearn people of MLLMU-Bench from a fine-tuned 2B or 7B.

python -m vkd_jax.main --config configs/qwen2_vl.py:2b --workdir DIR \\
    --config.model.path=MODEL --config.data.folder=SNAPSHOT

configs/qwen2_vl.py:2b            Qwen/Qwen2-VL-2B-Instruct      (also without the colon)
configs/qwen2_vl.py:7b            Qwen/Qwen2-VL-7B-Instruct
configs/qwen2_vl.py:2b,grad_diff  another method, see vkd_jax/methods
configs/qwen2_vl.py:2b,forget=5   another share of the people, in per cent

MODEL is the vanilla model: the published checkpoint fine-tuned on the people, as a folder or an id on the Hugging
Face hub. Without it the published checkpoint itself is taken, which has never met them. Pictures are shrunk to at most
`model.max_pixels`, by default 200,704 (256 image tokens); 0 takes the model's own budget.
"""

import ml_collections

from vkd_jax import defaults
from vkd_jax.data.processing import MAX_PIXELS
from vkd_jax.models import qwen2_vl


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The config of one of the runs above."""
    return defaults.published(arg, qwen2_vl.PRESETS, max_pixels=MAX_PIXELS)
