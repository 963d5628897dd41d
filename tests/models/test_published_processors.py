"""Public copies of published preprocessor_config.json and generation_config.json files, read with the presets.

The image has 1,100 x 808 pixels; `shape` and `tokens` are worked out by hand from the published sizes.
"""

import copy
import json
from pathlib import Path

import pytest
import transformers
from PIL import Image

from vkd_jax import models
from vkd_jax.checkpoints import bundle
from vkd_jax.data import image_settings, image_sizes
from vkd_jax.types import UserError

PUBLISHED = json.loads((Path(__file__).parent / "published_processors.json").read_text("utf-8"))


def preset(name):
    """The module of a family and the transformers configuration of a preset."""
    family, size = name.partition(",")[0].split()
    module = models.module_for(family)
    return module, transformers.AutoConfig.for_model(family, **module.PRESETS[size][1])


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_image_processor_gives_the_published_model_its_images(name, tmp_path):
    published, (module, hf_config) = PUBLISHED[name], preset(name)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(published["preprocessor"]))
    processor = transformers.AutoImageProcessor.from_pretrained(
        str(tmp_path), backend="pil", config=hf_config, local_files_only=True
    )
    config = module.Config.from_hf(hf_config)
    assert image_sizes.processor_problem(processor, config.edges_are_areas) is None
    assert problem_of(config, processor) is None
    if "limits" in published:
        assert list(config.pixel_limits(processor)) == published["limits"]
    output = processor(
        images=[Image.new("RGB", (1100, 808))],
        do_convert_rgb=True,
        return_tensors="np",
        **config.image_processor_options,
    )
    (image,) = config.extract_images(output)
    assert list(image.shape) == [*published["shape"], 3]
    assert config.image_tokens(*image.shape[:2]) == published["tokens"]


OWN = {  # one published processor of each family, and the settings that the family reads
    "llava 7b": (),
    "gemma3 4b": (),
    "llava_next 7b": ("image_grid_pinpoints",),
    "internvl 1b": ("size", "min_patches", "max_patches"),
    "qwen2_vl 2b": ("do_resize", "patch_size", "merge_size", "temporal_patch_size", "size"),
    "qwen3_vl 2b": ("do_resize", "patch_size", "merge_size", "temporal_patch_size", "size"),
    "smolvlm v2-500m": ("size", "max_image_size", "do_image_splitting"),
}
SETTINGS = {  # of families without a published file in this folder
    "llava_next 7b": {"image_processor_type": "LlavaNextImageProcessor"},
    "internvl 1b": {"image_processor_type": "GotOcr2ImageProcessor", "size": {"height": 448, "width": 448}},
}


def problem_of(config, processor):
    """What is wrong with an image processor, in the order in which a model folder is checked; None if nothing is."""
    try:
        problem = image_settings.class_problem(processor, config.image_processors)
        return problem or config.image_processor_problem(processor)
    except UserError as error:
        return str(error)


@pytest.fixture(scope="module")
def processors(tmp_path_factory):
    """The image processor of each family."""
    loaded = {}
    for name in OWN:
        folder = tmp_path_factory.mktemp("processor")
        settings = SETTINGS.get(name) or PUBLISHED[name]["preprocessor"]
        (folder / "preprocessor_config.json").write_text(json.dumps(settings))
        loaded[name] = transformers.AutoImageProcessor.from_pretrained(
            str(folder), backend="pil", local_files_only=True
        )
    return loaded


@pytest.mark.parametrize("name", OWN)
def test_the_image_processor_of_another_family_is_refused(name, processors):
    module, hf_config = preset(name)
    config = module.Config.from_hf(hf_config)
    problems = {other: problem_of(config, processor) for other, processor in processors.items()}
    assert problems.pop(name) is None
    assert all(problems.values()), problems
    assert sum("settings are those of" in problem for problem in problems.values()) >= len(problems) - 1  # both Qwens


@pytest.mark.parametrize(("name", "setting"), [(name, setting) for name, names in OWN.items() for setting in names])
def test_a_setting_that_is_missing_or_of_another_type_is_refused_by_name(name, setting, processors):
    module, hf_config = preset(name)
    config, processor = module.Config.from_hf(hf_config), copy.copy(processors[name])
    for value in (None, "2", 1.5, [], {}):
        setattr(processor, setting, value)
        assert setting in (problem_of(config, processor) or ""), (setting, value)


@pytest.mark.parametrize(
    ("name", "edge"), [("smolvlm v2-500m", 1), ("smolvlm v2-500m", 511), ("qwen2_vl 2b", 1), ("qwen3_vl 2b", 1023)]
)
def test_images_that_shrink_below_one_tile_or_token_are_refused(name, edge, processors):
    module, hf_config = preset(name)
    config, processor = module.Config.from_hf(hf_config), copy.copy(processors[name])
    processor.size = {"longest_edge": edge}
    assert "size.longest_edge" in problem_of(config, processor)


@pytest.mark.parametrize("name", [name for name in PUBLISHED if "generation" in PUBLISHED[name]])
def test_published_generation_settings_are_honored_or_named(name, tmp_path):
    """`do_sample`, `temperature` and the like say how to draw an answer; greedy decoding draws none."""
    (tmp_path / "generation_config.json").write_text(json.dumps(PUBLISHED[name]["generation"]))
    assert bundle.ignored_generation_settings(tmp_path) == PUBLISHED[name]["ignored"]
