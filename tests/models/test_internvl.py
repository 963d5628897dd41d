"""InternVL3: the metadata of its published checkpoints, names of tensors, tiles and refusals."""

import json
import re
import shutil

import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from vkd_jax import models
from vkd_jax.checkpoints import hf
from vkd_jax.data.processor import Processor
from vkd_jax.models import internvl
from vkd_jax.types import UserError

transformers = pytest.importorskip("transformers")

SIDE = 28  # of a tile of the small model; an image has at most four of them, and one for the whole image

# Fields of config.json of OpenGVLab/InternVL3-{1B,2B,8B}-hf, as far as public copies have them. The text: llm_config of
# OpenGVLab/InternVL3-1B, from which convert_internvl_weights_to_hf.py of transformers makes it, and vllm-project/vllm
# issue 17634, a log of the 8B by transformers 4.52. The sizes: those that NVIDIA's TensorRT routes of InternVL accept.
# The tower: `vit_300m_config` of internvl_hf2custom.py in OpenGVLab/InternVL.
TEXT = {
    "1b": dict(hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14),
    "2b": dict(hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12),
    "8b": dict(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28),
}
KV_HEADS = {"1b": 2, "2b": 2, "8b": 4}
SHARED_TEXT = dict(
    architectures=["Qwen2ForCausalLM"], model_type="qwen2", vocab_size=151674, max_position_embeddings=32768,
    max_window_layers=70, rms_norm_eps=1e-6, hidden_act="silu", attention_dropout=0.0, initializer_range=0.02,
    sliding_window=None, use_sliding_window=False, use_cache=True, bos_token_id=151643, eos_token_id=151645,
)  # fmt: skip
VISION = dict(
    architectures=["InternVisionModel"], model_type="internvl_vision", attention_bias=True, attention_dropout=0.0,
    dropout=0.0, hidden_act="gelu", hidden_dropout_prob=0.0, hidden_size=1024, image_size=[448, 448],
    initializer_factor=0.1, initializer_range=1e-10, intermediate_size=4096, layer_norm_eps=1e-6,
    layer_scale_init_value=0.1, norm_type="layer_norm", num_attention_heads=16, num_channels=3, num_hidden_layers=24,
    patch_size=[14, 14], projection_dropout=0.0, use_absolute_position_embeddings=True, use_mask_token=False,
    use_mean_pooling=True, use_qk_norm=False,
)  # fmt: skip
SHARED = dict(
    architectures=["InternVLForConditionalGeneration"], model_type="internvl", downsample_ratio=0.5,
    image_seq_length=256, image_token_id=151667, projector_hidden_act="gelu", vision_feature_layer=-1,
    vision_feature_select_strategy="default", tie_word_embeddings=False,
)  # fmt: skip
ROPE = dict(factor=2.0, rope_type="dynamic", type="dynamic")
# The fields that transformers 4 and 5 write differently.
GENERATIONS = {
    "4.52": (dict(rope_theta=1e6, rope_scaling=ROPE, torch_dtype="bfloat16"), "torch_dtype"),
    "5": (dict(rope_parameters=ROPE | dict(rope_theta=1e6), dtype="bfloat16"), "dtype"),
}
# preprocessor_config.json of OpenGVLab/InternVL3-*-hf: hiyouga/LLaMA-Factory issue 8342, without its empty fields.
PREPROCESSOR = dict(
    crop_to_patches=False, data_format="channels_first", default_to_square=True, do_convert_rgb=True, do_normalize=True,
    do_rescale=True, do_resize=True, image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225],
    image_processor_type="GotOcr2ImageProcessorFast", max_patches=12, min_patches=1,
    processor_class="InternVLProcessor", resample=3, rescale_factor=1 / 255, size=dict(height=448, width=448),
)  # fmt: skip


def published(size, generation):
    """The fields of a config.json on the hub."""
    written, dtype = GENERATIONS[generation]
    text = SHARED_TEXT | TEXT[size] | written | dict(num_key_value_heads=KV_HEADS[size])
    return SHARED | {"text_config": text, "vision_config": VISION | {dtype: "bfloat16"}, dtype: "bfloat16"}


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("size", internvl.PRESETS)
def test_presets_equal_the_published_configurations_field_by_field(size, generation, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(published(size, generation)))
    _, hf_config = hf.read_config(tmp_path)
    preset = transformers.AutoConfig.for_model("internvl", **internvl.PRESETS[size][1])
    assert internvl.Config.from_hf(hf_config) == internvl.Config.from_hf(preset)
    for section in ("vision_config", "text_config"):
        theirs, ours = getattr(hf_config, section).to_dict(), getattr(preset, section).to_dict()
        ignored = {"architectures", "dtype", "dropout", "initializer_factor", "initializer_range", "use_cache"}
        assert {k: v for k, v in theirs.items() if k not in ignored and k in ours} == {
            k: v for k, v in ours.items() if k not in ignored
        }


def test_the_published_image_processor_makes_at_most_twelve_tiles_of_256_tokens_and_one():
    config = internvl.Config.from_hf(transformers.AutoConfig.for_model("internvl", **internvl.PRESETS["1b"][1]))
    fields = {name: value for name, value in PREPROCESSOR.items() if not name.endswith(("_type", "_class"))}
    image_processor = transformers.GotOcr2ImageProcessorPil(**fields)
    assert config.image_processor_problem(image_processor) is None
    assert config.pixel_limits(image_processor) == (448 * 448, 12 * 448 * 448)
    assert config.image_tokens(448, 448) == 256 and config.image_tokens(3 * 448, 4 * 448) == 13 * 256
    config.limit_pixels(image_processor, internvl.MAX_PIXELS)
    assert image_processor.max_patches == 4


@pytest.fixture(scope="module")
def folder(family_folder):
    return family_folder("internvl")


def tensors(folder):
    read = {}
    for file in folder.glob("*.safetensors"):
        read |= safetensors.numpy.load_file(file)
    return read


def copied(folder, path, rename=lambda name: name, **fields):
    """A copy with other names of tensors, in one file, and other fields of config.json."""
    path.mkdir()
    for file in folder.iterdir():
        if "safetensors" not in file.name:
            shutil.copy(file, path)
    settings = {**json.loads((folder / "config.json").read_text()), **fields}
    settings = {name: value for name, value in settings.items() if value is not None}
    (path / "config.json").write_text(json.dumps(settings))
    renamed = {rename(name): value for name, value in tensors(folder).items()}
    safetensors.numpy.save_file(renamed, path / "model.safetensors", metadata={"format": "pt"})
    return path


def newer(name):
    """The name that transformers 4.52 and later give to a tensor of a published file."""
    if name == "language_model.lm_head.weight":
        return "lm_head.weight"
    return f"model.{name}".replace("model.language_model.model.", "model.language_model.")


def mixed(name):
    """Newer names of the language model, older ones of the rest."""
    return newer(name) if name.startswith("language_model") else name


def without_part(name):
    """The names of the parts of a model without its head, and of a head beside it."""
    return newer(name).removeprefix("model.")


@pytest.mark.parametrize("rename", [newer, mixed, without_part])
def test_tensors_are_read_by_all_generations_of_their_names(folder, tmp_path, rename):
    _, want, _ = hf.load(folder)
    copy = copied(folder, tmp_path / "copy", rename)
    assert not tensors(folder).keys() == tensors(copy).keys()
    _, params, _ = hf.load(copy)
    assert params.keys() == want.keys()
    for path, value in params.items():
        np.testing.assert_array_equal(value, want[path])


def test_files_on_the_hub_have_older_names(folder):
    names = tensors(folder)
    assert "language_model.lm_head.weight" in names and "vision_tower.embeddings.cls_token" in names
    assert "vision_tower.encoder.layer.2.attention.projection_layer.bias" in names
    assert names["vision_tower.embeddings.position_embeddings"].shape == (1, 17, 32)


def test_a_head_of_its_own_is_kept_if_the_configuration_does_not_mention_it(folder, tmp_path):
    copy = copied(folder, tmp_path / "copy", tie_word_embeddings=None)
    assert transformers.AutoConfig.from_pretrained(copy).tie_word_embeddings  # the default of transformers 5
    _, params, config = hf.load(copy)
    assert not config.text.tie_embeddings and "language_model/head/kernel" in params


@pytest.mark.parametrize(
    ("rename", "fields", "message"),
    [
        (lambda name: name, dict(model_type="internvl_chat"), "Model type 'internvl_chat' is that of original"),
        (lambda name: re.sub(r"multi_modal_projector\.linear_1", "mlp1.1", name), {}, "have InternVL's original names"),
    ],
)
def test_original_checkpoints_are_refused_with_the_name_of_a_converted_one(folder, tmp_path, rename, fields, message):
    with pytest.raises(UserError) as error:
        hf.load(copied(folder, tmp_path / "copy", rename, **fields))
    assert message in str(error.value)
    assert str(error.value).endswith("Use a converted model, such as OpenGVLab/InternVL3-1B-hf.")


@pytest.mark.parametrize(
    ("section", "field", "value", "message"),
    [
        ("vision_config", "image_size", [28, 56], "vision_config.image_size is [28, 56] (supported: a square)"),
        ("vision_config", "image_size", [21, 21], "image_size is 21 (supported: numbers of patches a side that 2"),
        ("vision_config", "patch_size", [29, 29], "vision_config.patch_size is 29 (supported: at most the image size"),
        ("vision_config", "hidden_act", "relu", "vision_config.hidden_act is 'relu' (supported: "),
        ("vision_config", "norm_type", "batch_norm", "norm_type is 'batch_norm' (supported: layer_norm, rms_norm)"),
        ("text_config", "head_dim", 8, "text_config.head_dim is 8 (supported: 12)"),
        ("text_config", "use_sliding_window", True, "text_config.use_sliding_window is True (supported: False)"),
        ("text_config", "model_type", "qwen3", "text_config.model_type is 'qwen3' (supported: qwen2)"),
        (None, "downsample_ratio", 0.3, "downsample_ratio is 0.3 (supported: 1, 0.5, 0.25)"),
        (None, "vision_feature_layer", -5, "vision_feature_layer is -5 (supported: one layer, from -4 to 3)"),
        (None, "vision_feature_layer", [-1, -2], "vision_feature_layer is [-1, -2] (supported: one layer"),
        (
            None,
            "vision_feature_select_strategy",
            "full",
            "vision_feature_select_strategy is 'full' (supported: default",
        ),
        (None, "projector_hidden_act", "relu", "projector_hidden_act is 'relu' (supported: "),
    ],
)
def test_fields_that_are_not_supported_are_named(folder, tmp_path, section, field, value, message):
    settings = json.loads((folder / "config.json").read_text())
    (settings[section] if section else settings)[field] = value
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError) as error:
        hf.read_config(tmp_path)
    assert message in str(error.value)


def test_the_rope_of_another_type_is_refused(folder):
    hf_config = transformers.AutoConfig.from_pretrained(folder)
    hf_config.text_config.rope_parameters = dict(rope_type="linear", factor=2.0, rope_theta=1e4)
    with pytest.raises(UserError, match=r"rope_type is 'linear' \(supported: default, dynamic\)"):
        internvl.Config.from_hf(hf_config)


def test_an_earlier_feature_layer_uses_fewer_blocks_and_no_norm(folder):
    hf_config = transformers.AutoConfig.from_pretrained(folder)
    hf_config.vision_config.use_mean_pooling = False
    assert internvl.Config.from_hf(hf_config).uses_post_norm
    hf_config.vision_feature_layer = -2
    config = internvl.Config.from_hf(hf_config)
    assert config.used_blocks == 2 and not config.uses_post_norm and config.vision.post_norm


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(size=dict(height=28, width=56)), "makes tiles of 28 x 56 pixels .*image_size of config.json is 28 x 28"),
        (dict(min_patches=3, max_patches=2), "min_patches is 3 and max_patches is 2"),
        (dict(min_patches=0), "min_patches is 0"),
    ],
)
def test_tiles_that_the_model_does_not_support_are_refused(config, changes, message):
    options = dict(size=dict(height=SIDE, width=SIDE)) | changes
    assert re.search(message, config.image_processor_problem(transformers.GotOcr2ImageProcessorPil(**options)))


def test_grids_are_those_of_transformers():
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

    rng, found = np.random.default_rng(0), set()
    for _ in range(3000):
        height, most = int(rng.integers(1, 200)), int(rng.integers(1, 13))
        width = height * int(rng.integers(1, 6)) if rng.random() < 0.4 else int(rng.integers(1, 200))
        least = int(rng.integers(1, most + 1))
        columns, rows = get_optimal_tiled_canvas((height, width), (SIDE, SIDE), least, most)
        assert internvl.nearest_grid(height, width, rows * columns, SIDE) == (rows, columns)
        found.add((rows, columns))
    assert len(found) > 20
    # Equally near: a small image takes the first of the grids, a large one the last.
    assert internvl.nearest_grid(4, 5, 2, SIDE) == (2, 1) and internvl.nearest_grid(40, 50, 2, SIDE) == (1, 2)


@pytest.mark.parametrize(("height", "width", "grid"), [(60, 59, (2, 2)), (30, 88, (1, 3)), (70, 36, (2, 1))])
def test_the_tiles_of_an_image_are_its_grid_row_by_row_and_the_whole_image(folder, config, height, width, grid):
    processor = Processor(folder, config)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))
    image = processor.image(picture)
    for view, (rows, columns) in zip(image.views, [grid, (1, 1)], strict=True):
        size = dict(height=rows * SIDE, width=columns * SIDE)
        resized = processor.image_processor(picture, crop_to_patches=False, size=size, return_tensors="np")
        np.testing.assert_array_equal(view, resized["pixel_values"][0].transpose(1, 2, 0))


def test_max_pixels_limits_the_number_of_tiles(folder, config):
    picture, small = Image.new("RGB", (59, 60)), Processor(folder, config, max_pixels=3 * SIDE**2)
    assert small.max_pixels == 3 * SIDE**2 and small.image(picture).shape == (SIDE, SIDE, 3)
    with pytest.raises(UserError, match=r"model\.max_pixels=783: the model needs at least 784"):
        Processor(folder, config, max_pixels=783)


def test_other_model_types_keep_their_message():
    with pytest.raises(UserError, match="'internvl_audio' is not supported. Supported types: .*internvl"):
        models.module_for("internvl_audio")
