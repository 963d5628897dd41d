"""A LLaVA with random weights and sets of random rows: all that training needs, without files or a tokenizer."""

import dataclasses
import functools
import json
import sys
import types
from pathlib import Path

import jax
import numpy as np

from vkd_jax.checkpoints import hf
from vkd_jax.config.training import TrainConfig
from vkd_jax.data.encoding import EncodedSet
from vkd_jax.data.images import PackedImages
from vkd_jax.models import base, llava
from vkd_jax.models.clip_vit import VisionConfig
from vkd_jax.models.decoder import DecoderConfig
from vkd_jax.runtime.mesh import param_shardings
from vkd_jax.types import Example

CONFIG = llava.LlavaConfig(  # every width divides over eight devices
    vision=VisionConfig(image_size=16, patch_size=8, width=16, layers=2, heads=2, mlp_width=32),
    text=DecoderConfig(vocab=64, width=16, layers=2, heads=4, kv_heads=2, head_width=4, mlp_width=32),
    image_token_id=4,
)


def model(mesh):
    """graphdef and weights, each where the rules put it on this mesh."""
    _, params = drawn()
    config = dataclasses.replace(CONFIG, mesh=mesh)
    graphdef, _ = base.abstract_model(lambda rngs: llava.Llava(config, rngs=rngs))
    rule = param_shardings(mesh, llava.SHARDING)
    return graphdef, {path: jax.device_put(np.asarray(x), rule(path, x.shape)) for path, x in params.items()}


@functools.cache
def drawn():
    """graphdef and random weights."""
    return hf.init_params(CONFIG, 0)


def rows(seed: int, count: int) -> EncodedSet:
    """Returns random rows of four image tokens, four question tokens and two answer tokens, with four images in all."""
    random = np.random.default_rng(seed)
    tokens = random.integers(5, CONFIG.text.vocab, (count, 10)).astype(np.int32)
    tokens[:, :4] = CONFIG.image_token_id
    return EncodedSet(
        examples=tuple(Example(str(i), "", b"", "", "", "") for i in range(count)),
        tokens=tokens,
        mask=np.ones_like(tokens, bool),
        target_positions=np.tile(np.array([7, 8], np.int32), (count, 1)),
        targets=tokens[:, 8:],
        target_mask=np.ones((count, 2), bool),
        prompt_length=np.full(count, 8, np.int32),
        image_rows=np.arange(count, dtype=np.int32) % 4,
        images=PackedImages.of(random.normal(size=(4, 16, 16, 3)).astype(np.float32), CONFIG),
    )


SPEED = ("data_wait_share", "examples_per_second")  # no two runs agree on these


def train_config(**changes) -> TrainConfig:
    """Settings of a short run that logs every step."""
    fields = dict(steps=3, batch_size=dict(forget=8, retain=8, image=8), learning_rate=1e-3, warmup_steps=2)
    fields |= dict(weight_decay=0.1, log_every=1, log_seconds=60.0, checkpoint_every=2)
    return TrainConfig(**fields | changes)


def metrics_on_stdout() -> None:
    """Makes `train` print a JSON line for each step instead of importing TensorFlow, which takes seconds."""

    class Progress:
        def __init__(self, folder: Path, **options):
            pass

        def overview(self, trainable):
            pass

        def tick(self, step):
            pass

        def write(self, step, scalars):
            kept = {name: value for name, value in scalars.items() if name not in SPEED}
            print(json.dumps({"step": step} | kept), flush=True)

        def close(self):
            pass

    module = types.ModuleType("vkd_jax.training.metric_writer")
    module.Progress = Progress
    sys.modules["vkd_jax.training.metric_writer"] = module
