"""The planner: operations by hand and as JAX traces them, shapes as a real run has them, and what it says."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vkd_jax import arithmetic, blueprint, methods, plan, sharding, train
from vkd_jax.methods import base
from vkd_jax.models import quantize
from vkd_jax.types import UserError

ROOT = Path(__file__).parents[1]
LENGTHS = blueprint.Lengths(text=12, answer=5)


@pytest.fixture
def config(get_config, tiny_folder):
    config = get_config("tiny.py")
    config.model.path = str(tiny_folder)
    config.train.batch_size.update(forget=2, retain=3)
    return config


def draw(config, method="vkd", whole=False, mesh=None, **fields):
    method = methods.create(method, fields)
    return blueprint.draw(config, mesh or sharding.make_mesh(), LENGTHS, method, whole)


# ---- Arithmetic ----


def test_operations_of_a_tiny_llava_by_hand(config):
    """Five patch slots (a class token and 2 x 2), four image tokens, sixteen tokens, five of them answer."""
    found = plan.flops(draw(config))
    rows = 5
    block = 2 * 5 * (4 * 16 * 16 + 2 * 16 * 32) + 4 * 5 * 5 * 16
    patches = 2 * 4 * (8 * 8 * 3 * 16)
    assert found["vision_tower"].forward == rows * (patches + 3 * block)  # the fourth block feeds nothing
    projector = 2 * 4 * (16 * 24 + 24 * 24)
    assert found["projector"].forward == found["projector"].weights == rows * projector
    layer = 2 * 16 * (2 * 24 * 24 + 2 * 24 * 12 + 3 * 24 * 40) + 4 * 16 * 16 * 24
    assert found["language_model"].forward == rows * 2 * layer
    assert found["language_model"].weights == 0  # frozen
    attention = 4 * 16 * 16 * 24
    assert found["language_model"].backward == rows * 2 * (layer + attention)
    assert found["head"].forward == rows * 2 * 5 * 24 * 400 and found["head"].weights == 0


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("vkd", {}),
        ("vkd", dict(blocks=1)),
        ("vkd", dict(blocks=0)),
        ("grad_diff", dict(train="all")),
        ("grad_diff", dict(train="lora", lora_rank=2)),
        ("kl", dict(train="visual")),
        ("rmu", {}),
    ],
)
def test_operations_are_those_that_jax_traces(config, name, fields, remat):
    config.model.remat = remat
    drawn = draw(config, name, **fields)
    counted = sum(part.total for part in plan.flops(drawn).values())
    traced = arithmetic.traced(drawn.step, *drawn.inputs)
    assert counted == pytest.approx(traced, rel=0.02)


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("fields", [dict(train="visual"), dict(train="all")])
def test_operations_of_qwen_are_those_that_jax_traces(get_config, qwen_folder, fields, remat):
    config = get_config("qwen2_vl.py")
    config.model.update(
        path=str(qwen_folder("qwen2_vl")), base="", remat=remat, dtype="float32", quantize="", max_pixels=56 * 56
    )
    config.train.batch_size.update(forget=2, retain=2)
    drawn = draw(config, "grad_diff", whole=True, **fields)
    counted = sum(part.total for part in plan.flops(drawn).values())
    assert counted == pytest.approx(arithmetic.traced(drawn.step, *drawn.inputs), rel=0.02)


def test_loops_are_counted_as_often_as_they_turn():
    def loop(x):
        return jax.lax.scan(lambda x, _: (x @ x, None), x, length=7)[0]

    assert arithmetic.traced(loop, jnp.ones((3, 3))) == 7 * 2 * 27


# ---- Shapes ----


def shapes(tree):
    return jax.tree.map(lambda x: (tuple(x.shape), str(x.dtype)), tree)


@pytest.mark.parametrize("name", [name for name in methods.METHODS if name not in ("finetune", "manu")])
def test_what_is_planned_is_what_a_run_has(config, tiny_model, tiny_sets, name):
    """State, frozen weights, masks and caches; batches but for how long the questions are."""
    params, model_config = tiny_model.params, tiny_model.config
    fields = dict(fisher_samples=6, fisher_chunk=3) if name in ("vkd", "mmunlearner") else {}
    method = methods.create(name, fields)
    context = base.Context(tiny_model.graphdef, params, None, model_config, tiny_sets, seed=0, encode=tiny_model.encode)
    prepared = method.prepare(context)
    drawn = draw(config, name, **fields)
    assert shapes(drawn.shapes) == shapes(params)
    assert set(drawn.state.params) == set(method.trainable(params, model_config))
    assert (drawn.mask is None) == (prepared.mask is None)
    assert shapes(drawn.mask) == shapes(prepared.mask)
    assert drawn.method.teachers().keys() == prepared.teacher.keys()
    for stream, planned in drawn.batches.items():
        real = prepared.sets[stream].batch(np.arange(planned.tokens.shape[0]))
        assert shapes(planned.cached) == shapes(dict(real.cached)), stream
        assert shapes(planned.pictures) == shapes(dict(real.pictures)), stream
        for field in ("tokens", "mask", "at", "targets", "target_mask"):
            assert getattr(planned, field).dtype == getattr(real, field).dtype


def test_weights_and_moments_lie_over_the_chips(config):
    mesh = sharding.make_mesh(devices=jax.devices())
    drawn = draw(config, mesh=mesh)
    assert all(leaf.sharding is not None for leaf in jax.tree.leaves(drawn.inputs))
    held = plan.held(drawn)
    trained = 4 * sum(x.size for x in drawn.state.params.values())
    assert held["trainable"] == trained and held["optimizer"] == 2 * trained + 4 + 4
    assert held["mask"] == trained // 4 and held["original"] == trained
    assert held["frozen"] == 4 * sum(x.size for x in drawn.frozen.values())


def test_two_values_of_four_bits_are_a_byte():
    assert plan.nbytes(jax.ShapeDtypeStruct((3, 5), jnp.int4)) == 8
    assert plan.nbytes(jax.ShapeDtypeStruct((3, 5), jnp.bfloat16)) == 30


def test_a_quantised_model_is_planned_as_it_is_loaded(config, tiny_model):
    config.model.quantize = "int8"
    drawn = draw(config)
    params = tiny_model.params
    how = quantize.parse("int8")
    want = {path: quantize.quantized(path, x, how) for path, x in params.items()}
    assert shapes(drawn.shapes) == shapes(want)
    assert shapes(draw(config, "grad_diff", whole=True, train="all").shapes) == shapes(params)


def test_a_planned_step_is_the_step_that_runs(config, tiny_model):
    """Compiled here, it takes as many bytes of arguments as the parts say, but for weights that feed nothing."""
    drawn = draw(config)
    compiled = drawn.lower().compile()
    idle = ("vision_tower/blocks/3/", "vision_tower/post_norm/")
    unused = sum(plan.nbytes(x) for path, x in drawn.frozen.items() if path.startswith(idle))
    held = plan.held(drawn)
    expected = sum(held.values()) - held["original"] - unused
    assert compiled.memory_analysis().argument_size_in_bytes == pytest.approx(expected, rel=0.01)
    assert train.step_bytes(compiled) > compiled.memory_analysis().argument_size_in_bytes


# ---- What is refused ----


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
def test_bad_input(config, changes, message):
    with config.ignore_type():
        for name, value in changes.items():
            if name == "method.name":
                config.method = dict(name=value)
            else:
                config.update_from_flattened_dict({name: value})
    with pytest.raises(UserError, match=message):
        blueprint.draw(config, sharding.make_mesh(), LENGTHS)


def test_a_row_that_is_too_long_is_refused(config):
    with pytest.raises(UserError, match="a row of 1004 tokens is longer than the model's 128"):
        blueprint.draw(config, sharding.make_mesh(), dataclasses.replace(LENGTHS, text=1000))


@pytest.mark.parametrize("topology", ["v9:1x1", "v5e", "v5e:two"])
def test_topologies_that_do_not_exist(topology):
    with pytest.raises(UserError, match=r"give a chip \(v4, v5e, v5p, v6e\) and a shape, such as v5e:2x2"):
        plan.devices(topology)


# ---- As a program ----


@pytest.fixture
def run(tmp_path):
    """What the planner found, and what it printed."""
    pytest.importorskip("libtpu", reason="the TPU compiler is not installed: pip install '.[tpu]'")

    def run(*flags):
        done = subprocess.run(
            [sys.executable, "-m", "vkd_jax.plan", *flags, "--json=found.json"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads((tmp_path / "found.json").read_text()), done.stdout

    return run


def test_as_a_program(run, tiny_folder):
    """The TPU compiler's figures of a tiny step, on the page and in the file."""
    flags = [f"--config={ROOT}/configs/tiny.py", f"--config.model.path={tiny_folder}", "--topology=v5e:1x1"]
    found, page = run(*flags, "--text_tokens=12", "--answer_tokens=5")
    own, usual = found["steps"]["vkd"], found["steps"]["grad_diff, all weights"]
    for step in (own, usual):
        assert step["fits"] and step["compiler"]["total"] > step["compiler"]["arguments"] > 0
        assert step["compiler"]["collectives"] == {}  # of one chip
    assert own["flops_total"] < usual["flops_total"]
    assert "total by the compiler" in page and "v5e:1x1: 1 chips of 16 GiB" in page


@pytest.mark.slow
def test_llava_7b_unlearns_on_one_chip_of_16_gb(run):
    """As the README has it."""
    flags = [f"--config={ROOT}/configs/llava.py:7b", "--topology=v5e:1x1", "--nocompare"]
    rows = [f"--config.train.batch_size.{name}=4" for name in ("forget", "retain")]
    found, _ = run(*flags, *rows, "--config.model.quantize=int4:64")
    step = found["steps"]["vkd"]
    assert step["fits"] and step["total"] <= 15.0 * 2**30
    assert found["rows"] == {"forget": 4, "retain": 4} and found["tokens"] == 704
