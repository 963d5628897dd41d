"""Writing of model folders: identical bytes, trained tensors alone, and nothing half-written."""

import errno
import json
import os
import shutil

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import transformers
from llava_folders import equal, hf_config, random_params, read, shard, write

from vkd_jax.checkpoints import export, hf
from vkd_jax.checkpoints.manifest import compare_tensors
from vkd_jax.models import llava, lora
from vkd_jax.types import Diverged, UserError


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
