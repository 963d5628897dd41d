"""All stages of a published model's config on the folder benchmark: base -> vanilla -> retain-only -> unlearned."""

import json
import re
import types

import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp
from PIL import Image

from vkd_jax.benchmarks.synthetic import people
from vkd_jax.checkpoints.manifest import compare_tensors
from vkd_jax.runs import pipeline
from vkd_jax.types import UserError

NAMES = [person.name for person in people.SIXTY.people()[:4]]


def short(config, root, base):
    """The config with a few steps of each stage, in float32."""
    config.data.update(forget=str(root / "forget"), retain=str(root / "retain"))
    config.model.update(base=str(base), dtype="float32")
    config.eval.update(protocol="options", max_new_tokens=4)
    steps = dict(steps=3, epochs=0.0, warmup_steps=0, log_every=1, learning_rate=1e-2, buckets=1)
    config.train.update(batch_size=dict(forget=2, retain=4), **steps)
    config.finetune.train.update(batch_size=dict(image=4, text=2), **steps)
    config.method.update(fisher_samples=4, fisher_chunk=2, augment_forget=1)
    return config


@pytest.fixture(scope="module")
def run(get_config, tiny_folder, request_folders, tmp_path_factory):
    """A finished run of LLaVA: folder, source and results."""
    config = short(get_config("llava.py", "folder,all"), request_folders, tiny_folder)
    config.eval.general = "textvqa"
    workdir = tmp_path_factory.mktemp("runs") / "run"
    return types.SimpleNamespace(path=workdir, source=tiny_folder, results=pipeline.run(config, workdir).to_json())


def test_adapters_are_merged_into_the_language_model_only(run):
    changed = compare_tensors(run.source, run.path / "vanilla")["changed"]
    assert len(changed) == 14 and all("language_model.model.layers" in name for name in changed)  # 7 kernels, 2 layers


def test_unlearning_starts_from_the_fine_tuned_model_and_changes_visual_weights(run):
    changed = compare_tensors(run.path / "vanilla", run.path / "unlearned")["changed"]
    assert changed and not any("language_model" in name or "lm_head" in name for name in changed)


def test_the_retain_only_model_was_trained_on_other_rows(run):
    assert compare_tensors(run.path / "vanilla", run.path / "retain_only")["changed"]
    assert json.loads((run.path / "retain_only" / "provenance.json").read_text())["without"] == [NAMES[0]]


def test_checkpoints_belong_to_the_run(run):
    """Those of another config or of other inputs are refused: see tests of the folder of a run and of checkpoints."""
    identities = set()
    for name in ("train", "train/vanilla", "train/retain_only"):
        with ocp.training.Checkpointer(run.path / name / "checkpoints") as checkpoints:
            identities.add(checkpoints.load_checkpointables(checkpoints.latest, {"run": None})["run"]["run"])
    assert len(identities) == 1 and re.fullmatch("[0-9a-f]{64}", identities.pop())


def test_the_report_describes_the_folders(run):
    text = (run.path / "report.md").read_text("utf-8")
    assert "Benchmark: your own request" in text and "forget 1 of them" in text
    assert "| people to forget | 1 | 2 | 2 | 1 |" in text
    models = run.results["models"]
    assert set(models) == {"vanilla", "retain_only", "unlearned"}
    assert models["vanilla"]["retain"]["vqa"]["n"] == 6 and run.results["forget_quality"]["unlearned"]["vqa"]["n"] == 2
    with Image.open(run.path / "report" / "portraits.png") as sheet:
        assert min(sheet.size) > 300


def test_suites_are_sets_of_general_ability_of_any_benchmark(run):
    sets = {eval_set["name"]: eval_set for eval_set in run.results["meta"]["benchmark"]["sets"]}
    assert sets["textvqa"]["role"] == "general" and list(sets)[-1] == "textvqa"
    for model in run.results["models"].values():
        summary = model["textvqa"]["suite_vqa"]
        assert summary["n"] == 4 and 0 <= summary["vqa_accuracy"]["mean"] <= 1 and summary["people"] == 0
    assert "textvqa/accuracy" in run.results["utility"]["unlearned"]["components"]
    text = (run.path / "report.md").read_text("utf-8")
    assert "| TextVQA, validation split (drawn stand-in) | VQA accuracy ↑ | upstream | 4 |" in text
    assert json.loads((run.path / "inputs.json").read_text())["sets"]["textvqa"]["questions"] == 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "family"),
    [("qwen2_vl.py", "qwen2_vl"), ("qwen2_5_vl.py", "qwen2_5_vl")],
)
def test_each_family_is_fine_tuned_on_a_quantized_language_model(
    get_config, family_folder, request_folders, tmp_path, file, family
):
    config = short(get_config(file, "folder,finetune"), request_folders, family_folder(family))
    config.model.quantize = "int8"
    results = pipeline.run(config, tmp_path / "run").to_json()
    assert np.isfinite(results["models"]["vanilla"]["forget"]["vqa"]["probability"]["mean"])
    changed = compare_tensors(family_folder(family), tmp_path / "run" / "vanilla")["changed"]
    assert len(changed) == 14 and all("layers." in name and "visual" not in name for name in changed)
    log = (tmp_path / "run" / "train" / "vanilla" / "metrics.jsonl").read_text()
    rows = [json.loads(line) for line in log.splitlines()]
    assert rows[-1]["step"] == 3 and {"image_ce", "text_ce", "examples_per_second", "data_wait_share"} <= set(rows[-1])


def test_a_forget_set_without_images_is_refused_before_training(get_config, tiny_folder, request_folders, tmp_path):
    config = short(get_config("llava.py", "folder"), request_folders, tiny_folder)
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "metadata.jsonl").write_text('{"question": "Who?", "answer": "a judge", "person": "1"}\n')
    config.data.forget = str(tmp_path / "words")
    config.model.path = str(tiny_folder)
    with pytest.raises(UserError, match="the forget set has no question with an image"):
        pipeline.run(config, tmp_path / "run")
    assert not (tmp_path / "run" / "train").exists()
