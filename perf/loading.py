"""Times the check for NaN and infinity while a model is loaded.

python perf/loading.py [--dtype float32|bfloat16] [--rounds N] [--json FILE]

Loads a LLaVA with random weights, of 1 GB, with the check and without it, in turns. The file stays in the page cache,
so that the check is compared with the fastest reads. Seconds are those of the processor, which other programs on the
machine influence least.
"""

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
import tables
import transformers
from command import run

from vkd_jax.checkpoints import export, hf, safetensors_files
from vkd_jax.models import base, llava

WIDTH, MLP_WIDTH, LAYERS = 2048, 8192, 4  # of the decoder in float32; in bfloat16 it has twice as many layers
TOWER = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2)


def measure(dtype: str, rounds: int) -> dict[str, Any]:
    """Writes the model, and loads it in turns."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "model", dtype)
        size = (Path(folder) / "model" / safetensors_files.WEIGHTS).stat().st_size
        seconds: dict[str, list[float]] = {"with the check": [], "without": []}
        for number in range(rounds + 1):
            for name, times in seconds.items():
                elapsed = load(Path(folder) / "model", checked=name == "with the check")
                times += [elapsed] if number else []  # the first load fills the page cache, and compiles
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    cost = medians["with the check"] / medians["without"] - 1
    return {"bytes": size, "dtype": dtype, "seconds": seconds, "median": medians, "cost": cost}


def write(folder: Path, dtype: str) -> None:
    """Writes a model folder of about 1 GB."""
    layers = LAYERS * (2 if dtype == "bfloat16" else 1)
    text = dict(hidden_size=WIDTH, intermediate_size=MLP_WIDTH, num_hidden_layers=layers, num_attention_heads=16)
    hf_config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**TOWER, image_size=28, patch_size=14),
        text_config=transformers.LlamaConfig(**text, vocab_size=4096),
        image_token_index=4,
        dtype=dtype,
    )
    config = llava.LlavaConfig.from_hf(hf_config)
    _, shapes = base.abstract_model(lambda rngs: llava.Llava(config, rngs=rngs))
    rng = np.random.default_rng(0)
    params = {path: rng.standard_normal(x.shape, np.float32).astype(dtype) for path, x in shapes.items()}
    export.create(folder, hf_config, params)


def load(folder: Path, checked: bool) -> float:
    """Loads the model, and returns the seconds of the processor."""
    check = safetensors_files.is_finite if checked else lambda values: True
    with mock.patch.object(safetensors_files, "is_finite", check):
        start = time.process_time()
        jax.block_until_ready(hf.load(folder)[1])
        return time.process_time() - start


if __name__ == "__main__":
    run(__doc__, measure, tables.loading, dtype=("bfloat16", "dtype of the weights", ("float32", "bfloat16")),
        rounds=(9, "loads of each kind"))  # fmt: skip
