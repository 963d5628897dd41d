"""Public copies of published config.json files: each parses, and the presets equal them field by field."""

import json
from pathlib import Path

import pytest
from transformers import AutoConfig

from vkd_jax.checkpoints import hf

PUBLISHED = json.loads((Path(__file__).parent / "published_configs.json").read_text("utf-8"))


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_preset_equals_the_published_config(name, tmp_path):
    family, size = name.partition(",")[0].split()
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[name]["config"]))
    module, hf_config = hf.read_config(tmp_path)
    preset = AutoConfig.for_model(family, **module.PRESETS[size][1])
    assert module.Config.from_hf(hf_config) == module.Config.from_hf(preset)
    assert PUBLISHED[name]["source"].startswith("https://huggingface.co/")
