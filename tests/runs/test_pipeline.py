"""Whole runs on a small random model: the files they write, how they resume, and which weights stay unchanged."""

import hashlib
import json
import re
import shutil
import types
import weakref

import pytest
import yaml
from inspected import answers, files, forbid, read
from PIL import Image

from vkd_jax.checkpoints import certificate
from vkd_jax.checkpoints.bundle import ModelBundle
from vkd_jax.checkpoints.manifest import compare_tensors
from vkd_jax.config.schema import RunConfig
from vkd_jax.data.images import open_image
from vkd_jax.evaluation.inference import Answerer
from vkd_jax.runs import pipeline, stages
from vkd_jax.runs.job import check_config, load_options
from vkd_jax.runs.workdir import Workdir
from vkd_jax.types import Missing, UserError

SHARD = "train-00000-of-00001.parquet"
SUMMARY = {"accuracy", "correct", "n", "low", "high"}


@pytest.fixture(scope="module")
def vkd(make_config, tmp_path_factory):
    """A finished run: config, folder and results."""
    workdir = tmp_path_factory.mktemp("runs") / "vkd"
    config = make_config("vkd", **{"method.fisher_samples": 16, "method.blocks": 1})
    return types.SimpleNamespace(config=config, path=workdir, results=pipeline.run(config, workdir).to_json())


def opened(config, folder):
    """The bundle of a folder, as a run with this config loads it."""
    options = load_options(config.model)
    return ModelBundle.load_for(config.method, folder, seed=0, mesh=check_config(config), **options)


# ---- Files and results of a run ----


def test_results_hold_both_models_with_counts(vkd):
    results = vkd.results
    assert results == json.loads((vkd.path / "results.json").read_text())
    meta = results["meta"]
    assert {"command", "config", "seed", "commit", "versions", "protocol"} <= set(meta)
    assert meta["command"] == "called from Python: vkd_jax.runs.pipeline.run"  # and not the command line of pytest
    assert meta["config"] == json.loads((vkd.path / "config.json").read_text())
    assert meta["config"]["method"]["beta"] == 0.4 and meta["config"]["method"]["mask_threshold"] is None
    assert set(results["models"]) == {"vanilla", "unlearned"}
    for name, sets in results["models"].items():
        assert set(sets) == {"forget", "test", "retain", "retain_test", "real"}
        items = answers(vkd.path, name)
        for set_name, kinds in sets.items():
            assert {"vqa", "qa"} <= set(kinds)
            for kind, summary in kinds.items():
                assert set(summary) >= SUMMARY and summary["accuracy"] == summary["correct"] / summary["n"]
                task, modality = ("classification_" + kind).split("_")[-2:]
                records = [a for a in items if (a["set"], a["task"], a["modality"]) == (set_name, task, modality)]
                assert (sum(a["correct"] for a in records), len(records)) == (summary["correct"], summary["n"])
    assert results["chance"]["forget"] == {"vqa": 0.25, "qa": 0.25}
    stages = {"data", "load", "evaluate vanilla", "prepare", "unlearn", "export", "evaluate unlearned"}
    assert stages <= set(results["timing"]) and all(seconds >= 0 for seconds in results["timing"].values())


def test_the_exported_model_has_a_card_and_a_certificate_that_name_nobody(vkd):
    folder = vkd.path / "unlearned"
    content, card = certificate.read(folder), (folder / "README.md").read_text("utf-8")
    assert not list(certificate.differences(folder))
    forgotten = {a["person"] for a in answers(vkd.path, "vanilla") if a["set"] == "forget"}
    digests = {hashlib.sha256(person.encode()).hexdigest() for person in forgotten}
    assert set(content["forgotten"]) == digests == set(re.findall("`([0-9a-f]{64})`", card))
    assert content["figures"]["models"] == vkd.results["models"]
    _, header, body = card.split("---\n", 2)
    assert not re.search(r"[^\n]\n#", body)  # a blank line before each heading
    assert yaml.safe_load(header).keys() == {"library_name", "pipeline_tag", "tags"}
    forget = vkd.results["models"]["unlearned"]["forget"]["vqa"]
    assert f"| people to forget, with image | {forget['n']} |" in body
    assert f" {100 * forget['accuracy']:.1f} % (" in body and "no attack was run" in body


def _forget(content):
    return content["figures"]["models"]["unlearned"]["forget"]["vqa"]


def _right(content):
    n = _forget(content)["n"]
    _forget(content).update(correct=n - 1, accuracy=(n - 1) / n)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (_right, "other accuracies than README.md"),
        (lambda content: _forget(content).update(low=0.123), "other accuracies than README.md"),
        (lambda content: content.pop("figures"), "other accuracies than README.md"),
        (lambda content: content.pop("config"), "another config than provenance.json, in "),
        (
            lambda content: content["config"]["train"].update(steps=3000),
            "another config than provenance.json, in train",
        ),
        (lambda content: content["config"]["eval"].update(max_items=7), "another config than provenance.json, in eval"),
        (lambda content: content["forgotten"].append(content["forgotten"][0]), "as forgotten, and README.md"),
        (lambda content: content.update(commit="0" * 40), "another commit than README.md"),
        (lambda content: content.pop("command"), "another command than README.md"),
        (lambda content: content.update(command=content["command"] + " --x"), "another command than README.md"),
        (lambda content: content.update(date="2020-01-01T00:00:00+00:00"), "and provenance.json of a later date, 20"),
        (
            lambda content: content["inputs"]["sets"]["forget"].update(questions=1),
            "questions of the set forget, and its inputs 1",
        ),
    ],
)
def test_an_edited_certificate_contradicts_what_it_certifies(vkd, change, problem, tmp_path):
    folder = tmp_path / "unlearned"
    shutil.copytree(vkd.path / "unlearned", folder)
    content = json.loads((folder / certificate.FILE).read_text())
    change(content)
    (folder / certificate.FILE).write_text(json.dumps(content))
    assert problem in "; ".join(certificate.differences(folder))


def test_an_edited_certificate_contradicts_the_results_of_its_run(vkd, tmp_path):
    shutil.copytree(vkd.path / "unlearned", tmp_path / "unlearned")
    shutil.copy(vkd.path / "results.json", tmp_path)
    content = json.loads((tmp_path / "unlearned" / certificate.FILE).read_text())
    assert not list(certificate.differences(tmp_path / "unlearned"))
    content |= {"versions": {}, "date": "2099-01-01T00:00:00+00:00"}
    (tmp_path / "unlearned" / certificate.FILE).write_text(json.dumps(content))
    [problem] = certificate.differences(tmp_path / "unlearned")
    assert problem == "the certificate has another date, versions than results.json of the run in the folder above"


@pytest.mark.parametrize("name", ["results.json", "manifest.json", "answers/vanilla.jsonl", "records.json"])
def test_a_certificate_needs_the_entries_of_its_run(vkd, tmp_path, name):
    shutil.copytree(vkd.path / "unlearned", tmp_path / "unlearned")
    for file in ("inputs.json", "records.json"):  # as after a purge, which deletes results and answers
        shutil.copy(vkd.path / file, tmp_path)
    assert not list(certificate.differences(tmp_path / "unlearned"))
    entries = json.loads((tmp_path / "records.json").read_text())
    (tmp_path / "records.json").write_text(json.dumps({other: x for other, x in entries.items() if other != name}))
    name != "records.json" or (tmp_path / name).unlink()
    [problem] = certificate.differences(tmp_path / "unlearned")
    assert problem.startswith("records.json of the run in the folder above lacks ") and (
        name in problem or name == "records.json"
    )


def test_both_models_are_asked_the_same_questions(vkd):
    questions = [[(a["set"], a["id"], a["question"]) for a in answers(vkd.path, n)] for n in ("vanilla", "unlearned")]
    assert questions[0] == questions[1] and len(set(questions[0])) == len(questions[0]) > 100


def test_only_visual_tensors_change(vkd, tiny_folder, tiny_model):
    manifest = json.loads((vkd.path / "manifest.json").read_text())
    assert manifest == compare_tensors(tiny_folder, vkd.path / "unlearned")
    changed = manifest["changed"]
    assert changed and not [name for name in changed if "language_model" in name or "lm_head" in name]
    assert any("multi_modal_projector" in name for name in changed)
    blocks = {int(i) for name in changed for i in re.findall(r"encoder\.layers\.(\d+)\.", name)}
    assert blocks == {0}  # the one that feeds the projector; block 1 feeds nothing
    results = vkd.results
    assert results["manifest"] == {
        "changed": len(changed),
        "tensors": len(manifest["tensors"]),
        "language_model_changed": 0,
    }
    assert results["text_logits_identical"] is True
    sizes = {path: value.size for path, value in tiny_model.params.items()}
    visual = sum(n for p, n in sizes.items() if p.startswith(("projector/", "vision_tower/blocks/0/")))
    assert results["trainable"] == {"parameters": visual, "of": sum(sizes.values())}


def test_weights_that_train_are_float32_and_others_have_the_dtype_of_the_config(vkd, tiny_folder):
    config = RunConfig.from_config_dict(vkd.config).override("model.dtype=bfloat16")
    model = opened(config, tiny_folder)
    trained = set(config.method.trainable(model.params, model.config))
    assert trained
    for path, value in model.params.items():
        assert value.dtype == ("float32" if path in trained else "bfloat16"), path


@pytest.mark.parametrize(("name", "fields"), [("retain_only", {}), ("base", {"method.target": "base"})])
def test_a_model_of_another_kind_is_refused_before_weights_are_loaded(make_config, tiny_folder, tmp_path, name, fields):
    other = tmp_path / "other"
    shutil.copytree(tiny_folder, other)
    changed = json.loads((other / "config.json").read_text()) | {"vision_feature_layer": -1}
    (other / "config.json").write_text(json.dumps(changed))
    config = make_config("vkd", **{f"model.{name}": str(other)}, **fields)
    with pytest.raises(UserError, match=f"config.model.{name} is a model of another kind or size"):
        pipeline.run(config, tmp_path / "run")
    assert not (tmp_path / "run" / "answers").exists()


@pytest.mark.parametrize(
    ("stage", "changes", "sentence"),
    [
        ("unlearn", {"train.steps": 3, "train.epochs": 1.0}, "train.steps: steps=3 and epochs=1.0. Give one of them"),
        ("unlearn", {"method.teacher": "base"}, "model.base: the method reads the model before fine-tuning"),
        ("finetune", {"finetune.train.steps": 0}, "finetune.train.steps: steps=0 and epochs=0.0. Give one of them"),
        ("finetune", {"finetune.train.microbatches": 5}, "do not divide over 1 devices in 5 microbatches"),
    ],
)
def test_wrong_training_settings_are_refused_by_the_stages_that_read_them(
    make_config, tiny_folder, stage, changes, sentence
):
    other = {"unlearn": "finetune", "finetune": "unlearn"}[stage]
    config = make_config("vkd", **{"model.base": "" if "method.teacher" in changes else str(tiny_folder)}, **changes)
    config.stage = stage
    with pytest.raises(UserError, match=re.escape(sentence)):
        check_config(RunConfig.from_config_dict(config))
    config.update(stage=other)
    config.model.base = str(tiny_folder)
    check_config(RunConfig.from_config_dict(config))


def test_each_model_is_released_before_the_next_is_loaded(vkd, make_config, tmp_path, monkeypatch):
    """A chip may have room for one model only."""
    config = RunConfig.from_config_dict(make_config("vkd", **{"model.retain_only": vkd.config.model.path}))
    alive, calls = weakref.WeakSet(), []

    class Model:
        def __init__(self, folder):
            alive.add(self)

    def record(name, value=None):
        return lambda *_: calls.append((name, len(alive))) or value

    workdir = Workdir(tmp_path, config)
    workdir.given = {name: tmp_path / name for name in ("path", "retain_only")}
    monkeypatch.setattr(workdir, "check_source", lambda folder: None)
    fake = types.SimpleNamespace(workdir=workdir, config=config, load=Model, questions={})
    monkeypatch.setattr(stages, "evaluate_and_attack", lambda job, name, model: record(f"judge {name}", [])())
    monkeypatch.setattr(stages, "unlearn", record("unlearn", tmp_path))
    for name in ("text_scores", "model_changes", "write"):
        monkeypatch.setattr(stages.results_writer, name, record(name, {}))
    monkeypatch.setattr(stages, "compare_tensors", record("manifest", {}))
    stages.unlearn_and_evaluate(fake, {})
    counts = dict(calls)
    assert {"judge retain_only", "judge vanilla", "unlearn", "judge unlearned", "manifest"} <= counts.keys()
    assert max(counts.values()) == 1 and counts["manifest"] == 0


@pytest.mark.parametrize("damaged", [None, "results.json", "answers/vanilla.jsonl", "answers/unlearned.jsonl"])
def test_a_report_is_only_written_from_whole_results_and_answers(tmp_path, damaged):
    workdir = Workdir(tmp_path, RunConfig())
    for name in ("results.json", "answers/vanilla.jsonl", "answers/unlearned.jsonl"):
        workdir.write_text(name, '{"id": 1}\n{"id": 2}\n')
    if damaged:  # cut at the end of a line
        (tmp_path / damaged).write_text('{"id": 1}\n')
    assert workdir.has_results("results.json") is (damaged is None)


def test_only_scores_of_questions_with_an_image_change(vkd):
    """The evaluation reads the exported model, not the vanilla one again."""
    changed = 0
    for a, b in zip(answers(vkd.path, "vanilla"), answers(vkd.path, "unlearned"), strict=True):
        if a["modality"] == "qa":
            assert a == b
        elif "scores" in a:
            changed += a["scores"] != b["scores"]
    assert changed > 20


def test_a_run_writes_report_and_plots(vkd):
    assert "forget" in (vkd.path / "report.md").read_text("utf-8")
    for name in ("losses", "forget_retain", "portraits"):
        with Image.open(vkd.path / "report" / f"{name}.png") as image:
            assert min(image.size) > 100
    steps = [json.loads(line)["step"] for line in (vkd.path / "train" / "metrics.jsonl").read_text().splitlines()]
    assert sorted(set(steps)) == [1, 2, 3]


def test_transformers_generates_the_same_answers(vkd, two_forgotten):
    """It loads the export without missing or unexpected keys and generates the same text."""
    torch = pytest.importorskip("torch")
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    folder = vkd.path / "unlearned"
    torch_model, info = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    torch_model.eval()
    processor = AutoProcessor.from_pretrained(folder)
    sets = read(two_forgotten)
    examples = [e for e in sets["forget"] if e.task == "classification"]
    examples += [e for e in sets["retain"] if e.task == "classification"][:16]
    pictured = [e for e in examples if e.image is not None]
    texts = [e for e in examples if e.image is None]
    assert len(pictured) > 20 and len(texts) > 8
    answerer = Answerer(opened(RunConfig.from_config_dict(vkd.config), folder), batch_size=16)
    generated = answerer.generate(
        [e.question for e in pictured], answerer.encode_images([e.image for e in pictured]), max_new_tokens=6
    )
    generated += answerer.generate([e.question for e in texts], max_new_tokens=6)
    for group, answered in ((pictured, generated[: len(pictured)]), (texts, generated[len(pictured) :])):
        prompts = []
        for e in group:
            content = [{"type": "image"}] * (e.image is not None) + [{"type": "text", "text": e.question}]
            prompts.append(
                processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
            )
        images = [open_image(e.image).convert("RGB") for e in group if e.image is not None]
        inputs = processor(images=images or None, text=prompts, padding=True, return_tensors="pt")
        with torch.no_grad():
            out = torch_model.generate(**inputs, max_new_tokens=6, do_sample=False)
        expected = processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert answered == [text.strip() for text in expected]
    assert len(set(generated)) > 1


# ---- Rerun and resume ----


def test_rerunning_a_finished_run_changes_nothing(vkd, monkeypatch):
    forbid(monkeypatch, "evaluate.evaluate", "loop.fit", "export.export", "hf.load")
    before = files(vkd.path)
    assert pipeline.run(vkd.config, vkd.path).to_json() == vkd.results
    assert files(vkd.path) == before


def test_a_finished_run_is_compared_with_all_inputs_that_are_still_there(vkd, monkeypatch):
    """Data that contradicts itself now is other data, while data and models that are gone only cannot be compared."""

    def fail(error):
        def read(*_):
            raise error

        return read

    before = files(vkd.path)
    for name in ("read_data", "given_models"):
        with monkeypatch.context() as patch:
            patch.setattr(pipeline, name, fail(UserError("1 images are in both folders")))
            with pytest.raises(UserError, match="1 images are in both folders"):
                pipeline.run(vkd.config, vkd.path)
            patch.setattr(pipeline, name, fail(Missing("There is no folder")))
            assert pipeline.run(vkd.config, vkd.path).to_json() == vkd.results
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "given_models", fail(Missing("There is no folder")))
        patch.setattr(pipeline, "read_data", lambda *_: {})
        with pytest.raises(UserError, match="was computed from other inputs: the set forget had"):
            pipeline.run(vkd.config, vkd.path)
    assert files(vkd.path) == before


def test_a_folder_of_another_config_is_refused_by_field(vkd, make_config):
    before = files(vkd.path)
    other = make_config("vkd", **{"method.fisher_samples": 16, "method.blocks": 1, "train.learning_rate": 0.5})
    with pytest.raises(UserError, match=r"another config \(train.learning_rate: 0.002 in the folder, 0.5 now\)"):
        pipeline.run(other, vkd.path)
    assert files(vkd.path) == before


@pytest.mark.parametrize(
    ("copied", "forbidden"),
    [
        (("config.json", "answers/vanilla.jsonl"), ()),
        (("config.json", "answers/vanilla.jsonl", "train", "unlearned"), ("loop.fit", "export.export")),
        (
            ("config.json", "answers", "train", "unlearned", "manifest.json", "results.json"),
            ("loop.fit", "export.export", "hf.load", "evaluate.evaluate"),
        ),
    ],
    ids=["before training", "after the export", "before the report"],
)
def test_an_interrupted_run_resumes_bit_for_bit(vkd, tmp_path, monkeypatch, copied, forbidden):
    """Existing results are used as they are, and all results are the same."""
    workdir = tmp_path / "run"
    for name in ("inputs.json", "records.json", *copied):
        if (vkd.path / name).is_dir():
            shutil.copytree(vkd.path / name, workdir / name)
        else:
            (workdir / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(vkd.path / name, workdir / name)
    forbid(monkeypatch, *forbidden)
    results = pipeline.run(vkd.config, workdir).to_json()
    for key in ("models", "chance", "manifest", "trainable", "text_logits_identical"):
        assert results[key] == vkd.results[key]
    now, then = files(workdir), files(vkd.path)
    for name in ("answers/vanilla.jsonl", "answers/unlearned.jsonl", "unlearned/model.safetensors", "manifest.json"):
        assert now[name] == then[name]
    assert (workdir / "report.md").exists() and (workdir / "report.html").exists()


# ---- Other methods and stages ----


@pytest.mark.slow
def test_training_all_weights_changes_the_language_model(make_config, tmp_path):
    """Shows that the manifest would list a changed language model."""
    config = make_config("grad_diff", **{"train.learning_rate": 0.01})
    results = pipeline.run(config, tmp_path / "run").to_json()
    assert results["manifest"]["language_model_changed"] > 0 and results["text_logits_identical"] is False
    changed = json.loads((tmp_path / "run" / "manifest.json").read_text())["changed"]
    assert any("language_model" in name for name in changed)
    assert results["trainable"]["parameters"] > 0.5 * results["trainable"]["of"]
