"""The table of docs/planner.md: which model is planned for which chips, and how.

python -m vkd_jax.plan --config configs/plans.py --json docs/results/plans.json
python -m vkd_jax.reporting.tables docs/planner.md

configs/plans.py                        every model on every slice, a row each
configs/plans.py:v5e-16                 one slice, or one model, or one row: configs/plans.py:LLaVA-1.5-7B,v5e-16

The rule: a single chip of 16 GB takes the config's own word for it, `onechip`; all others lay the model in bfloat16
over their chips by `fsdp`, and by tensor=4 from 16 chips on, with 8 + 8 rows a step, or fsdp + fsdp where that is more.
"""

import math

import ml_collections

from vkd_jax.types import UserError

MODELS = {
    "LLaVA-1.5-7B": "configs/llava.py:7b",
    "LLaVA-1.5-13B": "configs/llava.py:13b",
    "Qwen2-VL-2B": "configs/qwen2_vl.py:2b",
    "Qwen2-VL-7B": "configs/qwen2_vl.py:7b",
}
SLICES = {
    "v5e-1": "v5e:1x1",
    "v5e-4": "v5e:2x2",
    "v5e-16": "v5e:4x4",
    "v5e-64": "v5e:8x8",
    "v5e-256": "v5e:16x16",
    "v4-8": "v4:2x2x1",  # Google counts the two cores of a v4 and of a v5p
    "v5p-8": "v5p:2x2x1",
    "v6e-1": "v6e:1x1",
    "v6e-8": "v6e:2x4",
}
EXAMPLES = 4800  # rows of a typical run: 300 steps of 8 + 8


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The rows, all of them, and the words that choose some."""
    words = tuple(filter(None, arg.split(",")))
    for word in words:
        if word not in {**MODELS, **SLICES}:
            raise UserError(f"{word!r} is not a word of this config; it takes {', '.join([*MODELS, *SLICES])}.")
    rows = [(model, name, command(model, name)) for model in MODELS for name in SLICES]
    plans = dict(rows=tuple(rows), only=words, examples=EXAMPLES)
    return ml_collections.ConfigDict(dict(stage="plan", plans=plans))


def command(model: str, name: str) -> str:
    """The planner's flags for a row."""
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
