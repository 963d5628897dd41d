"""Model folders that cannot be right: weights, headers, indexes, configs, tokenizers, templates and adapters."""

import json
import os
import struct

import numpy as np
import pytest
from hostile_cases import INDEX, WEIGHTS, Case, asked, check, with_files, with_tensors, written

from vkd_jax.data import image_sizes

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


def config(section="", **fields):
    """Fields of config.json, or of a section of it, are changed."""

    def change(values):
        if section:
            return values | {section: values[section] | fields}
        return values | fields

    return with_files(config__json=change)


def processor(**fields):
    """Fields of the image processor are changed."""
    return with_files(
        processor_config__json=lambda values: values | {"image_processor": values["image_processor"] | fields}
    )


def joint_processor(**fields):
    """Fields by which transformers counts image tokens are changed."""
    return with_files(processor_config__json=lambda values: values | fields)


def template(text):
    return with_files(chat_template__jinja=text)


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


def nested(levels):
    return "[" * levels + "]" * levels


TEXT_TEMPLATE = "{% for m in messages %}{{ 'Q: ' + m.content + ' A:' }}{% endfor %}"
PARTS = "{% for m in messages %}{% for c in m.content %}{{ c.text }}{% endfor %}{% endfor %}"
PART_TEMPLATE = "{% for part in messages %}{% if 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}"
HUGE = 10**9


def below(values):
    """An index whose shards are in a folder within that of the model."""
    return values | {"weight_map": {name: f"shards/{shard}" for name, shard in values["weight_map"].items()}}


def token_added(values):
    """A tokenizer with a token for "Who" that the model does not know."""
    token = dict(id=5000, content="Who", single_word=False, lstrip=False, rstrip=False, normalized=False, special=False)
    return values | {"added_tokens": [*values["added_tokens"], token]}


def deaf(values):
    """A tokenizer that deletes what is no special token."""
    return values | {"normalizer": {"type": "Replace", "pattern": {"Regex": "[A-Za-z ?:]+"}, "content": ""}}


def letterless(values):
    """A tokenizer that knows special tokens alone."""
    special = {token: number for token, number in values["model"]["vocab"].items() if token.startswith("<")}
    return values | {"model": values["model"] | {"vocab": special, "merges": []}}


def merged(share):
    """A tokenizer that has lost the other merges."""

    def change(values):
        merges = values["model"]["merges"]
        return values | {"model": values["model"] | {"merges": merges[: int(share * len(merges))]}}

    return change


def panicking(values):
    """A tokenizer whose normalizer has an error of its own."""
    return values | {"normalizer": {"type": "Replace", "pattern": {"String": ""}, "content": "ab"}}


def hub_cache(folder):
    for path in folder.iterdir():
        path.unlink()
    (folder / "snapshots").mkdir()


def doubled(values):
    """A tokenizer with two tokens of one id."""
    vocab = values["model"]["vocab"]
    first, second = [token for token, number in vocab.items() if number in (300, 301)]
    return values | {"model": values["model"] | {"vocab": vocab | {first: vocab[second]}}}


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
    # Image processors.
    Case("crop of another size", processor(crop_size={"height": 56, "width": 56}), ("crop_size", "48")),
    Case("image size that is a text", processor(size="large"), ("image_processor.size",)),
    Case("standard deviation 0", processor(image_std=[0.0, 0.0, 0.0]), ("image_std",)),
    Case("standard deviation that is an object", processor(image_std={"red": 1}), ("image_std", "red")),
    Case("factor of pixels 0", processor(rescale_factor=0), ("rescale_factor=0", "all alike")),
    Case("negative factor of pixels", processor(rescale_factor=-1 / 255), ("rescale_factor=-0.00392", "all alike")),
    *(
        Case(f"{name} of {value:g}", processor(**{name: values}), (name, "all alike"))
        for name, value, values in (
            ("image_mean", 1e30, [1e30] * 3),
            ("image_std", 1e30, [0.5, 0.5, 1e30]),
            ("image_std", 1e-9, [1e-9] * 3),
            ("rescale_factor", 1e-300, 1e-300),
            ("rescale_factor", 1e9, 1e9),
        )
    ),
    Case("edge shorter than the crop", processor(size={"shortest_edge": 1}), ("size.shortest_edge", "crop_size")),
    Case("mean of texts", processor(image_mean=["a", "b", "c"]), ("image_mean", "['a', 'b', 'c']")),
    Case(
        "factor of pixels that is a text",
        processor(rescale_factor="1/255"),
        ("image_processor.rescale_factor", "number"),
    ),
    Case("crop of a million pixels", processor(crop_size={"height": 10**6, "width": 10**6}), ("image processor",)),
    Case("edge of 10^5 pixels", processor(size={"shortest_edge": 10**5}), ("size.shortest_edge", "100000", "4,096")),
    Case("edge of a fraction", processor(size={"shortest_edge": 47.5}), ("size.shortest_edge", "47.5")),
    *(
        Case(f"{field} as {what}", processor(**{field: value}), ("processor_config.json", f"image_processor.{field}"))
        for field, what, value in (
            ("size", "an empty list", []),
            ("size", "a list of texts", ["48"]),
            ("crop_size", "a list of lists", [[48]]),
            ("size", "an empty object", {}),
            ("size", "true", True),
            ("crop_size", "a nested object", {"height": {}}),
            ("resample", "a text", "bicubic"),
            ("resample", "a list", []),
            ("resample", "a large number", 10**9),
            ("image_mean", "a short list", [0.5]),
            ("image_std", "true", True),
            ("rescale_factor", "true", True),
        )  # fmt: skip
    ),
    *(
        Case(f"{field} that is null", processor(**{field: None}), (f"{field} of the image processor is null", switch))
        for field, switch in image_sizes.NEEDED.items()
    ),
    *(
        Case(
            f"{field} {value!r} beside another model",
            joint_processor(**{field: value}),
            ("processor_config.json", field, "image tokens"),
        )
        for field, value in (
            ("patch_size", 6),
            ("patch_size", 12.0),
            ("num_additional_image_tokens", 0),
            ("num_additional_image_tokens", True),
            ("vision_feature_select_strategy", "full"),
        )
    ),
    Case("resizing that is a text", processor(do_resize="false"), ("do_resize", "'false'", "true or false")),
    Case("processor that is a list", with_files(processor_config__json=[1]), ("processor_config.json",)),
    Case("processor that is no JSON", with_files(processor_config__json="{"), ("processor",)),
    Case("no processor", with_files(processor_config__json=None), ("image processor",)),
    # Tokenizers.
    Case("no tokenizer", with_files(tokenizer__json=None), ("tokenizer",)),
    Case("empty tokenizer", with_files(tokenizer__json=""), ("tokenizer",)),
    Case("tokenizer that is a list", with_files(tokenizer__json=[]), ("tokenizer",)),
    Case("tokenizer without a model", with_files(tokenizer__json={"version": "1.0"}), ("tokenizer",)),
    Case("tokenizer that deletes texts", with_files(tokenizer__json=deaf), ("tokenizer", "different texts")),
    Case("tokenizer that panics", with_files(tokenizer__json=panicking), ("tokenizer",)),
    Case(
        "sentencepiece model alone",
        with_files(tokenizer__json=None, tokenizer__model=b"x"),
        ("tokenizer.model is not read", "tokenizer.json"),
    ),
    Case("folder of the hub's cache", asked(hub_cache), ("folder of the hub's cache", "snapshots")),
    Case(
        "folder of a run", with_files(config__json={"seed": 0}, records__json={}), ("--workdir of a run", "unlearned")
    ),
    Case("two tokens of one id", with_files(tokenizer__json=doubled), ("tokenizer.json", "are both the token")),
    *(
        Case(f"tokenizer with {share:.0%} of its merges", with_files(tokenizer__json=merged(share)), ("by no merge",))
        for share in (0, 0.5)
    ),
    Case("tokenizer without letters", with_files(tokenizer__json=letterless), ("tokenizer", "different texts")),
    Case("tokenizer config that is a list", with_files(tokenizer_config__json=[]), ("tokenizer",)),
    Case(
        "longest text that is a text",
        with_files(tokenizer_config__json=lambda values: values | {"model_max_length": "long"}),
        ("tokenizer", "str"),
    ),
    Case("ordinary token as the image token", config(image_token_index=300), ("image token 300", "texts are made of")),
    Case(
        "image token that ends answers",
        with_files(generation_config__json={"eos_token_id": [2, 4]}),
        ("image token 4", "ends or pads"),
    ),
    Case("token behind the embeddings", with_files(tokenizer__json=token_added), ("token", "1024", "tokenizer")),
    Case("tokenizer config nested deeply", with_files(tokenizer_config__json=nested(100_000)), ("tokenizer",)),
    Case(
        "end of sequence that is a text",
        with_files(generation_config__json={"eos_token_id": "</s>"}),
        ("eos_token_id",),
    ),
    Case(
        "end of sequence behind the vocabulary",
        with_files(generation_config__json={"eos_token_id": [10**9]}),
        ("eos_token_id",),
    ),
    Case(
        "end of sequence that is every token",
        with_files(generation_config__json={"eos_token_id": [*range(1024)]}),
        ("eos_token_id", "which texts are made of"),
    ),
    Case(
        "end of sequence that is a word",
        with_files(generation_config__json={"eos_token_id": [2, 300]}),
        ("generation_config.json", "eos_token_id 300 is", "which texts are made of"),
    ),
    *(
        Case(
            f"{name} that is a word",
            with_files(tokenizer_config__json=lambda values, name=name: values | {name: "USER"}),
            ("special token 'USER' is a word", "tokenizer_config.json"),
        )
        for name in ("eos_token", "bos_token", "pad_token")
    ),
    Case("generation config that is a list", with_files(generation_config__json=[]), ("generation_config.json",)),
    # Chat templates.
    Case("template that raises", template("{{ raise_exception('only users') }}"), ("template", "only users")),
    Case("template with an error", template("{% for m in messages %}"), ("template",)),
    Case("template that divides by zero", template("{{ 1 / 0 }}"), ("template",)),
    Case("template that joins texts", template(TEXT_TEMPLATE), ("template",)),
    Case("template that renders nothing", template(PART_TEMPLATE), ("template",)),
    Case(
        "template that shows a list", template("{% for m in messages %}Q: {{ m.content }}{% endfor %}"), ("template",)
    ),
    Case("template of an endless loop", template("{% for i in range(1000000000000) %}x{% endfor %}"), ("template",)),
    Case("template of 10^8 letters", template("{{ 'x' * 100000000 }}"), ("template", "100,000,000 characters")),
    Case("template of 10^10 letters", template("{{ 'x' * 10000000000 }}"), ("template", "MemoryError")),
    Case("template that centers a letter", template("{{ 'x'.center(1000000000000) }}"), ("template", "MemoryError")),
    Case("template of a power", template("{{ 9 ** 9 ** 9 }}{{ messages[0].content }}"), ("template", "a power")),
    Case("template of half a pair", template("{{ '\\ud800' }}" + PARTS), ("template", "half of a surrogate pair")),
    Case("template that reads attributes", template("{{ messages.__class__.__mro__ }}"), ("template",)),
    Case("template of an unknown filter", template("{{ messages | nothing }}"), ("template",)),
    Case("template that is no UTF-8", template(b"\xff\xfe"), ("utf-8",)),
    Case(
        "template that is a number",
        with_files(chat_template__jinja=None, chat_template__json={"chat_template": 3}),
        ("template",),
    ),
    # Adapters.
    Case("adapter as a model", asked(adapter_alone), ("ORG/NAME", "base of the adapter")),
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
