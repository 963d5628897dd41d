"""The streams of harmless images and of other facts, and the refusals of a benchmark: who reads them, and how."""

import dataclasses
import types

import numpy as np
import pytest

from vkd_jax import methods, registry
from vkd_jax.benchmarks.mllmu import Mllmu
from vkd_jax.benchmarks.safeeraser import SafeEraser
from vkd_jax.methods import base
from vkd_jax.methods.decouple import Decouple
from vkd_jax.methods.idk import IDK
from vkd_jax.methods.other_facts import OtherFacts
from vkd_jax.models.base import bind
from vkd_jax.runs.job import Job
from vkd_jax.types import UserError

STREAMS = {"decouple": Decouple, "other_facts": OtherFacts}


@pytest.fixture(scope="module")
def context(tiny_model, tiny_sets):
    return base.Context(
        tiny_model.graphdef, tiny_model.params, None, tiny_model.config, tiny_sets, seed=0, encode=tiny_model.encode
    )


@pytest.mark.parametrize("name", [name for name in registry.METHODS if name not in ("finetune", "manu")])
def test_every_method_that_trains_on_a_forget_set_has_the_streams_that_have_a_weight(context, name):
    plain = methods.create(name, {})
    for stream, section in STREAMS.items():
        method = methods.create(name, {stream: section(weight=0.5)})
        assert stream not in plain.losses() and set(method.losses()) == set(plain.losses()) | {stream}
        assert method.cache_spec(stream, {}, context.model_config) == base.CacheSpec()


def test_the_loss_is_the_cross_entropy_of_the_answers_times_the_weight(context):
    batch = context.sets["retain"].batch(np.arange(4))
    model = bind(context.graphdef, context.params)
    ce = base.cross_entropy(model, batch).mean()
    for stream, section in STREAMS.items():
        loss, metrics = section(weight=0.5).losses()[stream](model, batch)
        np.testing.assert_allclose([loss, metrics[f"{stream}_ce"]], [0.5 * ce, ce], rtol=1e-6)


def job_of(benchmark, tiny_sets):
    sets = {"harmless": tiny_sets["retain"].examples}
    job = types.SimpleNamespace(benchmark=benchmark, sets=sets)
    return Job.image_questions(job, Decouple.STREAM)


def test_the_stream_has_the_harmless_images_of_the_benchmark(tiny_sets):
    questions = job_of(SafeEraser(), tiny_sets)
    assert questions and set(questions) <= set(tiny_sets["retain"].examples)
    with pytest.raises(UserError, match="method.decouple.weight: MLLMU-Bench has no such images to train on. Give 0."):
        job_of(Mllmu(), tiny_sets)


def test_idk_trains_on_the_refusals_of_the_benchmark(context, tiny_model):
    rows = [
        dataclasses.replace(e, image=None, image_id="", answer=answer, options=())
        for e, answer in zip(context.sets["retain"].examples[:2], ("No idea.", "I cannot tell."), strict=True)
    ]
    context = dataclasses.replace(context, sets={**context.sets, "refusals": tiny_model.encode(rows)})
    answers = {e.answer for e in IDK().prepare(context).sets["forget"].examples}
    assert answers == {"No idea.", "I cannot tell."}
