"""Adapters that are written for PEFT: their names, and that reading them gives the exported model."""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy
import transformers
from llava_folders import TEXT, VISION, read

from vkd_jax import models
from vkd_jax.checkpoints import adapters, export, hf, peft, sources
from vkd_jax.models import lora
from vkd_jax.runtime import hub, storage

RANK, ALPHA = 2, 6


@pytest.fixture(scope="module")
def trained(folder):
    """The parameters and configuration of a model with adapters, and trained A and B."""
    _, params, config = hf.load(folder)
    return train(params), config


def test_an_adapter_over_its_base_is_the_exported_model(folder, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "CACHE", tmp_path / "cache")
    params, config = trained
    export.export(params, folder, tmp_path / "model", config)
    peft.export(params, folder, tmp_path / "adapter", config, given=sources.Parts(str(folder), folder))
    merged, exported = read(sources.fetch_model(tmp_path / "adapter")), read(tmp_path / "model")
    assert merged.keys() == exported.keys()
    for name, tensor in exported.items():
        np.testing.assert_allclose(merged[name], tensor, rtol=1e-5, atol=1e-6, err_msg=name)
    changed = {name for name, tensor in read(folder).items() if not np.array_equal(tensor, exported[name])}
    assert len(changed) == 2 * 7  # all linear layers of two blocks


def test_names_and_settings_are_those_of_peft(folder, trained, tmp_path):
    params, config = trained
    peft.export(params, folder, tmp_path / "adapter", config, given=sources.Parts("org/base", folder))
    settings = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "org/base" and settings["peft_type"] == "LORA"
    assert (settings["r"], settings["lora_alpha"], settings["lora_dropout"]) == (RANK, ALPHA, 0.1)
    tensors = safetensors.numpy.load_file(tmp_path / "adapter" / adapters.WEIGHTS)
    names = {name.removeprefix("base_model.model.").rsplit(".lora_", 1)[0] for name in tensors}
    assert len(names) == 14 and len(tensors) == 28
    assert set(settings["target_modules"]) == names and settings["modules_to_save"] is None
    up = tensors["base_model.model.model.language_model.layers.1.mlp.up_proj.lora_B.weight"]
    np.testing.assert_array_equal(up, np.asarray(params["language_model/blocks/mlp/up/kernel/lora_b"][1]).T)


DECODER, PROJECTOR = "language_model.model.layers.1", "multi_modal_projector.linear_1"  # as before transformers 4.52
EMBED, HEAD = "model.language_model.embed_tokens", "lm_head"
PATCHES = "vision_tower.vision_model.embeddings.patch_embedding"


def write_adapter(path, base, tensors, **config):
    """Writes an adapter of the base; each tensor is a name and a shape."""
    rng = np.random.default_rng(1)
    path.mkdir()
    values = {
        f"base_model.model.{name}": rng.standard_normal(shape, np.float32) * 0.1 for name, shape in tensors.items()
    }
    safetensors.numpy.save_file(values, path / adapters.WEIGHTS)
    settings = dict(peft_type="LORA", base_model_name_or_path=str(base), r=3, lora_alpha=5) | config
    (path / hub.ADAPTER_CONFIG).write_text(json.dumps(settings))
    return path


def train(params):
    params = lora.attach(params, rank=RANK, alpha=ALPHA, dropout=0.1, seed=0)
    rng = np.random.default_rng(0)
    matrices = {
        path: jax.numpy.asarray(rng.standard_normal(x.shape, np.float32) * 0.1)
        for path, x in params.items()
        if lora.is_adapter(path)
    }
    return matrices | lora.adapters(params)


@pytest.mark.parametrize("replaces_trained", [False, True])
def test_a_given_adapter_and_the_trained_one_become_one(folder, tmp_path, monkeypatch, replaces_trained):
    monkeypatch.setattr(storage, "CACHE", tmp_path / "cache")
    width, saved = TEXT["hidden_size"], f"{DECODER}.self_attn.o_proj" if replaces_trained else HEAD
    shapes = {
        f"{DECODER}.self_attn.q_proj.lora_A.weight": (7, width),
        f"{DECODER}.self_attn.q_proj.lora_B.weight": (width, 7),
        f"{PROJECTOR}.lora_A.default.weight": (3, VISION["hidden_size"]),
        f"{PROJECTOR}.lora_B.default.weight": (width, 3),
        f"{PATCHES}.lora_A.weight": (3, 3, 4, 4),
        f"{PATCHES}.lora_B.weight": (VISION["hidden_size"], 3, 1, 1),
        f"{EMBED}.lora_embedding_A": (3, TEXT["vocab_size"]),
        f"{EMBED}.lora_embedding_B": (width, 3),
        f"{saved}.weight": (width if replaces_trained else TEXT["vocab_size"], width),
    }
    patterns = dict(rank_pattern={"q_proj": 7}, alpha_pattern={"linear_1": 9}, modules_to_save=[saved.split(".")[-1]])
    given = sources.parts_of(write_adapter(tmp_path / "given", folder, shapes, **patterns))
    source = sources.fetch_model(tmp_path / "given")
    assert given == sources.Parts(str(folder), folder, tmp_path / "given") and given.folder == source
    _, params, config = hf.load(source)
    params = train(params)
    export.export(params, source, tmp_path / "model", config)
    peft.export(params, source, tmp_path / "both", config, given=given)
    settings = json.loads((tmp_path / "both/adapter_config.json").read_text())
    if replaces_trained:
        assert settings["base_model_name_or_path"] == str(source) and settings["r"] == RANK
    else:
        assert settings["base_model_name_or_path"] == str(folder)
        assert (settings["r"], settings["lora_alpha"], settings["modules_to_save"]) == (7 + RANK, 7 + RANK, [HEAD])
        assert len(settings["target_modules"]) == 14 + 3
    merged, exported = read(sources.fetch_model(tmp_path / "both")), read(tmp_path / "model")
    for name, tensor in exported.items():
        np.testing.assert_allclose(merged[name], tensor, rtol=1e-5, atol=1e-5, err_msg=name)


def test_weights_that_are_no_adapters_are_refused(folder, trained, tmp_path):
    params, config = trained
    with pytest.raises(ValueError, match="projector/fc1/bias"):
        peft.export(params | {"projector/fc1/bias": np.zeros(3)}, folder, tmp_path, config, given=None)


@pytest.mark.parametrize("family", models.MODELS)
def test_modules_have_their_names_in_the_model_of_transformers(family):
    torch = pytest.importorskip("torch", reason="PyTorch is needed for comparison: pip install '.[test]'")
    module = models.module_for(family)
    hf_config = transformers.AutoConfig.for_model(family, **next(iter(module.PRESETS.values()))[1])
    table = module.hf_table(module.Config.from_hf(hf_config))
    names = [name.replace("{i}", "0") for name, _, _ in table if name.endswith(".weight")]
    with torch.device("meta"):
        model = transformers.AutoModelForImageTextToText.from_config(hf_config)
    modules = dict(model.named_modules())
    # The towers of CLIP and SigLIP have lost a prefix in transformers 5.6.
    found = [peft.module_name(name).replace("vision_tower.vision_model.", "vision_tower.") for name in names]
    assert len(names) > 20 and [name for name in found if name not in modules] == []
