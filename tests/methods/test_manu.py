"""Pruning of neurons: scores by hand, statistics against captured activations, and the weights that are pruned."""

import dataclasses
import functools
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from vkd_jax import methods
from vkd_jax.checkpoints import hf
from vkd_jax.config import defaults
from vkd_jax.data.batching import rng
from vkd_jax.data.encoding import EncodedSet
from vkd_jax.data.images import PackedImages
from vkd_jax.methods import base
from vkd_jax.methods.manu import EPS, Manu, Statistics, importance, select_top
from vkd_jax.models import layers, qwen2_5_vl, qwen2_vl, qwen_vit
from vkd_jax.models.base import bind
from vkd_jax.models.decoder import DecoderConfig
from vkd_jax.models.qwen_vit import VisionConfig
from vkd_jax.runs import pipeline
from vkd_jax.types import Example, UserError

IMAGE = 4  # the image token of the Qwen models below
TAU = 0.02  # random weights have small activations
FAMILIES = ("llava", "qwen2_vl", "qwen2_5_vl")
SETS = ("forget", "retain", "forget_text", "retain_text")


# The scores, by hand.


def statistics_of(z, threshold=TAU):
    """Statistics of activations [..., f] of real tokens, by their definitions."""
    z = np.asarray(z, np.float64).reshape(-1, np.shape(z)[-1])
    return Statistics(z.mean(0), np.abs(z).mean(0), (np.abs(z) > threshold).mean(0), np.square(z).mean(0))


def test_importance_by_hand():
    image, text = statistics_of([[1.0], [-3.0]]), statistics_of([[0.0], [2.0]])
    assert (*image, image.variance) == (-1, 2, 1, 5, 4)
    assert (*text, text.variance) == (1, 1, 0.5, 2, 1)
    want = {"abs": 1 / 3, "freq": 0.5 / 1.5, "var": 5**0.5, "rms": (3 / 7) ** 0.5}
    alone = {"abs": 2, "freq": 1, "var": 2, "rms": 5**0.5}
    for term in want:
        np.testing.assert_allclose(importance(image, text, [term]), want[term], rtol=1e-4)
        np.testing.assert_allclose(importance(image, None, [term]), alone[term], rtol=1e-12)
    np.testing.assert_allclose(importance(image, text), sum(want.values()), rtol=1e-4)
    np.testing.assert_allclose(importance(image), sum(alone.values()), rtol=1e-12)


def test_a_score_is_the_forget_importance_over_the_retain_importance():
    ones, threes, silent = statistics_of([[1.0, 1.0]]), statistics_of([[3.0, 0.0]]), statistics_of([[0.0, 0.0]])
    # |z|, share and root of the mean square; one token has no variance.
    score = Manu().score({"forget": threes, "retain": ones})
    np.testing.assert_allclose(score, [(3 + 1 + 3) / 3, 0], rtol=1e-4)
    assert Manu(terms=("abs",)).score({"forget": threes, "retain": silent})[0] == pytest.approx(3 / EPS)
    # With text activations of zero, c is 1 for every neuron whose image activations are not zero.
    texts = {"forget_text": silent, "retain_text": silent}
    np.testing.assert_allclose(Manu().score({"forget": threes, "retain": ones} | texts), [1, 0], rtol=1e-4)


def test_the_top_share_by_hand():
    scores = np.array([[1.0, 5.0, 2.0], [5.0, 0.0, 5.0]])
    np.testing.assert_array_equal(select_top(scores, 2 / 6), [[0, 1, 0], [1, 0, 0]])  # the first of equal scores
    np.testing.assert_array_equal(select_top(scores, 4 / 6), [[0, 1, 1], [1, 0, 1]])
    with pytest.raises(UserError, match=r"method\.share: 0\.05 of 6 neurons is less than one"):
        select_top(scores, 0.05)


# Models of each family with forget and retain sets.


QWEN = DecoderConfig(
    vocab=40, width=16, layers=2, heads=2, kv_heads=1, head_width=8, mlp_width=24, mrope_section=(2, 1, 1),
    qkv_bias=True,
)  # fmt: skip
TOWER = dict(width=16, layers=2, heads=2, mlp_width=24, patch_size=2)


def qwen_set(config, seed, texts):
    """Five right-padded rows of random words, after images of several sizes or without images."""
    rng = np.random.default_rng(seed)
    grids = [(1, 2), (2, 2), (1, 1), (1, 3), (2, 1)]
    images = [rng.standard_normal((4 * r, 4 * c, 3)).astype(np.float32) for r, c in grids]
    rows = [([] if texts else [IMAGE] * (r * c)) + list(rng.integers(5, 40, 3 + i)) for i, (r, c) in enumerate(grids)]
    tokens = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for row, words in zip(tokens, rows, strict=True):
        row[: len(words)] = words
    mask = tokens > 0
    last = mask.sum(1, keepdims=True).astype(np.int32) - 1
    return EncodedSet(
        examples=rows, tokens=tokens, mask=mask, target_positions=last, targets=np.full_like(last, 7),
        target_mask=last > 0, prompt_length=last[:, 0],
        image_rows=np.full(len(rows), -1) if texts else np.arange(len(rows)),
        images=None if texts else PackedImages.of(images, config),
    )  # fmt: skip


def llava_set(model, seed, texts):
    """Five questions of several lengths, with images of noise or without images."""
    rng = np.random.default_rng(seed)

    def example(i):
        image = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), np.uint8)).save(image, "PNG")
        words = " ".join(rng.choice(["who", "is", "this", "what", "name", "work"], 2 + i))
        fields = dict(image=None, image_id="") if texts else dict(image=image.getvalue(), image_id=str(i))
        return Example(id=str(i), person="", question=words, answer="a b", **fields)

    return model.encode([example(i) for i in range(5)])


@pytest.fixture(scope="module")
def contexts(tiny_model):
    """A function that returns the context of a family."""

    @functools.cache
    def make(family):
        if family == "llava":
            vision = dataclasses.replace(tiny_model.config.vision, layers=3)  # of which two are in use
            config = dataclasses.replace(tiny_model.config, vision=vision)
            draw = functools.partial(llava_set, tiny_model)
        else:
            module = qwen2_vl if family == "qwen2_vl" else qwen2_5_vl
            more = {} if family == "qwen2_vl" else dict(gated=True, window=4, full_attention_blocks=(1,))
            config = module.Config(VisionConfig(**TOWER, **more), QWEN, IMAGE)
            draw = functools.partial(qwen_set, config)
        graphdef, params = hf.init_params(config, seed=0)
        # Biases start at zero, which would hide whether pruning sets them to zero.
        params = {k: v + 0.1 if k.endswith("/bias") else v * 2 if "kernel" in k else v for k, v in params.items()}
        sets = {name: draw(seed, name.endswith("_text")) for seed, name in enumerate(SETS)}
        return base.Context(graphdef, params, None, config, sets, seed=0)

    return make


@pytest.fixture(scope="module")
def edit(contexts):
    """The weights that `Manu` prunes with a share of 0.1; cached by its arguments."""
    return functools.cache(lambda family, train: Manu(train=train, share=0.1, threshold=TAU).edit(contexts(family)))


def activations(context, name):
    """The activations of a whole set, computed from the kernels block by block: {tower: [tokens, f] for each layer}."""
    encoded, config = context.sets[name], context.model_config
    batch = encoded.batch(np.arange(len(encoded)))
    pixels = batch.images is not None and "pixels" in batch.images

    def inner(mlp, x):
        def product(layer):
            return x @ layer.kernel[...] + (0 if layer.bias is None else layer.bias[...])

        if hasattr(mlp, "fc1"):
            return layers.ACTIVATIONS[mlp.activation](product(mlp.fc1))
        return product(mlp.gate) / (1 + jnp.exp(-product(mlp.gate))) * product(mlp.up)

    def run(blocks, x, more):
        activations_of_blocks = []
        for block, arguments in zip(blocks, more, strict=True):
            attended = block.attn(block.norm1(x), *arguments)
            x = x + (attended[0] if isinstance(attended, tuple) else attended)
            activations_of_blocks.append(inner(block.mlp, block.norm2(x)))
            x = x + block.mlp(block.norm2(x))
        return activations_of_blocks

    @jax.jit
    def capture(params):
        model, towers, features = bind(context.graphdef, params), {}, None
        tower = model.vision_tower
        if pixels:
            used = list(tower.blocks)[: config.used_blocks]
            towers["vision_tower"] = run(used, tower.embed(batch.images["pixels"]), [()] * len(used))
        elif batch.images is not None:
            where = batch.images["patch_coords"]
            vision = config.vision
            windows = [0 if i in vision.full_attention_blocks else vision.window for i in range(2)]
            allowed = [qwen_vit.attention_mask(where, window) for window in windows]
            given = [(tower._rotary_tables(where), x) for x in allowed]
            towers["vision_tower"] = run(tower.blocks, tower.embed(batch.images["patches"], where), given)
        if batch.images is not None:
            features, _ = model.encode(batch.images)
        x, positions, *_ = model.embed(batch.tokens, batch.mask, features)
        turned = model.language_model._rotary_tables(positions, x.shape[1])
        stacked = model.language_model.blocks
        blocks = [jax.tree.map(lambda w, i=i: w[i], stacked) for i in range(config.text.layers)]
        allowed = batch.mask[:, None] & np.tri(batch.mask.shape[1], dtype=bool)
        towers["language_model"] = run(blocks, x, [(turned, allowed, None, None)] * len(blocks))
        return towers

    real = {"language_model": batch.mask}
    if batch.images is not None:
        real["vision_tower"] = np.s_[:, :] if pixels else batch.images["patch_coords"][..., 0] >= 0
    return {tower: [np.asarray(z)[real[tower]] for z in zs] for tower, zs in capture(context.params).items()}


@pytest.mark.parametrize("family", ["llava", *(pytest.param(x, marks=pytest.mark.slow) for x in FAMILIES[1:])])
def test_the_statistics_equal_those_of_captured_activations(contexts, family):
    context = contexts(family)
    got = Manu(threshold=TAU, batch_size=3).statistics(context)  # the last batch repeats a row
    assert tuple(got) == SETS
    for name in ("forget", "retain_text"):
        want = activations(context, name)
        assert got[name].keys() == want.keys() and ("vision_tower" in want) == (name == "forget")
        for tower, layers_of_tower in want.items():
            for layer, z in enumerate(layers_of_tower):
                for values, expected in zip(got[name][tower], statistics_of(z), strict=True):
                    np.testing.assert_allclose(values[layer], expected, rtol=1e-4, atol=1e-5)
            assert 0.1 < got[name][tower].active_share.mean() < 0.99


def test_statistics_ignore_padding(contexts):
    """Neither the tokens at padding nor their number matters."""
    context = contexts("qwen2_5_vl")

    def padded(encoded):
        more = ((0, 0), (0, 4))
        tokens = np.pad(np.where(encoded.mask, encoded.tokens, 9), more, constant_values=9)
        return dataclasses.replace(encoded, tokens=tokens, mask=np.pad(encoded.mask, more), bucket_shapes=None)

    method = Manu(threshold=TAU)
    want = method.statistics(context)
    got = method.statistics(dataclasses.replace(context, sets={k: padded(v) for k, v in context.sets.items()}))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), got, want)


def test_the_seed_determines_a_sample_of_bounded_size(contexts):
    context, method = contexts("llava"), Manu(train="visual", samples=2, threshold=TAU)
    first, again = (method.statistics(context)["forget"]["vision_tower"] for _ in range(2))
    other = method.statistics(dataclasses.replace(context, seed=1))["forget"]["vision_tower"]
    rows = rng(0, "manu/forget").permutation(5)[:2]
    assert set(rows) != set(rng(1, "manu/forget").permutation(5)[:2])
    jax.tree.map(np.testing.assert_array_equal, again, first)
    assert not np.array_equal(first.mean_square, other.mean_square)
    for layer, z in enumerate(activations(context, "forget")["vision_tower"]):
        sampled = statistics_of(z.reshape(5, -1, z.shape[-1])[rows])
        np.testing.assert_allclose(first.mean_square[layer], sampled.mean_square, rtol=1e-4)


# The weights that are pruned.


def neurons(path, params):
    """The neurons whose elements of a weight are all zero: bool [.., f]."""
    weight = np.asarray(params[path])
    if path.endswith("/bias"):
        return weight == 0
    return ~weight.any(-1 if path.endswith(("fc2/kernel", "down/kernel")) else -2)


def shaped(pruned, path):
    """Reshapes a mask of neurons, bool [.., f], so that it broadcasts to a weight."""
    if path.endswith("/bias"):
        return pruned
    return pruned[..., None] if path.endswith(("fc2/kernel", "down/kernel")) else pruned[..., None, :]


@pytest.mark.parametrize("train", ["visual", pytest.param("all", marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", FAMILIES)
def test_exactly_the_share_is_pruned_and_all_other_weights_stay(contexts, edit, family, train):
    context, edited, method = contexts(family), edit(family, train), Manu(train=train)
    assert method.losses() == {}
    assert list(edited) == method.trainable(context.params, context.model_config)
    towers = {}  # tower -> block -> its pruned neurons
    for path, weight in edited.items():
        before = context.params[path]
        assert weight.dtype == before.dtype and weight.sharding == before.sharding and weight.shape == before.shape
        pruned = neurons(path, edited)
        np.testing.assert_array_equal(weight, np.where(shaped(pruned, path), 0, before))
        blocks = towers.setdefault(path.split("/")[0], {})
        # Pruning covers all weights of a neuron.
        np.testing.assert_array_equal(pruned, blocks.setdefault(path.split("/mlp/")[0], pruned))
    assert set(towers) == ({"vision_tower"} if train == "visual" else {"vision_tower", "language_model"})
    for blocks in towers.values():
        assert sum(x.sum() for x in blocks.values()) == round(0.1 * sum(x.size for x in blocks.values()))


def test_the_neurons_with_the_highest_scores_are_pruned(contexts, edit):
    context, edited = contexts("llava"), edit("llava", "all")
    statistics = {name: {tower: [statistics_of(z) for z in zs] for tower, zs in activations(context, name).items()}
                  for name in SETS}  # fmt: skip
    scores = {}
    for tower, count in {"vision_tower": 2, "language_model": 2}.items():
        of = {name: towers[tower] for name, towers in statistics.items() if tower in towers}
        scores[tower] = np.stack([Manu().score({name: rows[i] for name, rows in of.items()}) for i in range(count)])
    pruned = {
        "vision_tower": np.stack([neurons(f"vision_tower/blocks/{i}/mlp/fc2/kernel", edited) for i in range(2)]),
        "language_model": neurons("language_model/blocks/mlp/down/kernel", edited),
    }
    for tower, score in scores.items():
        assert score[pruned[tower]].min() > score[~pruned[tower]].max() - 1e-4
    counts = pruned["vision_tower"].sum(1)
    assert counts.sum() == 6 and counts.max() - counts.min() > 1  # of all layers together


def test_only_neurons_of_the_last_blocks_compete(contexts):
    edited = Manu(train="visual", blocks=1, share=0.25, threshold=TAU).edit(contexts("llava"))
    assert {path.split("/mlp/")[0] for path in edited} == {"vision_tower/blocks/1"}  # the last block in use
    assert neurons("vision_tower/blocks/1/mlp/fc2/kernel", edited).sum() == 8


def test_a_pruned_neuron_has_no_activation_and_no_gradient(contexts, edit):
    context, edited = contexts("qwen2_vl"), edit("qwen2_vl", "all")
    frozen = {k: v for k, v in context.params.items() if k not in edited}
    batch = context.sets["forget"].batch(np.arange(5))

    @jax.jit
    @jax.grad
    def gradient(trained):
        return jnp.mean(base.cross_entropy(bind(context.graphdef, frozen | trained), batch))

    for path, grad in gradient(dict(edited)).items():
        pruned = np.broadcast_to(shaped(neurons(path, edited), path), grad.shape)
        assert not np.asarray(grad)[pruned].any() and np.asarray(grad)[~pruned].any(), path
    after = dataclasses.replace(context, params=context.params | edited)
    for tower, statistics in Manu(threshold=TAU).statistics(after)["forget"].items():
        assert (statistics.mean_square == 0).sum() == round(0.1 * statistics.mean_square.size), tower


def test_answers_to_text_change_only_if_the_language_model_is_pruned(contexts, edit):
    context = contexts("llava")

    @jax.jit
    def logits(params, batch):
        return base.answer_logits(bind(context.graphdef, params), batch)[0]

    with_image, text = (context.sets[name].batch(np.arange(5)) for name in ("forget", "forget_text"))
    for train in ("visual", "all"):
        after = context.params | edit("llava", train)
        assert np.any(logits(after, with_image) != logits(context.params, with_image))
        assert np.array_equal(logits(after, text), logits(context.params, text)) == (train == "visual")


def test_without_text_only_questions_image_statistics_determine_the_scores(contexts):
    context, method = contexts("qwen2_vl"), Manu(share=0.1, threshold=TAU)
    image_only = dataclasses.replace(context, sets={k: v for k, v in context.sets.items() if k != "retain_text"})
    edited = method.edit(image_only)
    statistics = {name: statistics_of(activations(context, name)["language_model"][0]) for name in ("forget", "retain")}
    pruned = neurons("language_model/blocks/mlp/down/kernel", edited)
    assert pruned.sum() == 5 and method.score(statistics)[pruned[0]].min() > method.score(statistics)[~pruned[0]].max()


# The contract of a method.


@pytest.mark.parametrize("family", FAMILIES)
def test_only_weights_of_neurons_can_be_pruned(contexts, family):
    context = contexts(family)
    paths = methods.create("manu", {}).trainable(context.params, context.model_config)
    assert {path.split("/mlp/")[1] for path in paths if path.startswith("language_model/")} == {
        "gate/kernel", "up/kernel", "down/kernel"
    }  # fmt: skip
    assert not [p for p in paths if p.startswith("projector/") or p.endswith(("fc2/bias", "down/bias"))]
    unused = f"vision_tower/blocks/{context.model_config.used_blocks}/"
    assert not [path for path in paths if path.startswith(unused)]
    assert all("/mlp/" in path for path in paths)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(train="lora"), r"method\.train: adapters have no neurons to prune\. Give visual or all"),
        (dict(train="visual", blocks=0), r"method\.blocks: MANU does not prune the projector"),
        (dict(share=0.0), r"method\.share: 0\.0 is not allowed\. Give a number greater than 0 and below 1\."),
        (dict(share=1.0), r"method\.share: 1\.0 is not allowed"),
        (dict(terms=()), r"method\.terms: \(\) is not allowed\. Give a nonempty tuple"),
        (dict(terms=("abs", "mean")), r"method\.terms: \('abs', 'mean'\) is not allowed"),
        (dict(samples=0), r"method\.samples: 0 is not allowed\. Give a whole number of at least 1"),
        (dict(batch_size=0), r"method\.batch_size: 0 is not allowed"),
    ],
)
def test_invalid_hyperparameters_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        methods.create("manu", fields)


def test_a_run_with_manu_prunes_without_training(get_config, few, tiny_folder, tmp_path):
    config = get_config("tiny.py", "vkd")
    config.data.source = str(few)
    config.model.update(path=str(tiny_folder), base="", retain_only="")
    config.eval.update(max_items=2, batch_size=8)
    config.method = defaults.method("manu", train="visual", share=0.1, samples=8, threshold=TAU)
    results = pipeline.run(config, tmp_path / "run").to_json()
    assert results["text_logits_identical"] and results["manifest"]["language_model_changed"] == 0
    assert set(results["models"]) == {"vanilla", "unlearned"}
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["changed"] and all(".mlp.fc" in name for name in manifest["changed"])
    assert not (tmp_path / "run" / "train").exists()
