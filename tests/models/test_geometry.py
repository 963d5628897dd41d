"""Sizes of a config.json that cannot be: refused before anything is built."""

import pytest
from transformers import AutoConfig

from vkd_jax import models
from vkd_jax.models import base
from vkd_jax.types import UserError

TEXT = dict(
    vocab_size=40, hidden_size=16, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, max_position_embeddings=64,
)  # fmt: skip
TOWER = dict(
    hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, image_size=8, patch_size=4,
)  # fmt: skip
MROPE = dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 1, 1])


def hf_config(family, vision, text, fields):
    if family == "llava":
        tower, kind = TOWER | dict(model_type="clip_vision_model") | vision, "llama"
        return AutoConfig.for_model(
            family, vision_config=tower, text_config=TEXT | dict(model_type=kind) | text, image_token_index=4, **fields
        )
    tower = dict(depth=2, num_heads=2, patch_size=2)
    tower |= dict(embed_dim=16, hidden_size=16) if family == "qwen2_vl" else dict(
        hidden_size=16, intermediate_size=24, out_hidden_size=16, window_size=8, fullatt_block_indexes=[1]
    )  # fmt: skip
    return AutoConfig.for_model(
        family,
        vision_config=tower | vision,
        text_config=TEXT | dict(rope_parameters=MROPE) | text,
        image_token_id=4,
        **fields,
    )


@pytest.mark.parametrize("family", models.MODELS)
def test_good_sizes_are_read(family):
    assert models.module_for(family).Config.from_hf(hf_config(family, {}, {}, {})).text.width == 16


@pytest.mark.parametrize("family", models.MODELS)
@pytest.mark.parametrize("field", ["vocab_size", "hidden_size", "num_hidden_layers", "num_key_value_heads"])
@pytest.mark.parametrize("value", [0, -1, 10**10])
def test_sizes_of_the_decoder_are_positive_and_not_absurd(family, field, value):
    refused(family, {}, {field: value}, f"text_config.{field} is {value} (supported: an integer from 1 to")


@pytest.mark.parametrize(
    "family, field, value",
    [
        ("llava", "hidden_size", 0),
        ("llava", "num_hidden_layers", 10**9),
        ("llava", "image_size", 0),
        ("llava", "patch_size", 0),
        ("llava", "patch_size", 9),
        ("llava", "num_attention_heads", 3),
        ("qwen2_vl", "depth", 10**9),
        ("qwen2_vl", "embed_dim", 0),
        ("qwen2_vl", "spatial_merge_size", 0),
        ("qwen2_vl", "mlp_ratio", 0),
        ("qwen2_vl", "num_heads", 3),
        ("qwen2_5_vl", "depth", 0),
        ("qwen2_5_vl", "patch_size", 0),
        ("qwen2_5_vl", "num_heads", 0),
        ("qwen2_5_vl", "window_size", -8),
    ],
)
def test_sizes_of_the_tower_fit_together(family, field, value):
    refused(family, {field: value}, {}, f"vision_config.{field} is {value} (supported: ")


@pytest.mark.parametrize("family", models.MODELS)
def test_heads_divide(family):
    heads = dict(num_key_value_heads=3, num_attention_heads=4)
    refused(family, {}, heads, "num_key_value_heads is 3 (supported: a divisor of")


@pytest.mark.parametrize("family", models.MODELS)
@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", "float64", "bool", "nonsense"])
def test_other_dtypes_are_refused(family, dtype):
    refused(family, {}, {}, f"dtype is '{dtype}' (supported: float32, bfloat16, float16)", dtype=dtype)


def test_dtypes_of_arguments_are_refused():
    assert base.check_dtype("bfloat16") == "bfloat16"
    for dtype in ("int8", "float8_e5m2", "nonsense"):
        with pytest.raises(UserError, match="supported: float32, bfloat16, float16"):
            base.check_dtype(dtype)


def refused(family, vision, text, message, **fields):
    settings = hf_config(family, {}, {}, {})
    for section, changes in ((settings.vision_config, vision), (settings.text_config, text), (settings, fields)):
        for name, value in changes.items():
            object.__setattr__(section, name, value)  # past the checks of transformers, which vary between versions
    if fields:
        settings.__dict__.update(fields)
    with pytest.raises(UserError) as error:
        models.module_for(family).Config.from_hf(settings)
    assert message in str(error.value)
