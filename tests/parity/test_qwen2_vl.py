"""Qwen-VL families against PyTorch on small random models: every block, positions, gradients, generation."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_parity as parity
from torch_parity import EOS, IMAGE, PAD, SIDES

from vkd_jax import models
from vkd_jax.checkpoints import hf
from vkd_jax.models.base import bind
from vkd_jax.models.qwen2_vl import mrope_positions
from vkd_jax.models.qwen_vit import token_coords

torch = pytest.importorskip("torch", reason="PyTorch is needed for comparison: pip install '.[test]'")
transformers = pytest.importorskip("transformers")

# Grouped and ungrouped key/value heads, untied and tied output heads, three patch sizes.
SHAPES = {
    "qwen2_vl": dict(patch_size=14, kv_heads=2, tied=False),
    "qwen2_5_vl": dict(patch_size=4, kv_heads=4, tied=True),
    "qwen3_vl": dict(patch_size=6, kv_heads=2, tied=True),
}

# Rows and columns of tokens of the images of each prompt; windows of two tokens do not divide most of them.
GRIDS = (((3, 5), (2, 2)), ((4, 3),), ((1, 2), (5, 1), (2, 4)))
OTHER_GRIDS = (((2, 3),), ((4, 2), (1, 1), (3, 3)), ((2, 8), (1, 3)))


@dataclasses.dataclass(frozen=True)
class Pair:
    """The same weights in both frameworks, with inputs."""

    module: Any
    torch: Any
    graphdef: Any
    params: dict[str, jax.Array]
    config: Any
    images: list[list[np.ndarray]]  # of each prompt, [H, W, 3]
    tokens: dict[str, np.ndarray]  # padding side -> [b, t]
    mask: dict[str, np.ndarray]
    answers: dict[str, np.ndarray]  # bool [b, t]: tokens that the loss counts


def hf_config(family, patch_size, kv_heads, tied):
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 5000.0}
    text = dict(
        vocab_size=200, hidden_size=64, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=kv_heads, max_position_embeddings=256, pad_token_id=PAD, bos_token_id=1, eos_token_id=EOS,
        rope_parameters=rope, rms_norm_eps=1e-6,
    )  # fmt: skip
    vision = dict(num_heads=2, patch_size=patch_size)
    if family == "qwen2_vl":
        vision |= dict(depth=2, embed_dim=32, hidden_size=64, mlp_ratio=2)
    elif family == "qwen3_vl":  # the axes have 4, 3 and 3 of the channel pairs, since there is no eleventh
        text |= dict(head_dim=20, rope_parameters=rope | dict(mrope_section=[3, 4, 3], mrope_interleaved=True))
        vision |= dict(depth=4, hidden_size=32, intermediate_size=40, out_hidden_size=64)
        vision |= dict(num_position_embeddings=25, deepstack_visual_indexes=[0, 2])
    else:  # the window is rounded down to two tokens
        vision |= dict(depth=3, hidden_size=32, intermediate_size=40, out_hidden_size=64)
        vision |= dict(window_size=4 * patch_size + 1, fullatt_block_indexes=[1])
    return transformers.AutoConfig.for_model(
        family, text_config=text, vision_config=vision, tie_word_embeddings=tied, image_token_id=IMAGE,
        video_token_id=5, vision_start_token_id=6, vision_end_token_id=7,
    )  # fmt: skip


def draw(config, grids, rng):
    """Draws the images of each prompt with the given rows and columns of tokens, as an image processor returns them."""
    side = config.vision.patch_size * config.vision.merge
    return [[rng.standard_normal((r * side, c * side, 3)).astype(np.float32) for r, c in row] for row in grids]


def processed(config, images) -> dict[str, Any]:
    """Returns the output of transformers' image processor for images with final size and scale."""
    options = dict.fromkeys(("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"), False)
    vision = config.vision
    processor = transformers.Qwen2VLImageProcessorPil(**options, patch_size=vision.patch_size, merge_size=vision.merge)
    flat = [image for row in images for image in row]
    return dict(processor(images=flat, return_tensors="pt", input_data_format="channels_last"))


TEXT_LENGTHS = (5, 9, 2)


def prompts(grids, rng):
    """Draws prompts of a few text tokens, images with a text token after each, and text tokens."""
    rows = []
    for row, n in zip(grids, TEXT_LENGTHS, strict=True):
        images = [token for r, c in row for token in (*[IMAGE] * (r * c), 7)]
        rows.append([1, *rng.integers(8, 200, 2).tolist(), *images, *rng.integers(8, 200, n).tolist()])
    return rows


@pytest.fixture(scope="module", params=SHAPES)
def pair(request, tmp_path_factory) -> Pair:
    torch.manual_seed(0)
    hf_settings = hf_config(request.param, **SHAPES[request.param])
    model = transformers.AutoModelForImageTextToText.from_config(hf_settings).eval()
    parity.scale_weights(model)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    graphdef, params, config = hf.load(folder)
    rng = np.random.default_rng(0)
    images = draw(config, GRIDS, rng)
    padded = parity.pad_prompts(prompts(GRIDS, rng), TEXT_LENGTHS)
    return Pair(models.module_for(request.param), model, graphdef, params, config, images, *padded)


def to_torch(tokens, mask):
    tokens = torch.tensor(tokens, dtype=torch.long)
    return dict(input_ids=tokens, attention_mask=torch.tensor(mask).long(), mm_token_type_ids=(tokens == IMAGE).int())


def real(tokens):
    """Returns the real tokens of all images of all prompts in order, the layout of transformers."""
    return np.asarray(tokens.values)[np.asarray(tokens.valid)]


def test_patches_agree_with_the_image_processor(pair):
    theirs = processed(pair.config, pair.images)
    packed = pair.config.pack(pair.images)
    assert packed["patches"].shape[:2] == (3, 96)  # of 76, 48, 60
    frames = theirs["pixel_values"].numpy().reshape(len(theirs["pixel_values"]), 3, 2, -1)
    ours = packed["patches"][packed["patch_coords"][..., 0] >= 0].reshape(len(frames), 3, -1)
    np.testing.assert_array_equal(np.stack([ours] * 2, axis=2), frames)
    for image, again in zip(sum(pair.images, []), pair.config.extract_images(theirs), strict=True):
        np.testing.assert_array_equal(again, image)
    assert sum(pair.config.image_tokens(*image.shape[:2]) for image in sum(pair.images, [])) == len(frames) // 4


@functools.partial(jax.jit, static_argnums=0)
def encode(graphdef, params, images):
    return bind(graphdef, params).encode(images)


def test_vision_blocks_and_projector_agree(pair):
    visual, captured = pair.torch.model.visual, []
    hooks = [m.register_forward_hook(lambda m, x, y: captured.append(y)) for m in (visual.patch_embed, *visual.blocks)]
    first = visual.blocks[0].register_forward_pre_hook(lambda m, x: captured.append(x[0]))
    with torch.no_grad():
        output = pair.torch.get_image_features(**processed(pair.config, pair.images))
    for hook in (*hooks, first):
        hook.remove()
    embedded, entering, *blocks = captured
    order = torch.arange(len(entering))
    if not pair.config.vision.position_side:
        # Qwen2.5-VL sorts patches by windows; the order is recovered from their embeddings.
        order = torch.cdist(embedded, entering).argmin(1)
        assert torch.equal(embedded, entering[order])

    features, taps = encode(pair.graphdef, pair.params, pair.config.pack(pair.images))
    assert set(taps) == {f"vision/{i}" for i in range(len(blocks))} | {"features", "projector"}
    for i, block in enumerate(blocks):
        parity.assert_close(real(taps[f"vision/{i}"]), block[order], 1e-4)
    parity.assert_close(real(taps["features"]), blocks[-1][order], 1e-4)
    features_by_block = [output.pooler_output, *getattr(output, "deepstack_features", ())]
    merged = torch.cat([torch.cat(list(of_images)) for of_images in features_by_block], dim=-1)
    parity.assert_close(real(taps["projector"]), merged, 1e-4)
    np.testing.assert_array_equal(features.values, taps["projector"].values)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("grids", [((), (), ()), (((2, 3),), ((4, 1),), ()), GRIDS, OTHER_GRIDS], ids=str)
def test_positions_agree(pair, side, grids):
    rng = np.random.default_rng(1)
    tokens, mask = parity.pad_rows(prompts(grids, rng), side)
    images = draw(pair.config, grids, rng)
    inputs = to_torch(tokens, mask)
    grid = processed(pair.config, images)["image_grid_thw"] if any(grids) else None
    theirs, deltas = pair.torch.model.get_rope_index(**inputs, image_grid_thw=grid)

    coords = token_coords(pair.config.pack(images)["patch_coords"], 2)
    ours = np.asarray(jax.jit(mrope_positions)(tokens == IMAGE, mask, coords))
    np.testing.assert_array_equal(ours, theirs.permute(1, 2, 0))
    # The position of the next token.
    np.testing.assert_array_equal(ours.max((1, 2)) + 1, deltas[:, 0].numpy() + mask.sum(1))


@functools.partial(jax.jit, static_argnums=0)
def logits(graphdef, params, images, tokens, mask):
    model = bind(graphdef, params)
    return model(tokens, mask, features=model.encode(images)[0])[0]


@pytest.mark.parametrize("side", SIDES)
def test_logits_agree(pair, side):
    tokens, mask = pair.tokens[side], pair.mask[side]
    with torch.no_grad():
        theirs = pair.torch(**to_torch(tokens, mask), **processed(pair.config, pair.images)).logits
    ours = logits(pair.graphdef, pair.params, pair.config.pack(pair.images), tokens, mask)
    parity.assert_close(ours[mask], theirs[torch.tensor(mask)], 1e-4)


def test_images_of_other_sizes_do_not_recompile(pair):
    rng, compiled = np.random.default_rng(2), []
    for grids in (GRIDS, OTHER_GRIDS):
        images = draw(pair.config, grids, rng)
        rows = prompts(grids, rng)
        tokens, mask = parity.pad_rows([*rows, [0] * 40], "right")
        tokens, mask = tokens[:3], mask[:3]
        with torch.no_grad():
            theirs = pair.torch(**to_torch(tokens, mask), **processed(pair.config, images)).logits
        ours = logits(pair.graphdef, pair.params, pair.config.pack(images), tokens, mask)
        parity.assert_close(ours[mask], theirs[torch.tensor(mask)], 1e-4)
        compiled.append(logits._cache_size())
    assert compiled[0] == compiled[1]


@pytest.mark.parametrize("side", SIDES)
def test_text_only_logits_agree(pair, side):
    parity.assert_text_logits_agree(bind(pair.graphdef, pair.params), pair.torch, side, 2e-4)


@functools.partial(jax.jit, static_argnums=0)
@functools.partial(jax.value_and_grad, argnums=1)
def loss(graphdef, visual, frozen, images, tokens, mask, answers):
    model = bind(graphdef, {**frozen, **visual})
    logits, _ = model(tokens, mask, features=model.encode(images)[0])
    log_p = jax.nn.log_softmax(logits[:, :-1])
    token_log_p = jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=-1)[..., 0]
    return -jnp.where(answers[:, 1:], token_log_p, 0).sum() / answers.sum()


# Logits are compared for both sides.
@pytest.mark.parametrize("side", ["left", pytest.param("right", marks=pytest.mark.slow)])
def test_loss_and_gradients_of_all_visual_parameters_agree(pair, side):
    inputs, answers = to_torch(pair.tokens[side], pair.mask[side]), pair.answers[side]
    labels = inputs["input_ids"].masked_fill(~torch.tensor(answers), -100)
    pair.torch.zero_grad()
    theirs = pair.torch(**inputs, **processed(pair.config, pair.images), labels=labels).loss
    theirs.backward()

    images = pair.config.pack(pair.images)
    visual, frozen = parity.split_visual(pair.params)
    ours, gradients = loss(pair.graphdef, visual, frozen, images, pair.tokens[side], pair.mask[side], answers)
    np.testing.assert_allclose(ours, theirs.item(), rtol=1e-3)
    compared = set()
    largest = max(float(jnp.abs(g).max()) for g in gradients.values())
    for name, parameter in pair.torch.named_parameters():
        slot = hf.find_slot(pair.module, pair.config, name)
        if slot.path not in visual:
            continue
        compared.add(slot.path)
        gradient, want = gradients[slot.path], slot.to_param(parameter.grad.numpy())
        error, norm = np.linalg.norm(gradient - want), np.linalg.norm(want)
        assert norm > 1e-3 * largest, name
        assert error <= 1e-3 * norm, (name, error, norm)
    assert compared == set(visual)


def test_greedy_answers_to_prompts_of_different_lengths_agree(pair):
    inputs = to_torch(pair.tokens["left"], pair.mask["left"]) | processed(pair.config, pair.images)
    parity.assert_greedy_answers_agree(pair, inputs)


def test_option_log_probs_agree_with_a_forward_pass_per_option(pair):
    def inputs_of(row, ids):
        return to_torch([ids], [[True] * len(ids)]) | processed(pair.config, pair.images[row : row + 1])

    options = [[[17, 8, 9], [10]], [[11, 12], [13, 14]], [[20], [21, 22, 23]]]
    parity.assert_option_log_probs_agree(pair, options, inputs_of)
