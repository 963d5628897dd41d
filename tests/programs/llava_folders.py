"""Model folders of a tiny LLaVA with random weights, for the tests of checkpoints."""

import json

import jax.numpy as jnp
import numpy as np
import safetensors.numpy
import transformers

from vkd_jax.models import base, llava

VISION = dict(
    hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, projection_dim=16,
    image_size=8, patch_size=4,
)  # fmt: skip
TEXT = dict(
    vocab_size=40, hidden_size=12, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, max_position_embeddings=64,
)  # fmt: skip


def hf_config(vision=None, text=None, **changes):
    return transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION | (vision or {})),
        text_config=transformers.LlamaConfig(**TEXT | (text or {})),
        **dict(image_token_index=4) | changes,
    )


def random_params(config, dtype=np.float32, seed=0):
    """Draws random parameters without compiling an initializer."""
    _, shapes = base.abstract_model(lambda rngs: llava.Llava(config, rngs=rngs))
    rng = np.random.default_rng(seed)
    return {k: jnp.asarray(rng.standard_normal(v.shape).astype(dtype)) for k, v in shapes.items()}


def read(folder):
    return safetensors.numpy.load_file(folder / "model.safetensors")


def write(folder, tensors):
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def shard(folder):
    """Splits the single file into two shards with an index."""
    tensors = read(folder)
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in parts.items():
        safetensors.numpy.save_file({n: tensors[n] for n in part}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {n: file for file, part in parts.items() for n in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()


def equal(a, b):
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and bool((a[k] == b[k]).all()) for k in a)
