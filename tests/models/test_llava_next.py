"""LLaVA-1.6: grids, unpadding and newlines, limits, names of tensors, and published metadata."""

import dataclasses
import json
import types

import jax
import llava_next_metadata as metadata
import numpy as np
import pytest
from PIL import Image

from vkd_jax.checkpoints import hf
from vkd_jax.data.processor import Processor
from vkd_jax.methods import feature_targets
from vkd_jax.methods.scope import visual_paths
from vkd_jax.models import base, llava_next
from vkd_jax.types import UserError

SIDE = 28  # of a tile of the small model, which has three patches a side


@pytest.fixture(scope="module")
def folder(family_folder):
    return family_folder("llava_next")


def published(size):
    """The configuration of a published model."""
    return llava_next.Config.from_hf(hf_config(metadata.CONFIGS[size]))


def hf_config(fields):
    from transformers import AutoConfig

    return AutoConfig.for_model(**fields)


def test_grids_and_numbers_of_tokens_equal_those_of_transformers(config):
    """Two thousand sizes, for the published grids; the last two make one border odd, and drop all but one row."""
    from transformers import LlavaNextProcessor
    from transformers.image_processing_utils import select_best_resolution

    model = published("7b")
    pinpoints = metadata.PINPOINTS
    joint = object.__new__(LlavaNextProcessor)
    joint.image_processor = types.SimpleNamespace(image_grid_pinpoints=pinpoints)
    joint.patch_size, joint.num_additional_image_tokens = 14, 1
    sizes = np.exp(np.random.default_rng(0).uniform(2, 8.5, (2000, 2))).astype(int).tolist()
    for height, width in [*sizes, (336, 487), (20, 3000)]:
        best = select_best_resolution((height, width), pinpoints)
        grid = best[0] // 336, best[1] // 336
        assert model.best_grid(height, width, grid[0] * grid[1]) == grid
        size = model.tiled_size(height, width, grid)
        assert model.grids(*size) == [(1, 1), grid]
        want = joint._get_number_of_features(height, width, 336, 336) - 1  # without the class token
        assert model.image_tokens(*size) == want <= model.packed_tokens(*size)


def test_a_published_example_has_its_published_number_of_tokens():
    """An image of 808 x 1100 pixels becomes 5 tiles, and with 29 tokens of text a prompt of 2,369."""
    model = published("mistral-7b")
    size = model.tiled_size(808, 1100, model.best_grid(808, 1100, 4))
    assert model.grids(*size) == [(1, 1), (2, 2)] and size == (2 * 336 - 12, 2 * 336)
    assert model.image_tokens(*size) + 29 == 2369


def test_tokens_by_hand(config):
    """A grid of 1 x 2 tiles, that is 3 x 6 patches, of whose columns the first and the last are dropped."""
    size = config.tiled_size(30, 45, (1, 2))
    assert size == (SIDE, 2 * SIDE - 2) and config.image_tokens(*size) == 9 + 3 * (4 + 1)
    packed = config.pack([[np.broadcast_to(np.float32(0), (*size, 3))] * 2])
    first, second = packed["token_index"][0, :24], packed["token_index"][0, 24:48]
    assert first[:9].tolist() == list(range(9))  # the whole image
    assert first[9:].reshape(3, 5).tolist() == [[10, 11, 18, 19, -1], [13, 14, 21, 22, -1], [16, 17, 24, 25, -1]]
    np.testing.assert_array_equal(second, np.where(first < 0, -1, first + 27))
    coords = packed["token_coords"][0]
    assert coords[9:14].tolist() == [[1, 0, 0], [1, 0, 1], [1, 0, 2], [1, 0, 3], [2, 0, 0]]
    assert coords[13:24:5].tolist() == [[2, 0, 0], [2, 1, 0], [2, 2, 0]]
    np.testing.assert_array_equal(coords[24:48], coords[:24] + [3, 0, 0])
    assert (coords[48:] == -1).all() and len(coords) == 2 * config.packed_tokens(*size)


def test_features_of_look_alikes_are_those_at_the_same_place_and_newlines_those_of_newlines(config):
    sizes = [config.tiled_size(*original, grid) for original, grid in (((30, 45), (1, 2)), ((90, 40), (3, 1)))]
    coords = config.pack([[np.broadcast_to(np.float32(0), (*size, 3))] for size in sizes])["token_coords"]
    tokens = base.VisualTokens(coords[..., 1:].astype(np.float32) + 100 * coords[..., :1], coords)
    resampled = feature_targets.resample_features(tokens, np.array([1, 0]), coords)
    for target, values in zip(coords, resampled, strict=True):
        real = target[:, 0] >= 0
        np.testing.assert_array_equal(values[real, 0] // 100, target[real, 0])
    np.testing.assert_array_equal(resampled[0, :9], coords[0, :9, 1:])  # whole images have one shape


def test_newlines_train_with_the_projector_and_are_the_same_for_all_images(folder, config):
    graphdef, params, _ = hf.load(folder)
    assert "projector/newline" in visual_paths(params, config, 0)
    packed = config.pack([[np.full((SIDE, 2 * SIDE, 3), x, np.float32)] for x in (0, 1)])
    features, taps = jax.jit(lambda x: base.bind(graphdef, params).encode(x))(packed)
    newlines = features.coords[..., 0] == 2
    assert newlines.sum(1).tolist() == [3, 3]
    want = np.broadcast_to(params["projector/newline"], features.values[newlines].shape)
    np.testing.assert_array_equal(features.values[newlines], want)
    assert not np.asarray(features.values)[~np.asarray(features.valid)].any()


def test_max_pixels_limits_the_grids(folder, config):
    processor = Processor(folder, config)
    assert processor.max_pixels == 4 * SIDE**2
    assert [v.shape for v in processor.image(Image.new("RGB", (50, 60))).views] == [(SIDE,) * 2 + (3,), (56, 56, 3)]
    small = Processor(folder, config, max_pixels=2 * SIDE**2)
    assert small.max_pixels == 2 * SIDE**2
    picture = small.image(Image.new("RGB", (50, 60)))
    assert config.grids(*picture.shape[:2]) == [(1, 1), (2, 1)]
    prompt, _ = small.encode("Who?", None, [picture])
    assert prompt.count(config.image_token_id) == config.image_tokens(*picture.shape[:2])
    with pytest.raises(UserError, match=r"model\.max_pixels=1567: the model needs at least 1568"):
        Processor(folder, config, max_pixels=1567)
    assert config.largest_image(0) == config.largest_image(4 * SIDE**2) == (2 * SIDE, 2 * SIDE)
    assert config.largest_image(2 * SIDE**2) == (2 * SIDE, SIDE)


def test_image_processors_of_other_models_are_refused(config):
    settings = types.SimpleNamespace(image_grid_pinpoints=[[28, 56]])
    assert "image_grid_pinpoints is [[28, 56]], and it is" in config.image_processor_problem(settings)
    output = {"pixel_values": np.zeros((1, 3, 3, 56, 28), np.float32), "image_sizes": [(5, 5)]}
    with pytest.raises(UserError, match="returns 56 x 28 pixels .* and the model takes 28 x 28"):
        config.extract_images(output)
    output["pixel_values"] = np.zeros((1, 6, 3, 28, 28), np.float32)
    with pytest.raises(UserError, match="returns a grid of 5 tiles, and no image_grid_pinpoints"):
        config.extract_images(output)


@pytest.mark.parametrize("size", llava_next.PRESETS)
def test_names_of_every_generation_of_transformers_are_read(size):
    """Names before 4.52, from 4.52 to 5.5, and since 5.6, whose vision tower has no inner model."""
    model, names = published(size), {}
    for prefix, inner in (("", "vision_model."), ("model.", "vision_model."), ("model.", "")):
        decoder, head = (
            ("model.language_model", "lm_head") if prefix else ("language_model.model", "language_model.lm_head")
        )
        for name in (
            f"{prefix}image_newline",
            f"{prefix}multi_modal_projector.linear_1.weight",
            f"{prefix}vision_tower.{inner}encoder.layers.23.mlp.fc1.weight",
            f"{prefix}vision_tower.{inner}embeddings.class_embedding",
            f"{decoder}.layers.31.self_attn.k_proj.weight",
            f"{decoder}.norm.weight",
            f"{head}.weight",
        ):
            names.setdefault(hf.find_slot(llava_next, model, name), []).append(name)
    assert None not in names and len(names) == 7 and all(len(found) == 3 for found in names.values())


# Published metadata; its file names the source of each part.


@pytest.mark.parametrize("size", llava_next.PRESETS)
def test_presets_equal_the_published_configurations(size):
    _, fields = llava_next.PRESETS[size]
    assert llava_next.Config.from_hf(hf_config(dict(model_type="llava_next", **fields))) == published(size)


@pytest.mark.parametrize("name", metadata.TEMPLATES)
def test_published_chat_templates_render(folder, config, tmp_path, name):
    """Images come first, whatever their place in the message."""
    template, first, second = metadata.TEMPLATES[name]
    for file in folder.iterdir():
        if file.suffix == ".json" and "safetensors" not in file.name:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    processor = Processor(tmp_path, config)
    assert processor.prompt("Who is this?", 1) == first
    assert processor.prompt("And?", 0, [("Who is this?", "Mara Lindt", 1)]) == second


def test_the_published_image_processor_fits_the_published_models(folder, tmp_path):
    for file in folder.iterdir():
        if "token" in file.name or file.name in ("chat_template.json", "generation_config.json"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(metadata.IMAGE_PROCESSOR))
    token = json.loads((folder / "config.json").read_text())["image_token_index"]
    model = dataclasses.replace(published("7b"), image_token_id=token)
    picture = Processor(tmp_path, model).image(Image.new("RGB", (1100, 808)))
    assert picture.shape == (660, 672, 3) and [view.shape[0] for view in picture.views] == [336, 672]
