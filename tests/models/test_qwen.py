"""Qwen-VL families without PyTorch: patches and positions by hand, the forward pass, configurations of Qwen2."""

import dataclasses
import functools
import json
import shutil
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from vkd_jax import models
from vkd_jax.checkpoints import export, hf, safetensors_files
from vkd_jax.data.processor import Processor
from vkd_jax.models import base, layers, qwen2_5_vl, qwen2_vl, qwen3_vl, qwen_vit
from vkd_jax.models.decoder import DecoderConfig
from vkd_jax.models.qwen_vit import VisionConfig
from vkd_jax.types import UserError

IMAGE = 4
TEXT = DecoderConfig(
    vocab=40, width=16, layers=2, heads=2, kv_heads=1, head_width=8, mlp_width=24, mrope_section=(2, 1, 1),
    qkv_bias=True,
)  # fmt: skip
VISION = dict(width=16, layers=2, heads=2, mlp_width=24, patch_size=2)
QWEN2 = ("qwen2_vl", "qwen2_5_vl")
CONFIGS = {
    "qwen2_vl": qwen2_vl.Config(VisionConfig(**VISION), TEXT, IMAGE),
    "qwen2_5_vl": qwen2_5_vl.Config(
        VisionConfig(**VISION, gated=True, window=4, full_attention_blocks=(1,)), TEXT, IMAGE
    ),
    "qwen3_vl": qwen3_vl.Config(
        VisionConfig(**VISION, patch_bias=True, position_side=3, deepstack_blocks=(0,)),
        dataclasses.replace(TEXT, qkv_bias=False, qk_norm=True, mrope_interleaved=True),
        IMAGE,
    ),
}
CONFIG = CONFIGS["qwen2_vl"]


@functools.cache
def random(family):
    return hf.init_params(CONFIGS[family], seed=0)


@pytest.fixture(scope="module", params=CONFIGS)
def model(request):
    graphdef, params = random(request.param)
    # Weights large enough that every input matters to every output.
    return base.bind(graphdef, {k: v * 3 if "kernel" in k else v for k, v in params.items()})


def draw(*grids, seed=0):
    """Draws the images of each row of a batch, of the given rows and columns of tokens of 4 x 4 pixels."""
    rng = np.random.default_rng(seed)
    return [[rng.standard_normal((4 * r, 4 * c, 3)).astype(np.float32) for r, c in row] for row in grids]


# Patches.


def test_slot_counts_by_hand():
    # 4, 6, 8, 12, 16, ... tokens of four patches.
    counts = {0: 16, 1: 16, 16: 16, 17: 24, 24: 24, 25: 32, 33: 48, 49: 64, 65: 96, 97: 128, 2560: 3072, 4000: 4096}
    assert {n: qwen_vit.slot_count(n, 2) for n in counts} == counts
    assert [qwen_vit.slot_count(n, 1) for n in (1, 5, 7, 9)] == [4, 6, 8, 12]


def test_patches_that_merge_are_adjacent():
    side_by_side = [[0, 0], [0, 1], [1, 0], [1, 1], [0, 2], [0, 3], [1, 2], [1, 3]]
    np.testing.assert_array_equal(qwen_vit.patch_coords(2, 4, 2), side_by_side)
    stacked = [[0, 0], [0, 1], [1, 0], [1, 1], [2, 0], [2, 1], [3, 0], [3, 1]]
    np.testing.assert_array_equal(qwen_vit.patch_coords(4, 2, 2), stacked)


def test_patchify_by_hand():
    # The value of a pixel encodes its color, row and column.
    y, x, color = np.meshgrid(np.arange(4), np.arange(4), np.arange(3), indexing="ij")
    image = (100 * color + 10 * y + x).astype(np.float32)
    patches, coords = qwen_vit.patchify(image, 2, 2)
    np.testing.assert_array_equal(coords, [[0, 0], [0, 1], [1, 0], [1, 1]])
    assert patches[1].tolist() == [2, 3, 12, 13, 102, 103, 112, 113, 202, 203, 212, 213]
    assert patches[2, :4].tolist() == [20, 21, 30, 31]
    np.testing.assert_array_equal(qwen_vit.unpatchify(patches, coords, 2), image)


def test_pack_by_hand_and_its_inverse(unpack):
    rows = draw(((1, 1), (2, 3)), ((1, 2),), ())
    packed = CONFIG.pack(rows)
    assert packed["patches"].shape == (3, 32, 12) and packed["patch_coords"].shape == (3, 32, 3)  # 4 + 24 patches
    assert packed["patches"].dtype == np.float32 and packed["patch_coords"].dtype == np.int32
    assert packed["patch_coords"][0, :6].tolist() == [[0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1], [1, 0, 0], [1, 0, 1]]
    assert packed["patch_coords"][0, 27].tolist() == [1, 3, 5]
    np.testing.assert_array_equal((packed["patch_coords"] == -1).sum((1, 2)), [12, 72, 96])
    assert not packed["patches"][packed["patch_coords"][..., 0] < 0].any()
    back = unpack(CONFIG, packed)
    assert [len(row) for row in back] == [2, 1, 0]
    for image, again in zip(sum(rows, []), sum(back, []), strict=True):
        np.testing.assert_array_equal(image, again)
    assert [CONFIG.image_tokens(*x.shape[:2]) for x in sum(rows, [])] == [1, 6, 2]


def test_images_are_extracted_from_the_output_of_the_image_processor():
    images = sum(draw(((1, 2), (3, 1))), [])
    patchified = [qwen_vit.patchify(image, 2, 2)[0].reshape(-1, 3, 1, 4) for image in images]
    output = {
        "pixel_values": np.concatenate([patches.repeat(2, axis=2).reshape(len(patches), -1) for patches in patchified]),
        "image_grid_thw": np.array([[1, 2, 4], [1, 6, 2]]),
    }
    for image, again in zip(images, CONFIG.extract_images(output), strict=True):
        np.testing.assert_array_equal(image, again)


def test_an_image_that_is_not_a_whole_number_of_tokens_is_rejected():
    with pytest.raises(UserError, match="4 x 6 pixels cannot be divided into tokens of 4 x 4"):
        CONFIG.pack([[np.zeros((4, 6, 3))]])


def test_token_coords_by_hand():
    coords = CONFIG.pack(draw(((1, 2), (1, 1))))["patch_coords"]
    want = [[0, 0, 0], [0, 0, 1], [1, 0, 0], [-1, -1, -1]]
    np.testing.assert_array_equal(qwen_vit.token_coords(coords, 2), [want])


# The network, by hand.


def test_rotation_by_hand():
    # Pairs (1, 5), (2, 6) rotate by the row, 3, and (3, 7), (4, 8) by the column, 1; the angles are n and n / 10.
    config = VisionConfig(**VISION, rope_theta=100.0)
    options = dict(dtype="bfloat16", param_dtype="float32", rngs=nnx.Rngs(0))
    tower = qwen_vit.VisionTower(config, remat="", mesh=None, **options)
    tables = tower._rotary_tables(jnp.array([[[7, 3, 1], *[[-1, -1, -1]] * 3]]))
    x = jnp.tile(jnp.arange(1.0, 9.0), (1, 4, 1, 1))
    c, s = np.cos([3, 0.3, 1, 0.1]), np.sin([3, 0.3, 1, 0.1])
    low, high = np.arange(1.0, 5.0), np.arange(5.0, 9.0)
    y = layers.rotate(x, tables)
    np.testing.assert_allclose(y[0, 0, 0], [*(low * c - high * s), *(high * c + low * s)], rtol=1e-5)
    np.testing.assert_array_equal(y[0, 1:], x[0, 1:])  # padding
    half = x.astype(jnp.bfloat16)  # computed in float32, the dtype of the tables
    np.testing.assert_array_equal(layers.rotate(half, tables), y.astype(jnp.bfloat16))


def test_attention_masks_by_hand():
    coords = jnp.array([[[0, 0, 0], [0, 0, 2], [0, 2, 0], [1, 0, 0], [-1, -1, -1]]])
    same_image = [[1, 1, 1, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 0, 1]]
    np.testing.assert_array_equal(qwen_vit.attention_mask(coords), [same_image])
    np.testing.assert_array_equal(qwen_vit.attention_mask(coords, window=2), [np.eye(5)])
    np.testing.assert_array_equal(qwen_vit.attention_mask(coords, window=3), [same_image])


def test_positions_by_hand():
    coords = jnp.array([[[0, 0, 0], [0, 0, 1], [0, 0, 2], [0, 1, 0], [0, 1, 1], [0, 1, 2], [1, 0, 0], [1, 1, 0]]])
    # Two text tokens, an image of 2 x 3 tokens, a text token, an image of 2 x 1, a text token.
    is_image = jnp.array([[0, 0, 1, 1, 1, 1, 1, 1, 0, 1, 1, 0]], bool)
    time = [0, 1, 2, 2, 2, 2, 2, 2, 5, 6, 6, 8]
    row = [0, 1, 2, 2, 2, 3, 3, 3, 5, 6, 7, 8]
    column = [0, 1, 2, 3, 4, 2, 3, 4, 5, 6, 6, 8]
    want = np.stack([time, row, column], axis=-1)[None]
    positions = jax.jit(qwen2_vl.mrope_positions)
    got = positions(is_image, jnp.ones((1, 12), bool), coords)
    np.testing.assert_array_equal(got, want)
    pad = jnp.zeros((1, 2), bool)
    for before, after in ((pad, pad[:, :0]), (pad[:, :0], pad)):
        mask = jnp.concatenate([before, jnp.ones((1, 12), bool), after], axis=1)
        padded = jnp.concatenate([before, is_image, after], axis=1)
        got = positions(padded, mask, coords)
        np.testing.assert_array_equal(got[mask], want[0])
        assert not got[~mask].any()


def test_embedding_a_still_image_equals_embedding_equal_frames(model):
    tower, patches = model.vision_tower, jax.random.normal(jax.random.key(0), (1, 16, 12))
    kernel, coords = tower.patch_embedding[...], CONFIG.pack(draw(((2, 2),)))["patch_coords"]
    assert kernel.shape == (2, 3, 2, 2, 16)
    video = jnp.stack([patches.reshape(1, 16, 3, 2, 2)] * 2, axis=2)
    want = jnp.einsum("bpfcij,fcijd->bpd", video, kernel)
    if tower.position_embedding is not None:
        want += tower._positions(coords) + tower.patch_bias[...]
    np.testing.assert_allclose(tower.embed(patches, coords), want, atol=1e-5)


# The forward pass.


@functools.partial(jax.jit, static_argnums=0)
def encode(graphdef, params, images, earlier=None):
    return base.bind(graphdef, params).encode(images, earlier=earlier)


def taps_of(model, rows, slots=0):
    """Returns the taps of images in at least `slots` slots; the patches in further slots must not matter."""
    packed = model.config.pack(rows)
    padding = ((0, 0), (0, max(slots - packed["patch_coords"].shape[1], 0)), (0, 0))
    packed["patches"] = np.pad(packed["patches"], padding, constant_values=9.0)
    packed["patch_coords"] = np.pad(packed["patch_coords"], padding, constant_values=-1)
    return encode(*base.split_model(model), packed)[1]


def close(ours, want):
    np.testing.assert_allclose(ours, want, rtol=1e-4, atol=1e-4)


def test_taps_are_block_outputs_projector_input_and_projector_output(model):
    features, taps = encode(*base.split_model(model), model.config.pack(draw(((2, 2), (1, 1)))))
    assert set(taps) == {"vision/0", "vision/1", "features", "projector"}
    assert model.config.used_blocks == 2
    np.testing.assert_array_equal(features.values, taps["projector"].values)
    np.testing.assert_array_equal(taps["features"].values, taps["vision/1"].values)
    assert (
        features.values.shape == (1, 6, 16 * (1 + len(model.config.vision.deepstack_blocks)))
        and features.valid.sum() == 5
    )
    assert taps["features"].values.shape == (1, 24, 16) and taps["features"].valid.sum() == 20


def test_empty_slots_do_not_change_features_and_have_zero_features(model):
    rows = draw(((2, 3),), ((1, 1), (2, 1)))
    few, many = taps_of(model, rows), taps_of(model, rows, slots=48)
    for name, tap in few.items():
        p = tap.values.shape[1]
        close(many[name].values[:, :p], tap.values)
        np.testing.assert_array_equal(many[name].coords[:, :p], tap.coords)
        assert not tap.values[~tap.valid].any() and not many[name].values[:, p:].any()


def test_empty_slots_have_zero_gradients(model):
    graphdef, params = base.split_model(model)

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1))
    def gradients(patches, params, coords):
        _, taps = base.bind(graphdef, params).encode({"patches": patches, "patch_coords": coords})
        return sum((tap.values**2).sum() for tap in taps.values())

    packed = model.config.pack(draw(((2, 3),), ((1, 1),)))
    valid = packed["patch_coords"][..., 0] >= 0
    patch_gradients, _ = gradients(packed["patches"], params, packed["patch_coords"])
    assert patch_gradients[valid].any(axis=-1).all() and not patch_gradients[~valid].any()
    _, param_gradients = gradients(packed["patches"], params, np.full_like(packed["patch_coords"], -1))
    assert not any(gradient.any() for gradient in param_gradients.values())


def test_images_of_a_prompt_do_not_attend_to_each_other(model):
    images = [*draw(((2, 3), (2, 1)))[0], *draw(((1, 2),), seed=1)[0]]
    together = taps_of(model, [images])["projector"]
    for index, image in enumerate(images):
        alone = taps_of(model, [[image]], slots=48)["projector"]
        close(together.values[together.coords[..., 0] == index], alone.values[alone.valid])


def test_windows_limit_attention():
    model, packed = random("qwen2_5_vl"), CONFIG.pack(draw(((3, 4),)))
    coords = packed["patch_coords"][0]
    change = np.array(packed["patches"])
    change[0, 0] += 1  # at row 0, column 0
    before, after = (encode(*model, {**packed, "patches": x})[1] for x in (packed["patches"], change))
    changed = [np.asarray((before[t].values != after[t].values).any(-1)[0]) for t in ("vision/0", "vision/1")]
    np.testing.assert_array_equal(changed[0], (coords[:, 0] == 0) & (coords[:, 1] < 4) & (coords[:, 2] < 4))
    np.testing.assert_array_equal(changed[1], coords[:, 0] == 0)


def test_encode_continues_from_any_block(model):
    packed = model.config.pack(draw(((2, 2),), ((1, 3), (1, 1))))
    features, taps = encode(*base.split_model(model), packed)
    for start in (1, 2):
        earlier = {name: taps[name].values for name in model.config.taps_before(start)}
        again, later = encode(*base.split_model(model), {"patch_coords": packed["patch_coords"]}, earlier)
        close(again.values, features.values)
        assert set(later) == {f"vision/{i}" for i in range(start, 2)} | {"features", "projector"}


def test_rematerialization_does_not_change_gradients():
    config = CONFIGS["qwen2_5_vl"]
    _, params = random("qwen2_5_vl")
    packed = config.pack(draw(((2, 2),)))

    @functools.partial(jax.jit, static_argnums=1)
    @jax.grad
    def gradients(params, remat):
        remat_config = dataclasses.replace(config, remat=remat)
        graphdef, _ = base.abstract_model(lambda rngs: qwen2_vl.Model(remat_config, rngs=rngs))
        return (base.bind(graphdef, params).encode(packed)[0].values ** 2).sum()

    count = [str(gradients.trace(params, remat).jaxpr).count("prevent_cse") for remat in ("", "full")]
    assert count == [0, 1]  # a scan of all blocks
    plain, recomputed = (gradients(params, remat) for remat in ("", "full"))
    for name, gradient in plain.items():
        close(recomputed[name], gradient)


def test_bfloat16_computation_gives_float32_logits(model):
    config = dataclasses.replace(model.config, compute_dtype="bfloat16")
    family = hf.family_of(config)
    graphdef, params = base.abstract_model(lambda rngs: family.Model(config, rngs=rngs, param_dtype=jnp.bfloat16))
    tokens = jnp.array([[1, IMAGE, IMAGE, IMAGE, IMAGE, 9]])

    def forward(params, images):
        half = base.bind(graphdef, params)
        features, taps = half.encode(images)
        return taps, half(tokens, tokens > 0, features=features)[0]

    taps, logits = jax.eval_shape(forward, params, config.pack(draw(((2, 2),))))
    assert {tap.values.dtype for tap in taps.values()} == {jnp.dtype("bfloat16")}
    assert logits.dtype == jnp.float32


def test_an_image_token_without_a_feature_is_text(model):
    features, _ = encode(*base.split_model(model), model.config.pack(draw(((1, 2),))))
    tokens = jnp.array([[1, IMAGE, IMAGE, 9, IMAGE, 10]])
    mask = jnp.ones_like(tokens, bool)

    @jax.jit
    def both_ways(features):
        whole, _ = model(tokens, mask, features=features)
        cache = model.language_model.empty_cache(1, 6)
        _, cache = model(tokens[:, :4], mask[:, :4], features=features, cache=cache)
        return whole[:, 4:], model(tokens[:, 4:], mask[:, 4:], cache=cache)[0]  # as in generation

    close(*both_ways(features))


# Configuration and files.


def hf_config(family, text=None, vision=None, **fields):
    from transformers import AutoConfig

    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 5000.0}
    sizes = dict(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, rope_parameters=rope, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    tower = dict(depth=2, num_heads=2, patch_size=2)
    if family == "qwen2_vl":
        tower |= dict(embed_dim=16, hidden_size=16, mlp_ratio=2)
    else:
        tower |= dict(
            hidden_size=16, out_hidden_size=16, intermediate_size=24, window_size=9, fullatt_block_indexes=[1]
        )
    fields = dict(image_token_id=IMAGE) | fields
    return AutoConfig.for_model(
        family, text_config=sizes | (text or {}), vision_config=tower | (vision or {}), **fields
    )


def test_configurations_are_read():
    config = qwen2_5_vl.Config.from_hf(hf_config("qwen2_5_vl", tie_word_embeddings=True), remat="full")
    assert config.vision == VisionConfig(
        **VISION, activation="silu", gated=True, window=4, full_attention_blocks=(1,)
    )  # 9 pixels are two tokens of two patches
    assert config.text == dataclasses.replace(
        TEXT, norm_eps=1e-5, rope_theta=5000.0, tie_embeddings=True, max_positions=64
    )
    assert config.remat == "full" and config.compute_dtype == "float32" and config.image_token_id == IMAGE
    config = qwen2_vl.Config.from_hf(hf_config("qwen2_vl"))
    assert config.vision == VisionConfig(**VISION | dict(mlp_width=32))


@pytest.mark.parametrize("family", QWEN2)
def test_configurations_from_before_transformers_5_are_read(family, tmp_path):
    new = hf_config(family, tie_word_embeddings=True)
    old = {k: v for k, v in new.text_config.to_dict().items() if k not in ("model_type", "rope_parameters", "dtype")}
    old |= dict(rope_theta=5000.0, rope_scaling={"type": "mrope", "mrope_section": [2, 1, 1]}, torch_dtype="bfloat16")
    vision = {k: v for k, v in new.vision_config.to_dict().items() if k not in ("rope_parameters", "dtype")}
    vision["model_type"] = family
    old |= dict(model_type=family, vision_config=vision, image_token_id=IMAGE, tie_word_embeddings=True)
    (tmp_path / "config.json").write_text(json.dumps(old))
    module, read = hf.read_config(tmp_path)
    assert module is models.module_for(family)
    assert module.Config.from_hf(read) == module.Config.from_hf(new, compute_dtype="bfloat16")


@pytest.mark.parametrize("family", QWEN2)
def test_all_unsupported_fields_are_reported_at_once(family, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4, "mrope_section": [2, 2, 1]}
    text = dict(hidden_act="gelu", rope_parameters=rope, use_sliding_window=True, max_window_layers=1)
    vision = dict(hidden_act="relu", in_channels=1, num_heads=8)
    vision |= dict(hidden_size=8) if family == "qwen2_vl" else dict(out_hidden_size=8, window_size=3)
    with pytest.raises(UserError, match="and .* more"):
        models.module_for(family).Config.from_hf(hf_config(family, text, vision))
    named = (
        "text_config.hidden_act is 'gelu'", "text_config.rope_parameters", "mrope_section is (2, 2, 1)",
        "text_config.use_sliding_window", "text_config.layer_types", "vision_config.hidden_act is 'relu'",
        "vision_config.in_channels is 1", "vision_config.num_heads is 8", "the width of merged patches is 8",
    )  # fmt: skip
    (file,) = tmp_path.iterdir()  # the message has the first three
    for name in named:
        assert name in file.read_text()
    assert ("vision_config.window_size is 3" in file.read_text()) == (family == "qwen2_5_vl")


def test_the_configuration_of_the_other_family_is_rejected():
    for family, other in (("qwen2_vl", "qwen2_5_vl"), ("qwen2_5_vl", "qwen2_vl")):
        with pytest.raises(UserError, match="vision_config.model_type.*text_config.model_type"):
            models.module_for(family).Config.from_hf(hf_config(other))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", QWEN2)
def test_written_models_are_read_under_all_generations_of_names(family, tied, tmp_path):
    hf_settings = hf_config(family, tie_word_embeddings=tied)
    module, rng = models.module_for(family), np.random.default_rng(0)
    config = module.Config.from_hf(hf_settings)
    _, shapes = base.abstract_model(lambda rngs: module.Model(config, rngs=rngs))
    params = {path: jnp.asarray(rng.standard_normal(x.shape, np.float32)) for path, x in shapes.items()}
    export.create(tmp_path / "model", hf_settings, params)
    _, again, _ = hf.load(tmp_path / "model")
    assert all((again[k] == v).all() for k, v in params.items()) and again.keys() == params.keys()
    names = safetensors_files.Checkpoint(tmp_path / "model").tensors
    assert {name.split(".")[0] for name in names} == {"visual", "model"} | ({"lm_head"} if not tied else set())
    for name in names:
        memory = name.replace("visual.", "model.visual.", 1) if name.startswith("visual.") else name
        memory = memory.replace("model.", "model.language_model.", 1) if name.startswith("model.") else memory
        assert hf.find_slot(module, config, memory) == hf.find_slot(module, config, name) is not None
    assert hf.find_slot(module, config, "visual.blocks.0.attn.rel_pos") is None


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl"])
@pytest.mark.parametrize("lost", ["<|vision_start|>", "<|vision_end|>"])
def test_a_template_without_the_tokens_around_images_is_refused(family, lost, family_folder, tmp_path):
    """transformers finds images, and with them positions, by these tokens."""
    folder = shutil.copytree(family_folder(family), tmp_path / "copy")
    module, settings = hf.read_config(folder)
    config, image = module.Config.from_hf(settings), Image.new("RGB", (56, 56))
    processor = Processor(folder, config)
    processor.encode("Who?", "Mara", [processor.image(image)])
    file = folder / "chat_template.json"
    file.write_text(json.dumps({"chat_template": json.loads(file.read_text())["chat_template"].replace(lost, "")}))
    processor = Processor(folder, config)
    processor.encode("Who?", "Mara")
    with pytest.raises(
        UserError, match=r"does not write <\|vision_start\|><\|image_pad\|><\|vision_end\|> for an image"
    ):
        processor.encode("Who?", "Mara", [processor.image(image)])
