"""Layers against values by hand, the contract of the forward pass, and generation; without PyTorch."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vkd_jax import models
from vkd_jax.checkpoints import hf
from vkd_jax.models import base, layers, llava
from vkd_jax.models.clip_vit import VisionConfig, VisionTower
from vkd_jax.models.decoder import Decoder, DecoderConfig
from vkd_jax.models.generate import Prompts, greedy, last_token, option_log_probs
from vkd_jax.types import UserError

IMAGE = 4
CONFIG = llava.LlavaConfig(
    vision=VisionConfig(image_size=8, patch_size=4, width=16, layers=3, heads=2, mlp_width=24),
    text=DecoderConfig(vocab=40, width=16, layers=2, heads=4, kv_heads=2, head_width=4, mlp_width=24),
    image_token_id=IMAGE,
)


@pytest.fixture(scope="module")
def model():
    graphdef, params = hf.init_params(CONFIG, seed=0)
    # Weights large enough that every input matters to every output.
    return base.bind(graphdef, {k: v * 4 if "kernel" in k else v for k, v in params.items()})


@pytest.fixture(scope="module")
def images():
    return {"pixels": jax.random.normal(jax.random.key(1), (2, 8, 8, 3))}


def prompt(*rows, side="right"):
    width = max(map(len, rows))
    pad = [[0] * (width - len(row)) for row in rows]
    tokens = [p + list(r) if side == "left" else list(r) + p for p, r in zip(pad, rows, strict=True)]
    mask = [p + [1] * len(r) if side == "left" else [1] * len(r) + p for p, r in zip(pad, rows, strict=True)]
    return jnp.array(tokens), jnp.array(mask, bool)


def row_of(features, i):
    return jax.tree.map(lambda x: x[i : i + 1], features)


# Values by hand.


def test_layer_norm_and_rms_norm_by_hand():
    options = dict(eps=0.0, dtype="float32", param_dtype=jnp.float32)
    x = jnp.array([[1.0, 3.0]])  # mean 2, deviation 1, mean square 5
    np.testing.assert_allclose(layers.LayerNorm(2, **options)(x), [[-1, 1]], rtol=1e-6)
    np.testing.assert_allclose(layers.RMSNorm(2, **options)(x), np.array([[1, 3]]) / 5**0.5, rtol=1e-6)


def test_zero_centered_norm_and_scaled_embedding_by_hand():
    norm = layers.RMSNorm(2, eps=0.0, dtype="float32", param_dtype=jnp.float32, zero_centered=True)
    norm.scale[...] = jnp.array([0.0, 1.0])
    np.testing.assert_allclose(norm(jnp.array([[1.0, 3.0]])), np.array([[1, 6]]) / 5**0.5, rtol=1e-6)
    options = dict(dtype="bfloat16", param_dtype=jnp.float32, rngs=nnx.Rngs(0))
    embedding = layers.Embedding(3, 2, scale=2560**0.5, **options)
    embedding.embedding[...] = jnp.ones((3, 2))
    assert embedding(jnp.array([1])).tolist() == [[50.5, 50.5]]  # 50.596 rounded to bfloat16
    assert embedding.attend(jnp.ones((1, 2))).tolist() == [[2.0, 2.0, 2.0]]


def test_rotation_by_hand():
    def rotate(x, positions, *sections):
        frequency = np.float32([1, 0.1])
        return layers.rotate(x, layers.rotary_tables(jnp.array(positions), frequency, sections, 8, jnp.float32))

    x = jnp.array([1.0, 2.0, 3.0, 4.0]).reshape(1, 1, 1, 4)  # pairs (1, 3), (2, 4); angles n, n / 10
    c, s = np.cos([1, 0.1]), np.sin([1, 0.1])
    want = [1 * c[0] - 3 * s[0], 2 * c[1] - 4 * s[1], 3 * c[0] + 1 * s[0], 4 * c[1] + 2 * s[1]]
    np.testing.assert_allclose(rotate(x, [[[1]]], 2).ravel(), want, rtol=1e-6)
    np.testing.assert_array_equal(rotate(x, [[[0]]], 2), x)
    np.testing.assert_array_equal(rotate(x, [[[-1]]], 2), x)  # the position of padding
    # Two axes: the first pair rotates by the first axis (5), the second pair by the second (1).
    c, s = np.cos([5, 0.1]), np.sin([5, 0.1])
    want = [1 * c[0] - 3 * s[0], 2 * c[1] - 4 * s[1], 3 * c[0] + 1 * s[0], 4 * c[1] + 2 * s[1]]
    np.testing.assert_allclose(rotate(x, [[[5, 1]]], 1, 1).ravel(), want, rtol=1e-5)


def test_equal_positions_on_all_axes_rotate_like_scalar_positions():
    results = []
    for section in ((), (1, 1)):
        text = dataclasses.replace(CONFIG.text, mrope_section=section)
        decoder = Decoder(text, remat="", mesh=None, dtype="float32", param_dtype="float32", rngs=nnx.Rngs(0))
        x = jax.random.normal(jax.random.key(1), (1, 5, text.width))
        positions, attention_mask = jnp.array([[0, 1, 2, 3, 3]]), jnp.tri(5, dtype=bool)[None]
        results.append(decoder(x, positions, attention_mask)[0])
        if section:
            results.append(decoder(x, jnp.tile(positions[..., None], 2), attention_mask)[0])
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


def test_attention_by_hand():
    q = jnp.array([1.0, 0.0]).reshape(1, 1, 1, 2) * 2**0.5  # undoes the scale 1 / sqrt(2)
    k = jnp.array([[np.log(3.0), 0.0], [0.0, 5.0], [9.0, 9.0]]).reshape(1, 3, 1, 2)
    v = jnp.array([[4.0, 0.0], [8.0, 4.0], [100.0, 100.0]]).reshape(1, 3, 1, 2)
    y = layers.attention(q, k, v, jnp.array([[[True, True, False]]]))  # weights 3/4, 1/4, 0
    np.testing.assert_allclose(y.ravel(), [5.0, 1.0], rtol=1e-6)


def test_grouped_heads_share_their_keys():
    q, k, v = (jax.random.normal(jax.random.key(i), (2, 5, n, 4)) for i, n in enumerate((4, 2, 2)))
    want = layers.attention(q, jnp.repeat(k, 2, axis=2), jnp.repeat(v, 2, axis=2))
    np.testing.assert_allclose(layers.attention(q, k, v), want, atol=1e-6)


def test_a_query_without_keys_gives_finite_values():
    x = jnp.ones((1, 2, 1, 2))
    loss = lambda x: layers.attention(x, x, x, jnp.zeros((1, 2, 2), bool)).sum()  # noqa: E731
    assert jnp.isfinite(loss(x)) and jnp.isfinite(jax.grad(loss)(x)).all()


def test_patches_are_a_strided_convolution():
    # Two of ten pixels remain.
    config = VisionConfig(image_size=10, patch_size=4, width=6, layers=0, heads=1, mlp_width=6)
    tower = VisionTower(config, remat="", mesh=None, dtype="float32", param_dtype=jnp.float32, rngs=nnx.Rngs(0))
    tower.pre_norm = lambda x: x
    x = jax.random.normal(jax.random.key(0), (2, 10, 10, 3))
    want = jax.lax.conv_general_dilated(
        x, tower.patch_embedding[...], (4, 4), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    got = tower.embed(x)[:, 1:] - tower.position_embedding[1:]
    np.testing.assert_allclose(got, want.reshape(2, 4, 6), atol=1e-5)


def test_features_replace_image_tokens_in_order():
    x = -jnp.ones((2, 4, 1))
    features = jnp.array([[[10.0], [11.0]], [[20.0], [21.0]]])
    got = layers.insert_features(x, jnp.array([[0, 1, 1, 0], [1, 0, 1, 1]], bool), features)
    # An image token beyond the last feature, which a model may generate, is not replaced.
    np.testing.assert_array_equal(got[..., 0], [[-1, 10, 11, -1], [20, -1, 21, -1]])


# The module and its parameters.


def test_bind_inverts_split_model(model):
    graphdef, params = base.split_model(model)
    again, params_again = base.split_model(base.bind(graphdef, dict(reversed(params.items()))))
    assert again == graphdef and hash(again) == hash(graphdef)
    assert params_again.keys() == params.keys()
    assert all(params_again[k] is params[k] or (params_again[k] == params[k]).all() for k in params)
    assert {k.split("/")[0] for k in params} == {"vision_tower", "projector", "language_model"}
    assert params["vision_tower/blocks/2/attn/q/kernel"].shape == (16, 16)
    assert params["language_model/blocks/attn/k/kernel"].shape == (2, 16, 8)


def test_bind_reports_missing_and_unknown_parameters(model):
    graphdef, params = base.split_model(model)
    params.pop("projector/fc1/bias")
    with pytest.raises(ValueError, match="70"):
        base.bind(graphdef, params)
    params["projector/fc3/bias"] = jnp.zeros(16)
    with pytest.raises(ValueError, match="fc3"):
        base.bind(graphdef, params)


def test_initialization_depends_on_the_seed_and_has_the_given_dtype():
    _, a = hf.init_params(CONFIG, seed=3, dtype=jnp.bfloat16)
    _, b = hf.init_params(CONFIG, seed=3, dtype=jnp.bfloat16)
    _, c = hf.init_params(CONFIG, seed=4, dtype=jnp.bfloat16)
    assert all(v.dtype == jnp.bfloat16 and (v == b[k]).all() for k, v in a.items())
    assert not (a["projector/fc1/kernel"] == c["projector/fc1/kernel"]).all()
    q = a["language_model/blocks/attn/q/kernel"]
    assert not (q[0] == q[1]).all()


def test_unknown_model_types_are_reported():
    with pytest.raises(UserError, match="'bert' is not supported. Supported types: .*llava"):
        models.module_for("bert")


# The forward pass.


def test_encode_continues_from_any_block(model, images):
    features, taps = model.encode(images)
    assert set(taps) == {"vision/0", "vision/1", "features", "projector"}  # layer -2 of three blocks
    assert features.values.shape == (2, CONFIG.image_tokens(8, 8), 16) and taps["vision/0"].values.shape == (2, 5, 16)
    np.testing.assert_array_equal(features.coords[1], [[0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1]])
    np.testing.assert_array_equal(taps["vision/0"].coords[1, 0], [0, -1, -1])  # the class token has no row and column
    for k in (1, 2):
        again, fewer = model.encode(earlier={name: taps[name].values for name in CONFIG.taps_before(k)})
        np.testing.assert_allclose(again.values, features.values, atol=1e-6)
        assert set(fewer) == {f"vision/{i}" for i in range(k, 2)} | {"features", "projector"}
    with pytest.raises(ValueError, match="takes images"):
        model.encode()


def test_unused_visual_parameters_have_zero_gradient(model, images):
    graphdef, params = base.split_model(model)
    gradients = jax.grad(lambda p: jnp.square(base.bind(graphdef, p).encode(images)[0].values).sum())(params)
    zero = {k for k, v in gradients.items() if not k.startswith("language_model/") and not v.any()}
    assert zero == {k for k in params if k.startswith(("vision_tower/blocks/2/", "vision_tower/post_norm/"))}


def test_padding_does_not_change_logits(model, images):
    features, _ = model.encode(images)
    rows = [1, *[IMAGE] * 4, 7, 8, 9], [1, *[IMAGE] * 4, 5]
    for side in ("left", "right"):
        tokens, mask = prompt(*rows, side=side)
        logits, cache = model(tokens, mask, features=features)
        assert cache is None and logits.dtype == jnp.float32 and jnp.isfinite(logits).all()
        noisy, _ = model(jnp.where(mask, tokens, 33), mask, features=features)
        for i, row in enumerate(rows):
            alone, _ = model(*prompt(row), features=row_of(features, i))
            np.testing.assert_allclose(logits[i][mask[i]], alone[0], atol=1e-5)
            np.testing.assert_array_equal(noisy[i][mask[i]], logits[i][mask[i]])


def test_attention_is_causal_and_logits_depend_on_the_image(model, images):
    features, _ = model.encode(images)
    tokens, mask = prompt([1, *[IMAGE] * 4, 7, 8, 9], [1, *[IMAGE] * 4, 7, 8, 9])
    logits, _ = model(tokens, mask, features=features)
    changed, _ = model(tokens.at[:, 6].set(20), mask, features=features)
    np.testing.assert_array_equal(logits[:, :6], changed[:, :6])
    assert (jnp.abs(logits[:, 6:] - changed[:, 6:]).max(-1) > 1e-4).all()
    assert (jnp.abs(logits[0] - logits[1]).max(-1) > 1e-4)[1:].all()  # equal tokens, different images


def test_query_positions_select_logits(model):
    tokens, mask = prompt([1, 6, 7, 8], [1, 9])
    query_positions = jnp.array([[0, 3], [1, 0]])
    logits, _ = model(tokens, mask)
    selected, _ = model(tokens, mask, query_positions=query_positions)
    np.testing.assert_allclose(selected, jnp.take_along_axis(logits, query_positions[..., None], 1), atol=1e-6)


def test_text_logits_do_not_depend_on_visual_weights(model):
    graphdef, params = base.split_model(model)
    broken = {k: v if k.startswith("language_model/") else v + jnp.nan for k, v in params.items()}
    run = jax.jit(lambda p, tokens, mask: base.bind(graphdef, p)(tokens, mask)[0])
    tokens, mask = prompt([1, 6, 7, 8], [1, 9])
    np.testing.assert_array_equal(run(params, tokens, mask), run(broken, tokens, mask))


@pytest.mark.parametrize("query_positions", [pytest.param(None, marks=pytest.mark.slow), [[5, 6, 0], [4, 4, 1]]])
def test_rematerialization_does_not_change_gradients(model, images, query_positions):
    _, params = base.split_model(model)
    tokens, mask = prompt([1, *[IMAGE] * 4, 7, 8], [1, *[IMAGE] * 4, 5])
    query_positions = None if query_positions is None else jnp.array(query_positions)
    gradients = []
    for remat in ("", "dots", "full"):
        config = dataclasses.replace(CONFIG, remat=remat)
        graphdef, _ = base.abstract_model(lambda rngs, config=config: llava.Llava(config, rngs=rngs))

        def loss(params, graphdef=graphdef):
            model = base.bind(graphdef, params)
            features, _ = model.encode(images)
            return jnp.square(model(tokens, mask, features=features, query_positions=query_positions)[0]).mean()

        gradients.append(jax.jit(jax.grad(loss))(params))
    plain, *recomputed = gradients
    for k in params:
        for gradient in recomputed:
            np.testing.assert_allclose(gradient[k], plain[k], rtol=1e-4, atol=1e-5)


def test_bfloat16_computation_gives_float32_logits(model, images):
    config = dataclasses.replace(CONFIG, compute_dtype="bfloat16")
    graphdef, _ = base.abstract_model(lambda rngs: llava.Llava(config, rngs=rngs))
    _, params = base.split_model(model)
    bfloat16_model = base.bind(graphdef, params)
    tokens, mask = prompt([1, *[IMAGE] * 4, 7, 8], [1, *[IMAGE] * 4, 5])
    features, taps = bfloat16_model.encode(images)
    assert {v.values.dtype for v in taps.values()} == {jnp.dtype(jnp.bfloat16)}
    logits, _ = bfloat16_model(tokens, mask, features=features)
    want, _ = model(tokens, mask, features=model.encode(images)[0])
    assert logits.dtype == jnp.float32
    assert np.corrcoef(logits.ravel(), want.ravel())[0, 1] > 0.99


# Generation.


def test_last_token_for_left_and_right_padding():
    _, left = prompt([1, 2, 3], [1], side="left")
    _, right = prompt([1, 2, 3], [1], side="right")
    np.testing.assert_array_equal(last_token(left), [2, 2])
    np.testing.assert_array_equal(last_token(right), [2, 0])


@pytest.mark.parametrize(
    "side", ["left", pytest.param("right", marks=pytest.mark.slow)]
)  # prompts are padded on the left
def test_greedy_equals_repeated_argmax_without_a_cache(model, images, side):
    features, _ = model.encode(images)
    rows = [1, *[IMAGE] * 4, 7, 8, 9], [1, *[IMAGE] * 4, 5]
    want = []
    for i, row in enumerate(rows):
        row = list(row)
        for _ in range(6):
            row.append(int(model(*prompt(row), features=row_of(features, i))[0][0, -1].argmax()))
        want.append(row[-6:])
    batch = prompt(*rows, side=side)
    graphdef, params = base.split_model(model)

    @functools.partial(jax.jit, static_argnums=0)
    def run(eos, params, features, tokens, mask):
        model = base.bind(graphdef, params)
        return greedy(model, Prompts(tokens, mask, features), max_new_tokens=6, eos_ids=eos, pad_id=0)

    np.testing.assert_array_equal(run((99,), params, features, *batch), want)
    # With a generated token, the third or the first, as end token: it is part of the answer, and padding follows.
    for end in (want[0][2], want[0][0]):
        for row in want:
            if end in row:
                row[row.index(end) + 1 :] = [0] * (5 - row.index(end))
        np.testing.assert_array_equal(run((99, end), params, features, *batch), want)


@pytest.mark.parametrize("side", ["left", "right"])
def test_option_scores_equal_scores_of_single_options(model, images, side):
    features, _ = model.encode(images)
    rows = [1, *[IMAGE] * 4, 7, 8, 9], [1, *[IMAGE] * 4, 5]
    options = jnp.array([[[10, 11, 12], [13, 0, 0], [16, 17, 18]], [[14, 15, 0], [0, 0, 0], [19, 20, 0]]])
    options_mask = jnp.array([[[1, 1, 1], [1, 0, 0], [1, 1, 1]], [[1, 1, 0], [0, 0, 0], [1, 1, 0]]], bool)
    scores = option_log_probs(model, Prompts(*prompt(*rows, side=side), features), options, options_mask)
    for i, row in enumerate(rows):
        for j in range(3):
            option = options[i, j][options_mask[i, j]].tolist()
            if not option:
                assert scores[i, j] == -jnp.inf
                continue
            log_p = jax.nn.log_softmax(model(*prompt([*row, *option]), features=row_of(features, i))[0][0])
            want = sum(float(log_p[len(row) - 1 + n, token]) for n, token in enumerate(option))
            np.testing.assert_allclose(scores[i, j], want, atol=1e-4)
    first_tokens = options[..., :1]
    prompts = Prompts(*prompt(*rows, side=side), features)
    single = option_log_probs(model, prompts, first_tokens, jnp.ones_like(first_tokens, bool))
    np.testing.assert_allclose(single[0, 1], scores[0, 1], atol=1e-5)


# Named scopes.


def products(jaxpr, scope=""):
    """Yields the name stack of each matrix product, those in loop bodies included."""
    for equation in jaxpr.eqns:
        stack = f"{scope}/{equation.source_info.name_stack}"
        if equation.primitive.name == "dot_general":
            yield stack
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from products(inner, stack)


@pytest.mark.parametrize("remat", ["", "full"])
def test_every_product_runs_under_the_named_scope_of_its_layer(images, remat):
    config = dataclasses.replace(CONFIG, remat=remat)
    graphdef, params = base.abstract_model(lambda rngs: llava.Model(config, rngs=rngs))
    tokens, mask = prompt([IMAGE] * 4 + [9, 8])

    def loss(params):
        model = base.bind(graphdef, params)
        features, _ = model.encode({"pixels": images["pixels"][:1]})
        return model(tokens, mask, features=features)[0].sum()

    stacks = list(products(jax.make_jaxpr(jax.grad(loss))(params).jaxpr))
    names = [next((name for name in base.SCOPES if name in stack), None) for stack in stacks]
    assert set(names) == set(base.SCOPES)
