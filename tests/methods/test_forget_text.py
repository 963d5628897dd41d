"""Forgetting in text as well: the stream of every method by hand, and the configs that ask for it."""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np
import pytest

from vkd_jax import benchmarks, methods, registry
from vkd_jax.config.schema import RunConfig
from vkd_jax.methods import base, idk, losses
from vkd_jax.methods.mmunlearner import MMUnlearner
from vkd_jax.methods.text_stream import ForgetText
from vkd_jax.models.base import bind
from vkd_jax.planner import abstract_step
from vkd_jax.runtime.mesh import make_mesh
from vkd_jax.types import EvalSet, Role, UserError

UNLEARNING = [name for name in registry.METHODS if name not in ("finetune", "manu")]


@dataclasses.dataclass(frozen=True)
class WithCrossEntropy(base.Context):
    cross_entropy: Callable | None = None  # of the rows of a batch


@pytest.fixture(scope="module")
def context(tiny_model, tiny_sets):
    texts = {
        f"{name}_text": tiny_model.encode(
            [dataclasses.replace(e, image=None, image_id="") for e in tiny_sets[name].examples[:6]]
        )
        for name in ("forget", "retain")
    }
    model = bind(tiny_model.graphdef, tiny_model.params)
    compute = jax.jit(lambda batch: base.cross_entropy(model, batch))
    return WithCrossEntropy(
        *(tiny_model.graphdef, tiny_model.params, None, tiny_model.config, {**tiny_sets, **texts}, 0),
        encode=tiny_model.encode,
        cross_entropy=lambda batch: np.asarray(compute(dataclasses.replace(batch, cached={}))),
    )


def of_ascent(context, batch, method):
    return -np.minimum(context.cross_entropy(batch), method.cap).mean()


def of_npo(context, batch, method):
    return 2 / method.beta * np.log(2)  # at the vanilla model, whatever the answers


def of_refusal(context, batch, method):
    return context.cross_entropy(batch).mean()


def of_steering(context, batch, method):
    model = bind(context.graphdef, context.params)
    hidden = jax.jit(lambda batch: base.hidden_states(model, batch, method.layers(context.model_config)))(batch)
    target = batch.cached["target"][:, None]
    return losses.relative_squared_distance(hidden, target, 1.0, batch.mask).mean()


LOSSES = {
    **dict.fromkeys(("grad_ascent", "grad_diff", "kl", "mmunlearner", "vkd"), of_ascent),
    "npo": of_npo,
    "idk": of_refusal,
    "rmu": of_steering,
}
SMALL = {"vkd": {"augment_forget": 0, "mask_scope": "none", "bound": "look_alike"}}  # quick


@pytest.mark.parametrize("name", UNLEARNING)
def test_every_method_forgets_text_by_its_own_loss(context, name, monkeypatch):
    monkeypatch.setattr(MMUnlearner, "_mask", lambda *_: None)
    plain = methods.create(name, {})
    assert "forget_text" not in plain.losses() and plain.forget_streams == ("forget",)
    method = methods.create(name, {"train": "all", "forget_text": ForgetText(weight=2.0), **SMALL.get(name, {})})
    encoded = method.prepare(context).sets["forget_text"]
    spec = method.cache_spec("forget_text", {}, context.model_config)
    assert encoded.per_example.keys() == spec.per_example.keys() and not spec.per_image
    batch, model = encoded.batch(np.arange(4)), bind(context.graphdef, context.params)
    loss, metrics = jax.jit(lambda batch: method.losses()["forget_text"](model, batch))(batch)
    np.testing.assert_allclose(loss, 2 * LOSSES[name](context, batch, method), rtol=1e-4)
    assert all(metric.startswith("text_") for metric in metrics)
    if name == "idk":
        assert {example.answer for example in encoded.examples} <= set(idk.REFUSALS)


def test_the_language_model_of_mmunlearner_is_scored_on_the_text_that_is_forgotten():
    names = {"forget_text", "retain_text"}
    plain, both = (methods.create("mmunlearner", {"forget_text": ForgetText(weight=x)}) for x in (0.0, 1.0))
    assert sorted(plain._text_sets("retain", names)) == ["forget_text", "retain_text"]
    assert plain._text_sets("forget", names) == []
    assert (both._text_sets("forget", names), both._text_sets("retain", names)) == (["forget_text"], ["retain_text"])


@pytest.mark.parametrize(
    ("forgets_text", "roles"),
    [(False, [Role.RETAIN_FACTS, Role.RETAIN_FACTS]), (True, [Role.FORGET, Role.FORGET_HOLDOUT])],
)
def test_one_function_decides_the_role_of_text_about_the_people_to_forget(forgets_text, roles):
    forget, test, retain, *_ = benchmarks.eval_sets(benchmarks.create("mllmu", {}), forgets_text)
    assert [s.role_of(kind) for s, kind in ((forget, "cloze_qa"), (test, "qa_letter"))] == roles
    assert [s.role_of("vqa_letter") for s in (forget, test)] == [Role.FORGET, Role.FORGET_HOLDOUT]
    assert retain.role_of("qa") is Role.RETAIN
    assert EvalSet("real", "general", "general ability", "real").role_of("suite_vqa") is Role.GENERAL


@pytest.mark.parametrize(
    ("file", "words", "train"),
    [
        ("tiny.py", "forgets=both", "all"),
        ("tiny.py", "both,train=visual+lora", "visual+lora"),
        ("tiny.py", "both,manu", "all"),
        ("llava.py", "both", "visual+lora"),
        ("qwen2_vl.py", "both,npo,lora,onechip", "lora"),
        ("tiny.py", "both,robust,grad_diff", "all"),
    ],
)
def test_the_argument_makes_the_method_follow(get_config, file, words, train):
    config = RunConfig.from_config_dict(get_config(file, words))
    assert config.data.forgets_text and config.method.train == train
    if hasattr(config.method, "forget_text"):
        assert (config.method.forget_text.weight, config.method.text.weight) == (1.0, 4.0)
        assert {"text", "forget_text"} <= set(config.method.losses())
    config.check_stage(1)


def test_each_method_of_a_comparison_follows(get_config):
    entrants = get_config("llava.py", "both,runs=compare").compare.entrants
    assert {entrant.method.train for entrant in entrants.values()} == {"visual+lora", "lora", "all"}
    weights = {entrant.method.forget_text.weight for entrant in entrants.values() if "forget_text" in entrant.method}
    assert weights == {1.0}


@pytest.mark.parametrize(
    ("words", "fields", "problem"),
    [
        ("", {"data.forgets": "both"}, "data.forgets: both needs a method.train whose weights text reaches"),
        ("train=all", {"data.forgets": "both"}, "both needs method.forget_text.weight greater than 0. Give the config"),
        ("both", {"data.forgets": "visual"}, "data.forgets: visual keeps text about the people. Give both, or method."),
        ("train=visual,both", {}, "forgets=both: train=visual trains no weight that text reaches. Give train=visual+l"),
        ("both,ablations", {}, "runs=ablations: its methods are tuned to forget who is in an image."),
        ("both", {"method.forget": "none"}, "method.forget_text.weight: text has no features to distill"),
        ("both", {"method.train": "visual", "method.text.weight": 0.0}, "method.forget_text.weight: train=visual"),
        ("", {"data.forgets": "text"}, "data.forgets: 'text' is not allowed. Give one of visual, both."),
    ],
)
def test_a_config_that_would_not_forget_what_it_says_is_refused(get_config, words, fields, problem):
    with pytest.raises(UserError) as error:
        config = get_config("tiny.py", words)
        config.update_from_flattened_dict(fields)
        RunConfig.from_config_dict(config).check_stage(1)
    assert problem in str(error.value)


def test_the_planner_counts_the_stream(get_config, context, tiny_folder):
    config = get_config("tiny.py", "both")
    config.model.path = str(tiny_folder)
    config.method.update(forget="npo", mask_scope="none")
    step = abstract_step.build(RunConfig.from_config_dict(config), make_mesh(), abstract_step.Lengths(20, 6))
    batch = step.batches["forget_text"]
    assert batch.images is None and batch.tokens.shape == (32, 20)
    assert {name: x.shape for name, x in batch.cached.items()} == {"reference": (32,)}
