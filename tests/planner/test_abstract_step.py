"""A planned step equals the step of a run, array by array."""

import dataclasses

import jax
import numpy as np
import pytest
from planned import LENGTHS, build_step

from vkd_jax import methods, registry
from vkd_jax.config import defaults
from vkd_jax.config.schema import RunConfig
from vkd_jax.methods import base
from vkd_jax.methods.null_space import NullSpace
from vkd_jax.methods.replay import STREAM, Replay
from vkd_jax.models import quantize
from vkd_jax.planner import abstract_step, memory
from vkd_jax.runtime.memory import program_bytes
from vkd_jax.runtime.mesh import make_mesh
from vkd_jax.types import UserError

pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # ml_collections' way to read one


def shapes(tree):
    return jax.tree.map(lambda x: (tuple(x.shape), str(x.dtype)), tree)


@pytest.mark.parametrize("name", [name for name in registry.METHODS if name not in ("finetune", "manu")])
def test_a_planned_step_has_the_arrays_of_a_run(config, tiny_model, tiny_sets, name):
    """State, frozen weights, masks and caches agree, and batches except for their lengths."""
    params, model_config = tiny_model.params, tiny_model.config
    fields = dict(fisher_samples=6, fisher_chunk=3) if name in ("vkd", "mmunlearner") else {}
    method = methods.create(name, fields)
    context = base.Context(tiny_model.graphdef, params, None, model_config, tiny_sets, seed=0, encode=tiny_model.encode)
    prepared = method.prepare(context)
    step = build_step(config, name, **fields)
    assert shapes(step.shapes) == shapes(params)
    assert set(step.state.params) == set(method.trainable(params, model_config))
    assert (step.mask is None) == (prepared.mask is None)
    assert shapes(step.mask) == shapes(prepared.mask)
    for stream, planned in step.batches.items():
        real = prepared.sets[stream].batch(np.arange(planned.tokens.shape[0]))
        assert shapes(planned.cached) == shapes(dict(real.cached)), stream
        assert shapes(planned.images) == shapes(dict(real.images)), stream
        for field in ("tokens", "mask", "target_positions", "targets", "target_mask"):
            assert getattr(planned, field).dtype == getattr(real, field).dtype


def test_the_cached_features_of_earlier_people_are_planned(config):
    with config.unlocked():
        config.train.batch_size.earlier = 4
    batch = build_step(config, replay=Replay(weight=1.0), blocks=0).batches[STREAM]
    assert {name: x.shape[0] for name, x in batch.cached.items()} == dict.fromkeys(
        ("target", "scale", "ce", "vision/0"), 4
    )


def test_weights_and_moments_are_sharded_over_the_chips(config):
    mesh = make_mesh(devices=jax.devices())
    step = build_step(config, mesh=mesh)
    assert all(leaf.sharding is not None for leaf in jax.tree.leaves(step.inputs))
    kinds = memory.bytes_by_kind(step)
    trained = 4 * sum(x.size for x in step.state.params.values())
    assert kinds["trainable"] == trained and kinds["optimizer"] == 2 * trained + 4 + 4
    assert kinds["mask"] == trained // 4 and kinds["original"] == trained
    assert kinds["frozen"] == 4 * sum(x.size for x in step.frozen.values())


def test_projections_into_the_null_space_are_planned(config):
    step = build_step(config, "grad_diff", train="visual", null_space=NullSpace(energy=0.9))
    widths = [x.shape[0] for path, x in step.state.params.items() if path.endswith("/kernel") and len(x.shape) == 2]
    assert memory.bytes_by_kind(step)["mask"] == 4 * sum(d * d for d in widths) > 0
    assert step.traced.jaxpr  # the step takes them


def test_a_quantized_model_is_planned_as_it_is_loaded(config, tiny_model):
    config.model.quantize = "int8"
    step = build_step(config)
    params = tiny_model.params
    settings = quantize.parse("int8")
    want = {path: quantize.quantize_param(path, x, settings) for path, x in params.items()}
    assert shapes(step.shapes) == shapes(want)
    assert shapes(build_step(config, "grad_diff", quantized=False, train="all").shapes) == shapes(params)


def test_a_stream_starts_after_the_gradients_of_the_previous_one(config):
    """Otherwise a compiler may keep the activations of both."""
    step = build_step(config)
    equations = jax.make_jaxpr(step.step)(*step.inputs).eqns
    waits = [x.invars for x in equations if x.primitive.name == "optimization_barrier"]
    gradients = len(step.state.params)
    assert [len(x) for x in waits] == [
        len(jax.tree.leaves(batch)) + (gradients if i else 0) for i, batch in enumerate(step.batches.values())
    ]


def test_a_planned_step_is_the_step_that_runs(config, tiny_model):
    """Compiled here, its arguments have the planned bytes, except for weights that are not used."""
    step = build_step(config)
    compiled = step.traced.lower().compile()
    idle = ("vision_tower/blocks/1/", "vision_tower/post_norm/")
    unused = sum(memory.nbytes(x) for path, x in step.frozen.items() if path.startswith(idle))
    kinds = memory.bytes_by_kind(step)
    expected = sum(kinds.values()) - kinds["original"] - unused
    assert compiled.memory_analysis().argument_size_in_bytes == pytest.approx(expected, rel=0.01)
    assert program_bytes(compiled) > compiled.memory_analysis().argument_size_in_bytes


# ---- Errors ----


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method.name": "manu"}, "method manu trains nothing"),
        (
            {"model.path": "org/unknown"},
            "the planner knows no sizes of org/unknown; pass a model folder, or one of llava",
        ),
        ({"train.batch_size.forget": 0}, "forget"),
    ],
)
def test_bad_input_is_refused(config, changes, message):
    for name, value in changes.items():
        if name == "method.name":
            config.method = defaults.method(value)
        else:
            config.update_from_flattened_dict({name: value})
    with pytest.raises(UserError, match=message):
        abstract_step.build(RunConfig.from_config_dict(config), make_mesh(), LENGTHS)


def test_a_row_that_is_too_long_is_refused(config):
    with pytest.raises(UserError, match="a row of 1004 tokens is longer than the model's 128"):
        abstract_step.build(RunConfig.from_config_dict(config), make_mesh(), dataclasses.replace(LENGTHS, text=1000))
    lengths = dataclasses.replace(LENGTHS, text=1000, row="m.jsonl, line 2: the row")
    with pytest.raises(UserError, match=r"^m\.jsonl, line 2: the row of 1004 tokens .*; shorten its texts\.$"):
        abstract_step.build(RunConfig.from_config_dict(config), make_mesh(), lengths)
