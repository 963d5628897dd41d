"""Qwen3-VL without PyTorch: positions, interleaved axes and deep-stack features by hand; its configuration."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vkd_jax.checkpoints import export, hf, safetensors_files
from vkd_jax.data.encoding import EncodedSet
from vkd_jax.data.images import PackedImages
from vkd_jax.methods import base as methods
from vkd_jax.methods.scope import frozen_blocks
from vkd_jax.methods.vkd import VKD
from vkd_jax.models import base, qwen3_vl
from vkd_jax.models.decoder import DecoderConfig, interleaved_axes
from vkd_jax.models.layers import insert_features
from vkd_jax.models.qwen_vit import VisionConfig
from vkd_jax.training import loop
from vkd_jax.types import Example, UserError

IMAGE = 4
TEXT = DecoderConfig(
    vocab=40, width=16, layers=3, heads=2, kv_heads=1, head_width=12, mlp_width=24, mrope_section=(2, 2, 2),
    mrope_interleaved=True, qk_norm=True,
)  # fmt: skip
VISION = VisionConfig(
    width=16, layers=3, heads=2, mlp_width=24, patch_size=2, activation="gelu_pytorch_tanh", patch_bias=True,
    position_side=4, deepstack_blocks=(0, 1),
)  # fmt: skip
CONFIG = qwen3_vl.Config(VISION, TEXT, IMAGE)


@pytest.fixture(scope="module")
def model():
    """Weights large enough that every input matters to every output."""
    graphdef, params = hf.init_params(CONFIG, seed=0)
    return graphdef, {k: v * 3 if "kernel" in k else v for k, v in params.items()}


def draw(*grids, seed=0):
    """Draws images of the given rows and columns of tokens of 4 x 4 pixels."""
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((4 * r, 4 * c, 3)).astype(np.float32) for r, c in grids]


@functools.partial(jax.jit, static_argnums=0)
def encode(graphdef, params, images):
    return base.bind(graphdef, params).encode(images)


# Positions.


def test_the_axes_of_channel_pairs_alternate():
    published = interleaved_axes((24, 20, 20))
    assert published.tolist() == [0, 1, 2] * 20 + [0] * 4
    assert np.bincount(published).tolist() == [24, 20, 20]
    assert interleaved_axes((3, 4, 3)).tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]  # there is no pair 10


def test_interleaved_rotation_by_hand(model):
    decoder = base.bind(*model).language_model
    decoder.config = dataclasses.replace(TEXT, mrope_section=(3, 2, 1), rope_theta=100.0)
    cos, sin = decoder._rotary_tables(jnp.array([[[5, 2, 7], [1, 1, 1]]]), 16)
    angle = np.array([[5, 2, 7, 5, 2, 5], [1] * 6]) * 100.0 ** (-np.arange(0, 12, 2) / 12)
    np.testing.assert_allclose(cos[0, :, 0], np.cos(angle), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(sin[0, :, 0], np.sin(angle), rtol=1e-5, atol=1e-6)


def test_position_embeddings_are_resampled_by_hand(model):
    tower = base.bind(*model).vision_tower
    row, column = np.indices((4, 4)).reshape(2, -1)
    grid = np.stack([10 * row + column, (row == 0) & (column == 3)], axis=1)  # a plane, and one corner
    tower.position_embedding[...] = jnp.asarray(np.pad(grid, ((0, 0), (0, 14))), jnp.float32)
    # An image of 2 x 4 patches, and one of 6 x 2, whose corners are those of the grid.
    packed = CONFIG.pack([draw((1, 2), (3, 1))])
    image, row, column = np.moveaxis(packed["patch_coords"][0], -1, 0)
    got = np.asarray(tower._positions(jnp.asarray(packed["patch_coords"])))[0]
    for index, (rows, columns) in enumerate([(2, 4), (6, 2)]):
        y, x = row[image == index] * 3 / (rows - 1), column[image == index] * 3 / (columns - 1)
        np.testing.assert_allclose(got[image == index, 0], 10 * y + x, atol=1e-5)
        corner = np.maximum(1 - y, 0) * np.maximum(x - 2, 0)
        np.testing.assert_allclose(got[image == index, 1], corner, atol=1e-5)
    assert np.isfinite(got).all()


# Deep-stack features.


@pytest.fixture(scope="module")
def prompts(model):
    """Two rows of tokens with their mask and features: two images, and one image with padding on the left."""
    tokens = np.array([[1, *[IMAGE] * 2, 7, *[IMAGE] * 3, 9], [0, 0, 0, 1, *[IMAGE] * 2, 8, 9]])
    packed = CONFIG.pack([draw((1, 2), (3, 1)), draw((2, 1), seed=1)])
    return tokens, tokens > 0, encode(*model, packed)[0]


def test_deepstack_features_are_added_after_the_first_blocks(model, prompts):
    tokens, mask, features = prompts
    graphdef, params = model
    assert features.values.shape[-1] == 3 * 16

    @functools.partial(jax.jit, static_argnames="remat")
    def states(params, remat=""):
        module = base.bind(graphdef, params)
        decoder = module.language_model
        decoder.remat = remat
        embedded = module.embed(tokens, mask, features)
        by_depth = [decoder.read(embedded, mask, layers=n)[0] for n in (1, 2, 3)]
        is_image = jnp.asarray(tokens == IMAGE)
        inputs = decoder._attention_inputs(embedded.positions, mask[:, None] & jnp.tri(8, dtype=bool), None)(None)
        x, by_hand = embedded.x, []
        for i in range(3):
            block = jax.tree.map(lambda leaf, i=i: leaf[i], decoder.blocks)
            x, _ = block(x, *inputs)
            if i < 2:
                x += insert_features(jnp.zeros_like(x), is_image, features.values[..., 16 * (i + 1) : 16 * (i + 2)])
            by_hand.append(x)
        neurons = decoder.neurons(embedded, mask, lambda z: z.sum())
        last = jax.tree.map(lambda leaf: leaf[2], decoder.blocks).neurons(by_hand[1], *inputs).sum()
        return by_depth, by_hand, (neurons[2], last)

    for remat in ("", "full"):
        by_depth, by_hand, neurons = states(params, remat=remat)
        for ours, want in zip(by_depth, by_hand, strict=True):
            np.testing.assert_allclose(ours[mask], want[mask], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(*neurons, rtol=1e-4)


def test_prefixes_and_query_positions_have_deepstack_features(model, prompts):
    tokens, mask, features = prompts
    graphdef, params = model

    @jax.jit
    def logits(params):
        module = base.bind(graphdef, params)
        whole = module(tokens, mask, features=features)[0]
        cache = module.language_model.empty_cache(2, 8)
        _, cache = module(tokens[:, :7], mask[:, :7], features=features, cache=cache)
        last = jnp.full((2, 1), 7)
        without = module(tokens, mask, features=features._replace(values=features.values.at[..., 16:].set(0)))[0]
        queried = module(tokens, mask, features=features, query_positions=last)[0]
        return whole[:, 7:], module(tokens[:, 7:], mask[:, 7:], cache=cache)[0], queried, without[:, 7:]

    whole, after_prefix, queried, without = logits(params)
    np.testing.assert_allclose(after_prefix, whole, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(queried, whole, rtol=1e-4, atol=1e-4)
    assert (np.abs(without - whole).max(-1) > 0.05).all()


def test_encode_continues_from_the_blocks_that_feed_the_projector():
    taps = {block: CONFIG.taps_before(block) for block in (1, 2, 3)}
    assert taps == {1: ("vision/0",), 2: ("vision/0", "vision/1"), 3: ("vision/0", "vision/1", "vision/2")}
    published = qwen3_vl.Config(dataclasses.replace(VISION, layers=24, deepstack_blocks=(5, 11, 17)), TEXT, IMAGE)
    assert published.taps_before(16) == ("vision/5", "vision/11", "vision/15")
    assert published.taps_before(18) == ("vision/5", "vision/11", "vision/17")


def encoded(count=3):
    """Questions about images of several sizes."""
    grids = [(1, 2), (2, 2), (2, 1)][:count]
    tokens = np.zeros((count, 8), np.int32)
    for row, (r, c) in zip(tokens, grids, strict=True):
        row[: r * c + 3] = [*[IMAGE] * (r * c), 9, 10, 11]
    last = (tokens > 0).sum(1, keepdims=True).astype(np.int32) - 2
    return EncodedSet(
        examples=[Example(str(i), "", b"", str(i), "", "") for i in range(count)],
        tokens=tokens, mask=tokens > 0, target_positions=last, targets=np.full_like(last, 11),
        target_mask=last > 0, prompt_length=last[:, 0], image_rows=np.arange(count, dtype=np.int32),
        images=PackedImages.of(draw(*grids), CONFIG),
    )  # fmt: skip


def test_cached_blocks_do_not_change_the_gradients_of_the_mergers(model):
    graphdef, params = model
    method, sets = VKD(blocks=1, mask_scope="none", augment_forget=0), dict.fromkeys(("forget", "retain"), encoded())
    context = methods.Context(graphdef, params, None, CONFIG, sets, seed=0)
    paths = set(method.trainable(params, CONFIG))
    assert {p for p in paths if p.startswith("projector/deepstack/1/fc2")} and not any("position" in p for p in paths)
    plain = method.prepare(context).sets["forget"]
    prefix = frozen_blocks(paths, CONFIG)
    cached = loop.cache_prefix(graphdef, params, plain, prefix)
    assert set(cached.per_image) - set(plain.per_image) == {"vision/0", "vision/1"} and prefix == 2

    def loss(trained, batch):
        return method.losses()["forget"](base.bind(graphdef, {**params, **trained}), batch)[0]

    gradients = jax.jit(jax.grad(loss))
    trained = {path: params[path] for path in paths}
    want, got = (gradients(trained, rows.batch(np.arange(3))) for rows in (plain, cached))
    for path in paths:
        np.testing.assert_allclose(got[path], want[path], rtol=1e-3, atol=1e-5, err_msg=path)
        # The key biases of attention have no gradient; every merger has one.
        assert np.abs(want[path]).max() > 1e-4 or "projector" not in path, path


# Configuration and files.


def hf_config(text=None, vision=None, **fields):
    from transformers import AutoConfig

    rope = {"rope_type": "default", "rope_theta": 5000.0, "mrope_section": [2, 2, 2], "mrope_interleaved": True}
    sizes = dict(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, head_dim=12,
        num_key_value_heads=1, max_position_embeddings=64, rope_parameters=rope, dtype="bfloat16",
    )  # fmt: skip
    tower = dict(
        depth=3, num_heads=2, patch_size=2, hidden_size=16, out_hidden_size=16, intermediate_size=24,
        num_position_embeddings=16, deepstack_visual_indexes=[0, 1],
    )  # fmt: skip
    return AutoConfig.for_model(
        "qwen3_vl",
        text_config=sizes | (text or {}),
        vision_config=tower | (vision or {}),
        image_token_id=IMAGE,
        **fields,
    )


def test_the_configuration_is_read():
    config = qwen3_vl.Config.from_hf(hf_config(tie_word_embeddings=True), remat="full")
    assert config.vision == VISION
    assert config.text == dataclasses.replace(TEXT, rope_theta=5000.0, tie_embeddings=True, max_positions=64)
    assert config.remat == "full" and config.image_token_id == IMAGE
    assert config.compute_dtype == "bfloat16"  # which only text_config has, as published


def test_all_unsupported_fields_are_reported_at_once():
    rope = {"rope_type": "default", "rope_theta": 5000.0, "mrope_section": [2, 2, 1]}
    text, vision = dict(attention_bias=True, rope_parameters=rope), dict(hidden_act="relu")
    with pytest.raises(UserError) as error:
        qwen3_vl.Config.from_hf(hf_config(text, vision))
    for problem in ("hidden_act is 'relu'", "attention_bias is True", "mrope_section is (2, 2, 1)"):
        assert problem in str(error.value)


@pytest.mark.parametrize("tied", [False, True])
def test_written_models_are_read_under_the_names_of_models_with_and_without_a_head(tied, tmp_path):
    settings, rng = hf_config(tie_word_embeddings=tied, dtype="float32"), np.random.default_rng(0)
    config = qwen3_vl.Config.from_hf(settings)
    _, shapes = base.abstract_model(lambda rngs: qwen3_vl.Model(config, rngs=rngs))
    params = {path: jnp.asarray(rng.standard_normal(x.shape, np.float32)) for path, x in shapes.items()}
    export.create(tmp_path / "model", settings, params)
    _, again, _ = hf.load(tmp_path / "model")
    assert all((again[k] == v).all() for k, v in params.items()) and again.keys() == params.keys()
    names = safetensors_files.Checkpoint(tmp_path / "model").tensors
    heads = {"model.visual", "model.language_model"} | (set() if tied else {"lm_head.weight"})
    assert {".".join(name.split(".")[:2]) for name in names} == heads
    for name in names:
        without_head = name.removeprefix("model.")
        assert hf.find_slot(qwen3_vl, config, without_head) == hf.find_slot(qwen3_vl, config, name) is not None
