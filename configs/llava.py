"""LLaVA-1.5 as published: its checkpoint learns the people of a benchmark, and forgets some of them.

python -m vkd_jax.main --config configs/llava.py:7b,all --workdir DIR --config.data.source=SNAPSHOT

configs/llava.py:7b                             llava-hf/llava-1.5-7b-hf (also without the word)
configs/llava.py:13b                            llava-hf/llava-1.5-13b-hf
configs/llava.py:npo,lora                       another of vkd_jax/methods, on adapters (or visual, train=all)
configs/llava.py:7b,onechip                     what fits on one chip of 16 GB
configs/llava.py:attacks                        every attack of vkd_jax/attacks afterwards
configs/llava.py:clear                          another benchmark: mllmu, clear, folder; see vkd_jax/data
configs/llava.py:forget=5                       another share of the people, in per cent
configs/llava.py:finetune                       base -> vanilla alone, by the benchmark's published recipe
configs/llava.py:7b,clear,forget=5,retain_only  words go together, in any order; base -> a model without the people
configs/llava.py:all                            base -> vanilla -> retain-only -> unlearned -> report

Without a stage among the words a vanilla model is unlearned: pass --config.model.path=MODEL, the published checkpoint
fine-tuned on the people, and --config.model.retain_only=MODEL to compare it with. SNAPSHOT is a folder as the hub lays
it out, an id on the Hugging Face hub (MLLMMU/MLLMU-Bench, therem/CLEAR) or gs://.
"""

import ml_collections

from vkd_jax.config import defaults
from vkd_jax.models import llava


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The config of one of the runs above."""
    return defaults.published(arg, llava.PRESETS)
