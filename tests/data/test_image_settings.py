"""Types of the settings of image processors: one reader for all fields of all families."""

import itertools
import json

import pytest

from vkd_jax.data import image_settings
from vkd_jax.types import UserError

PUBLISHED = {
    "LLaVA": dict(
        crop_size=dict(height=336, width=336), do_center_crop=True, do_convert_rgb=True, do_normalize=True,
        do_rescale=True, do_resize=True, image_mean=[0.48145466, 0.4578275, 0.40821073],
        image_processor_type="CLIPImageProcessor", image_std=[0.26862954, 0.26130258, 0.27577711],
        processor_class="LlavaProcessor", resample=3, rescale_factor=1 / 255, size=dict(shortest_edge=336),
    ),
    "an early CLIP": dict(crop_size=224, size=224, resample=3, image_mean=[0.5] * 3, feature_extractor_type="CLIP"),
    "Qwen2-VL": dict(
        min_pixels=3136, max_pixels=12_845_056, patch_size=14, temporal_patch_size=2, merge_size=2,
        image_mean=[0.5] * 3, image_std=[0.5] * 3, image_processor_type="Qwen2VLImageProcessor",
    ),
    "Gemma-3": dict(
        do_convert_rgb=None, do_pan_and_scan=None, image_seq_length=256, pan_and_scan_max_num_crops=None,
        pan_and_scan_min_crop_size=None, pan_and_scan_min_ratio_to_activate=None, size=dict(height=896, width=896),
    ),
    "LLaVA-1.6": dict(image_grid_pinpoints=[[336, 672], [672, 336]], aspect_ratio_setting="anyres", do_pad=True),
    "SmolVLM": dict(
        do_image_splitting=True, max_image_size=dict(longest_edge=512), size=dict(longest_edge=2048), rescale_factor=1,
        video_sampling=dict(fps=1, max_frames=64),
    ),
    "InternVL": dict(crop_to_patches=False, min_patches=1, max_patches=12, data_format="channels_first", pad_size=None),
    "a list of sides": dict(size=[448, 448]),
}  # fmt: skip
INTEGER = ([], [1], "1", True, 1.5, {}, {"a": {"b": 1}})
SWITCH = ([], [True], "true", 1, 0, 1.5, {})
NUMBER = ([], [1.0], "1/255", True, {}, float("inf"))
CHANNEL = ([], [1, 2], [0.5] * 4, ["a"] * 3, [[1], [1], [1]], [True] * 3, "x", True, {"red": 1})
SIDES = ([], True, 1.5, "48", {"a": 1})
SIZE = ([], [1], [[1]], ["a", "b"], [1, 2, 3], [1.5, 2], "large", True, 1.5, {}, {"edge": 336}) + tuple(
    {"height": 48, "width": side} for side in SIDES
)
TEXT = ([], ["x"], 1, True, {})
BAD = {
    "whole numbers": (("patch_size", "min_pixels", "max_patches", "image_seq_length"), INTEGER),
    "resampling": (("resample",), (*INTEGER, -1, 6, 10**9)),
    "switches": (("do_resize", "do_anything", "crop_to_patches"), SWITCH),
    "numbers": (("rescale_factor", "pan_and_scan_min_ratio_to_activate"), NUMBER),
    "channels": (("image_mean", "image_std"), CHANNEL),
    "sizes": (("size", "crop_size", "pad_size", "max_image_size"), SIZE),
    "texts": (("image_processor_type", "data_format", "device"), TEXT),
    "grids": (("image_grid_pinpoints",), ([], [1, 2], [[1]], [[1, 2, 3]], [["a", "b"]], "x", 1, True, {})),
}


def write(folder, name, values):
    (folder / name).write_text(json.dumps(values).replace("Infinity", "1e400"))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_settings_are_accepted(tmp_path, name):
    for field in (*PUBLISHED[name], None):  # each of them may be null
        values = {key: None if key == field else value for key, value in PUBLISHED[name].items()}
        write(tmp_path, "preprocessor_config.json", values)
        image_settings.check(tmp_path)


@pytest.mark.parametrize("kind", BAD)
def test_other_types_are_refused_by_file_and_field(tmp_path, kind):
    for field, value in itertools.product(*BAD[kind]):
        for name, values, prefix in (
            ("preprocessor_config.json", {field: value}, ""),
            ("processor_config.json", {"image_processor": {field: value}}, "image_processor."),
        ):
            write(tmp_path, name, values)
            with pytest.raises(UserError) as raised:
                image_settings.check(tmp_path)
            assert str(raised.value).startswith(f"{tmp_path / name}: ") and str(raised.value).endswith("again.")
            assert f"{prefix}{field}" in str(raised.value)
        (tmp_path / "processor_config.json").unlink()


def test_the_section_of_the_processor_counts_before_the_other_file(tmp_path):
    write(tmp_path, "preprocessor_config.json", {"resample": "x"})
    write(tmp_path, "processor_config.json", {"image_processor": {"resample": 3}})
    image_settings.check(tmp_path)
    write(tmp_path, "processor_config.json", {"image_seq_length": 256})
    with pytest.raises(
        UserError, match="preprocessor_config.json: resample is 'x', and has to be a whole number up to 5"
    ):
        image_settings.check(tmp_path)
    for section in ([], "x", 3, True):
        write(tmp_path, "processor_config.json", {"image_processor": section})
        with pytest.raises(UserError, match="processor_config.json: image_processor is .*, not an object"):
            image_settings.check(tmp_path)


def test_settings_that_change_pixels_are_compared_where_both_processors_have_them(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
    values = PUBLISHED["LLaVA"]
    write(first, "preprocessor_config.json", values)
    section = values | dict(image_processor_type="CLIPImageProcessorFast", do_pad=False, image_std=None)
    write(second, "processor_config.json", {"image_processor": section})  # as a later version writes them
    assert image_settings.differences(first, second) == []
    changed = section | dict(image_mean=[0.5] * 3, do_resize=False, size=dict(shortest_edge=224))
    write(second, "processor_config.json", {"image_processor": changed})
    assert image_settings.differences(first, second) == ["do_resize", "image_mean", "size"]
