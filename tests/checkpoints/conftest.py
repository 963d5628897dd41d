"""Fixtures of the tests of checkpoints: a model folder, and a copy of it to change."""

import shutil
import tempfile

import pytest
from llava_folders import hf_config, random_params

from vkd_jax.checkpoints import export
from vkd_jax.models import llava


@pytest.fixture(autouse=True)
def lists(tmp_path_factory, monkeypatch):
    """Writes the long lists of messages to a folder that the tests remove."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("lists")))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    export.create(folder, hf_config(), random_params(llava.LlavaConfig.from_hf(hf_config())))
    return folder


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")
