"""Asking one model one question, from Python and from the command line."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from vkd_jax import ask, messages, models
from vkd_jax.types import UserError

ROOT = Path(__file__).parents[1]
QUESTION = "What is this person's job?"


@pytest.fixture(scope="module")
def model(tiny_folder):
    return ask.load(tiny_folder)


@pytest.fixture(scope="module")
def image_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "face.png"
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def test_a_path_a_string_a_pil_image_and_an_array_give_the_same_answer(model, image_file):
    expected = model.generate([QUESTION], model.encode_images([image_file.read_bytes()]), max_new_tokens=8)
    with Image.open(image_file) as opened:
        for image in (image_file, str(image_file), opened, np.asarray(opened)):
            assert [ask.answer(model, QUESTION, image, max_new_tokens=8)] == expected


def test_a_question_without_an_image_is_answered_from_text(model):
    assert ask.answer(model, QUESTION, max_new_tokens=8) == model.generate([QUESTION], max_new_tokens=8)[0]


def test_an_answer_is_limited_to_the_context_of_the_model(model):
    """The default of 50 tokens does not fit after this question, so the answer ends with the last position."""
    question = "why " * 16
    tokens = len(model.processor.encode(question, None)[0])
    free_positions = model.config.text.max_positions - tokens
    assert 0 < free_positions < 50
    assert ask.answer(model, question) == model.generate([question], max_new_tokens=free_positions)[0]
    with pytest.raises(UserError, match=f"exceed the model's {model.config.text.max_positions}"):
        ask.answer(model, question * 10)


def run(monkeypatch, capsys, *args):
    monkeypatch.setattr(sys, "argv", ["ask", *map(str, args)])
    status = ask.main()
    return status, *capsys.readouterr()


def test_the_command_prints_only_the_answer(monkeypatch, capsys, tiny_folder, model, image_file):
    args = ("--model", tiny_folder, "--image", image_file, "--question", QUESTION, "--max_new_tokens", 8)
    expected = ask.answer(model, QUESTION, image_file, max_new_tokens=8)
    assert run(monkeypatch, capsys, *args) == (0, messages.escaped(expected) + "\n", "")


def test_a_limit_of_pixels_is_refused_by_the_name_that_was_given(monkeypatch, capsys, tiny_folder):
    for pixels, problem in ((-5, "it is negative. Give 0"), (99, "all images of .* have one size")):
        with pytest.raises(UserError, match=f"^max_pixels={pixels}: {problem}"):
            ask.load(tiny_folder, max_pixels=pixels)
        status, out, err = run(
            monkeypatch, capsys, "--model", tiny_folder, "--question", QUESTION, f"--max_pixels={pixels}"
        )
        assert (status, out) == (2, "") and re.match(f"error: --max_pixels={pixels}: {problem}", err)


def write_truncated(path, image_file):
    path.write_bytes(image_file.read_bytes()[:-1500])


def write_huge(path, image_file):
    path.touch()
    os.truncate(path, 2**40)  # without data on the disk


@pytest.mark.parametrize(
    ("write", "problem"),
    [
        (lambda path, _: None, "There is no file {path}."),
        (lambda path, _: path.mkdir(), "{path} is a folder; pass a regular file."),
        (lambda path, _: os.mkfifo(path), "{path} is a named pipe; pass a regular file."),
        (lambda path, _: path.symlink_to("/dev/zero"), "{path} is a device; pass a regular file."),
        (write_huge, "{path} has 1,048,576.0 MiB, and at most 100 MiB are read."),
        (lambda path, _: path.write_text("not an image"), "{path} cannot be used: the image is broken or of a format"),
        (
            lambda path, _: path.write_bytes(b""),
            "{path} cannot be used: the image is broken or of a",
        ),
        (write_truncated, "{path} cannot be used: the image is truncated: its PNG has no end."),
    ],
    ids=["missing", "folder", "pipe", "device", "huge", "text", "empty", "truncated"],
)
def test_files_that_are_not_images_are_reported(model, tmp_path, image_file, write, problem):
    path = tmp_path / "face.png"
    write(path, image_file)
    with pytest.raises(UserError) as raised:
        ask.answer(model, QUESTION, path)
    assert str(raised.value).startswith(problem.format(path=path))


@pytest.mark.parametrize(
    ("question", "image", "problem"),
    [(" \n", None, "the question is blank"), (QUESTION, "", "--image: an empty name"), (QUESTION, " ", "empty name")],
)
def test_blank_questions_and_names_are_refused(model, question, image, problem):
    with pytest.raises(UserError, match=problem):
        ask.answer(model, question, image)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (dict(question=None), "question: None is not allowed. Give one question as a text"),
        (dict(question=["Who?", "What?"]), "question: .* of type list"),
        (dict(question=5), "question: 5 of type int"),
        (dict(image=b"\x89PNG"), "image: .* of type bytes is not allowed"),
        (dict(image=["face.png"]), "image: .* of type list"),
        (dict(image=np.zeros((4, 4, 3))), r"image: an array of float64 with the shape \(4, 4, 3\) is not allowed"),
        (dict(image=np.zeros((4, 4), np.uint8)), r"Give uint8 values of the shape \(height, width, 3\)"),
        (dict(image=np.zeros((0, 4, 3), np.uint8)), "image: an array of uint8"),
        (dict(max_new_tokens="4"), "max_new_tokens: '4' of type str is not allowed. Give a whole number"),
        (dict(max_new_tokens=2.5), "max_new_tokens: 2.5 of type float"),
        (dict(max_new_tokens=True), "max_new_tokens: True of type bool"),
    ],
    ids=lambda x: None if isinstance(x, str) else next(iter(x)),
)
def test_arguments_of_other_types_are_refused(model, arguments, problem):
    with pytest.raises(UserError, match=problem):
        ask.answer(model, **{"question": QUESTION, **arguments})


@pytest.mark.parametrize("model_type", ["bert", None, 3])
def test_unsupported_model_types_are_reported(monkeypatch, capsys, tmp_path, tiny_folder, model_type):
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": model_type}))
    status, out, err = run(monkeypatch, capsys, "--model", folder, "--question", QUESTION)
    supported = ", ".join(sorted(models.MODELS))
    assert (status, out) == (2, "")
    assert err == f"error: Model type {model_type!r} is not supported. Supported types: {supported}.\n"


def test_a_missing_model_or_tokenizer_is_reported(monkeypatch, capsys, tmp_path, tiny_folder):
    status, out, err = run(monkeypatch, capsys, "--model", tmp_path / "nowhere", "--question", QUESTION)
    assert (status, out, err.count("\n")) == (2, "", 1) and "no model folder" in err
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder, ignore=shutil.ignore_patterns("*token*", "processor*"))
    status, out, err = run(monkeypatch, capsys, "--model", folder, "--question", QUESTION)
    assert (status, out, err.count("\n")) == (2, "", 1) and "no usable tokenizer" in err


def test_a_model_with_nan_gives_no_answer(monkeypatch, capsys, tmp_path, tiny_folder):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    tensors["multi_modal_projector.linear_1.bias"][3] = np.nan
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    status, out, err = run(monkeypatch, capsys, "--model", folder, "--question", QUESTION)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "NaN or infinity in multi_modal_projector.linear_1.bias" in err


def test_the_program_prints_one_line_for_an_error(tiny_folder, tmp_path):
    """The output contains no warnings or logs of libraries."""
    command = [sys.executable, "-m", "vkd_jax.ask", "--model", tiny_folder, "--question", QUESTION]
    command += ["--image", tmp_path / "nowhere.png"]
    completed = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert (completed.returncode, completed.stdout) == (2, "")
    assert completed.stderr == f"error: There is no file {tmp_path}/nowhere.png.\n"
