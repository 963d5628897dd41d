"""`vkd verify`: what it prints of models that are the same in PyTorch, and of models that are not."""

import dataclasses
import importlib
import shutil
import sys

import numpy as np
import pytest
import safetensors.numpy

from vkd_jax import models
from vkd_jax.checkpoints.bundle import ModelBundle
from vkd_jax.data.processor import Processor
from vkd_jax.runtime import hub
from vkd_jax.verify import comparison, jax_answers, parity, pytorch, questions

MAIN = importlib.import_module("vkd_jax.verify.__main__")
ASKED = ("--questions", "Who is this person?", "--max_new_tokens=6")


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the command: returns its exit status, stdout and stderr."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["verify", *map(str, arguments)])
        return MAIN.main(), *capsys.readouterr()

    return call


def test_the_shipped_model_is_the_same_in_pytorch(run):
    pytest.importorskip("torch")
    status, shown, _ = run("tiny_llava", *ASKED)
    assert status == 0, shown
    header, *rows, peak, verdict = shown.splitlines()
    assert header.split() == ["image", "prompt", "features", "logits", "largest", "KL", "tokens"]
    assert [row.split("  ")[0] for row in rows] == ["336 x 336", "413 x 275", "190 x 331", "text only"]
    assert all(row.endswith(" 6/6") for row in rows) and peak.startswith("Peak memory ")
    assert f"{hub.SHIPPED / 'tiny_llava'} is the same model in float32: largest |logit difference| " in verdict
    assert verdict.endswith(" nats, all 24 greedy tokens equal.")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("family", models.MODELS)
def test_every_family_is_the_same_in_pytorch(family, dtype, run, family_folder):
    pytest.importorskip("torch")
    status, shown, problem = run(family_folder(family), f"--dtype={dtype}", *ASKED)
    assert status == 0 and f"is the same model in {dtype}: " in shown, shown + problem
    assert "Prompts are those of vkd_jax: " not in shown or importlib.util.find_spec("torchvision") is None


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """A model of this library, two questions, and the answers of PyTorch in float32."""
    pytest.importorskip("torch")
    bundle = ModelBundle.load(hub.SHIPPED / "tiny_llava")
    asked = questions.build(None, ("Who is this person?",))[-2:]
    folder = tmp_path_factory.mktemp("answers")
    pytorch.save_answers(bundle.processor.folder, asked, bundle.processor, "float32", folder, max_new_tokens=6)
    return bundle, asked, [pytorch.read_answer(folder, i) for i in range(2)]


PROJECTOR, KEYS = "projector/fc2/kernel", "language_model/blocks/attn/k/kernel"
CHANGES = {
    "permuted projector": (
        lambda params: {PROJECTOR: params[PROJECTOR][::-1]},
        "features",
        "the image features differ",
    ),
    "permuted keys": (lambda params: {KEYS: params[KEYS][:, :, ::-1]}, "logits", "the logits (not the image features)"),
    "one key a little larger": (lambda params: {KEYS: params[KEYS].at[0, :, 0].mul(1.1)}, "logits", "the logits (not"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_first_stage_that_differs_is_named(change, asked):
    bundle, questions_, expected = asked
    changed, stage, words = CHANGES[change]
    damaged = dataclasses.replace(bundle, params=bundle.params | changed(bundle.params))
    differences = [
        comparison.compare(q.size, ours, e, e)
        for q, e, ours in zip(questions_, expected, jax_answers.answers(damaged, questions_, expected), strict=True)
    ]
    assert differences[0].stage == stage
    same, sentence = comparison.verdict(differences, "float32")
    assert not same and sentence.startswith("not the same model in float32: ") and words in sentence


def test_a_model_that_only_this_library_reads_otherwise_gives_status_1(run, monkeypatch):
    pytest.importorskip("torch")
    load = ModelBundle.load

    def damaged(*args, **options):
        bundle = load(*args, **options)
        return dataclasses.replace(bundle, params=bundle.params | {PROJECTOR: bundle.params[PROJECTOR][::-1]})

    monkeypatch.setattr(parity.ModelBundle, "load", damaged)
    status, shown, _ = run("tiny_llava", *ASKED)
    assert status == 1 and "is not the same model in float32: the image features differ first, by " in shown


def test_a_model_whose_logits_are_equal_is_refused(run, tmp_path):
    pytest.importorskip("torch")
    folder = tmp_path / "model"
    shutil.copytree(hub.fetch_model("tiny_llava"), folder)
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("lm_head.weight"))
    safetensors.numpy.save_file(tensors | {name: np.zeros_like(tensors[name])}, folder / "model.safetensors")
    status, shown, problem = run(folder, *ASKED)
    assert (status, shown) == (2, "") and "The logits in PyTorch are NaN or infinite, or the same" in problem


def test_what_the_processor_of_transformers_refuses_is_one_sentence(run, monkeypatch):
    transformers, _ = pytest.importorskip("transformers"), pytest.importorskip("torch")

    def refuse(*_, **__):
        raise ValueError("not today")

    monkeypatch.setattr(transformers.LlavaProcessor, "__call__", refuse)
    status, _, problem = run("tiny_llava", *ASKED)
    assert status == 2 and "cannot process 'Who is this person?' (not today)" in problem


def test_other_prompts_give_status_1_before_the_model_is_asked(run, monkeypatch):
    pytest.importorskip("torch")
    encode = Processor.encode

    def without_last(self, question, *args):
        prompt, answer = encode(self, question, *args)
        return prompt[:-1], answer

    monkeypatch.setattr(Processor, "encode", without_last)
    status, shown, _ = run("tiny_llava", *ASKED)
    assert status == 1 and "the prompts have other tokens (in 4 of 4 questions)." in shown
    assert shown.count(" differs ") == 4


def test_without_pytorch_the_command_says_how_to_install_it(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    status, _, problem = run("tiny_llava")
    assert status == 2 and "needs PyTorch: install it with `pip install torch`" in problem


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--sign=key"], "--sign is used with --certificate"),
        (["--public_key=key"], "--public_key is used with --certificate"),
        (["--certificate", "--dtype=bfloat16"], "--dtype is used without --certificate"),
        (["--certificate", "--questions", "Who?"], "--questions is used without --certificate"),
        (["--images=absent"], "--images: "),
        (["--questions", " "], "a question is blank"),
        (["--questions", "\u200b"], "a question is blank"),
        (["--questions", "See <image>?"], "a text contains <image>, which stands for an image"),
        (["--questions", "Who?", "who " * 400], "tokens with 336 x 336, and the model takes"),
        (["--max_new_tokens=0"], "--max_new_tokens=0: give at least 1"),
        (["--max_new_tokens=1000000000"], "--max_new_tokens=1000000000: the model takes"),
        (["--max_pixels=9"], "all images of "),
    ],
)
def test_wrong_arguments_are_refused(run, arguments, problem):
    pytest.importorskip("torch")
    status, _, shown = run("tiny_llava", *arguments)
    assert status == 2 and problem in shown


def test_the_images_of_a_folder_are_asked_about(tmp_path, request_folders):
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(Exception, match="is not a folder with image files"):
        questions.build(str(tmp_path), ())
    built = questions.build(str(request_folders / "forget"), ("Who?", "What?"))
    assert [(x.size, x.text) for x in built] == [
        (size, text) for size in ("32 x 32", "32 x 32", "text only") for text in ("Who?", "What?")
    ]
    (tmp_path / "broken.PNG").write_bytes(b"no image")
    with pytest.raises(Exception, match="broken.PNG: the image is broken or of a format that is not read"):
        questions.build(str(tmp_path), ())


def test_positions_after_the_image_are_compared():
    assert pytorch.compared_positions(np.array([1, 4, 4, 7, 8, 9]), 4) == 3
    assert pytorch.compared_positions(np.array([1, 2, 3]), 4) == 3
    assert pytorch.compared_positions(np.arange(10, 400), 4) == pytorch.MOST_POSITIONS
