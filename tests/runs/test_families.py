"""A whole run of each family, from a published model's config to an export that transformers loads."""

import json
import re
import types

import numpy as np
import pytest

from vkd_jax import benchmarks as benchmarks
from vkd_jax.checkpoints.bundle import ModelBundle
from vkd_jax.checkpoints.manifest import compare_tensors
from vkd_jax.config.schema import RunConfig
from vkd_jax.data.images import open_image
from vkd_jax.evaluation.inference import Answerer
from vkd_jax.runs import pipeline
from vkd_jax.runs.job import check_config, load_options

# config file, its arguments, model_type, quantization of the language model
RUNS = {
    "llava": ("llava.py", "7b", "llava", ""),
    "llava_next in int8": ("llava_next.py", "mistral-7b", "llava_next", "int8"),
    "vipllava": ("vipllava.py", "7b", "vipllava", ""),
    "gemma3 in int8": ("gemma3.py", "4b", "gemma3", "int8"),
    "qwen2_vl": ("qwen2_vl.py", "2b", "qwen2_vl", ""),
    "qwen2_5_vl in int8": ("qwen2_5_vl.py", "3b", "qwen2_5_vl", "int8"),
    "qwen3_vl in int8": ("qwen3_vl.py", "2b", "qwen3_vl", "int8"),
    "idefics3": ("smolvlm.py", "256m", "idefics3", ""),
    "smolvlm in int8": ("smolvlm.py", "v2-256m", "smolvlm", "int8"),
    "internvl": ("internvl.py", "1b", "internvl", ""),
}
# Vision blocks that are in use; of the other families two are.
USED_BLOCKS = {"llava": 1} | dict.fromkeys(("llava_next", "vipllava", "qwen3_vl", "internvl"), 3)
VISUAL = re.compile(r"(model\.)?(vision_tower|multi_modal_projector|visual|vision_model|connector|image_newline)(\.|$)")


# The default suite runs configs/tiny.py in test_pipeline.py, LLaVA in test_stages.py, and one family here.
PARAMS = [pytest.param(name, marks=[] if "gemma3" in name else pytest.mark.slow) for name in RUNS]
# What transformers' processors return besides tokens, mask and pixels: which tokens are image tokens.
TOKEN_TYPES = {"gemma3": "token_type_ids"} | dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl"), "mm_token_type_ids")


@pytest.fixture(scope="module", params=PARAMS)
def run(request, get_config, few, family_folder, tmp_path_factory):
    """A finished run: its family, source, folder and results."""
    file, words, family, quantize = RUNS[request.param]
    source = family_folder(family)
    config = get_config(file, words)
    config.model.update(path=str(source), dtype="float32", quantize=quantize)
    if family == "llava":  # the options do not fit into 96 positions
        config.eval.protocol = "options"
    config.data.source = str(few)
    config.eval.update(max_items=3, max_new_tokens=4)
    config.train.update(
        steps=3, warmup_steps=1, batch_size=dict(forget=4, retain=4), learning_rate=1e-3, log_every=1, buckets=1
    )
    config.method.update(fisher_samples=4, fisher_chunk=2, augment_forget=1)
    workdir = tmp_path_factory.mktemp("runs") / "run"
    results = pipeline.run(config, workdir).to_json()
    return types.SimpleNamespace(family=family, source=source, path=workdir, config=config, results=results)


def test_only_visual_tensors_change_and_text_stays_bit_for_bit(run):
    manifest = json.loads((run.path / "manifest.json").read_text())
    assert manifest == compare_tensors(run.source, run.path / "unlearned")
    changed = manifest["changed"]
    assert changed and all(VISUAL.match(name) for name in changed)
    blocks = {int(i) for name in changed for i in re.findall(r"(?:layers?|blocks)\.(\d+)\.", name)}
    assert blocks == set(range(USED_BLOCKS.get(run.family, 2)))  # some families also have an unused block
    assert any(re.search(r"merger|multi_modal_projector|connector", name) for name in changed)
    assert any(re.search(r"patch_embed", name) for name in changed)
    assert run.results["text_logits_identical"] is True and run.results["manifest"]["language_model_changed"] == 0


def test_the_export_has_every_file_of_the_source(run):
    def names(folder):
        return {path.name for path in folder.iterdir()}

    assert names(run.source) | {"provenance.json", "certificate.json", "README.md"} == names(run.path / "unlearned")


def test_a_run_writes_answers_of_both_models_and_a_report(run):
    for name in ("vanilla", "unlearned"):
        lines = (run.path / "answers" / f"{name}.jsonl").read_text("utf-8").splitlines()
        records = [json.loads(line) for line in lines]
        assert {r["protocol"] for r in records if r["task"] == "classification"} == {run.config.eval.protocol}
    assert "forget" in (run.path / "report.md").read_text("utf-8")
    assert len(list((run.path / "report").glob("*.png"))) >= 1


def test_transformers_loads_the_export_and_generates_the_same_answers(run, few, tmp_path):
    torch = pytest.importorskip("torch")
    import transformers

    folder = run.path / "unlearned"
    hf, info = transformers.AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    hf.eval()
    sets = benchmarks.read(benchmarks.create("mllmu", {"source": str(few)}), tmp_path)
    examples = [e for e in [*sets["forget"], *sets["retain"]] if e.task == "classification" and e.image is not None]
    run.config.model.quantize = ""  # what was exported are the original weights of the language model
    config = RunConfig.from_config_dict(run.config)
    options = dict(mesh=check_config(config), **load_options(config.model))
    bundle = ModelBundle.load_for(config.method, folder, seed=0, **options)
    answerer = Answerer(bundle, batch_size=4)
    processor = answerer.processor
    generated = answerer.generate(
        [e.question for e in examples], answerer.encode_images([e.image for e in examples]), max_new_tokens=6
    )
    expected = []
    for e in examples:
        tokens, _ = processor.encode(e.question, None, [processor.image(e.image)])
        options = processor.config.image_processor_options
        inputs = dict(processor.image_processor(images=[open_image(e.image)], return_tensors="pt", **options))
        inputs["input_ids"] = torch.tensor([tokens])
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        for name in ("num_crops", "num_patches", "rows", "cols"):  # which processors read, not models
            inputs.pop(name, None)
        if run.family in TOKEN_TYPES:
            inputs[TOKEN_TYPES[run.family]] = (inputs["input_ids"] == processor.image_token_id).int()
        with torch.no_grad():
            out = hf.generate(**inputs, max_new_tokens=6, do_sample=False, pad_token_id=processor.pad_id)
        expected.append(processor.tokenizer.decode(out[0, len(tokens) :], skip_special_tokens=True).strip())
    assert generated == expected
    assert len(set(generated)) > 1 and len(np.unique([e.image_id for e in examples])) > 1
