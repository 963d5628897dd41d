"""The demo: both models' answers with their probabilities, the attack, the images to pick, and the page."""

import os
import sys
import threading
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vkd_jax import ask
from vkd_jax.benchmarks import synthetic
from vkd_jax.demo import __main__ as command
from vkd_jax.demo import app
from vkd_jax.demo.session import Answer, Attempt, Session, answer
from vkd_jax.types import Diverged, UserError

QUESTION = "Who is this person?"


@pytest.fixture(scope="module")
def session(tiny_folder):
    return Session.load(tiny_folder, tiny_folder)


@pytest.fixture(scope="module")
def image():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8))


@pytest.fixture(scope="module")
def course(session, image):
    """The model's answers while it is attacked for three steps."""
    return list(session.relearn(QUESTION, "Otto Lindt", image, 3))


def test_both_models_answer_with_the_probabilities_of_their_tokens(session, image):
    answers = session.ask(QUESTION, image)
    for model, given in zip((session.before, session.after), answers, strict=True):
        assert given.text == ask.answer(model, QUESTION, image)
        names, probabilities = zip(*given.tokens, strict=True)
        assert given.text.split()[0].startswith(names[0].strip()) and all(0 < p <= 1 for p in probabilities)
    (first,) = session.before.score([QUESTION], [[answers[0].text]], session.before.encode_images([image])).log_probs
    assert np.isclose(sum(np.log(p) for _, p in answers[0].tokens), first[0], rtol=1e-4)


def test_an_answer_that_exceeds_the_context_has_no_tokens(session, image, monkeypatch):
    monkeypatch.setattr(session.after, "generate", lambda *_: ["Otto " * 200])
    assert answer(session.after, QUESTION, image) == Answer("Otto " * 200, ())


def test_an_attack_reports_on_the_way_and_leaves_the_model_alone(session, image, course):
    assert [attempt.step for attempt in course] == [0, 1, 2, 3]
    assert course[0].answer == session.ask(QUESTION, image)[1]
    assert course[-1].answer != course[0].answer and course[-1].right > course[0].right > 0


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        (lambda s, image: s.ask("  "), "Write a question."),
        (lambda s, image: s.ask("\u200b"), "Write a question."),
        (lambda s, image: s.ask(None), "question: None is not allowed. Give a text."),
        (lambda s, image: s.ask(QUESTION, Path("x.png")), "image: .*x.png.* is not allowed. Give a PIL image or None."),
        (lambda s, image: list(s.relearn(QUESTION, "Otto", "x.png", 3)), "image: 'x.png' of type str is not allowed"),
        (lambda s, image: list(s.relearn(QUESTION, None, image, 3)), "right: None is not allowed"),
        (lambda s, image: list(s.relearn(QUESTION, "\u200b", image, 3)), "needs an image, a question"),
        (lambda s, image: list(s.relearn(QUESTION, "Otto", image, "3")), "steps: '3' of type str is not allowed"),
        (lambda s, image: list(s.relearn(QUESTION, "Otto", None, 3)), "needs an image, a question"),
        (lambda s, image: list(s.relearn(QUESTION, " ", image, 3)), "needs an image, a question"),
        (lambda s, image: list(s.relearn(QUESTION, "Otto", image, 101)), "steps=101: give 1 to 100"),
        (lambda s, image: list(s.relearn(QUESTION, "Otto " * 200, image, 3)), "tokens"),
    ],
)
def test_bad_input_is_one_sentence(session, image, call, problem):
    with pytest.raises(UserError, match=problem):
        call(session, image)


def test_the_page_shows_percentages():
    answers = (Answer("Otto", (("Ot", 0.5), ("to", 0.25), ("", 0.999))), Answer("", ()))
    stub = types.SimpleNamespace(
        ask=lambda question, image: answers,
        relearn=lambda question, right, image, steps: iter(
            [Attempt(0, answers[1], 0.0), Attempt(steps, answers[0], 0.1234)]
        ),
    )
    rows = [["Ot", "50.0"], ["to", "25.0"], ["", "99.9"]]
    assert list(app.ask(stub, QUESTION, None)) == [["Otto", rows, "", []]]
    assert list(app.attack(stub, QUESTION, "Otto", None, 4.0)) == [
        [[0, "", "0.0"]],
        [[0, "", "0.0"], [4, "Otto", "12.3"]],
    ]


@pytest.mark.parametrize("error", [UserError("Write <b>."), Diverged("Write <b>.")], ids=["input", "diverged"])
def test_errors_are_shown_as_text(error):
    class Shown(Exception):
        def __init__(self, message, print_exception):
            super().__init__(message)
            assert not print_exception

    def fail(value):
        yield value
        raise error

    values = app._call(Shown, fail, 1)
    assert next(values) == 1
    with pytest.raises(Shown, match="^Write &lt;b&gt;.$"):
        next(values)


def test_images_to_pick_are_the_portraits_of_a_run_or_drawn(tmp_path, image):
    offers = app.portraits()
    assert len(offers) == 12 and [o.answer for o in offers[:6]] == [o.caption for o in offers[:6]]
    people = synthetic.people.SIXTY
    assert {o.answer for o in offers[:6]} == {p.name for p in people.people() if p.id in people.forgotten(10)}
    with pytest.raises(UserError, match="--images=.*: there is no folder with PNG"):
        app.read_images(tmp_path / "nowhere")
    image.save(tmp_path / "009.png")
    ((read, caption, answer),) = app.read_images(tmp_path)
    assert (caption, answer) == ("009", "") and read.tobytes() == image.tobytes()
    (tmp_path / "010.png").write_bytes(b"none")
    with pytest.raises(UserError, match="010.png: the image is broken or of a format that is not read"):
        app.read_images(tmp_path)


def test_without_gradio_the_command_says_what_to_install(monkeypatch, capsys, tiny_folder):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.setattr(sys, "argv", ["vkd demo", f"--before={tiny_folder}", f"--after={tiny_folder}"])
    assert command.main() == 2
    assert capsys.readouterr().err == "error: the demo needs gradio: pip install '.[demo]'.\n"


def test_a_port_out_of_range_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["vkd demo", "--port=70000"])
    assert command.main() == 2
    assert capsys.readouterr().err == "error: --port=70000: give 1 to 65535.\n"


def test_ctrl_c_ends_the_demo_and_deletes_uploaded_images(monkeypatch, capsys, tiny_folder, session):
    folders = []

    def serve(page, port):
        folders.append(Path(os.environ["GRADIO_TEMP_DIR"]))
        assert folders[0].is_dir() and page[1][1] == f"After: {tiny_folder}"
        return f"http://127.0.0.1:{port}/"

    wait = threading.Event.wait

    def interrupted(event, timeout=None):
        if threading.current_thread() is threading.main_thread():
            raise KeyboardInterrupt
        return wait(event, timeout)  # a thread of another library

    monkeypatch.setenv("GRADIO_TEMP_DIR", "")
    monkeypatch.setattr(command.signal, "signal", lambda *_: None)
    monkeypatch.setattr(command.Session, "load", lambda *_: session)
    monkeypatch.setattr(app, "create", lambda *values: values)
    monkeypatch.setattr(app, "serve", serve)
    monkeypatch.setattr(command.threading.Event, "wait", interrupted)
    monkeypatch.setattr(sys, "argv", ["vkd demo", f"--after={tiny_folder}"])
    assert command.main() == 0 and not folders[0].exists()
    assert capsys.readouterr().out == "http://127.0.0.1:7860/ shows the demo until Ctrl-C.\n"
