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
QWEN_TEXT = TEXT | dict(rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 1, 1]))
QWEN_TOWER = dict(depth=2, num_heads=2, patch_size=2, hidden_size=16)
WINDOWED_TOWER = dict(intermediate_size=24, out_hidden_size=16, window_size=8, fullatt_block_indexes=[1])
DEEPSTACK_TOWER = dict(
    intermediate_size=24, out_hidden_size=16, num_position_embeddings=9, deepstack_visual_indexes=[1],
)  # fmt: skip

# vision_config, text_config and further fields of each family.
CONFIGS = {
    "llava": (
        TOWER | dict(model_type="clip_vision_model"), TEXT | dict(model_type="llama"), dict(image_token_index=4),
    ),
    "llava_next": (
        TOWER | dict(model_type="clip_vision_model"), TEXT | dict(model_type="mistral", sliding_window=None),
        dict(image_token_index=4, image_grid_pinpoints=[[8, 16], [16, 8]]),
    ),
    "vipllava": (
        TOWER | dict(model_type="clip_vision_model"), TEXT | dict(model_type="llama"),
        dict(image_token_index=4, vision_feature_layer=[-2, 1]),
    ),
    "gemma3": (
        TOWER | dict(model_type="siglip_vision_model", vision_use_head=False),
        TEXT | dict(model_type="gemma3_text", head_dim=8, sliding_window=4),
        dict(image_token_index=4, boi_token_index=5, eoi_token_index=6, mm_tokens_per_image=4),
    ),
    "idefics3": (TOWER, TEXT | dict(model_type="llama"), dict(image_token_id=4, scale_factor=2)),
    "smolvlm": (TOWER, TEXT | dict(model_type="llama"), dict(image_token_id=4, scale_factor=1)),
    "internvl": (TOWER, TEXT | dict(model_type="qwen2"), dict(image_token_id=4)),
    "qwen2_vl": (QWEN_TOWER | dict(embed_dim=16), QWEN_TEXT, dict(image_token_id=4)),
    "qwen2_5_vl": (QWEN_TOWER | WINDOWED_TOWER, QWEN_TEXT, dict(image_token_id=4)),
    "qwen3_vl": (QWEN_TOWER | DEEPSTACK_TOWER, QWEN_TEXT | dict(head_dim=8), dict(image_token_id=4)),
}  # fmt: skip


def hf_config(family):
    vision, text, fields = CONFIGS[family]
    return AutoConfig.for_model(family, vision_config=dict(vision), text_config=dict(text), **fields)


@pytest.mark.parametrize("family", models.MODELS)
def test_good_sizes_are_read(family):
    assert models.module_for(family).Config.from_hf(hf_config(family)).text.width == 16


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
        ("llava_next", "image_size", 0),
        ("llava_next", "patch_size", 9),
        ("llava_next", "num_attention_heads", 3),
        ("gemma3", "image_size", 0),
        ("gemma3", "patch_size", 9),
        ("gemma3", "num_attention_heads", 3),
        ("gemma3", "vision_use_head", True),
        ("smolvlm", "image_size", 0),
        ("smolvlm", "patch_size", 9),
        ("smolvlm", "num_attention_heads", 3),
        ("smolvlm", "num_channels", 1),
        ("internvl", "image_size", [8, 12]),
        ("internvl", "num_attention_heads", 3),
        ("internvl", "num_channels", 1),
        ("internvl", "use_mask_token", True),
        ("internvl", "use_absolute_position_embeddings", False),
        ("qwen2_vl", "depth", 10**9),
        ("qwen2_vl", "embed_dim", 0),
        ("qwen2_vl", "spatial_merge_size", 0),
        ("qwen2_vl", "mlp_ratio", 0),
        ("qwen2_vl", "num_heads", 3),
        ("qwen2_5_vl", "depth", 0),
        ("qwen2_5_vl", "patch_size", 0),
        ("qwen2_5_vl", "num_heads", 0),
        ("qwen2_5_vl", "window_size", -8),
        ("qwen3_vl", "num_position_embeddings", 8),
        ("qwen3_vl", "num_position_embeddings", 0),
        ("qwen3_vl", "deepstack_visual_indexes", [2]),
        ("qwen3_vl", "deepstack_visual_indexes", [1, 0]),
        ("qwen3_vl", "deepstack_visual_indexes", [0, 1]),
        ("qwen3_vl", "patch_size", [2, 2]),
    ],
)
def test_sizes_of_the_tower_fit_together(family, field, value):
    refused(family, {field: value}, {}, f"vision_config.{field} is {value} (supported: ")


@pytest.mark.parametrize("family", models.MODELS)
def test_heads_divide(family):
    heads = dict(num_key_value_heads=3, num_attention_heads=4)
    refused(family, {}, heads, "num_key_value_heads is 3 (supported: a divisor of")


FULL, SLIDING = ("text_config.rope_parameters." + name for name in ("full_attention", "sliding_attention"))


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("head_dim", 7, "text_config.head_dim is 7 (supported: even numbers"),
        ("sliding_window", None, "text_config.sliding_window is None (supported: an integer"),
        ("query_pre_attn_scalar", 0, "text_config.query_pre_attn_scalar is 0 (supported: an integer"),
        ("hidden_activation", "relu", "text_config.hidden_activation is 'relu'"),
        ("attention_bias", True, "text_config.attention_bias is True (supported: False or null"),
        ("final_logit_softcapping", 30.0, "text_config.final_logit_softcapping is 30.0 (supported: False or null"),
        ("attn_logit_softcapping", 50.0, "text_config.attn_logit_softcapping is 50.0 (supported: False or null"),
        ("use_bidirectional_attention", True, "text_config.use_bidirectional_attention is True"),
        ("layer_types", ["chunked_attention"] * 2, "text_config.layer_types is ['chunked_attention']"),
        ("layer_types", ["full_attention"], "(supported: 2 of full_attention, sliding_attention"),
        (
            "rope_parameters",
            dict(
                full_attention=dict(rope_type="yarn", rope_theta=0.0, factor=2.0),
                sliding_attention=dict(rope_type="linear", rope_theta=1e4, factor=2.0),
            ),
            f"{FULL}.rope_type is 'yarn' (supported: default, linear); {FULL}.rope_theta is 0.0 (supported: positive "
            f"numbers); {SLIDING}.rope_type is 'linear'",
        ),
    ],
)
def test_decoders_of_gemma_that_are_not_supported(field, value, message):
    refused("gemma3", {}, {field: value}, message)


@pytest.mark.parametrize(("tokens", "supported"), [(1, True), (4, True), (3, False), (9, False), (0, False)])
def test_the_image_tokens_of_gemma_are_pooled_patches(tokens, supported):
    settings = hf_config("gemma3")  # two patches a side
    settings.mm_tokens_per_image = tokens
    if supported:
        assert models.module_for("gemma3").Config.from_hf(settings).image_tokens(8, 8) == tokens
        return
    with pytest.raises(UserError, match=f"mm_tokens_per_image is {tokens}"):
        models.module_for("gemma3").Config.from_hf(settings)


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("scale_factor", 0, "scale_factor is 0 (supported: an integer from 1"),
        ("scale_factor", 3, "scale_factor is 3 (supported: a divisor of the patches of a side, 2)"),
        ("tie_word_embeddings", True, None),
    ],
)
def test_the_scale_of_smolvlm_divides_the_patches(field, value, message):
    settings = hf_config("idefics3")
    setattr(settings, field, value)
    if message is None:
        assert models.module_for("idefics3").Config.from_hf(settings).text.tie_embeddings
        return
    with pytest.raises(UserError) as error:
        models.module_for("idefics3").Config.from_hf(settings)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "text, fields, message",
    [
        ({}, dict(image_grid_pinpoints=[]), "image_grid_pinpoints is [] (supported: pairs of multiples of"),
        ({}, dict(image_grid_pinpoints=[[8, 12]]), "image_grid_pinpoints is [[8, 12]] (supported: pairs of multiples"),
        ({}, dict(image_grid_pinpoints=[[8]]), "image_grid_pinpoints is [[8]]"),
        ({}, dict(image_grid_pinpoints=[[8, 32]]), "vision_config.image_size, 8, up to 3 times)"),
        ({}, dict(image_grid_pinpoints=3), "image_grid_pinpoints is 3"),
        ({}, dict(vision_feature_select_strategy="full"), "vision_feature_select_strategy is 'full' (supported: def"),
        ({}, dict(vision_feature_layer=[-2, -1]), "vision_feature_layer is [-2, -1] (supported: one layer"),
        ({}, dict(use_image_newline_parameter=False), "use_image_newline_parameter is False (supported: True)"),
        (dict(sliding_window=4096), {}, "text_config.sliding_window is 4096 (supported: null)"),
        (dict(model_type="qwen2"), {}, "text_config.model_type is 'qwen2' (supported: llama, mistral)"),
    ],
)
def test_fields_of_llava_next_that_are_not_supported(text, fields, message):
    refused("llava_next", {}, text, message, **fields)


@pytest.mark.parametrize(
    ("patches", "supported"), [(26, True), (27, True), (32, True), (25, False), (31, False), (10**6, False)]
)
def test_numbers_of_patches_whose_positions_depend_on_rounding_are_refused(patches, supported):
    """transformers gives patch 5 of 25 the position of patch 4; the published models have 26, 27 and 32 patches."""
    settings = hf_config("smolvlm")
    settings.vision_config.image_size, settings.vision_config.patch_size = 4 * patches, 4
    if supported:
        assert models.module_for("smolvlm").Config.from_hf(settings).image_tokens(0, 0) >= 0
        return
    with pytest.raises(UserError, match=f"transformers gives two of {patches} patches a side one position"):
        models.module_for("smolvlm").Config.from_hf(settings)


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
    settings = hf_config(family)
    for section, changes in ((settings.vision_config, vision), (settings.text_config, text), (settings, fields)):
        for name, value in changes.items():
            object.__setattr__(section, name, value)  # past the checks of transformers, which vary between versions
    if fields:
        settings.__dict__.update(fields)
    with pytest.raises(UserError) as error:
        models.module_for(family).Config.from_hf(settings)
    assert message in str(error.value)
