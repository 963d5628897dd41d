"""Conversion: names, sharded and cast loading, and errors for invalid folders."""

import dataclasses
import functools
import json
import re
import weakref
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from jax.sharding import NamedSharding, PartitionSpec
from llava_folders import equal, hf_config, random_params, read, shard, write

from vkd_jax import models
from vkd_jax.checkpoints import export, hf, safetensors_files
from vkd_jax.checkpoints.manifest import compare_tensors
from vkd_jax.models import base, llava, quantize
from vkd_jax.runtime import hub
from vkd_jax.runtime.mesh import make_mesh, replicated
from vkd_jax.types import NotFinite, UserError

REPLICATED = replicated(make_mesh())
QUANTIZE = functools.partial(quantize.quantize_param, settings=quantize.parse("int8"))


def to_saved(name):
    """Maps names of the files on the Hub to those of a model that transformers 5 created and saved."""
    return name.replace("vision_tower.vision_model.", "vision_tower.")


def to_memory(name):
    """Maps names of the files on the Hub to those of a PyTorch module in memory, which some tools save."""
    name = to_saved(name)
    if name == "language_model.lm_head.weight":
        return "lm_head.weight"
    return "model." + name.replace("language_model.model.", "language_model.")


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


@pytest.mark.parametrize("rename", [to_saved, to_memory])
@pytest.mark.parametrize("family", ["llava", "gemma3"])
def test_other_generations_of_names_have_the_same_slots(family, rename):
    from transformers import AutoConfig

    module = models.module_for(family)
    config = module.Config.from_hf(AutoConfig.for_model(family, **next(iter(module.PRESETS.values()))[1]))
    names = [template.replace("{i}", "1") for template, _, _ in module.hf_table(config)]
    assert all(hf.find_slot(module, config, rename(n)) == hf.find_slot(module, config, n) is not None for n in names)


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
    for piece in more.addressable_shards:
        np.testing.assert_array_equal(piece.data, want + 1)


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
        (dict(vision=dict(hidden_act="relu")), "hidden_act is 'relu' (supported: quick_gelu, gelu, "),
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


def test_the_first_of_very_many_unknown_tensors_are_named_without_looking_at_all(folder, copy, monkeypatch):
    looked = []
    monkeypatch.setattr(hf, "find_slot", lambda *args: looked.append(args) or None)
    write(copy, read(folder) | {f"a{number:04d}": np.ones(0, np.float32) for number in range(1100)})
    fails(copy, "unknown tensor a0000; unknown tensor a0001; unknown tensor a0002 and others, more than 1,000 in all.")
    assert len(looked) == hf.MOST_UNKNOWN + 1


def test_a_head_that_is_missing_and_not_tied_is_named(folder, copy):
    write(copy, {name: tensor for name, tensor in read(folder).items() if "lm_head" not in name})
    fails(copy, "missing tensor language_model.lm_head.weight")


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


def test_a_matrix_that_is_zero_in_the_dtype_of_the_run_is_refused(copy):
    name = "language_model.model.layers.1.mlp.up_proj.weight"
    tensors = read(copy)
    tensors[name] *= 1e-8 / np.abs(tensors[name]).max()  # half of the smallest float16 is 3e-8
    write(copy, tensors)
    hf.load(copy, dtype="bfloat16")
    with pytest.raises(UserError, match=f"{name} is zero throughout in float16"):
        hf.load(copy, dtype="float16")


def test_of_many_weights_that_are_not_finite_three_are_named(copy):
    write(copy, {name: np.full_like(tensor, np.nan) for name, tensor in read(copy).items()})
    with pytest.raises(NotFinite, match=r"in \S+, \S+, \S+ and \d+ more "):
        hf.load(copy)


def test_abstract_models_are_kept_by_configuration_and_dtype(tiny_config):
    other = dataclasses.replace(tiny_config, text=dataclasses.replace(tiny_config.text, layers=1))
    for config in (tiny_config, other, tiny_config):
        for dtype in (jnp.float32, jnp.bfloat16):
            _, shapes = hf.abstract_model(llava.Llava, config, dtype)
            create = functools.partial(llava.Llava, config, param_dtype=dtype)
            _, expected = base.abstract_model(lambda rngs, create=create: create(rngs=rngs))
            assert shapes == expected and {x.dtype for x in shapes.values()} == {jnp.dtype(dtype)}
            shapes.clear()  # a caller's own
