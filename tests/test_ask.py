"""One question to one model, from Python and from the command line."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vkd_jax import ask
from vkd_jax.types import UserError

ROOT = Path(__file__).parents[1]
QUESTION = "What is this person's job?"


@pytest.fixture(scope="module")
def model(tiny_folder):
    return ask.load(tiny_folder)


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures") / "face.png"
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def test_a_file_its_name_and_the_picture_itself_get_one_answer(model, picture):
    expected = model.generate([QUESTION], model.look([picture.read_bytes()]), max_new_tokens=8)
    with Image.open(picture) as opened:
        for image in (picture, str(picture), opened):
            assert [ask.answer(model, QUESTION, image, max_new_tokens=8)] == expected


def test_text_alone(model):
    assert ask.answer(model, QUESTION, max_new_tokens=8) == model.generate([QUESTION], max_new_tokens=8)[0]


def test_the_answer_takes_the_room_that_the_model_has(model):
    """The default of fifty tokens does not fit behind this question, and the answer ends where the model does."""
    question = "why " * 16
    tokens = len(model.processor.encode(question, None)[0])
    room = model.config.text.max_positions - tokens
    assert 0 < room < 50
    assert ask.answer(model, question) == model.generate([question], max_new_tokens=room)[0]
    with pytest.raises(UserError, match=f"exceed the model's {model.config.text.max_positions}"):
        ask.answer(model, question * 10)


def run(monkeypatch, capsys, *args):
    monkeypatch.setattr(sys, "argv", ["ask", *map(str, args)])
    status = ask.main()
    return status, *capsys.readouterr()


def test_the_command_prints_the_answer_alone(monkeypatch, capsys, tiny_folder, model, picture):
    args = ("--model", tiny_folder, "--image", picture, "--question", QUESTION, "--max_new_tokens", 8)
    expected = ask.answer(model, QUESTION, picture, max_new_tokens=8)
    assert run(monkeypatch, capsys, *args) == (0, expected + "\n", "")


def truncated(path, picture):
    path.write_bytes(picture.read_bytes()[:-1500])


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path, _: None, "No such file or directory"),
        (lambda path, _: path.mkdir(), "Is a directory"),
        (lambda path, _: path.write_text("not a picture"), "unknown or broken format"),
        (lambda path, _: path.write_bytes(b""), "unknown or broken format"),
        (truncated, "unknown or broken format"),
    ],
    ids=["missing", "folder", "text", "empty", "truncated"],
)
def test_what_is_no_picture(monkeypatch, capsys, tmp_path, tiny_folder, picture, make, reason):
    path = tmp_path / "face.png"
    make(path, picture)
    args = ("--model", tiny_folder, "--image", path, "--question", QUESTION)
    assert run(monkeypatch, capsys, *args) == (2, "", f"error: {path} is not a picture that can be read ({reason}).\n")


@pytest.mark.parametrize("model_type", ["bert", None, 3])
def test_models_that_are_not_supported(monkeypatch, capsys, tmp_path, tiny_folder, model_type):
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": model_type}))
    status, out, err = run(monkeypatch, capsys, "--model", folder, "--question", QUESTION)
    known = "llava, qwen2_5_vl, qwen2_vl"
    assert (status, out) == (2, "")
    assert err == f"error: Model type {model_type!r} is not supported. Supported types: {known}.\n"


def test_no_model_and_no_tokenizer(monkeypatch, capsys, tmp_path, tiny_folder):
    status, out, err = run(monkeypatch, capsys, "--model", tmp_path / "nowhere", "--question", QUESTION)
    assert (status, out, err.count("\n")) == (2, "", 1) and "no model folder" in err
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder, ignore=shutil.ignore_patterns("*token*", "processor*"))
    status, out, err = run(monkeypatch, capsys, "--model", folder, "--question", QUESTION)
    assert (status, out, err.count("\n")) == (2, "", 1) and "no usable tokenizer" in err


def test_as_a_program(tiny_folder, tmp_path):
    """Warnings and logs of the libraries stay out of what a user sees."""
    command = [sys.executable, "-m", "vkd_jax.ask", "--model", tiny_folder, "--question", QUESTION]
    command += ["--image", tmp_path / "nowhere.png"]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        done.stderr == f"error: {tmp_path}/nowhere.png is not a picture that can be read (No such file or directory).\n"
    )
