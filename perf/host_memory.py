"""Measures the memory of the host that VKD takes for a large retain set, with recomputed teacher features.

python perf/host_memory.py [--images N] [--json FILE]

The model has LLaVA-1.5-7B's shapes where features are made: images of 336 pixels, and 576 tokens with 1024 channels in
the tower and 4096 after the projector. It is small elsewhere: one vision block that counts, and one decoder block.
Images are JPEG files, which a run holds in memory, too: 1,000 different ones, and copies of them that share nothing.
The figures are the peaks of the process up to the end of each stage; training is two steps. The outputs of the vision
block, which does not train, would need more than the budget of method.cache_gib, and are computed at each step.
"""

import io
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tables
from command import run
from PIL import Image

from vkd_jax.checkpoints import new_model
from vkd_jax.checkpoints.bundle import ModelBundle
from vkd_jax.config.training import TrainConfig
from vkd_jax.methods import base
from vkd_jax.methods.vkd import VKD
from vkd_jax.runtime.mesh import make_mesh
from vkd_jax.training import loop
from vkd_jax.types import Example

SHAPE = dict(
    vocab_size=512,
    vision=dict(hidden_size=1024, intermediate_size=256, num_hidden_layers=2, num_attention_heads=16, image_size=336)
    | dict(patch_size=14, projection_dim=64),
    text=dict(hidden_size=4096, intermediate_size=256, num_hidden_layers=1, num_attention_heads=32)
    | dict(num_key_value_heads=32, max_position_embeddings=1024),
)
FORGET_IMAGES, DIFFERENT_IMAGES, SIDE, SOURCE_SIDE = 8, 1000, 336, 24


def measure(images: int) -> dict[str, Any]:
    """Encodes the sets, prepares VKD, and trains two steps."""
    peaks, seconds, start = {}, {}, time.perf_counter()

    def stage(name: str) -> None:
        """Records the peak so far."""
        peaks[name] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        seconds[name] = time.perf_counter() - start

    rng = np.random.default_rng(0)
    examples = {"forget": questions(rng, "forget", FORGET_IMAGES), "retain": questions(rng, "retain", images)}
    stage("image files")
    with tempfile.TemporaryDirectory() as folder:
        path = new_model.create_llava(Path(folder) / "model", examples["forget"], SHAPE, seed=0)
        model = ModelBundle.load(path, dtype="float32", mesh=make_mesh())
    stage("model")
    sets = {name: model.encode(rows) for name, rows in examples.items()}
    stage("encoded sets")
    context = base.Context(model.graphdef, model.params, None, model.config, sets, seed=0, encode=model.encode)
    method = VKD(teacher_features="recomputed", blocks=0, mask_scope="none", augment_forget=1)
    prepared = method.prepare(context)
    stage("prepared")
    config = TrainConfig(steps=2, learning_rate=1e-3, warmup_steps=0, batch_size=dict(forget=1, retain=1))
    loop.fit(model, method, prepared, config, seed=0, folder=None)
    stage("trained")
    taps = base.tap_shapes(context, sets["retain"])
    spec = VKD().cache_spec("retain", taps, model.config).per_image
    row = sum(int(np.prod(x.shape)) for name, x in spec.items() if name.startswith("target/"))
    return {
        "images": images,
        "image_bytes": sum(len(e.image) for e in examples["retain"]),
        "values": row,
        "peaks": peaks,
        "seconds": seconds,
        "weights": sum(x.nbytes for x in jax.tree.leaves(model.params)),
    }


def questions(rng: np.random.Generator, name: str, count: int) -> list[Example]:
    """One question each about smooth random images; what follows the end of a JPEG file is not read."""

    def jpeg() -> bytes:
        file = io.BytesIO()
        colors = Image.fromarray(rng.integers(0, 256, (SOURCE_SIDE, SOURCE_SIDE, 3), np.uint8))
        colors.resize((SIDE, SIDE), Image.Resampling.BILINEAR).save(file, "JPEG", quality=90)
        return file.getvalue()

    different = [jpeg() for _ in range(min(count, DIFFERENT_IMAGES))]
    return [
        Example(
            f"{name}/{i}", f"{name} {i}", different[i % len(different)] + b"%d" % i, f"{name}/{i}", "Who is this?",
            "a judge",
        )
        for i in range(count)
    ]  # fmt: skip


if __name__ == "__main__":
    run(__doc__, measure, tables.host_memory, images=(100_000, "images of the retain set"))
