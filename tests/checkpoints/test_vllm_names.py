"""The names of exported tensors and those of vLLM: its prefixes, its stacked layers and the modules of its models."""

import json
from pathlib import Path

import pytest
from transformers import AutoConfig

from vkd_jax import models

VLLM = json.loads((Path(__file__).parent / "vllm_names.json").read_text("utf-8"))
DECODER, HEAD = "language_model.model.", "language_model.lm_head."


def to_vllm(family, name):
    """The name of the parameter of vLLM's model that a tensor is loaded into: prefixes first, then stacked layers."""
    for old, new in VLLM["prefixes"].get(VLLM["families"][family]["prefixes"]) or ():
        name = name.replace(old, new, 1) if name.startswith(old) else name
    if VLLM["families"][family]["parts"].get("vision_tower") == "intern_vit" and name.startswith("vision_tower."):
        return name  # whose attention has separate layers
    return ".".join(VLLM["stacked"].get(part, part) for part in name.split("."))


def parameters(family):
    """The names of the parameters of vLLM's model, of the first block of each kind."""
    names = set(VLLM["families"][family]["others"])
    for part, kind in VLLM["families"][family]["parts"].items():
        for module in VLLM["modules"][kind]:
            names |= {f"{part}.{module}{suffix}".replace("#", "0") for suffix in ("", ".weight", ".bias")}
    return names


def of_the_hub(name):
    return name


def since_4_52(name):
    """The name in a checkpoint that transformers 4.52 or later wrote from a model in memory."""
    if name.startswith((DECODER, HEAD)):
        return name.replace(DECODER, "model.language_model.").replace(HEAD, "lm_head.")
    if name.startswith("model.layers") or name in ("model.norm.weight", "model.embed_tokens.weight"):
        return name.replace("model.", "model.language_model.", 1)
    return name if name.startswith(("model.", "lm_head.")) else f"model.{name}"


@pytest.mark.parametrize("layout", [of_the_hub, since_4_52])
@pytest.mark.parametrize("family", VLLM["families"])
def test_every_exported_tensor_has_a_place_in_vllm(family, layout):
    module = models.module_for(family)
    known = parameters(family)
    for _, fields in module.PRESETS.values():
        config = module.Config.from_hf(AutoConfig.for_model(family, **fields))
        names = {layout(template.replace("{i}", "0")) for template, _, _ in module.hf_table(config)}
        assert {to_vllm(family, name) for name in names} <= known


def test_every_family_names_its_source():
    assert VLLM["sources"].keys() == VLLM["families"].keys() == set(models.MODELS) - {"vipllava"}  # which vLLM lacks
    assert all(source.startswith("https://github.com/vllm-project/vllm/") for source in VLLM["sources"].values())
