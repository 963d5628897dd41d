"""Public copies of published preprocessor_config.json and generation_config.json files, read with the presets.

The image has 1,100 x 808 pixels; `shape` and `tokens` are worked out by hand from the published sizes.
"""

import json
from pathlib import Path

import pytest
import transformers
from PIL import Image

from vkd_jax import models
from vkd_jax.checkpoints import bundle
from vkd_jax.data import image_sizes

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
    assert config.image_processor_problem(processor) is None
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


@pytest.mark.parametrize("name", [name for name in PUBLISHED if "generation" in PUBLISHED[name]])
def test_published_generation_settings_are_honored_or_named(name, tmp_path):
    """`do_sample`, `temperature` and the like say how to draw an answer; greedy decoding draws none."""
    (tmp_path / "generation_config.json").write_text(json.dumps(PUBLISHED[name]["generation"]))
    assert bundle.ignored_generation_settings(tmp_path) == PUBLISHED[name]["ignored"]
