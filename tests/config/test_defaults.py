"""The config files: their arguments, and that every family and size has one."""

import pytest

from vkd_jax import models
from vkd_jax.config import defaults
from vkd_jax.config.schema import RunConfig
from vkd_jax.runs.job import check_config
from vkd_jax.types import UserError

PUBLISHED = {family: f"{family}.py" for family in models.MODELS} | {"idefics3": "smolvlm.py"}
EIGHT_BLOCKS_ON_ONE_CHIP = ("gemma3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")  # other families train all blocks


@pytest.mark.parametrize("family", PUBLISHED)
def test_every_size_selects_its_checkpoint(get_config, family):
    presets = models.module_for(family).PRESETS
    for size, (name, _) in presets.items():
        assert get_config(PUBLISHED[family], size).model.path == name
    first = next(name for name, file in PUBLISHED.items() if file == PUBLISHED[family])
    default, _ = next(iter(models.module_for(first).PRESETS.values()))
    assert get_config(PUBLISHED[family]).model.path == default


def test_arguments_can_be_combined_in_any_order_with_or_without_keys(get_config):
    config = get_config("llava.py", "mllmu,forget=5,size=13b,grad_diff")
    assert config.model.path == "llava-hf/llava-1.5-13b-hf" and config.model.dtype == "bfloat16"
    assert (config.data.benchmark, config.data.forget, config.method.name) == ("mllmu", 5, "grad_diff")
    assert config == get_config("llava.py", "method=grad_diff,13b,benchmark=mllmu,forget=5")
    assert get_config("llava.py", "7b").method == defaults.method("vkd")


def test_trained_weights_attacks_and_comparisons_are_arguments(get_config):
    config = get_config("qwen2_vl.py", "npo,lora,attacks")
    assert (config.method.name, config.method.train, config.attacks.names) == ("npo", "lora", "all")
    assert get_config("llava.py", "npo,train=visual,all").stage == "all"  # the stage; weights are train=all
    entrants = get_config("llava.py", "compare").compare.entrants
    assert (entrants.kl.method.train, entrants.vkd.method.train, entrants.manu.method.train) == (
        "lora",
        "visual",
        "all",
    )


@pytest.mark.parametrize(
    ("file", "words", "train", "text", "target"),
    [
        ("tiny.py", "robust", "all", 4.0, "none"),
        ("tiny.py", "robust,visual", "visual", 0.0, "none"),
        ("llava.py", "robust,onechip", "visual+lora", 4.0, "none"),
        ("llava.py", "robust,npo,lora", "lora", 4.0, None),
        ("llava.py", "", "visual", 0.0, "swap"),
    ],
)
def test_the_robust_setting_adds_the_options_against_relearning(get_config, file, words, train, text, target):
    method = get_config(file, words).method
    assert (method.train, method.text.weight, method.get("target")) == (train, text, target)
    assert bool(method.worst_case.radius) == ("robust" in words)
    if "bound" in method:
        assert method.bound == ("look_alike" if "robust" in words else "cap")
        assert method.mask_scope == ("none" if "robust" in words else "both")


def test_the_robust_setting_is_refused_for_a_method_that_trains_nothing(get_config):
    with pytest.raises(UserError, match=r"setting=robust: method=manu trains nothing"):
        get_config("tiny.py", "robust,manu")


@pytest.mark.parametrize("family", PUBLISHED)
@pytest.mark.parametrize("words", ["", "clear,all", "npo,lora,all", "mmunlearner"])
def test_onechip_quantizes_and_uses_one_device(get_config, family, words):
    *_, size = models.module_for(family).PRESETS
    config = get_config(PUBLISHED[family], f"{size},onechip,{words}")
    method = RunConfig.from_config_dict(config).method
    mesh = check_config(RunConfig.from_config_dict(config))
    assert mesh.size == 1 and config.model.quantize == "int4:64" and config.model.remat == "full"
    assert getattr(method, "fisher_chunk", 1) == 1
    assert method.blocks == (8 if family in EIGHT_BLOCKS_ON_ONE_CHIP else -1)


@pytest.mark.parametrize(
    ("benchmark", "percent", "message"),
    [
        ("mllmu", 1, "forget=1: benchmark=mllmu has no such forget set. Available: 5, 10, 15."),
        ("clear", 15, "forget=15: benchmark=clear has no such forget set. Available: 1, 5, 10."),
        ("folder", 5, "forget=5: benchmark=folder has no such forget set. Available: its data"),
    ],
)
def test_a_forget_set_that_the_benchmark_lacks_is_refused(get_config, benchmark, percent, message):
    with pytest.raises(UserError) as error:
        get_config("llava.py", f"{benchmark},forget={percent}")
    assert str(error.value).startswith(message)
