"""Public copies of published config.json files: each parses, and the presets equal them field by field.

Of some files only single `fields` are public.
"""

import json
from pathlib import Path

import pytest
from transformers import AutoConfig

from vkd_jax import models
from vkd_jax.checkpoints import hf

PUBLISHED = json.loads((Path(__file__).parent / "published_configs.json").read_text("utf-8"))


def preset(name):
    """The module of a family and the transformers configuration of a preset."""
    family, size = name.partition(",")[0].split()
    module = models.module_for(family)
    return module, AutoConfig.for_model(family, **module.PRESETS[size][1])


@pytest.mark.parametrize("name", [name for name in PUBLISHED if "config" in PUBLISHED[name]])
def test_the_preset_equals_the_published_config(name, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[name]["config"]))
    module, hf_config = hf.read_config(tmp_path)
    expected, ours = preset(name)
    assert module is expected and module.Config.from_hf(hf_config) == module.Config.from_hf(ours)


@pytest.mark.parametrize("name", [name for name in PUBLISHED if "fields" in PUBLISHED[name]])
def test_the_preset_has_the_published_fields(name):
    _, ours = preset(name)
    written, fields = ours.to_dict(), PUBLISHED[name]["fields"]
    for section in ("text_config", "vision_config"):
        assert {field: written[section][field] for field in fields[section]} == fields[section]
    assert all(written[field] == value for field, value in fields.items() if not field.endswith("_config"))


def test_each_copy_names_its_source():
    assert all("https://" in copy["source"] for copy in PUBLISHED.values())
