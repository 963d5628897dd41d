"""Serves the page of the demo on a port without a model, with markup in everything that comes from data and models."""

import sys
import threading
import types

from PIL import Image

from vkd_jax.demo import app
from vkd_jax.demo.session import Answer, Attempt
from vkd_jax.types import UserError

MARKUP = "<b>bold</b><img src='http://example.com/x.png' onerror='alert(1)'>"
ANSWER = Answer(MARKUP, ((MARKUP, 0.5),))


def ask(question, image):
    if question != app.QUESTION:
        raise UserError(f"{question} cannot be used.")
    return ANSWER, ANSWER


def relearn(question, right, image, steps):
    for step in (0, steps):
        yield Attempt(step, Answer(right, ()), 0.25)


if __name__ == "__main__":
    offers = [app.Offer(Image.new("RGB", (20, 20), color), MARKUP, MARKUP) for color in ("red", "blue")]
    session = types.SimpleNamespace(ask=ask, relearn=relearn)
    page = app.create(session, [f"Before: {MARKUP}", f"After: {MARKUP}"], offers, MARKUP)
    print(f"{app.serve(page, int(sys.argv[1]))} serves.", flush=True)
    threading.Event().wait()
