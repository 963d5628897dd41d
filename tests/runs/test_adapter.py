"""Adapters that unlearning trained alone are written beside the model that they change."""

import json
from types import SimpleNamespace

import jax.numpy as jnp
import pytest
from llava_folders import hf_config, random_params

from vkd_jax.checkpoints import adapters, export, hf, sources
from vkd_jax.models import llava, lora
from vkd_jax.runs import stages
from vkd_jax.runtime import hub, storage


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a model, its parameters with adapters, and the trained A and B."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    export.create(folder, hf_config(), random_params(llava.LlavaConfig.from_hf(hf_config())))
    _, params, config = hf.load(folder)
    params = lora.attach(params, rank=2, alpha=2.0, dropout=0.0, seed=0)
    trained = {path: jnp.full(x.shape, 0.01) for path, x in params.items() if lora.is_adapter(path)}
    return folder, SimpleNamespace(params=params, config=config), trained


@pytest.mark.parametrize(
    ("name", "path", "further", "base"),
    [
        ("unlearned", "org/model", (), "org/model"),
        ("unlearned", "somewhere/over/there", (), None),  # a folder: that of the source
        ("unlearned", "org/model", ("projector/fc1/bias",), "none"),  # train=visual+lora
        ("vanilla", "org/model", (), "none"),
    ],
)
def test_an_adapter_is_written_if_nothing_else_was_trained(model, tmp_path, monkeypatch, name, path, further, base):
    folder, bundle, trained = model
    trained = trained | {path: bundle.params[path] for path in further}
    monkeypatch.setattr(stages.sources, "parts_of", lambda name: sources.Parts(base or str(folder), folder))
    job = SimpleNamespace(
        config=SimpleNamespace(model=SimpleNamespace(path=path)),
        workdir=SimpleNamespace(
            path=tmp_path, model=lambda name, make: make(tmp_path / name), verify_source=lambda folder: None
        ),
    )
    monkeypatch.setattr(stages.results_writer, "provenance", lambda *_: {})
    stages._export(job, name, bundle, trained, folder, [])
    assert (tmp_path / name / "config.json").is_file()
    written = tmp_path / stages.ADAPTER
    assert written.exists() == (base != "none")
    if written.exists():
        assert {file.name for file in written.iterdir()} == {hub.ADAPTER_CONFIG, adapters.WEIGHTS}
        settings = json.loads((written / hub.ADAPTER_CONFIG).read_text())
        assert settings["base_model_name_or_path"] == (base or str(folder))
    if base is None:
        monkeypatch.setattr(storage, "CACHE", tmp_path / "cache")
        assert sources.fetch_model(written).is_dir()
