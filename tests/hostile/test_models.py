"""Model folders that cannot be right: weights, headers, indexes, configs and adapters."""

import json
import os
import struct

import numpy as np
import pytest
from hostile_cases import INDEX, WEIGHTS, Case, asked, check, config, nested, with_files, with_tensors, written

PROJECTOR = "multi_modal_projector.linear_1.weight"
TOWER = "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight"
TEXT = "language_model.model.layers.1.mlp.up_proj.weight"
HEAD = "language_model.lm_head.weight"
SHARD = "model-00001-of-00001.safetensors"


def spoiled(name, number):
    """One number of a tensor is replaced."""

    def change(tensors):
        tensors[name] = tensors[name].copy()
        tensors[name].flat[7] = number

    return with_tensors(change)


def multiplied(name, factor, summand=0.0):
    """A change of tensors that multiplies one of them and adds a number."""
    return lambda tensors: tensors.update({name: tensors[name] * np.float32(factor) + np.float32(summand)})


def cast(name, dtype):
    """A tensor has another dtype."""
    return with_tensors(lambda tensors: tensors.update({name: tensors[name].astype(dtype)}))


def renamed(change):
    """Tensors have other names."""
    return with_tensors(lambda tensors: {change(name): value for name, value in tensors.items()})


def original_llava_name(name):
    """The name that LLaVA's first code gave a tensor."""
    name = name.removeprefix("language_model.")
    return name.replace("vision_tower.", "model.vision_tower.vision_tower.").replace(
        "multi_modal_projector.linear_", "model.mm_projector."
    )


def header(change, pad=0):
    """The header of the weights is replaced by bytes or by JSON."""

    def spoil(folder):
        data = (folder / WEIGHTS).read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        new = change(json.loads(data[8 : 8 + length]))
        if not isinstance(new, bytes):
            new = json.dumps(new).encode()
        written(folder / WEIGHTS, struct.pack("<Q", len(new) + pad) + new + data[8 + length :])

    return asked(spoil)


def entry(**changes):
    """The header's entry of the projector is changed."""
    return header(lambda tensors: tensors | {PROJECTOR: tensors[PROJECTOR] | changes})


def index(change):
    """The weights are in one shard, whose index is what `change` returns for the right one."""

    def spoil(folder):
        (folder / WEIGHTS).rename(folder / SHARD)
        data = (folder / SHARD).read_bytes()
        names = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
        names.pop("__metadata__")
        written(folder / INDEX, change({"metadata": {}, "weight_map": dict.fromkeys(names, SHARD)}, folder))

    return asked(spoil)


def shard_at(name):
    """The index names another file for every tensor; the shard is there, beside the folder."""

    def change(index_json, folder):
        (folder / SHARD).rename(folder.parent / "outside.safetensors")
        shard = name.format(outside=folder.parent / "outside.safetensors")
        if "/" not in shard:
            os.symlink("../outside.safetensors", folder / shard)
        return index_json | {"weight_map": dict.fromkeys(index_json["weight_map"], shard)}

    return index(change)


def fifo(name):
    def change(folder):
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return asked(change)


def adapter_alone(folder):
    for path in folder.iterdir():
        path.unlink()
    written(folder / "adapter_config.json", {"peft_type": "LORA", "base_model_name_or_path": "ORG/NAME", "r": 4})
    written(folder / "adapter_model.safetensors", b"")


def link_loop(folder):
    (folder / WEIGHTS).unlink()
    os.symlink(WEIGHTS, folder / WEIGHTS)


HUGE = 10**9


def below(values):
    """An index whose shards are in a folder within that of the model."""
    return values | {"weight_map": {name: f"shards/{shard}" for name, shard in values["weight_map"].items()}}


def hub_cache(folder):
    for path in folder.iterdir():
        path.unlink()
    (folder / "snapshots").mkdir()


NO_MAP = ("has no weight_map", "is not a safetensors index")

CASES = [
    # Weights that are not finite.
    Case("nan in the projector", spoiled(PROJECTOR, np.nan), ("NaN or infinity", PROJECTOR)),
    Case("nan in the tower", spoiled(TOWER, np.nan), ("NaN or infinity", TOWER)),
    Case("nan in the language model", spoiled(TEXT, np.nan), ("NaN or infinity", TEXT)),
    Case("infinity in the head", spoiled(HEAD, np.inf), ("NaN or infinity", HEAD)),
    Case("minus infinity in the tower", spoiled(TOWER, -np.inf), ("NaN or infinity", TOWER)),
    # Weights without a signal.
    *(
        Case(f"{what} {name}", with_tensors(change), (name, "no answer depends on", of))
        for name, of in (
            ("language_model.model.embed_tokens.weight", "a text"),
            (HEAD, "a text"),
            (PROJECTOR, "an image"),
            ("multi_modal_projector.linear_2.weight", "an image"),
            ("vision_tower.vision_model.embeddings.patch_embedding.weight", "an image"),
            ("vision_tower.vision_model.pre_layrnorm.weight", "an image"),
        )
        for what, change in (("zero", multiplied(name, 0)), ("constant", multiplied(name, 0, 0.1)))
        if what == "zero" or "norm" not in name
    ),
    *(
        Case(f"zero {name}", with_tensors(multiplied(name, factor)), (name, "zero throughout"))
        for factor, names in (
            (0, ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj", "input_layernorm")),
            (1e-30, ("self_attn.v_proj",)),
        )
        for name in (f"language_model.model.layers.1.{part}.weight" for part in names)
    ),
    Case("vanishing projector", with_tensors(multiplied(PROJECTOR, 1e-30)), (PROJECTOR, "zero throughout")),
    Case("zero values of the tower", with_tensors(multiplied(TOWER, 0)), (TOWER, "zero throughout")),
    # Dtypes.
    Case("int32 projector", cast(PROJECTOR, np.int32), (PROJECTOR, "int32")),
    Case("int64 tower", cast(TOWER, np.int64), (TOWER, "int64")),
    Case("bool language model", cast(TEXT, np.bool_), (TEXT, "BOOL")),
    Case("bytes as weights", cast(PROJECTOR, np.uint8), (PROJECTOR, "uint8")),
    Case("compute dtype int8", config(dtype="int8"), ("int8",)),
    Case("compute dtype float8", config(dtype="float8_e4m3fn"), ("float8",)),
    Case("compute dtype that is none", config(dtype="float33"), ("float33",)),
    # Headers.
    Case("header longer than the file", header(lambda tensors: tensors, pad=10**12), (WEIGHTS, "truncated")),
    Case("header that is a list", header(lambda tensors: list(tensors)), (WEIGHTS,)),
    Case("header that is no JSON", header(lambda tensors: b"{" * 40), (WEIGHTS,)),
    Case("header nested deeply", header(lambda tensors: nested(100_000).encode()), (WEIGHTS,)),
    Case("header that is no UTF-8", header(lambda tensors: b'{"\xff": 1}'), (WEIGHTS,)),
    Case("negative offsets", entry(data_offsets=[-8, 49144]), (WEIGHTS,)),
    Case("offsets behind the file", entry(data_offsets=[10**13, 10**13 + 49152]), (WEIGHTS,)),
    Case("offsets that are texts", entry(data_offsets=["0", "1"]), (WEIGHTS,)),
    Case("one offset", entry(data_offsets=[0]), (WEIGHTS,)),
    Case("negative shape", entry(shape=[-128, -96]), ("header",)),
    Case("shape of fractions", entry(shape=[128.0, 96.0]), (WEIGHTS,)),
    Case("shape that is a text", entry(shape="12288"), (WEIGHTS,)),
    Case("shape of booleans", entry(shape=[True, True]), (WEIGHTS,)),
    Case("huge shape", entry(shape=[HUGE, HUGE]), (WEIGHTS,)),
    Case("dtype that is a list", entry(dtype=["F32"]), (WEIGHTS,)),
    Case("unknown dtype", entry(dtype="F99"), (WEIGHTS, "F99")),
    Case("overlapping tensors", entry(data_offsets=[0, 49152]), (WEIGHTS,)),
    Case("entry that is null", header(lambda tensors: tensors | {PROJECTOR: None}), (WEIGHTS,)),
    Case("empty weights", asked(lambda folder: written(folder / WEIGHTS, b"")), (WEIGHTS,)),
    Case("seven bytes of weights", asked(lambda folder: written(folder / WEIGHTS, b"\0" * 7)), (WEIGHTS,)),
    Case("named pipe as weights", fifo(WEIGHTS), (WEIGHTS,)),
    Case("folder as weights", asked(lambda f: ((f / WEIGHTS).unlink(), (f / WEIGHTS).mkdir())), (WEIGHTS,)),
    Case("weights that link to themselves", asked(link_loop), ("model",)),
    # Indexes.
    Case("shard above the folder", shard_at("../outside.safetensors"), (INDEX, "leads out"), lacks=NO_MAP),
    Case("shard at an absolute path", shard_at("{outside}"), (INDEX, "leads out"), lacks=NO_MAP),
    Case("shard below the folder", index(lambda v, _: below(v)), (INDEX, "not directly in"), lacks=NO_MAP),
    Case(
        "weights beside an index of others",
        index(lambda values, folder: (written(folder / WEIGHTS, (folder / SHARD).read_bytes()), values)[1]),
        ("has both", WEIGHTS, INDEX),
    ),
    Case("index without a map", index(lambda values, _: {"metadata": {}}), (INDEX,)),
    Case("index that is a list", index(lambda values, _: [values]), (INDEX,)),
    Case("index with an empty map", index(lambda values, _: {"weight_map": {}}), (INDEX,)),
    Case("index of numbers", index(lambda v, _: {"weight_map": dict.fromkeys(v["weight_map"], 3)}), (INDEX,)),
    Case("index of an empty name", index(lambda v, _: {"weight_map": dict.fromkeys(v["weight_map"], "")}), (INDEX,)),
    Case("index with NUL", index(lambda v, _: {"weight_map": dict.fromkeys(v["weight_map"], "a\0b")}), (INDEX,)),
    Case(
        "index with a surrogate", index(lambda v, _: {"weight_map": dict.fromkeys(v["weight_map"], "\ud800")}), (INDEX,)
    ),
    Case("index with control characters", index(lambda v, _: {"weight_map": {"\x1b[2J": SHARD}}), (INDEX,)),
    Case("index nested deeply", index(lambda values, _: nested(100_000)), (INDEX,)),
    Case("index that is no UTF-8", index(lambda values, _: b"\xff\xfe"), (INDEX,)),
    Case(
        "index of 5000 missing shards",
        index(lambda v, _: {"weight_map": {f"t{i}": f"s{i}.safetensors" for i in range(5000)}}),
        (INDEX,),
    ),
    Case("index of a name too long", index(lambda v, _: {"weight_map": {"t": "x" * 5000}}), ("too long",)),
    # Names.
    Case("names of the original LLaVA", renamed(original_llava_name), ("names",)),
    Case("all tensors unknown", renamed(lambda name: f"x.{name}"), ("x.",)),
    Case(
        "tensor of a block of 5000 digits",
        renamed(lambda n: n.replace("layers.0", "layers." + "9" * 5000)),
        ("layers",),
    ),
    Case("tensor of another shape", with_tensors(lambda t: t.update({PROJECTOR: t[PROJECTOR].T.copy()})), (PROJECTOR,)),
    # config.json.
    Case("config that is a list", with_files(config__json=[]), ("config.json",)),
    Case("empty config", with_files(config__json=""), ("config.json",)),
    Case("config that is no UTF-8", with_files(config__json=b"\xff"), ("config.json",)),
    Case("config with NaN", with_files(config__json='{"model_type": "llava", "text_config": NaN}'), ("config.json",)),
    Case("config nested deeply", with_files(config__json=nested(100_000)), ("config.json",)),
    Case("config without a model type", with_files(config__json={}), ("model_type",)),
    Case("another model type", config(model_type="gpt2"), ("gpt2", "llava")),
    Case("model type that is a list", config(model_type=["llava"]), ("model", "not supported")),
    Case("model type with control characters", config(model_type="\x1b[31m"), ("model",)),
    Case("named pipe as config", fifo("config.json"), ("config.json", "pipe")),
    Case("text config that is a number", config(text_config=3), ("text_config",)),
    Case("text config that is null", config(text_config=None), ("config",)),
    Case("10^9 layers", config("text_config", num_hidden_layers=HUGE), ("num_hidden_layers",)),
    Case("10^9 vision layers", config("vision_config", num_hidden_layers=HUGE), ("num_hidden_layers",)),
    Case("10^12 tokens", config("text_config", vocab_size=10**12), ("1000000000000",)),
    Case("10^12 positions", config("text_config", max_position_embeddings=10**12), ("max_position_embeddings",)),
    Case("hidden size 0", config("text_config", hidden_size=0), ("hidden_size",)),
    Case("negative hidden size", config("vision_config", hidden_size=-96), ("hidden_size",)),
    Case("hidden size that is a text", config("text_config", hidden_size="128"), ("hidden_size",)),
    Case("hidden size that is null", config("text_config", hidden_size=None), ("hidden_size",)),
    Case("hidden size with a fraction", config("text_config", hidden_size=128.5), ("hidden_size",)),
    Case("no layers", config("text_config", num_hidden_layers=0), ("num_hidden_layers",)),
    Case("no attention heads", config("text_config", num_attention_heads=0), ("config.json",)),
    Case("heads that do not divide", config("vision_config", num_attention_heads=7), ("attention heads",)),
    Case("key heads that do not divide", config("text_config", num_key_value_heads=3), ("num_key_value_heads",)),
    Case("patch size 0", config("vision_config", patch_size=0), ("patch_size",)),
    Case("patches larger than the image", config("vision_config", patch_size=100), ("patch_size",)),
    Case("image size 0", config("vision_config", image_size=0), ("image_size",)),
    Case("unknown activation", config("text_config", hidden_act="magic"), ("magic",)),
    Case("feature layer that is not there", config(vision_feature_layer=-99), ("vision_feature_layer",)),
    Case("feature layer that is a text", config(vision_feature_layer="last"), ("vision_feature_layer",)),
    Case("image token behind the vocabulary", config(image_token_index=10**6), ("image_token_index", "1000000")),
    *(
        Case(
            f"rope_theta {theta}",
            config("text_config", rope_parameters=dict(rope_type="default", rope_theta=theta)),
            ("text_config.rope_parameters.rope_theta", "from 100 to 1e+09"),
        )
        for theta in (1.0, 1e-30, 1e300)
    ),
    Case("epsilon that is negative", config("text_config", rms_norm_eps=-1.0), ("rms_norm_eps", "positive")),
    Case(
        "quantization config",
        config(quantization_config={"quant_method": "awq", "bits": 4}),
        ("quantization_config", "awq"),
    ),
    Case("quantization of bitsandbytes", config(quantization_config={"load_in_4bit": True}), ("quantization_config",)),
    # Folders of something else.
    Case("folder of the hub's cache", asked(hub_cache), ("folder of the hub's cache", "snapshots")),
    Case(
        "folder of a run", with_files(config__json={"seed": 0}, records__json={}), ("--workdir of a run", "unlearned")
    ),
    # Adapters.
    Case("adapter as a model", asked(adapter_alone), ("the base ORG/NAME of the adapter",)),
    Case(
        "adapter beside the weights",
        with_files(adapter_config__json={"peft_type": "LORA", "r": 4}, adapter_model__safetensors=b"x"),
        ("adapter",),
    ),
    Case(
        "pickled weights", asked(lambda folder: (folder / WEIGHTS).rename(folder / "pytorch_model.bin")), ("pickled",)
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_model_is_refused(case, fork_server, tmp_path):
    check(case, fork_server, tmp_path)
