"""The published sizes of every family: shapes of the weights, compared with PyTorch, and their sharding."""

import functools
import re

import jax
import numpy as np
import pytest

from vkd_jax import models
from vkd_jax.checkpoints import hf
from vkd_jax.models import base
from vkd_jax.runtime.mesh import check_rules, param_shardings

# Numbers of parameters on the Hugging Face Hub, rounded.
PUBLISHED = {
    ("llava", "7b"): 7.06e9,
    ("llava", "13b"): 13.4e9,
    ("llava_next", "7b"): 7.06e9,
    ("llava_next", "13b"): 13.4e9,
    ("llava_next", "mistral-7b"): 7.57e9,
    ("vipllava", "7b"): 7.08e9,
    ("vipllava", "13b"): 13.4e9,
    ("gemma3", "4b"): 4.30e9,
    ("gemma3", "12b"): 12.2e9,
    ("qwen2_vl", "2b"): 2.21e9,
    ("qwen2_vl", "7b"): 8.29e9,
    ("qwen2_5_vl", "3b"): 3.75e9,
    ("qwen2_5_vl", "7b"): 8.29e9,
    ("qwen3_vl", "2b"): 2.13e9,
    ("qwen3_vl", "4b"): 4.44e9,
    ("qwen3_vl", "8b"): 8.77e9,
    ("idefics3", "256m"): 256_484_928,
    ("idefics3", "500m"): 507_482_304,
    ("idefics3", "2.2b"): 2_246_272_880,
    ("smolvlm", "v2-256m"): 256_484_928,
    ("smolvlm", "v2-500m"): 507_482_304,
    ("smolvlm", "v2-2.2b"): 2_246_784_880,
    ("internvl", "1b"): 0.938e9,
    ("internvl", "2b"): 2.09e9,
    ("internvl", "8b"): 7.94e9,
}
PRESETS = [(family, size) for family in models.MODELS for size in models.module_for(family).PRESETS]
SMALLEST = [min((preset for preset in PRESETS if preset[0] == family), key=PUBLISHED.get) for family in models.MODELS]
every_preset = pytest.mark.parametrize(
    ("family", "size"),
    [pytest.param(*preset, marks=[] if preset in SMALLEST else pytest.mark.slow) for preset in PRESETS],
)


@functools.cache
def preset(family, size):
    from transformers import AutoConfig

    module = models.module_for(family)
    hf_config = AutoConfig.for_model(family, **module.PRESETS[size][1])
    config = module.Config.from_hf(hf_config)
    _, shapes = base.abstract_model(lambda rngs: module.Model(config, rngs=rngs))
    return module, hf_config, config, shapes


def test_every_preset_has_a_published_size():
    assert set(PRESETS) == set(PUBLISHED)


@every_preset
def test_the_number_of_parameters_is_the_published_one(family, size):
    *_, shapes = preset(family, size)
    assert sum(x.size for x in shapes.values()) == pytest.approx(PUBLISHED[family, size], rel=0.005)


@every_preset
def test_each_tensor_of_pytorch_has_one_slot(family, size):
    torch = pytest.importorskip("torch", reason="PyTorch is needed for comparison: pip install '.[test]'")
    from transformers import AutoModelForImageTextToText

    module, hf_config, config, shapes = preset(family, size)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(hf_config)
    assert type(model).__name__ == module.HF_ARCHITECTURE
    slots = {}
    for name, tensor in model.named_parameters():  # tied parameters occur once
        slot = hf.find_slot(module, config, name)
        shape = shapes[slot.path].shape[0 if slot.layer is None else 1 :]
        assert slot.to_param(np.broadcast_to(0, tensor.shape)).shape == shape, name
        assert slots.setdefault(slot, name) == name
    assert slots.keys() == set(hf.tensor_names(module, config, shapes).values())
    head = hf.find_slot(module, config, next(name for name in model.state_dict() if "lm_head" in name))
    assert (head.path == "language_model/embed/embedding") == config.text.tie_embeddings


@every_preset
def test_written_names_are_read_into_the_same_slots(family, size):
    module, _, config, shapes = preset(family, size)
    names = hf.tensor_names(module, config, shapes)
    assert all(hf.find_slot(module, config, name) == slot for name, slot in names.items())
    assert all(hf.canonical(module, name) == name for name in names)


@every_preset
def test_every_parameter_has_one_sharding_rule_and_every_rule_a_parameter(family, size):
    module, *_, shapes = preset(family, size)
    # Tied models have no head, unless a checkpoint brings another one than the embeddings.
    paths = {"language_model/head/kernel", *shapes}
    check_rules(module.SHARDING, paths)
    for path in paths:
        assert sum(re.fullmatch(pattern, path) is not None for pattern, _ in module.SHARDING) == 1, path


@every_preset
@pytest.mark.parametrize("mesh", [dict(data=1, fsdp=8, tensor=1), dict(data=1, fsdp=8, tensor=4)], ids=str)
def test_large_weights_are_fully_sharded(family, size, mesh):
    module, _, _, shapes = preset(family, size)
    sharding_of = param_shardings(jax.sharding.AbstractMesh(tuple(mesh.values()), tuple(mesh)), module.SHARDING)
    devices, per_device = np.prod(list(mesh.values())), 0
    for path, x in shapes.items():
        shard_size = np.prod(sharding_of(path, x.shape).shard_shape(x.shape))
        if x.size > 2**21:
            assert shard_size * devices == x.size, path
        per_device += shard_size
    assert per_device < sum(x.size for x in shapes.values()) / devices * 1.1
