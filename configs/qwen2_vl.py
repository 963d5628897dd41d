"""Qwen2-VL as published: its checkpoint learns the people of a benchmark, and forgets some of them.

python -m vkd_jax.main --config configs/qwen2_vl.py:2b,all --workdir DIR --config.data.source=SNAPSHOT

configs/qwen2_vl.py:2b                             Qwen/Qwen2-VL-2B-Instruct (also without the word)
configs/qwen2_vl.py:7b                             Qwen/Qwen2-VL-7B-Instruct
configs/qwen2_vl.py:npo,lora                       another of vkd_jax/methods, on adapters (or visual, train=all)
configs/qwen2_vl.py:7b,onechip                  what fits on one chip of 16 GB
configs/qwen2_vl.py:attacks                        every attack of vkd_jax/attacks afterwards
configs/qwen2_vl.py:clear                          another benchmark: mllmu, clear, folder; see vkd_jax/data
configs/qwen2_vl.py:forget=5                       another share of the people, in per cent
configs/qwen2_vl.py:finetune                       base -> vanilla alone, by the benchmark's published recipe
configs/qwen2_vl.py:2b,clear,forget=5,retain_only  words go together, in any order; base -> a model without the people
configs/qwen2_vl.py:all                            base -> vanilla -> retain-only -> unlearned -> report

Without a stage among the words a vanilla model is unlearned: pass --config.model.path=MODEL, the published checkpoint
fine-tuned on the people, and --config.model.retain_only=MODEL to compare it with. SNAPSHOT is a folder as the hub lays
it out, an id on the Hugging Face hub (MLLMMU/MLLMU-Bench, therem/CLEAR) or gs://. Pictures are shrunk to at most
`model.max_pixels`, by default 200,704 (256 image tokens); 0 takes the model's own budget.
"""

import ml_collections

from vkd_jax.config import defaults
from vkd_jax.data.processing import MAX_PIXELS
from vkd_jax.models import qwen2_vl

ONE_CHIP = "method.blocks=8"  # of 32: with all of them the optimizer alone would fill the chip


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The config of one of the runs above."""
    return defaults.published(arg, qwen2_vl.PRESETS, onechip=ONE_CHIP, max_pixels=MAX_PIXELS)
