"""Adapters: values by hand, identity at the start, gradients, dropout, sharding and export."""

import dataclasses
import functools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from vkd_jax.checkpoints import export, hf, safetensors_files
from vkd_jax.checkpoints.manifest import compare_tensors
from vkd_jax.config.training import TrainConfig
from vkd_jax.data.encoding import Batch
from vkd_jax.methods import base as methods
from vkd_jax.methods import losses, scope
from vkd_jax.methods.finetune import Finetune
from vkd_jax.models import base, llava, lora, quantize
from vkd_jax.models.clip_vit import VisionConfig
from vkd_jax.models.decoder import DecoderConfig
from vkd_jax.models.lora import Lora
from vkd_jax.training import optimizer

ROOT = Path(__file__).parents[2]
UP = "language_model/blocks/mlp/up/kernel"
CONFIG = llava.LlavaConfig(
    vision=VisionConfig(image_size=16, patch_size=8, width=16, layers=2, heads=2, mlp_width=32),
    text=DecoderConfig(vocab=64, width=32, layers=2, heads=4, kv_heads=2, head_width=8, mlp_width=48),
    image_token_id=4,
)
KEY = jax.random.key(7)
INT8 = quantize.parse("int8")


def random_params(shapes, seed=0):
    """Draws random weights of these shapes without compiling an initializer."""
    random = np.random.default_rng(seed)
    scale = {path: x.shape[-2] ** -0.5 if path.endswith("kernel") else 1.0 for path, x in shapes.items()}
    return {path: jnp.asarray(random.normal(0, scale[path], x.shape), jnp.float32) for path, x in shapes.items()}


@functools.cache
def graph(**changes):
    return base.abstract_model(lambda rngs: llava.Llava(dataclasses.replace(CONFIG, **changes), rngs=rngs))


@functools.cache
def plain():
    return random_params(graph()[1])


def attached(params, rank=4, alpha=8.0, dropout=0.0, seed=0, **options):
    return lora.attach(params, rank=rank, alpha=alpha, dropout=dropout, seed=seed, **options)


def tuned(params, seed=1):
    """Returns the parameters with a random B instead of zeros, as if trained."""
    random = np.random.default_rng(seed)
    return params | {
        path: jnp.asarray(random.normal(0, 0.3, x.shape), jnp.float32)
        for path, x in params.items()
        if path.endswith("/lora_b")
    }


def merged(params):
    """Returns equivalent plain weights, W + A B alpha / rank, with alpha / rank = 2."""
    out = {path: quantize.dequantize(x, jnp.float32) for path, x in params.items() if not isinstance(x, Lora)}
    for path, x in lora.adapters(params).items():
        a, b = out.pop(f"{path}/lora_a"), out.pop(f"{path}/lora_b")
        out[path] = quantize.dequantize(x.weight, jnp.float32) + 2 * jnp.einsum("ldr,lrf->ldf", a, b)
    return out


@functools.cache
def batch():
    random = np.random.default_rng(3)
    tokens = random.integers(5, 64, (3, 10)).astype(np.int32)
    return Batch(
        tokens=tokens,
        mask=np.ones_like(tokens, bool),
        target_positions=np.tile(np.array([7, 8], np.int32), (3, 1)),
        targets=tokens[:, 8:],
        target_mask=np.ones((3, 2), bool),
        images=None,
        cached={},
    )


@functools.partial(jax.jit, static_argnums=0)
def logits(graphdef, params, batch, key=None):
    return methods.answer_logits(base.bind(graphdef, params, key), batch)[0]


@functools.partial(jax.jit, static_argnums=0)
@functools.partial(jax.grad, argnums=1)
def gradient(graphdef, trainable, frozen, batch, key=None):
    answers, _ = methods.answer_logits(base.bind(graphdef, {**frozen, **trainable}, key), batch)
    return losses.answer_cross_entropy(answers, batch.targets, batch.target_mask).mean()


def parts(params, paths):
    return {k: params[k] for k in paths}, {k: x for k, x in params.items() if k not in paths}


def adapter_gradient(graphdef, params, key=None):
    paths = scope.trainable_paths(params, CONFIG, "lora", -1)
    return gradient(graphdef, *parts(params, paths), batch(), key)


# Values by hand.


def test_matmul_with_an_adapter_by_hand():
    weight = Lora(
        jnp.array([[1.0, 2.0], [3.0, 4.0]]), 0.5, 0.0, a=jnp.array([[1.0], [-1.0]]), b=jnp.array([[2.0, 3.0]])
    )
    # x W = (7, 10); x A B = -1 (2, 3); alpha / rank = 1/2.
    np.testing.assert_array_equal(lora.matmul(jnp.array([[1.0, 2.0]]), weight), [[6.0, 8.5]])
    np.testing.assert_array_equal(lora.delta(weight, None), [[1.0, 1.5], [-1.0, -1.5]])


def test_matmul_with_an_adapter_of_an_int8_kernel_by_hand():
    # Dequantized: (127, 127 / 127.5), (3, -64 / 127.5).
    quantized = quantize.quantize_param(UP, jnp.array([[127.5, 1.0], [3.2, -0.5]]), INT8)
    weight = Lora(quantized, 2.0, 0.0, a=jnp.array([[1.0], [0.0]]), b=jnp.array([[1.0, -1.0]]))
    want = [[157 + 2, -513 / 127.5 - 2]]
    np.testing.assert_allclose(lora.matmul(jnp.array([[1.0, 10.0]]), weight), want, rtol=1e-6)


def test_dropout_by_hand():
    # The adapter gets zero or twice its single input; the kernel always gets the input.
    weight = Lora(jnp.array([[5.0]]), 1.0, 0.5, a=jnp.array([[1.0]]), b=jnp.array([[10.0]]), key=KEY)
    x = jnp.full((4000, 1), 3.0)
    y = lora.matmul(x, weight)
    assert set(np.unique(y)) == {15.0, 15.0 + 60.0}
    np.testing.assert_allclose(y.mean(), 45.0, rtol=0.03)
    low_rate = lora.matmul(x, dataclasses.replace(weight, dropout=0.05))
    np.testing.assert_allclose((low_rate == 15.0).mean(), 0.05, atol=0.01)
    np.testing.assert_allclose(low_rate.mean(), 45.0, rtol=0.03)
    np.testing.assert_array_equal(lora.matmul(x, dataclasses.replace(weight, key=None)), jnp.full((4000, 1), 45.0))
    np.testing.assert_array_equal(lora.matmul(x, weight), y)


# Attaching adapters.


def test_attach_adds_an_adapter_to_each_kernel_of_the_blocks_and_changes_nothing_else():
    params = attached(plain(), rank=4, alpha=8.0, dropout=0.1)
    kernels = {f"language_model/blocks/{name}/kernel" for name in
               ("attn/q", "attn/k", "attn/v", "attn/o", "mlp/gate", "mlp/up", "mlp/down")}  # fmt: skip
    assert set(lora.adapters(params)) == kernels
    new = {f"{path}/{name}" for path in kernels for name in ("lora_a", "lora_b")}
    assert set(params) == set(plain()) | new
    assert all(params[path] is x for path, x in plain().items() if path not in kernels)
    for path in kernels:
        x = params[path]
        assert x.weight is plain()[path] and (x.scale, x.dropout, x.a, x.b) == (2.0, 0.1, None, None)
        layers, d, f = x.weight.shape
        a, b = params[f"{path}/lora_a"], params[f"{path}/lora_b"]
        assert (a.shape, b.shape, a.dtype, b.dtype) == ((layers, d, 4), (layers, 4, f), jnp.float32, jnp.float32)
        assert not b.any()
    quantized = attached({path: quantize.quantize_param(path, x, INT8) for path, x in plain().items()})
    assert quantized[UP].weight.qvalue.dtype == jnp.int8
    np.testing.assert_array_equal(quantized[f"{UP}/lora_a"], params[f"{UP}/lora_a"])


def test_a_has_the_distribution_of_peft():
    torch = pytest.importorskip("torch")
    ours = np.asarray(attached({UP: jnp.zeros((2, 400, 3))}, rank=100)[f"{UP}/lora_a"])
    torch.manual_seed(0)
    theirs = torch.nn.init.kaiming_uniform_(torch.empty(100, 400), a=math.sqrt(5)).numpy()
    np.testing.assert_allclose(np.abs(ours).max(), np.abs(theirs).max(), rtol=1e-3)
    np.testing.assert_allclose([ours.std(), ours.mean()], [theirs.std(), 0], atol=3e-4)


def test_adapters_are_independent_and_determined_by_the_seed():
    params, again, other = (attached(plain(), seed=seed) for seed in (0, 0, 1))
    drawn = [layer for path, x in params.items() if path.endswith("lora_a") for layer in np.asarray(x)]
    assert len({x.tobytes() for x in drawn}) == len(drawn) == 14
    for path in params:
        if path.endswith("lora_a"):
            np.testing.assert_array_equal(params[path], again[path])
            assert not np.any(params[path] == other[path])


def test_attach_and_the_forward_pass_work_on_shapes():
    graphdef, shapes = graph()
    params = jax.eval_shape(attached, shapes)
    assert jax.tree.structure(params) == jax.tree.structure(attached(plain()))
    assert jax.eval_shape(functools.partial(logits.__wrapped__, graphdef), params, batch()).shape == (3, 2, 64)


def test_split_model_inverts_bind():
    params = tuned(attached(plain(), dropout=0.5))
    graphdef, back = base.split_model(base.bind(graph()[0], params, KEY))
    assert graphdef == graph()[0]
    assert jax.tree.structure(back) == jax.tree.structure(params)
    assert all(x is y for x, y in zip(jax.tree.leaves(back), jax.tree.leaves(params), strict=True))


def test_bind_reports_incomplete_adapters_and_parameters_without_adapter():
    params, graphdef = attached(plain()), graph()[0]
    with pytest.raises(ValueError, match=rf"lack \['{UP}/lora_b'\]"):
        base.bind(graphdef, {path: x for path, x in params.items() if path != f"{UP}/lora_b"})
    with pytest.raises(ValueError, match=rf"lack \[\], and \['{UP}/lora_a', '{UP}/lora_b'\] belong to no adapter"):
        base.bind(graphdef, params | {UP: params[UP].weight})
    with pytest.raises(ValueError, match="not all parameters of the module"):
        base.bind(graphdef, {path: x for path, x in params.items() if path != "language_model/norm/scale"})


# Computation.


@pytest.mark.parametrize(
    ("compute_dtype", "key"),
    [("float32", None), pytest.param("float32", KEY, marks=pytest.mark.slow), ("bfloat16", KEY)],
)
def test_a_new_adapter_does_not_change_a_bit_of_the_logits(compute_dtype, key):
    graphdef, _ = graph(compute_dtype=compute_dtype)
    want = logits(graphdef, plain(), batch())
    np.testing.assert_array_equal(logits(graphdef, attached(plain(), dropout=0.3), batch(), key), want)


@pytest.mark.parametrize("settings", [pytest.param(None, marks=pytest.mark.slow), INT8])
def test_logits_equal_those_of_merged_weights_and_gradients_follow_the_chain_rule(settings):
    graphdef, _ = graph()
    base_params = plain()
    if settings:
        base_params = {path: quantize.quantize_param(path, x, settings) for path, x in base_params.items()}
    params = tuned(attached(base_params))
    whole = merged(params)
    want = logits(graphdef, whole, batch())
    assert float(jnp.abs(want - logits(graphdef, base_params, batch())).max()) > 0.1
    np.testing.assert_allclose(logits(graphdef, params, batch()), want, rtol=1e-4, atol=1e-4)

    gradients = adapter_gradient(graphdef, params)
    assert set(gradients) == set(params) - set(plain())
    weight_gradients = gradient(graphdef, *parts(whole, set(lora.adapters(params))), batch())
    for path, dw in weight_gradients.items():
        a, b = params[f"{path}/lora_a"], params[f"{path}/lora_b"]
        # W = W0 + 2 A B, so dA = 2 dW B^T and dB = 2 A^T dW.
        for name, by_hand in (
            ("lora_a", 2 * jnp.einsum("ldf,lrf->ldr", dw, b)),
            ("lora_b", 2 * jnp.einsum("ldr,ldf->lrf", a, dw)),
        ):
            ours = gradients[f"{path}/{name}"]
            np.testing.assert_allclose(ours, by_hand, rtol=1e-3, atol=1e-4 * float(jnp.abs(by_hand).max()))


def test_at_the_start_only_b_has_a_gradient():
    gradients = adapter_gradient(graph()[0], attached(plain()))
    assert all(bool(g.any()) == path.endswith("lora_b") for path, g in gradients.items())


def test_in_bfloat16_adapters_stay_float32():
    graphdef, _ = graph(compute_dtype="bfloat16")
    params = tuned(attached({path: x.astype(jnp.bfloat16) for path, x in plain().items()}))
    trainable, frozen = parts(params, scope.trainable_paths(params, CONFIG, "lora", -1))
    shapes = jax.eval_shape(functools.partial(gradient.__wrapped__, graphdef), trainable, frozen, batch())
    assert {x.dtype for x in (*trainable.values(), *shapes.values())} == {jnp.dtype(jnp.float32)}
    x = jnp.ones((2, 32), jnp.bfloat16)
    first = jax.tree.map(lambda x: x[0], lora.join(params)[UP])
    assert lora.matmul(x, first).dtype == jnp.bfloat16
    want = x.astype(jnp.float32) @ merged(params)[UP][0]
    np.testing.assert_allclose(lora.matmul(x, first), want, rtol=0.02, atol=0.02 * float(jnp.abs(want).max()))


# Dropout in the model.


def test_every_kernel_and_layer_has_its_own_dropout_key():
    joined = lora.adapters(lora.join(attached(plain(), dropout=0.1), KEY))
    assert all(x.key.shape == (2,) for x in joined.values())
    keys = [tuple(key) for x in joined.values() for key in np.asarray(jax.random.key_data(x.key)).tolist()]
    assert len(set(keys)) == len(keys) == 14
    other = lora.join(attached(plain(), dropout=0.1), jax.random.key(8))
    assert not set(keys) & {tuple(key) for key in np.asarray(jax.random.key_data(other[UP].key)).tolist()}
    assert all(x.key is None for x in lora.adapters(lora.join(attached(plain(), dropout=0.1))).values())
    assert all(x.key is None for x in lora.adapters(lora.join(attached(plain(), dropout=0.0), KEY)).values())


def test_dropout_is_determined_by_the_key():
    graphdef, params = graph()[0], tuned(attached(plain(), dropout=0.3))
    one, same, other = (logits(graphdef, params, batch(), jax.random.key(seed)) for seed in (7, 7, 8))
    without = logits(graphdef, params, batch())
    np.testing.assert_array_equal(one, same)
    for a, b in ((one, other), (one, without), (other, without)):
        assert float(jnp.abs(a - b).max()) > 1e-3
    np.testing.assert_array_equal(without, logits(graphdef, tuned(attached(plain())), batch()))


def test_rematerialization_repeats_the_same_dropout():
    params = tuned(attached(plain(), dropout=0.3))
    split = parts(params, scope.trainable_paths(params, CONFIG, "lora", -1))
    given = batch()
    # All positions are targets; for fewer, remat="" would compute fewer and drop other inputs.
    everywhere = jnp.broadcast_to(jnp.arange(given.tokens.shape[1]), given.tokens.shape)
    given = dataclasses.replace(given, target_positions=everywhere, targets=given.tokens, target_mask=given.mask)
    ours, want = (gradient(graph(remat=remat)[0], *split, given, KEY) for remat in ("full", ""))
    for path, g in want.items():
        np.testing.assert_allclose(ours[path], g, rtol=1e-4, atol=1e-6 * float(jnp.abs(g).max()), err_msg=path)


# Training.


def test_adapters_are_not_decayed_but_can_be_masked():
    params = tuned(attached(plain()))
    trainable, _ = parts(params, scope.trainable_paths(params, CONFIG, "lora", -1))
    assert len(trainable) == 14 and not any(optimizer.decay_mask(trainable).values())
    tx = optimizer.create(TrainConfig(weight_decay=0.5))
    mask = {path: np.arange(x.size).reshape(x.shape) % 2 == 0 for path, x in trainable.items()}

    @jax.jit
    def update(trainable):
        return tx.update(jax.tree.map(jnp.ones_like, trainable), tx.init(trainable), trainable, rate=0.1, mask=mask)[0]

    for path, step in update(trainable).items():
        # The first step of Adam, without decay.
        np.testing.assert_allclose(step, np.where(mask[path], -0.1, 0), rtol=1e-5)


def test_adapters_of_quantized_weights_are_trainable():
    params = attached({path: quantize.quantize_param(path, x, INT8) for path, x in plain().items()})
    paths = Finetune(train="lora").trainable(params, CONFIG)
    assert paths and not any(map(quantize.is_quantized, paths))
    assert {params[path].dtype for path in paths} == {jnp.dtype(jnp.float32)}


# Export.


def trained(params):
    """Returns the parameters that a run passes to `export.export`."""
    return lora.adapters(params) | {path: x for path, x in params.items() if "lora_" in path}


SLOW = ("qwen2_vl", "internvl")  # whose code other families run, too


@pytest.mark.parametrize(
    "name",
    ["llava", "gemma3", "qwen3_vl", "idefics3", *(pytest.param(x, marks=pytest.mark.slow) for x in SLOW)],
)
def test_the_exported_model_has_the_same_logits_in_transformers(name, family_folder, tmp_path):
    torch = pytest.importorskip("torch")
    import transformers

    folder = family_folder(name)
    graphdef, params, config = hf.load(folder)
    untrained = attached(params, dropout=0.5)
    params = tuned(untrained)
    export.export(trained(params), folder, tmp_path / "out", config)

    tokens = np.random.default_rng(0).integers(10, 300, (2, 9)).astype(np.int32)
    run = jax.jit(lambda params: base.bind(graphdef, params)(tokens, np.ones_like(tokens, bool))[0])
    ours, before = run(params), run(untrained)
    model = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype="float32")
    with torch.no_grad():
        theirs = model(input_ids=torch.tensor(tokens, dtype=torch.long)).logits.numpy()
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4 * np.abs(theirs).max())
    assert np.abs(theirs - before).max() > 0.05 * np.abs(theirs).max()


def test_an_export_changes_only_the_adapted_tensors(tiny_folder, tmp_path):
    _, params, config = hf.load(tiny_folder)
    untrained = attached(params)
    export.export(trained(tuned(untrained)), tiny_folder, tmp_path / "all", config)
    names = ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")
    want = {f"language_model.model.layers.{i}.{name}_proj.weight" for i in (0, 1) for name in names}
    assert set(compare_tensors(tiny_folder, tmp_path / "all")["changed"]) == want
    assert hf.load(tmp_path / "all")[1].keys() == params.keys()

    one = untrained | {f"{UP}/lora_b": untrained[f"{UP}/lora_b"].at[1, 0, 3].set(2.0)}
    export.export(trained(one), tiny_folder, tmp_path / "one", config)
    assert compare_tensors(tiny_folder, tmp_path / "one")["changed"] == [
        "language_model.model.layers.1.mlp.up_proj.weight"
    ]
    difference = hf.load(tmp_path / "one")[1][UP] - params[UP]
    np.testing.assert_allclose(difference[1, :, 3], 4 * one[f"{UP}/lora_a"][1, :, 0], rtol=1e-5, atol=1e-7)
    assert not difference.at[1, :, 3].set(0).any()


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
@pytest.mark.parametrize("settings", [None, INT8])
def test_adapters_are_added_to_the_weights_of_the_source(dtype, settings, tiny_folder, tmp_path):
    """The sum is rounded once, to the dtype of the source; the dtype of the weights in memory does not matter."""
    source = stored(tiny_folder, tmp_path / "source", dtype)
    transform = settings and functools.partial(quantize.quantize_param, settings=settings)
    _, loaded, config = hf.load(source, dtype="bfloat16", transform=transform)
    params = tuned(attached(loaded))
    export.export(trained(params), source, tmp_path / "out", config)
    before, after = (hf.load(folder)[1] for folder in (source, tmp_path / "out"))
    for path, x in after.items():
        assert x.dtype == dtype
        want, got = np.asarray(before[path], np.float32), np.asarray(x, np.float32)
        if f"{path}/lora_a" in params:
            want = want + 2 * np.matmul(*(np.asarray(params[f"{path}/{name}"]) for name in ("lora_a", "lora_b")))
            want = want.astype(dtype).astype(np.float32)
            np.testing.assert_allclose(got, want, rtol=float(jnp.finfo(dtype).eps), atol=1e-6, err_msg=path)
            assert dtype == np.float32 or (got != want).mean() < 0.02, path  # ties may round differently
        else:
            np.testing.assert_array_equal(got, want, err_msg=path)


def stored(folder, target, dtype):
    """Copies a model folder with weights of another dtype, some of which are -0."""
    _, params, config = hf.load(folder)
    params = {path: np.asarray(x).astype(dtype) for path, x in params.items()}
    params[UP][0, :3] = -0.0
    _, hf_config = hf.read_config(folder)
    export.create(target, hf_config, params)
    return target


def test_adapters_that_add_zero_do_not_change_a_byte(tiny_folder, tmp_path):
    source = stored(tiny_folder, tmp_path / "source", ml_dtypes.bfloat16)
    _, params, config = hf.load(source)
    assert np.signbit(params[UP][0, 0, 0])
    export.export(trained(attached(params)), source, tmp_path / "out", config)
    assert compare_tensors(source, tmp_path / "out")["changed"] == []


def test_an_export_reads_one_tensor_at_a_time(tiny_folder, tmp_path, monkeypatch):
    _, params, config = hf.load(tiny_folder)
    read, copy = [], safetensors_files.Tensor.copy_to
    monkeypatch.setattr(
        safetensors_files.Tensor, "copy_to", lambda self, parts: (read.append(self.shape), copy(self, parts))
    )
    export.export(trained(tuned(attached(params))), tiny_folder, tmp_path / "out", config)
    assert len(read) == 14 and all(len(shape) == 2 for shape in read)


def test_incomplete_adapters_are_not_exported(tiny_folder, tmp_path):
    _, params, config = hf.load(tiny_folder)
    params = attached(params)
    without = {path: x for path, x in trained(params).items() if path != UP}
    with pytest.raises(ValueError, match=f"{UP}/lora_a.* belong to no adapter"):
        export.export(without, tiny_folder, tmp_path / "out", config)
    with pytest.raises(ValueError, match="Adapters lack"):
        export.export(lora.adapters(params), tiny_folder, tmp_path / "out", config)
    with pytest.raises(ValueError, match="on disk"):
        other = {f"{UP}/lora_a": np.ones((2, 5, 4), np.float32), f"{UP}/lora_b": np.ones((2, 4, 40), np.float32)}
        export.export({UP: params[UP], **other}, tiny_folder, tmp_path / "out", config)
    assert not (tmp_path / "out").exists()


# Eight devices, simulated by XLA.


def test_every_mesh_gives_the_results_of_one_device(eight_devices):
    results = eight_devices["adapters"]
    one = results["1,1,1"]
    assert len(one["gradient"]) == 14
    np.testing.assert_allclose(results["2,2,2"]["loss"], one["loss"], rtol=1e-5)
    np.testing.assert_allclose(results["2,2,2"]["gradient"], one["gradient"], rtol=1e-3)
    assert results["2,2,2"]["replicated"] and results["2,2,2"]["a"] == one["a"]
