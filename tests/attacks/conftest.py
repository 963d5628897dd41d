"""A small model under attack, with questions about three people."""

import dataclasses
import io

import numpy as np
import pytest
from PIL import Image

from vkd_jax.types import Example

JOBS = ("baker", "pilot", "judge", "nurse")
TOWNS = ("Rome", "Oslo", "Lima", "Bonn")


def portrait(seed, size=(24, 24)):
    stream = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(30, 226, (*size, 3), np.uint8)
    Image.fromarray(pixels).save(stream, "png")
    return stream.getvalue()


def about(person, picture, prefix):
    """A question about the job and one about the town of a person in one image."""
    image, image_id = portrait([person, picture, len(prefix)]), f"{prefix}/{person}/{picture}"
    for number, (question, options) in enumerate((("What is the job?", JOBS), ("Which town?", TOWNS))):
        yield Example(f"{image_id}/{number}", f"{person}", image, image_id, question, options[person % 4], options)


@pytest.fixture(scope="session")
def people(tiny_model, tmp_path_factory):
    """Two people to forget and two to retain, two images of each, and other images of them."""
    from vkd_jax.attacks.base import Subject
    from vkd_jax.benchmarks.mllmu import Mllmu
    from vkd_jax.config.schema import EvalConfig, RunConfig
    from vkd_jax.evaluation import evaluate
    from vkd_jax.evaluation.inference import Answerer

    names = {"forget": ((0, 1), 2), "test": ((0, 1), 1), "retain": ((2, 3), 2), "retain_test": ((2, 3), 1)}
    asked = {
        name: [e for person in people for i in range(pictures) for e in about(person, i, name)]
        for name, (people, pictures) in names.items()
    }
    config = RunConfig(eval=EvalConfig(batch_size=8, max_new_tokens=3))
    options = dataclasses.replace(config.eval, protocol="options")
    answers = evaluate.evaluate(Answerer(tiny_model, batch_size=8), asked, options)
    folder = tmp_path_factory.mktemp("scratch")
    return Subject(
        "unlearned", tiny_model, asked, Mllmu.EVAL_SETS, answers, asked["forget"], [], config, tiny_model.mesh, folder
    )
