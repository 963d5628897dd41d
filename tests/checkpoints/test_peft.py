"""Adapters that are written for PEFT: their names, and that reading them gives the exported model."""

import json
import re

import jax
import numpy as np
import pytest
import safetensors.numpy
import transformers
from llava_folders import read

from vkd_jax import models
from vkd_jax.checkpoints import adapters, export, hf, peft, sources
from vkd_jax.models import lora
from vkd_jax.runtime import storage

RANK, ALPHA = 2, 6


@pytest.fixture(scope="module")
def trained(folder):
    """The parameters and configuration of a model with adapters, and trained A and B."""
    _, params, config = hf.load(folder)
    params = lora.attach(params, rank=RANK, alpha=ALPHA, dropout=0.1, seed=0)
    rng = np.random.default_rng(0)
    matrices = {
        path: jax.numpy.asarray(rng.standard_normal(x.shape, np.float32) * 0.1)
        for path, x in params.items()
        if lora.is_adapter(path)
    }
    return matrices | lora.adapters(params), config


def test_an_adapter_over_its_base_is_the_exported_model(folder, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "CACHE", tmp_path / "cache")
    params, config = trained
    export.export(params, folder, tmp_path / "model", config)
    peft.export(params, folder, tmp_path / "adapter", config, base=str(folder))
    merged, exported = read(sources.fetch_model(tmp_path / "adapter")), read(tmp_path / "model")
    assert merged.keys() == exported.keys()
    for name, tensor in exported.items():
        np.testing.assert_allclose(merged[name], tensor, rtol=1e-5, atol=1e-6, err_msg=name)
    changed = {name for name, tensor in read(folder).items() if not np.array_equal(tensor, exported[name])}
    assert len(changed) == 2 * 7  # all linear layers of two blocks


def test_names_and_settings_are_those_of_peft(folder, trained, tmp_path):
    params, config = trained
    peft.export(params, folder, tmp_path / "adapter", config, base="org/base")
    settings = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "org/base" and settings["peft_type"] == "LORA"
    assert (settings["r"], settings["lora_alpha"], settings["lora_dropout"]) == (RANK, ALPHA, 0.1)
    tensors = safetensors.numpy.load_file(tmp_path / "adapter" / adapters.WEIGHTS)
    names = {name.removeprefix("base_model.model.").rsplit(".lora_", 1)[0] for name in tensors}
    assert len(names) == 14 and len(tensors) == 28
    assert all(re.fullmatch(settings["target_modules"], name) for name in names)
    for tower in ("model.vision_tower.encoder.layers.0.self_attn.q_proj", "model.multi_modal_projector.linear_1"):
        assert not re.fullmatch(settings["target_modules"], tower)
    up = tensors["base_model.model.model.language_model.layers.1.mlp.up_proj.lora_B.weight"]
    np.testing.assert_array_equal(up, np.asarray(params["language_model/blocks/mlp/up/kernel/lora_b"][1]).T)


def test_weights_that_are_no_adapters_are_refused(folder, trained, tmp_path):
    params, config = trained
    with pytest.raises(ValueError, match="projector/fc1/bias"):
        peft.export(params | {"projector/fc1/bias": np.zeros(3)}, folder, tmp_path, config, base="")


@pytest.mark.parametrize("family", models.MODELS)
def test_modules_have_their_names_in_the_model_of_transformers(family):
    torch = pytest.importorskip("torch", reason="PyTorch is needed for comparison: pip install '.[test]'")
    module = models.module_for(family)
    hf_config = transformers.AutoConfig.for_model(family, **next(iter(module.PRESETS.values()))[1])
    table = module.hf_table(module.Config.from_hf(hf_config))
    names = [name.replace("{i}", "0") for name, path, _ in table if re.fullmatch(lora.KERNELS, path)]
    with torch.device("meta"):
        model = transformers.AutoModelForImageTextToText.from_config(hf_config)
    modules = dict(model.named_modules())
    assert len(names) == 7 and all(isinstance(modules[peft.module_name(name)], torch.nn.Linear) for name in names)
