"""The rows of the table in docs/planner.md: models, slices, and the flags of the planner for each.

python -m vkd_jax.plan --config configs/plans.py --json docs/results/plans.json
python -m vkd_jax.reporting.tables docs/planner.md

python -m vkd_jax.plan --config configs/plans.py:help                          all arguments
python -m vkd_jax.plan --config configs/plans.py:slice=v5e-16 --json FILE      the rows of one slice
python -m vkd_jax.plan --config configs/plans.py:model=LLaVA-1.5-7B,slice=v5e-16 --json FILE  one row

A single chip of 16 GB uses the config's `onechip` settings. All other rows shard the bfloat16 model over their chips by
`fsdp`, and by tensor=4 from 16 chips on. A batch has 8 + 8 rows, or fsdp + fsdp rows where that is more.
"""

import math

import ml_collections

from vkd_jax.config import arguments
from vkd_jax.config.arguments import Argument

MODELS = {
    "LLaVA-1.5-7B": "configs/llava.py:7b",
    "LLaVA-1.5-13B": "configs/llava.py:13b",
    "LLaVA-1.6-7B": "configs/llava_next.py:7b",
    "LLaVA-1.6-Mistral-7B": "configs/llava_next.py:mistral-7b",
    "LLaVA-1.6-13B": "configs/llava_next.py:13b",
    "Qwen2-VL-2B": "configs/qwen2_vl.py:2b",
    "Qwen2-VL-7B": "configs/qwen2_vl.py:7b",
    "Gemma-3-4B": "configs/gemma3.py:4b",
    "Gemma-3-12B": "configs/gemma3.py:12b",
    "Qwen3-VL-2B": "configs/qwen3_vl.py:2b",
    "Qwen3-VL-4B": "configs/qwen3_vl.py:4b",
    "Qwen3-VL-8B": "configs/qwen3_vl.py:8b",
    "SmolVLM-256M": "configs/smolvlm.py:256m",
    "SmolVLM-500M": "configs/smolvlm.py:500m",
    "SmolVLM-2.2B": "configs/smolvlm.py:2.2b",
    "InternVL3-1B": "configs/internvl.py:1b",
    "InternVL3-2B": "configs/internvl.py:2b",
    "InternVL3-8B": "configs/internvl.py:8b",
}
SLICES = {
    "v5e-1": "v5e:1x1",
    "v5e-4": "v5e:2x2",
    "v5e-16": "v5e:4x4",
    "v5e-64": "v5e:8x8",
    "v5e-256": "v5e:16x16",
    "v4-8": "v4:2x2x1",  # v4 and v5p slices are named by their cores, two per chip
    "v5p-8": "v5p:2x2x1",
    "v6e-1": "v6e:1x1",
    "v6e-8": "v6e:2x4",
}
ON_ALL = ("LLaVA-1.5-7B", "LLaVA-1.5-13B", "Qwen2-VL-2B", "Qwen2-VL-7B")  # models that are planned for every slice
FEWER = ("v5e-1", "v5e-4", "v5e-16", "v5p-8", "v6e-1")  # the slices that the other models are planned for
EXAMPLES = 4800  # rows of a typical run: 300 steps of 8 + 8


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns all rows, and the model and slice of those to plan."""
    every = frozenset(["all"])
    models = {"all": "all models"} | MODELS
    slices = {"all": "all slices"} | {name: f"topology {topology}" for name, topology in SLICES.items()}
    given = arguments.parse(
        arg,
        [
            Argument("model", "Model to plan, by its config.", models, "all", needs_key=every),
            Argument("slice", "Slice of TPUs to plan for.", slices, "all", needs_key=every),
        ],
        run_fields=False,
    )
    rows = [
        (model, name, command(model, name)) for model in MODELS for name in SLICES if model in ON_ALL or name in FEWER
    ]
    only = tuple(value for value in given.values() if value != "all")
    plans = dict(rows=tuple(rows), only=only, examples=EXAMPLES)
    return ml_collections.ConfigDict(dict(stage="plan", plans=plans))


def command(model: str, name: str) -> str:
    """Returns the planner's flags for a model and a slice."""
    config, topology = MODELS[model], SLICES[name]
    if name == "v5e-1":
        return f"--config={config},onechip --topology={topology} --nocompare"
    chips = math.prod(map(int, topology.partition(":")[2].split("x")))
    tensor = 4 if chips >= 16 else 1
    fsdp = chips // tensor
    rows = max(8, fsdp)
    settings = dict(fsdp=fsdp, tensor=tensor)
    flags = [f"--config.mesh.{axis}={size}" for axis, size in settings.items()]
    flags += [f"--config.train.batch_size.{stream}={rows}" for stream in ("forget", "retain")]
    return " ".join([f"--config={config}", f"--topology={topology}", "--nocompare", *flags])
