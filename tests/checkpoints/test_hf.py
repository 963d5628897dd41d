"""Conversion: names, identical bytes, sharded and cast loading, export, and errors for invalid folders."""

import dataclasses
import errno
import functools
import json
import os
import re
import shutil
import tempfile
import weakref
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import transformers
from jax.sharding import NamedSharding, PartitionSpec

from vkd_jax.checkpoints import export, hf, safetensors_files
from vkd_jax.checkpoints.manifest import compare_tensors
from vkd_jax.models import base, llava, lora, quantize
from vkd_jax.runtime import hub
from vkd_jax.runtime.mesh import make_mesh, replicated
from vkd_jax.types import Diverged, NotFinite, UserError

REPLICATED = replicated(make_mesh())
QUANTIZE = functools.partial(quantize.quantize_param, settings=quantize.parse("int8"))

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


@pytest.fixture(autouse=True)
def lists(tmp_path_factory, monkeypatch):
    """Writes the long lists of messages to a folder that the tests remove."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("lists")))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    export.create(folder, hf_config(), random_params(llava.LlavaConfig.from_hf(hf_config())))
    return folder


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


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


def to_saved(name):
    """Maps names of the files on the Hub to those of a model that transformers 5 created and saved."""
    return name.replace("vision_tower.vision_model.", "vision_tower.")


def to_memory(name):
    """Maps names of the files on the Hub to those of a PyTorch module in memory, which some tools save."""
    name = to_saved(name)
    if name == "language_model.lm_head.weight":
        return "lm_head.weight"
    return "model." + name.replace("language_model.model.", "language_model.")


def equal(a, b):
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and bool((a[k] == b[k]).all()) for k in a)


# Names and values.


def test_values_by_hand(folder):
    graphdef, params, config = hf.load(folder)
    tensors = read(folder)
    np.testing.assert_array_equal(params["projector/fc1/kernel"], tensors["multi_modal_projector.linear_1.weight"].T)
    patch = tensors["vision_tower.vision_model.embeddings.patch_embedding.weight"]  # [d, color, row, column]
    assert params["vision_tower/patch_embedding"][1, 2, 0, 7] == patch[7, 0, 1, 2]
    up = params["language_model/blocks/mlp/up/kernel"]
    np.testing.assert_array_equal(up[1], tensors["language_model.model.layers.1.mlp.up_proj.weight"].T)
    assert config == llava.LlavaConfig.from_hf(hf_config())
    assert equal(params, base.split_model(base.bind(graphdef, params))[1])


@pytest.mark.parametrize("rename", [to_saved, to_memory])
def test_other_generations_of_names_are_loaded_and_exported(folder, copy, rename):
    write(copy, {rename(n): t for n, t in read(folder).items()})
    _, want, _ = hf.load(folder)
    _, params, config = hf.load(copy)
    assert equal(params, want)
    target = copy.with_name("out")
    export.export({k: v + 1 for k, v in params.items()}, copy, target, config)
    assert read(target).keys() == read(copy).keys()
    assert len(compare_tensors(copy, target)["changed"]) == len(read(copy))


@pytest.mark.parametrize("name", ["tiny_base", "tiny_llava", "tiny_retain_only"])
def test_shipped_and_created_models_have_the_names_of_the_hub(folder, name):
    """transformers before 5.6 reads a LLaVA without `vision_model` in its names with a random vision tower."""
    for model in (folder, hub.fetch_model(name)):
        names = read(model).keys()
        assert names == {hf.canonical(llava, n) for n in names}
        assert {n.split(".")[0] for n in names} == {"language_model", "multi_modal_projector", "vision_tower"}
        assert {n.split(".")[1] for n in names if n.startswith("vision_tower")} == {"vision_model"}


def test_old_buffers_are_skipped(folder, copy):
    extra = {
        "vision_tower.vision_model.embeddings.position_ids": np.arange(5)[None],
        "model.language_model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(3, np.float32),
    }
    write(copy, read(folder) | extra)
    assert equal(hf.load(copy)[1], hf.load(folder)[1])


def test_tied_embeddings_have_no_head_parameter(tmp_path):
    hf_settings = hf_config(text=dict(tie_word_embeddings=True), tie_word_embeddings=True)
    params = random_params(llava.LlavaConfig.from_hf(hf_settings))
    assert "language_model/head/kernel" not in params
    export.create(tmp_path / "tied", hf_settings, params)
    assert equal(hf.load(tmp_path / "tied")[1], params)
    # Older files repeat the table as the head: it is not read, and an export writes both.
    tensors = read(tmp_path / "tied")
    table = tensors["language_model.model.embed_tokens.weight"]
    write(tmp_path / "tied", tensors | {"lm_head.weight": table})
    _, params, config = hf.load(tmp_path / "tied")
    path = "language_model/embed/embedding"
    export.export({path: params[path] * 2}, tmp_path / "tied", tmp_path / "out", config)
    out = read(tmp_path / "out")
    np.testing.assert_array_equal(out["lm_head.weight"], out["language_model.model.embed_tokens.weight"])
    assert (out["lm_head.weight"] == 2 * table).all()


def test_each_tensor_of_llava_7b_has_one_slot():
    torch = pytest.importorskip("torch")
    hf_settings = transformers.LlavaConfig()  # the defaults are the 7B's
    with torch.device("meta"):
        model = transformers.LlavaForConditionalGeneration(hf_settings)
    config = llava.LlavaConfig.from_hf(hf_settings)
    _, shapes = base.abstract_model(lambda rngs: llava.Llava(config, rngs=rngs))
    assert sum(v.size for v in shapes.values()) == sum(p.numel() for p in model.parameters()) > 7e9
    wanted = hf.tensor_names(llava, config, shapes)
    seen = {}
    for name, tensor in model.state_dict().items():
        slot = hf.find_slot(llava, config, name)
        assert wanted[hf.canonical(llava, name)] == slot
        assert slot not in seen, (name, seen[slot])
        seen[slot] = name
        shape = shapes[slot.path].shape[0 if slot.layer is None else 1 :]
        assert shape == tuple(tensor.shape[i] for i in slot.axes or range(tensor.ndim)), name
    assert set(seen) == set(wanted.values())


# Loading.


def test_master_weights_are_not_rounded(folder, tmp_path):
    """Trainable weights that did not change are exported byte for byte, whatever dtype the others have."""

    def visual(paths, config):
        return [path for path in paths if not path.startswith("language_model/")]

    _, exact, config = hf.load(folder)
    _, params, _ = hf.load(folder, dtype="bfloat16", masters=visual)
    trained = set(visual(params, config))
    assert {params[path].dtype for path in trained} == {jnp.dtype(jnp.float32)}
    assert {params[path].dtype for path in params.keys() - trained} == {jnp.dtype(jnp.bfloat16)}
    assert all((params[path] == exact[path]).all() for path in trained)
    export.export({path: params[path] for path in trained}, folder, tmp_path / "out", config)
    assert compare_tensors(folder, tmp_path / "out")["changed"] == []


def test_shards_give_the_parameters_of_one_file(folder, copy):
    shard(copy)
    assert equal(hf.load(copy)[1], hf.load(folder)[1])


def test_parameters_are_cast_while_loading(folder):
    _, params, config = hf.load(folder, dtype=jnp.bfloat16)
    _, want, _ = hf.load(folder)
    assert equal(params, {k: v.astype(jnp.bfloat16) for k, v in want.items()})
    assert config.compute_dtype == "bfloat16"
    assert hf.load(folder, dtype="bfloat16", compute_dtype="float32")[2].compute_dtype == "float32"
    assert hf.load(folder, remat="full")[2].remat == "full"


def test_parameters_are_loaded_with_their_sharding(folder):
    mesh = jax.make_mesh((len(jax.devices()),), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    shapes = {}

    def sharding(path, shape):
        shapes[path] = shape
        spec = [None] * len(shape)
        divisible = [i for i, size in enumerate(shape) if size % len(jax.devices()) == 0]
        if divisible:
            spec[divisible[-1]] = "x"
        return NamedSharding(mesh, PartitionSpec(*spec))

    _, params, _ = hf.load(folder, sharding=sharding)
    _, want, _ = hf.load(folder)
    assert equal(params, want)
    assert shapes == {k: v.shape for k, v in want.items()}
    assert all(v.sharding == sharding(k, v.shape) for k, v in params.items())


class SlicesSharding:
    """A sharding with one of the given slices of a parameter per device."""

    def __init__(self, *indices):
        self.indices = indices

    def addressable_devices_indices_map(self, shape):
        return dict(enumerate(self.indices))


def test_each_device_gets_its_slice_and_equal_slices_are_read_once(folder, monkeypatch):
    path = "language_model/blocks/mlp/gate/kernel"  # [layer, in, out]; the tensors are [out, in]
    config = llava.LlavaConfig.from_hf(hf_config())
    _, want, _ = hf.load(folder)
    parts = hf.match_tensors(llava, config, safetensors_files.Checkpoint(folder), want)[path]
    read, fill = [], safetensors_files.Tensor._fill
    monkeypatch.setattr(
        safetensors_files.Tensor, "_fill", lambda self, rows, f: (read.append(rows.nbytes), fill(self, rows, f))
    )
    monkeypatch.setattr(
        jax, "make_array_from_callback", lambda shape, sharding, take: [take(index) for index in sharding.indices]
    )

    def load_slices(*indices):
        read.clear()
        dtype, sharding = np.dtype(np.float32), SlicesSharding(*indices)
        return hf._read_param(parts, want[path].shape, dtype, sharding, lambda count: None)[0]

    everything = slice(None)
    halves = [(everything, slice(0, 6), everything), (everything, slice(6, 12, None), everything)]
    pieces = load_slices(*halves, *halves)
    for piece, index in zip(pieces, halves + halves, strict=True):
        np.testing.assert_array_equal(piece, np.asarray(want[path][index]))
    assert pieces[0] is pieces[2] and pieces[1] is pieces[3]
    assert all(piece.ctypes.data % 64 == 0 for piece in pieces)  # a CPU device uses aligned memory without a copy
    assert sum(read) == want[path].nbytes
    # A part of one layer.
    (piece,) = load_slices((slice(1, 2), slice(2, 5), slice(7, 9)))
    np.testing.assert_array_equal(piece, np.asarray(want[path][1:2, 2:5, 7:9]))
    assert sum(read) == want[path].nbytes // 2  # the other layer is not read


def test_parameters_do_not_depend_on_the_files_after_loading(folder, copy):
    _, params, _ = hf.load(copy)
    (copy / "model.safetensors").write_bytes(b"")
    assert equal(params, hf.load(folder)[1])


def test_donating_a_replicated_parameter_keeps_replicas_apart(folder):
    path = "projector/fc1/kernel"
    devices = jax.make_mesh((len(jax.devices()),), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    _, params, _ = hf.load(folder, sharding=lambda path, shape: NamedSharding(devices, PartitionSpec()))
    want = np.array(params[path])
    more = jax.jit(lambda x: x + 1, donate_argnums=0)(params[path])
    for shard in more.addressable_shards:
        np.testing.assert_array_equal(shard.data, want + 1)


def test_each_parameter_is_transformed_and_released_before_the_next_is_read(folder):
    _, want, _ = hf.load(folder)
    seen = {}

    def transform(path, param):
        assert isinstance(param, jax.Array)
        assert all(earlier() is None for earlier in seen.values()), "an earlier parameter is still in memory"
        seen[path] = weakref.ref(param)
        return (param * 2).astype(jnp.bfloat16) if path.startswith("language_model/") else {"small": param[..., :1]}

    _, params, _ = hf.load(folder, dtype=jnp.float32, transform=transform)
    assert list(seen) == list(want)
    for path, param in params.items():
        if path.startswith("language_model/"):
            np.testing.assert_array_equal(param, (want[path] * 2).astype(jnp.bfloat16))
        else:
            np.testing.assert_array_equal(param["small"], want[path][..., :1])


def test_loading_logs_its_progress(folder, monkeypatch):
    lines = []
    monkeypatch.setattr(safetensors_files, "LOG_SECONDS", 0)
    monkeypatch.setattr(safetensors_files.logging, "info", lambda text, *values: lines.append(text % values))
    hf.load(folder)
    assert len(lines) > 10
    assert all(f"GB of {folder} (" in line for line in lines)
    assert [line for line in lines if line.endswith("(100 %)")] == lines[-1:]


# Writing.


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_an_export_of_loaded_parameters_is_byte_identical(tmp_path, dtype):
    config = llava.LlavaConfig.from_hf(hf_config())
    source = tmp_path / "source"
    export.create(source, hf_config(), random_params(config, dtype))
    (source / "tokenizer.json").write_text("{}")
    (source / "pytorch_model.bin").write_bytes(b"the weights before unlearning")
    shard(source)
    _, params, config = hf.load(source)
    assert {v.dtype for v in params.values()} == {jnp.dtype(dtype)}
    export.export(params, source, tmp_path / "out", config)
    files = {p.name for p in source.iterdir()} - {"pytorch_model.bin"}
    assert {p.name for p in (tmp_path / "out").iterdir()} == files
    assert all((source / name).read_bytes() == (tmp_path / "out" / name).read_bytes() for name in files)
    assert compare_tensors(source, tmp_path / "out")["changed"] == []


def test_an_export_changes_exactly_the_trained_tensors(copy, tmp_path):
    shard(copy)
    _, params, config = hf.load(copy)
    trained = {"projector/fc2/bias": params["projector/fc2/bias"] + 1,
               "language_model/blocks/norm1/scale": params["language_model/blocks/norm1/scale"].at[1].add(1),
               "projector/fc1/bias": params["projector/fc1/bias"]}  # fmt: skip
    export.export(trained, copy, tmp_path / "out", config)
    manifest = compare_tensors(copy, tmp_path / "out")
    changed = ["language_model.model.layers.1.input_layernorm.weight", "multi_modal_projector.linear_2.bias"]
    assert manifest["changed"] == changed
    assert {n for n, e in manifest["tensors"].items() if e["before"] != e["after"]} == set(changed)
    assert equal(hf.load(tmp_path / "out")[1], params | trained)
    export.export({}, copy, tmp_path / "out", config)  # an earlier export is replaced
    assert compare_tensors(copy, tmp_path / "out")["changed"] == []
    assert {p.name for p in tmp_path.iterdir()} == {"copy", "out"}


@pytest.mark.parametrize("tied", [False, True])
def test_transformers_loads_created_and_exported_models(tmp_path, tied):
    pytest.importorskip("torch")
    hf_settings = hf_config(text=dict(tie_word_embeddings=tied), tie_word_embeddings=tied)
    params = random_params(llava.LlavaConfig.from_hf(hf_settings))
    export.create(tmp_path / "a", hf_settings, params)
    _, params, config = hf.load(tmp_path / "a")
    trained = {"projector/fc1/bias": params["projector/fc1/bias"] + 1}
    export.export(trained, tmp_path / "a", tmp_path / "b", config)
    torch_class = transformers.LlavaForConditionalGeneration
    model, info = torch_class.from_pretrained(tmp_path / "b", output_loading_info=True)
    assert not any(info.values()), info
    bias = model.model.multi_modal_projector.linear_1.bias.detach().numpy()
    np.testing.assert_array_equal(bias, trained["projector/fc1/bias"])
    model.save_pretrained(tmp_path / "c")  # transformers writes the same tensors
    assert read(tmp_path / "c").keys() == read(tmp_path / "a").keys()
    assert compare_tensors(tmp_path / "b", tmp_path / "c")["changed"] == []


def test_a_model_is_created_in_a_folder_with_a_tokenizer(tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "tokenizer.json").write_text("{}")
    params = random_params(llava.LlavaConfig.from_hf(hf_config()))
    export.create(tmp_path / "m", hf_config(), params)
    written = {p.name for p in (tmp_path / "m").iterdir()}
    assert written == {"tokenizer.json", "config.json", "generation_config.json", "model.safetensors"}
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert (config["architectures"], config["dtype"]) == (["LlavaForConditionalGeneration"], "float32")
    with pytest.raises(UserError, match="already holds a model"):
        export.create(tmp_path / "m", hf_config(), params)


# Invalid folders.

LINEAR_ROPE = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}


def whole(error):
    """The message of an error, with all items of the list that it has written to a file."""
    text = str(error.value)
    assert text.endswith(".") and "\n" not in text and len(text) <= 600
    file = re.search(r"are listed in (\S+\.txt)", text)
    return text + Path(file[1]).read_text() if file else text


def fails(folder, *messages):
    with pytest.raises(UserError) as error:
        hf.load(folder)
    text = whole(error)
    for message in messages:
        assert message in text, text


def test_missing_folders_configs_and_weights_are_reported(copy, tmp_path):
    fails(tmp_path / "nowhere", "no config.json")
    (copy / "model.safetensors").unlink()
    fails(copy, "has no weights")
    (copy / "config.json").write_text("{")
    fails(copy, "config.json: it is not JSON")


def test_unsupported_model_types_are_reported(copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"model_type": "bert"}))
    fails(copy, "'bert' is not supported", "llava")


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(vision=dict(hidden_act="relu")), "hidden_act is 'relu' (supported: quick_gelu, gelu)"),
        (dict(text=dict(hidden_act="gelu")), "text_config.hidden_act"),
        (dict(text=dict(attention_bias=True, mlp_bias=True)), "(supported: False); text_config.mlp_bias"),
        (dict(text=dict(rope_parameters=LINEAR_ROPE)), "rope_type is 'linear' (supported: default)"),
        (dict(vision_feature_layer=[-2, -1]), "one layer, from -4 to 3"),
        (dict(vision_feature_layer=-5), "one layer, from -4 to 3"),
        (dict(multimodal_projector_bias=False), "multimodal_projector_bias"),
    ],
)  # fmt: skip
def test_unsupported_fields_are_reported(changes, message):
    with pytest.raises(UserError) as error:
        llava.LlavaConfig.from_hf(hf_config(**changes))
    assert message in str(error.value)


def test_another_language_model_is_rejected():
    mistral = transformers.MistralConfig(hidden_size=16, num_attention_heads=2, num_key_value_heads=2)
    with pytest.raises(UserError, match="model_type is 'mistral'"):
        llava.LlavaConfig.from_hf(transformers.LlavaConfig(text_config=mistral))


def test_feature_layers_count_from_both_ends():
    config = llava.LlavaConfig.from_hf(hf_config())
    used = {n: dataclasses.replace(config, feature_layer=n).used_blocks for n in (-2, -1, -4, 0, 2, 3)}
    assert used == {-2: 2, -1: 3, -4: 0, 0: 0, 2: 2, 3: 3}


def test_all_wrong_tensors_are_listed(folder, copy):
    tensors = read(folder)
    for name in "multi_modal_projector.linear_1.bias", "language_model.model.layers.1.mlp.up_proj.weight":
        del tensors[name]
    tensors["language_model.model.norm.weight"] = np.ones(13, np.float32)
    tensors["language_model.model.layers.7.mlp.up_proj.weight"] = np.ones((20, 12), np.float32)
    tensors["vision_tower.adapter.weight"] = np.ones(3, np.float32)
    tensors["lm_head.weight"] = tensors["language_model.lm_head.weight"]
    write(copy, tensors)
    fails(
        copy,
        "missing tensor multi_modal_projector.linear_1.bias",
        "missing tensor language_model.model.layers.1.mlp.up_proj.weight",
        "language_model.model.norm.weight has shape (13,) instead of (12,)",
        "unknown tensor language_model.model.layers.7.mlp.up_proj.weight",
        "unknown tensor vision_tower.adapter.weight",
        "second time",
    )


# NaN and infinity.


@pytest.mark.parametrize(
    ("name", "value", "options"),
    [
        ("multi_modal_projector.linear_1.weight", np.nan, {}),
        ("multi_modal_projector.linear_2.bias", -np.inf, dict(dtype="bfloat16")),
        ("language_model.model.layers.1.mlp.up_proj.weight", np.nan, dict(transform=QUANTIZE)),
        ("language_model.model.embed_tokens.weight", np.inf, dict(sharding=lambda path, shape: REPLICATED)),
        ("vision_tower.vision_model.embeddings.class_embedding", 1e5, dict(dtype="float16")),  # finite on disk alone
        ("vision_tower.vision_model.post_layernorm.weight", np.nan, dict(masters=lambda paths, config: paths)),
    ],
    ids=["plain", "cast", "quantized", "sharded", "overflow", "masters"],
)
def test_weights_that_are_not_finite_are_refused_by_name(copy, name, value, options):
    tensors = read(copy)
    tensors[name].flat[-1] = value
    write(copy, tensors)
    with pytest.raises(NotFinite) as refused:
        hf.load(copy, **options)
    assert str(refused.value).startswith(f"{copy / 'model.safetensors'}: NaN or infinity in {name}. ")


def test_of_many_weights_that_are_not_finite_three_are_named(copy):
    write(copy, {name: np.full_like(tensor, np.nan) for name, tensor in read(copy).items()})
    with pytest.raises(NotFinite, match=r"in \S+, \S+, \S+ and \d+ more "):
        hf.load(copy)


@pytest.mark.parametrize("value", ["nan", "inf", "overflow", "adapter"])
def test_an_export_that_is_not_finite_leaves_no_folder(copy, tmp_path, value):
    dtype = np.float16 if value == "overflow" else np.float32
    write(copy, {name: tensor.astype(dtype) for name, tensor in read(copy).items()})
    _, params, config = hf.load(copy, dtype="float32")
    path = "projector/fc1/kernel"
    trained = {path: params[path].at[2, 1].set({"overflow": 1e5}.get(value, np.nan if value == "nan" else np.inf))}
    if value == "adapter":
        path = "language_model/blocks/mlp/up/kernel"
        params = lora.attach(params, rank=2, alpha=1.0, dropout=0.0, seed=0)
        trained = {f"{path}/lora_b": params[f"{path}/lora_b"].at[0, 0, 0].set(jnp.nan)} | lora.adapters(params)
        trained = {key: x for key, x in (params | trained).items() if key.startswith(path)}
    with pytest.raises(Diverged, match="has NaN or infinity in the dtype of .* no model was written"):
        export.export(trained, copy, tmp_path / "out", config)
    assert [entry.name for entry in tmp_path.iterdir()] == ["copy"]


def test_a_full_disk_leaves_no_partial_export(copy, tmp_path, monkeypatch):
    _, _, config = hf.load(copy)
    export.export({}, copy, tmp_path / "out", config)
    before = (tmp_path / "out" / "model.safetensors").read_bytes()

    def full(source, target):
        with open(target, "wb") as stream:
            stream.write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shutil, "copyfile", full)
    for name in ("new", "out"):
        with pytest.raises(UserError, match="disk is full"):
            export.export({}, copy, tmp_path / name, config)
    assert {p.name for p in tmp_path.iterdir()} == {"copy", "out"}
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before


def test_an_export_does_not_replace_folders_without_a_model(copy, tmp_path):
    _, _, config = hf.load(copy)
    with pytest.raises(UserError, match="Choose another folder"):
        export.export({}, copy, copy, config)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    with pytest.raises(UserError, match="not a model folder"):
        export.export({}, copy, tmp_path / "thesis", config)
    assert (tmp_path / "thesis" / "chapter.tex").exists()
    with pytest.raises(UserError, match="is a file"):
        export.export({}, copy, copy / "config.json", config)
    with pytest.raises(ValueError, match="no tensor for"):
        export.export({"projector/fc9/bias": jnp.ones(1)}, copy, tmp_path / "out", config)
    with pytest.raises(ValueError, match="on disk"):
        export.export({"projector/fc1/bias": jnp.ones(1)}, copy, tmp_path / "out", config)
    assert not (tmp_path / "out").exists()


def test_the_next_export_removes_the_rest_of_a_killed_one(tiny_folder, tmp_path, monkeypatch):
    _, _, config = hf.load(tiny_folder)
    with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
        killed.setattr(shutil, "rmtree", lambda *_, **__: None)
        with export._new_folder(tmp_path / "new") as folder:
            (folder / "model.safetensors").write_text("half")
            raise KeyboardInterrupt
    assert len(list(tmp_path.iterdir())) == 1
    export.export({}, tiny_folder, tmp_path / "new", config)
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
