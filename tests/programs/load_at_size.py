"""load_at_size.py FOLDER DATA FSDP: reads a LLaVA of 4.5 GB onto DATA x FSDP devices; prints bytes and seconds as JSON.

Writes it first if the folder is empty: bfloat16, four files and an index, made from little memory.
"""

import json
import re
import sys
import time
import zlib
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import transformers

from vkd_jax.checkpoints import hf
from vkd_jax.models import base, llava
from vkd_jax.runtime.mesh import make_mesh, param_shardings

CONFIG = transformers.LlavaConfig(  # one stacked matrix of the MLP is 1.3 GB: as much again is more than may be held
    vision_config=transformers.CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    ),
    text_config=transformers.LlamaConfig(
        vocab_size=4096,
        hidden_size=2048,
        intermediate_size=16384,
        num_hidden_layers=20,
        num_attention_heads=16,
        num_key_value_heads=4,
    ),
    image_token_index=4,
    dtype="bfloat16",
)
FILES = 4
PERIOD = 4_000_037  # a prime: no row of any matrix equals another
LAYER = "language_model.model.layers.{}."
# Which tensors some parameters are made of, told apart from the table that is tested; all but the first are turned.
CHECKED = {
    "language_model/embed/embedding": "language_model.model.embed_tokens.weight",
    "language_model/head/kernel": "language_model.lm_head.weight",
    "language_model/blocks/attn/k/kernel": LAYER + "self_attn.k_proj.weight",
    "language_model/blocks/attn/o/kernel": LAYER + "self_attn.o_proj.weight",
    "language_model/blocks/mlp/gate/kernel": LAYER + "mlp.gate_proj.weight",
    "language_model/blocks/mlp/down/kernel": LAYER + "mlp.down_proj.weight",
    "vision_tower/blocks/1/mlp/fc1/kernel": "vision_tower.vision_model.encoder.layers.1.mlp.fc1.weight",
}


def pattern() -> np.ndarray:
    """The numbers that every tensor repeats, each from a place of its own on."""
    return np.random.default_rng(0).standard_normal(PERIOD, np.float32).astype(ml_dtypes.bfloat16)


def first(name: str) -> int:
    return zlib.crc32(name.encode()) % PERIOD


def write(folder: Path) -> None:
    """The folder; every layer has tensors in each of the files."""
    CONFIG.save_pretrained(folder)
    config = llava.LlavaConfig.from_hf(CONFIG)
    _, shapes = base.abstract_model(lambda rngs: llava.Llava(config, rngs=rngs))
    tensors = {}
    for name, slot in hf.tensor_names(llava, config, shapes).items():
        shape = shapes[slot.path].shape[0 if slot.layer is None else 1 :]
        tensors[name] = [shape[i] for i in np.argsort(slot.axes or range(len(shape)))]
    names = sorted(tensors, key=lambda name: re.sub(r"(.*\.)(\d+)(\..*)", r"\3 \2", name))
    homes = {name: f"model-{i % FILES + 1:05}-of-{FILES:05}.safetensors" for i, name in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": homes}))
    numbers = pattern()
    for file in sorted(set(homes.values())):
        header, end = {}, 0
        for name in (own := [name for name in names if homes[name] == file]):
            begin, end = end, end + 2 * int(np.prod(tensors[name]))
            header[name] = {"dtype": "BF16", "shape": tensors[name], "data_offsets": [begin, end]}
        text = json.dumps(header).encode()
        with (folder / file).open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            for name in own:
                left, start = int(np.prod(tensors[name])), first(name)
                while left:
                    piece = numbers[start : start + left]
                    stream.write(piece.view(np.uint8))
                    left, start = left - len(piece), 0


def held(field: str) -> int:
    """Bytes of this process in memory: VmRSS now, VmHWM at most until now."""
    return 1024 * int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def read() -> int:
    """Bytes that this process has read from files so far."""
    return int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1])


def check(params, rng) -> int:
    """Compares numbers at random places of every device's part; returns how many."""
    numbers, count = pattern(), 0
    for path, template in CHECKED.items():
        for shard in params[path].addressable_shards:
            at = [rng.integers(0, size, 500) for size in shard.data.shape]
            found = np.asarray(shard.data)[tuple(at)]
            at = [i + (cut.start or 0) for i, cut in zip(at, shard.index, strict=True)]
            layers = at.pop(0) if "{}" in template else None
            sizes = params[path].shape[-2:]
            if path.endswith("kernel"):
                at, sizes = at[::-1], sizes[::-1]
            names = [template] * 500 if layers is None else [template.format(layer) for layer in layers]
            flat = np.ravel_multi_index(at, sizes) + np.array([first(name) for name in names])
            np.testing.assert_array_equal(found.view(np.uint16), numbers[flat % PERIOD].view(np.uint16), path)
            count += 500
    return count


def load(folder: Path, data: int, fsdp: int) -> dict:
    place = param_shardings(make_mesh(data=data, fsdp=fsdp), llava.SHARDING)
    before, bytes_before, start = held("VmRSS"), read(), time.monotonic()
    _, params, _ = hf.load(folder, sharding=place)
    jax.block_until_ready(params)
    return {
        "devices": jax.device_count(),
        "seconds": time.monotonic() - start,
        "peak": held("VmHWM") - before,
        "read": read() - bytes_before,
        "files": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        "parameters": sum(x.nbytes for x in params.values()),
        "target": sum(shard.data.nbytes for x in params.values() for shard in x.addressable_shards),
        "checked": check(params, np.random.default_rng(1)),
    }


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    if not any(folder.iterdir()):
        write(folder)
    print(json.dumps(load(folder, int(sys.argv[2]), int(sys.argv[3]))))
