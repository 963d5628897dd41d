"""Quantizing the frozen language model to int8 and int4: values by hand, computation, sharding and export."""

import dataclasses
import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from qwix import QArray

from vkd_jax import methods as unlearning
from vkd_jax.checkpoints import export, hf
from vkd_jax.checkpoints.bundle import check_trainable
from vkd_jax.checkpoints.manifest import compare_tensors
from vkd_jax.data.encoding import EncodedSet
from vkd_jax.data.images import PackedImages
from vkd_jax.methods import base as methods
from vkd_jax.methods import losses, saliency, scope
from vkd_jax.models import base, generate, llava, quantize
from vkd_jax.models.clip_vit import VisionConfig
from vkd_jax.models.decoder import DecoderConfig
from vkd_jax.models.quantize import Quantization
from vkd_jax.training.step import TrainState, make_step
from vkd_jax.types import UserError

ROOT = Path(__file__).parents[2]
KERNEL = "language_model/blocks/mlp/up/kernel"
HEAD, TABLE = "language_model/head/kernel", "language_model/embed/embedding"
CONFIG = llava.LlavaConfig(
    vision=VisionConfig(image_size=16, patch_size=8, width=32, layers=2, heads=2, mlp_width=64),
    text=DecoderConfig(vocab=96, width=64, layers=3, heads=4, kv_heads=2, head_width=16, mlp_width=160),
    image_token_id=4,
)
TIED = dataclasses.replace(CONFIG, text=dataclasses.replace(CONFIG.text, tie_embeddings=True))


@functools.cache
def drawn(config):
    """Returns a random model with distinct answers."""
    graphdef, params = hf.init_params(config, 0)
    return graphdef, {path: x * 5 if path in (HEAD, TABLE) else x for path, x in params.items()}


@functools.cache
def small(text, config=CONFIG):
    settings = quantize.parse(text)
    return {path: quantize.quantize_param(path, x, settings) for path, x in drawn(config)[1].items()}


def layer_of(text):
    """Returns the kernel of the first layer."""
    return jax.tree.map(lambda x: x[0], small(text)[KERNEL])


def as_floats(params):
    """Returns the dequantized weights."""
    return {path: quantize.dequantize(x, jnp.float32) for path, x in params.items()}


def rows(count=6, seed=1):
    """Returns rows of four image tokens, five tokens of a question and three of an answer."""
    random = np.random.default_rng(seed)
    tokens = random.integers(5, 96, (count, 12)).astype(np.int32)
    tokens[:, :4] = CONFIG.image_token_id
    return EncodedSet(
        examples=(None,) * count,
        tokens=tokens,
        mask=np.ones_like(tokens, bool),
        target_positions=np.tile(np.array([8, 9, 10], np.int32), (count, 1)),
        targets=tokens[:, 9:],
        target_mask=np.ones((count, 3), bool),
        prompt_length=np.full(count, 9, np.int32),
        image_rows=np.arange(count, dtype=np.int32),
        images=PackedImages.of(random.normal(size=(count, 16, 16, 3)).astype(np.float32), CONFIG),
    )


def parts(params, config=CONFIG):
    paths = scope.visual_paths(params, config, -1)
    return {k: params[k] for k in paths}, {k: x for k, x in params.items() if k not in paths}


def loss(graphdef, trainable, frozen, batch):
    logits, _ = methods.answer_logits(base.bind(graphdef, {**frozen, **trainable}), batch)
    return losses.answer_cross_entropy(logits, batch.targets, batch.target_mask).mean(), logits


@functools.partial(jax.jit, static_argnames="graphdef")
def step(graphdef, trainable, frozen, batch):
    """Returns the logits at the answers, and the gradient of the visual weights as one vector."""
    (_, logits), gradient = jax.value_and_grad(loss, argnums=1, has_aux=True)(graphdef, trainable, frozen, batch)
    return logits, jnp.concatenate([x.ravel() for x in gradient.values()])


def asked(params, config=CONFIG, **changes):
    graphdef, _ = drawn(config)
    if changes:
        config = dataclasses.replace(config, **changes)
        graphdef, _ = base.abstract_model(lambda rngs: llava.Llava(config, rngs=rngs))
    return step(graphdef, *parts(params, config), rows().batch(np.arange(6)))


def cosine(a, b):
    return float(a @ b / jnp.linalg.norm(a) / jnp.linalg.norm(b))


def kl(logits, other):
    p, q = jax.nn.log_softmax(logits), jax.nn.log_softmax(other)
    return float((jnp.exp(p) * (p - q)).sum(-1).mean())


# Values by hand.


def test_int8_by_hand():
    # A channel's largest weight is 127.5 steps: the steps are 1 and 1 / 127.5.
    weight = quantize.quantize_param(HEAD, jnp.array([[127.5, 1.0], [3.2, -0.5]]), Quantization(8))
    np.testing.assert_array_equal(weight.qvalue, [[127, 127], [3, -64]])
    assert weight.qvalue.dtype == jnp.int8
    np.testing.assert_allclose(weight.scale, [[1, 1 / 127.5]], rtol=1e-6)
    want = [[127, 127 / 127.5], [3, -64 / 127.5]]
    np.testing.assert_allclose(quantize.dequantize(weight, "float32"), want, rtol=1e-6)
    product = quantize.matmul(jnp.array([[1.0, 10.0]]), weight)
    np.testing.assert_allclose(product, [[157, -513 / 127.5]], rtol=1e-6)


def test_int4_in_groups_by_hand():
    # Two layers of four inputs and one output; the largest of each two inputs is 7.5 steps.
    layers = jnp.array([[7.5, 2.2, 0.75, -0.3], [-15.0, 0.9, 0.0, 0.0]])[..., None]
    weight = quantize.quantize_param(KERNEL, layers, Quantization(4, 2))
    np.testing.assert_array_equal(weight.qvalue[..., 0].astype(jnp.int8), [[7, 2, 7, -3], [-8, 0, 0, 0]])
    assert weight.qvalue.dtype == jnp.int4
    np.testing.assert_allclose(weight.scale[..., 0], [[1, 0.1], [2, 1]], rtol=1e-6)
    np.testing.assert_allclose(quantize.dequantize(weight, "float32")[1, :, 0], [-16, 0, 0, 0])


@pytest.mark.parametrize("axis", [0, 1])
def test_products_with_groups_equal_those_of_dequantized_weights(axis):
    """For a kernel, and for a table whose rows are outputs; with the gradient."""
    draw = np.random.default_rng(0).normal
    array = jnp.asarray(draw(size=[(32, 10), (10, 32)][axis]), jnp.float32)
    path = [HEAD, "language_model/embed/embedding"][axis]
    weight = quantize.quantize_param(path, array, Quantization(8, 8))
    assert weight.scale.shape == [(4, 10), (10, 4)][axis]
    x, back = jnp.asarray(draw(size=(5, 32)), jnp.float32), jnp.asarray(draw(size=(5, 10)), jnp.float32)
    plain = quantize.dequantize(weight, "float32") if axis == 0 else quantize.dequantize(weight, "float32").T
    product, pull = jax.vjp(lambda x: quantize.matmul(x, weight, axis), x)
    np.testing.assert_allclose(product, x @ plain, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(pull(back)[0], back @ plain.T, rtol=1e-5, atol=1e-5)


def test_w8a8_by_hand():
    # Weights (127, 3), (0, -64) in steps of 1 and 1 / 127.5; tokens (127.5, 1) and (1, 10) in steps of 1, 10 / 127.5.
    weight = quantize.W8A8Kernel(jnp.array([[127, 3], [0, -64]], jnp.int8), jnp.array([[1, 1 / 127.5]]))
    x = jnp.array([[127.5, 1.0], [1.0, 10.0]])
    product, back = jax.vjp(lambda x: quantize.matmul(x, weight), x)
    steps = np.array([[127, 1], [13, 127]]) @ np.array([[127, 3], [0, -64]])
    np.testing.assert_allclose(product, steps * [[1], [10 / 127.5]] * [[1, 1 / 127.5]], rtol=1e-6)
    # The gradient in units of the weights' steps is (127.5, -2) and (0, 1): steps of 1 and 1 / 127.5.
    gradient = back(jnp.array([[127.5, -2.0 * 127.5], [0.0, 127.5]]))[0]
    np.testing.assert_allclose(gradient, [[127 * 127 - 2 * 3, 128], [3 * 127 / 127.5, -64 * 127 / 127.5]], rtol=1e-6)


def test_a_table_is_quantized_and_read_by_row():
    table = quantize.quantize_param(TABLE, jnp.array([[127.5, 3.2], [1.0, -0.5]]), Quantization(8))
    np.testing.assert_allclose(table.scale, [[1], [1 / 127.5]], rtol=1e-6)
    np.testing.assert_allclose(
        quantize.take_rows(table, jnp.array([[1, 0]]), "float32"), [[[127 / 127.5, -64 / 127.5], [127, 3]]], rtol=1e-6
    )


def test_bfloat16_weights_are_quantized_as_their_float32_values():
    x = jax.random.normal(jax.random.key(0), (2, 64, 32), jnp.bfloat16)
    ours, exact = (quantize.quantize_param(KERNEL, value, Quantization(8)) for value in (x, x.astype(jnp.float32)))
    np.testing.assert_array_equal(ours.qvalue, exact.qvalue)
    np.testing.assert_array_equal(ours.scale, exact.scale)


# Which weights are quantized, and settings.


@pytest.mark.parametrize("config", [CONFIG, TIED])
def test_only_the_matrices_of_the_language_model_are_quantized(config):
    _, params = drawn(config)
    for text, bits in (("int8", 8), ("int4", 4)):
        quantized = {path: x for path, x in small(text, config).items() if isinstance(x, QArray)}
        assert {path for path in params if path.startswith("language_model/") and "norm" not in path} == set(quantized)
        for path, x in quantized.items():
            assert jnp.iinfo(x.qvalue.dtype).bits == (8 if path in (HEAD, TABLE) else bits)
            assert (x.shape, x.scale.dtype) == (params[path].shape, jnp.float32)
        assert all(x is params[path] for path, x in small(text, config).items() if path not in quantized)


def test_biases_norms_and_visual_weights_are_not_quantized():
    for path in (
        "language_model/blocks/attn/q/bias",
        "language_model/blocks/norm1/scale",
        "language_model/norm/scale",
        "vision_tower/blocks/0/attn/q/kernel",
        "vision_tower/patch_embedding",
        "projector/fc1/kernel",
    ):
        x = jnp.ones((4, 4))
        assert quantize.quantize_param(path, x, Quantization(8)) is x


@pytest.mark.parametrize(
    ("text", "settings"),
    [
        ("", None),
        ("int8", Quantization(8, None)),
        ("int4", Quantization(4, 128)),
        ("int8:64", Quantization(8, 64)),
        ("int4:32", Quantization(4, 32)),
        ("w8a8", Quantization(8, activations=True)),
    ],
)
def test_settings_are_parsed(text, settings):
    assert quantize.parse(text) == settings


@pytest.mark.parametrize(
    "text", ["int", "int2", "int16", "int8:", "int8:0", "int4:-1", "int8:x", " int8", "nf4", "INT8", "w8a8:64"]
)
def test_other_settings_are_rejected(text):
    with pytest.raises(UserError, match="model.quantize: .* is not allowed. Give int8 or int4"):
        quantize.parse(text)


def test_the_group_size_is_the_largest_divisor_of_the_width():
    sizes = [Quantization(4, 128).group_size(width) for width in (4096, 128, 320, 100, 11008, 18944, 8960)]
    assert sizes == [128, 128, 80, 100, 128, 128, 128]
    assert Quantization(8).group_size(131) == 131


def test_a_width_without_a_suitable_divisor_is_rejected():
    with pytest.raises(UserError, match="131 channels.*a group size that divides 131"):
        quantize.quantize_param(KERNEL, jnp.ones((1, 131, 2)), Quantization(4, 128))


# Computation.


@pytest.mark.parametrize(
    ("text", "least_cosine", "most_kl"),
    [
        pytest.param("int8", 0.999, 5e-4, marks=pytest.mark.slow),  # channels, as w8a8
        pytest.param("int8:32", 0.999, 5e-4, marks=pytest.mark.slow),  # groups, as int4:32
        pytest.param("int4", 0.8, 0.1, marks=pytest.mark.slow),  # channels, as w8a8
        ("int4:32", 0.8, 0.1),
        ("w8a8", 0.99, 5e-3),
    ],
)
def test_logits_and_visual_gradients_are_close_to_those_of_float32(text, least_cosine, most_kl):
    logits, gradient = asked(drawn(CONFIG)[1])
    other, other_gradient = asked(small(text))
    assert 1e-9 < kl(logits, other) < most_kl
    assert least_cosine < cosine(gradient, other_gradient) < 1 - 1e-9


@pytest.mark.parametrize(
    ("text", "config", "remat"),
    [
        *(("int8", CONFIG, ""), ("int4:32", CONFIG, "full"), ("int4", TIED, "")),
        pytest.param("int4:32", CONFIG, "dots", marks=pytest.mark.slow),
    ],
)
def test_logits_and_gradients_equal_those_of_dequantized_weights(text, config, remat):
    params = small(text, config)
    for ours, floats in zip(asked(params, config, remat=remat), asked(as_floats(params), config), strict=True):
        np.testing.assert_allclose(ours, floats, rtol=1e-4, atol=1e-5 * float(jnp.abs(floats).max()))


def test_w8a8_multiplies_integers_only_in_the_blocks():
    kinds = {path: type(x) for path, x in small("w8a8").items() if isinstance(x, QArray)}
    blocks = {path for path in kinds if path.startswith("language_model/blocks/")}
    assert {path for path, kind in kinds.items() if kind is quantize.W8A8Kernel} == blocks and kinds.keys() - blocks
    traced = str(jax.make_jaxpr(lambda x, w: quantize.matmul(x, w))(jnp.ones((2, 64)), layer_of("w8a8")))
    assert "preferred_element_type=int32" in traced


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_rematerialized_w8a8_gives_the_same_gradients(remat):
    (logits, gradient), (same, again) = asked(small("w8a8")), asked(small("w8a8"), remat=remat)
    # Values between two integers may be rounded to either: changing the weights by 1e-6 gives 1.1e-4 and 0.9995.
    assert kl(logits, same) < 3e-4
    assert cosine(gradient, again) > 0.999


def test_bfloat16_computation_rounds_dequantized_weights_once():
    params = small("int4")
    options = dict(compute_dtype="bfloat16")
    ours, ours_gradient = asked(params, **options)
    floats, floats_gradient = asked(as_floats(params), **options)
    np.testing.assert_allclose(ours, floats, rtol=0.02, atol=0.02 * float(jnp.abs(floats).max()))
    assert cosine(ours_gradient, floats_gradient) > 0.999
    x = jnp.ones((2, 64), jnp.bfloat16)
    assert quantize.matmul(x, params[HEAD]).dtype == jnp.bfloat16
    assert quantize.take_rows(params[TABLE], jnp.array([3]), "bfloat16").dtype == jnp.bfloat16


def test_gradients_of_single_rows_equal_those_of_dequantized_weights():
    def one(trainable, frozen, batch):
        return loss(drawn(CONFIG)[0], trainable, frozen, batch)[0][None]

    scores = [
        saliency.fisher_information(one, *parts(params), {"forget": (rows(), np.arange(4))}, chunk=2)["forget"]
        for params in (small("int8"), as_floats(small("int8")))
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6 * float(b.max())), *scores)


def test_generation_and_scores_equal_those_of_dequantized_weights():
    batch = rows().batch(np.arange(6))
    tokens, mask = batch.tokens[:, :9], batch.mask[:, :9]

    @jax.jit
    def run(params):
        model = base.bind(drawn(CONFIG)[0], params)
        features, _ = model.encode(batch.images)
        prompts = generate.Prompts(tokens, mask, features)
        answer = generate.greedy(model, prompts, max_new_tokens=4, eos_ids=(2,), pad_id=0)
        options = batch.targets.reshape(6, 1, 3)
        return answer, generate.option_log_probs(model, prompts, options, options > 0)

    (ours, ours_scores), (floats, floats_scores) = run(small("int4")), run(as_floats(small("int4")))
    np.testing.assert_array_equal(ours, floats)
    np.testing.assert_allclose(ours_scores, floats_scores, rtol=1e-4)


def test_the_backward_pass_saves_no_dequantized_layers():
    text = DecoderConfig(vocab=32, width=128, layers=6, heads=2, kv_heads=2, head_width=64, mlp_width=256)
    config = dataclasses.replace(CONFIG, text=text)
    graphdef, params = hf.init_params(config, 0)
    stack = sum(x.nbytes for path, x in params.items() if "language_model/blocks" in path)

    def memory(settings):
        weights = params
        if settings:
            weights = {path: quantize.quantize_param(path, x, settings) for path, x in params.items()}
        arguments = (graphdef, *parts(weights, config), rows(1).batch(np.arange(1)))
        return step.lower(*arguments).compile().memory_analysis()

    floats, eight = memory(None), memory(Quantization(8))
    assert eight.argument_size_in_bytes < floats.argument_size_in_bytes - 0.7 * stack
    assert eight.temp_size_in_bytes < floats.temp_size_in_bytes + 0.3 * stack


TEMPORARIES = """
import jax, jax.numpy as jnp
from qwix import QArray
from vkd_jax.planner.tpu_specs import topology_devices
from vkd_jax.models import quantize
there = jax.sharding.SingleDeviceSharding(topology_devices("v5e:1x1")[0])
shape = lambda dtype, *sizes: jax.ShapeDtypeStruct(sizes, dtype, sharding=there)
weight = QArray(shape(jnp.int4, 4096, 11008), shape(jnp.float32, 64, 11008))
def both(x, weight):
    product, pull = jax.vjp(lambda x: quantize.matmul(x, weight), x)
    return pull(jnp.tanh(product))
print(jax.jit(both).lower(shape(jnp.bfloat16, 256, 4096), weight).compile().memory_analysis().temp_size_in_bytes)
"""


@pytest.mark.slow
def test_a_tpu_dequantizes_groups_inside_the_product():
    """The forward and backward pass of a 7B model's kernel, 172 MiB in float32, need less than 1 MiB of temporaries."""
    pytest.importorskip("libtpu", reason="the TPU compiler is not installed: pip install '.[tpu]'")
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "JAX_PLATFORMS": "cpu"}
    shown = subprocess.run([sys.executable, "-c", TEMPORARIES], env=env, check=True, capture_output=True, text=True)
    assert int(shown.stdout) < 2**20


def test_quantization_and_the_step_work_on_shapes():
    graphdef, shapes = base.abstract_model(lambda rngs: llava.Llava(CONFIG, rngs=rngs))
    settings = quantize.parse("int4:32")

    def quantize_all(params):
        return {path: quantize.quantize_param(path, x, settings) for path, x in params.items()}

    params = jax.eval_shape(quantize_all, shapes)
    assert jax.tree.structure(params) == jax.tree.structure(small("int4:32"))
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(params)] == [
        (x.shape, x.dtype) for x in jax.tree.leaves(small("int4:32"))
    ]
    logits, gradient = jax.eval_shape(functools.partial(step, graphdef), *parts(params), rows().batch(np.arange(6)))
    assert logits.shape == (6, 3, 96)
    assert gradient.size == sum(x.size for x in parts(params)[0].values())


def test_split_model_inverts_bind():
    graphdef, params = base.split_model(base.bind(drawn(CONFIG)[0], small("int4")))
    assert graphdef == drawn(CONFIG)[0]
    assert jax.tree.structure(params) == jax.tree.structure(small("int4"))


# Training and export.


def test_a_step_trains_the_visual_weights_and_no_quantized_one():
    trainable, frozen = parts(small("int8"))
    tx = optax.with_extra_args_support(optax.adam(3e-3))
    fns = {"image": lambda model, batch: (jnp.mean(methods.cross_entropy(model, batch)), {})}
    update = jax.jit(make_step(drawn(CONFIG)[0], fns, tx, "none"))
    state = TrainState(trainable, tx.init(trainable), jnp.int32(0))
    batch, seen = {"image": rows().batch(np.arange(6))}, []
    for _ in range(10):
        state, metrics = update(state, frozen, None, batch)
        seen.append(float(metrics["loss"]))
    assert seen[-1] < 0.9 * seen[0]

    quantized = {path for path, value in small("int8").items() if isinstance(value, QArray)}
    assert quantized == {path for path in (*frozen, *trainable) if quantize.is_quantized(path)}
    assert not quantized & set(trainable)


def test_a_method_that_trains_quantized_weights_is_rejected_from_shapes(tiny_folder):
    check_trainable(tiny_folder, unlearning.create("vkd", {}), "int8")
    check_trainable(tiny_folder, unlearning.create("finetune", {"train": "lora"}), "int8")
    with pytest.raises(UserError, match="9 of the weights to train would be quantized.*visual weights or adapters"):
        check_trainable(tiny_folder, unlearning.create("grad_diff", {}), "int8")
    with pytest.raises(UserError, match="blocks=9: fewer vision blocks .* Give -1 to 1"):
        check_trainable(tiny_folder, unlearning.create("vkd", {"blocks": 9}), "int8")
    with pytest.raises(UserError, match="method.taps: unknown tap 'nose'"):
        check_trainable(tiny_folder, unlearning.create("vkd", {"taps": ("nose",)}), "int8")


def test_an_export_does_not_change_the_language_model(tiny_folder, tmp_path):
    _, params, config = hf.load(
        tiny_folder, transform=functools.partial(quantize.quantize_param, settings=quantize.parse("int4"))
    )
    assert isinstance(params[KERNEL], QArray)
    trained = {path: params[path] + 1 for path in scope.visual_paths(params, config, -1)}
    export.export(trained, tiny_folder, tmp_path / "out", config)
    tensors = compare_tensors(tiny_folder, tmp_path / "out")["tensors"]
    changed = {name for name, digests in tensors.items() if digests["changed"]}
    language = {name for name in tensors if "language_model" in name or "lm_head" in name}
    assert len(language) == 21
    assert not changed & language
    assert any("vision_tower" in name for name in changed) and any("projector" in name for name in changed)


# Eight devices, simulated by XLA.


@pytest.fixture
def meshes(eight_devices):
    return eight_devices["quantization"]


@pytest.mark.parametrize("mesh", ["1,8,1", "2,2,2"])
def test_every_mesh_gives_the_results_of_one_device(meshes, mesh):
    assert all(meshes[text][mesh]["sum"] == meshes[text]["1,1,1"]["sum"] for text in ("int8", "int4:8"))
    one, sharded = meshes["computed"]["1,1,1"], meshes["computed"][mesh]
    np.testing.assert_allclose(sharded["loss"], one["loss"], rtol=1e-5)
    np.testing.assert_allclose(sharded["gradient"], one["gradient"], rtol=1e-3)


def test_values_and_scales_have_the_sharding_of_the_weights(meshes):
    settings = ("int8", "int4:8")
    assert all(results["moved"] == [] for text in settings for results in meshes[text].values())
    spec = {text: meshes[text]["2,2,2"]["spec"] for text in settings}
    up, down, table = KERNEL, "language_model/blocks/mlp/down/kernel", TABLE
    # One scale for all inputs cannot be sharded; four groups of inputs can.
    assert spec["int8"][up] == [None, None, "tensor"] and spec["int8"][down] == [None, None, "fsdp"]
    assert spec["int4:8"][up] == [None, "fsdp", "tensor"] and spec["int4:8"][down] == [None, "tensor", "fsdp"]
    assert spec["int8"][table] == ["tensor", None] and spec["int4:8"][table] == ["tensor", "fsdp"]
    # Two groups do not divide over eight devices, and become eight.
    assert meshes["int4:8"]["1,8,1"]["spec"][up] == [None, "fsdp", None]


def test_no_device_repeats_the_products_of_another(meshes):
    """With six groups over four devices, and with eight, which four divides."""
    assert all(1 <= ratio < 1.1 for ratio in meshes["work"].values())
