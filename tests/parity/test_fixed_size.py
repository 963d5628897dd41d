"""LLaVA, Gemma-3, SmolVLM, InternVL against PyTorch on small random models: blocks, logits, gradients, generation."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_parity as parity
from torch_parity import IMAGE, PAD, SIDES

from vkd_jax import models
from vkd_jax.checkpoints import hf
from vkd_jax.data.images import TiledImage
from vkd_jax.evaluation.encoded_images import EncodedImages
from vkd_jax.models.base import bind
from vkd_jax.models.llava_next import LlavaNextConfig
from vkd_jax.models.tiled import TiledConfig, cut

torch = pytest.importorskip("torch", reason="PyTorch is needed for comparison: pip install '.[test]'")
transformers = pytest.importorskip("transformers")
from transformers.image_processing_utils import select_best_resolution  # noqa: E402

TEXT = dict(vocab_size=200, hidden_size=48, intermediate_size=80, max_position_embeddings=256, pad_token_id=PAD)
TOWER = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4)
WHOLE_TOWER = TOWER | dict(num_hidden_layers=2)  # of models that use every block


def llava(image_size, patch_size, kv_heads, feature_layer, select, tied):
    return transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(
            **TOWER, image_size=image_size, patch_size=patch_size, projection_dim=32
        ),
        text_config=transformers.LlamaConfig(
            **TEXT, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=kv_heads,
            rope_parameters={"rope_type": "default", "rope_theta": 5000.0}, tie_word_embeddings=tied,
        ),
        image_token_index=IMAGE, vision_feature_layer=feature_layer, vision_feature_select_strategy=select,
        tie_word_embeddings=tied,
    )  # fmt: skip


def vipllava():
    """Tied embeddings, and a projector that reads three of four layers in another order than the tower's."""
    config = llava(50, 8, 2, feature_layer=0, select="default", tied=True).to_dict()
    fields = {
        name: config[name] for name in ("vision_config", "text_config", "image_token_index", "tie_word_embeddings")
    }
    return transformers.VipLlavaConfig(**fields, vision_feature_layer=[-2, 1, -1], projector_layernorm_eps=1e-3)


def llava_next(image_size, patch_size, kv_heads, pinpoints, text, tied):
    return transformers.LlavaNextConfig(
        vision_config=transformers.CLIPVisionConfig(
            **TOWER, image_size=image_size, patch_size=patch_size, projection_dim=32
        ),
        text_config=transformers.AutoConfig.for_model(
            **text, **TEXT, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=kv_heads,
            tie_word_embeddings=tied,
        ),
        image_token_index=IMAGE, tie_word_embeddings=tied,
        image_grid_pinpoints=[[image_size * rows, image_size * columns] for rows, columns in pinpoints],
    )  # fmt: skip


def gemma3():
    """Seven patches a side, pooled two by two; a window shorter than an image; local, full and local blocks."""
    return transformers.Gemma3Config(
        vision_config=transformers.SiglipVisionConfig(
            **WHOLE_TOWER, image_size=30, patch_size=4, vision_use_head=False
        ),
        text_config=transformers.Gemma3TextConfig(
            **TEXT, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2, head_dim=10,
            query_pre_attn_scalar=16, sliding_window=5, sliding_window_pattern=2,
            rope_scaling={"rope_type": "linear", "factor": 8.0}, rope_theta=50_000.0, rope_local_base_freq=1000.0,
        ),
        image_token_index=IMAGE, boi_token_index=5, eoi_token_index=6, mm_tokens_per_image=9,
    )  # fmt: skip


def smolvlm(model_type, image_size, patch_size, scale, tied):
    return transformers.AutoConfig.for_model(
        model_type,
        vision_config=dict(WHOLE_TOWER, image_size=image_size, patch_size=patch_size),
        text_config=dict(
            TEXT, model_type="llama", num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2,
            tie_word_embeddings=tied,
        ),
        image_token_id=IMAGE, scale_factor=scale, tie_word_embeddings=tied,
    )  # fmt: skip


def internvl(image_size, patch_size, kv_heads, rope, tied, **vision):
    return transformers.InternVLConfig(
        vision_config=dict(WHOLE_TOWER, image_size=[image_size] * 2, patch_size=[patch_size] * 2, **vision),
        text_config=dict(
            TEXT, model_type="qwen2", num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=kv_heads,
            rope_parameters=rope, tie_word_embeddings=tied,
        ),
        image_token_id=IMAGE, tie_word_embeddings=tied,
    )  # fmt: skip


DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e6}  # as published
PLAIN = {"rope_type": "default", "rope_theta": 5000.0}
# The variants of the tower that the published sizes up to 8B do not have.
VARIANTS = dict(norm_type="rms_norm", use_qk_norm=True, attention_bias=False, use_mean_pooling=False)
# Configuration, and the images of each prompt, with the rows and columns of their tiles. Several image sizes, patch
# sizes, scales of joined patches, all-head and grouped key/value heads, feature layers.
ONE = (1, 1)
MODELS = {
    "mha": (lambda: llava(28, 14, 4, feature_layer=-2, select="default", tied=False), ((ONE,), (ONE,), (ONE,))),
    "gqa": (lambda: llava(50, 8, 2, feature_layer=-1, select="full", tied=True), ((ONE,), (ONE,), (ONE,))),
    # For LLaVA-1.6, the heights and widths of the images: wide and tall ones, borders of odd widths, no border.
    "vicuna": (
        lambda: llava_next(23, 7, 4, ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3)), dict(model_type="llama"), tied=False),
        (((40, 97),), ((61, 30), (200, 31)), ((46, 46),)),
    ),
    "mistral": (
        lambda: llava_next(
            28,
            9,
            2,
            ((2, 1), (1, 1), (3, 2)),
            dict(model_type="mistral", sliding_window=None, rope_theta=1e6),
            tied=True,
        ),
        (((28, 29),), ((90, 10),), ((300, 211), (3, 170))),
    ),
    "vipllava": (vipllava, ((ONE,), (ONE,), (ONE,))),
    "gemma3": (gemma3, ((ONE,), (ONE, ONE), (ONE,))),
    "idefics3": (lambda: smolvlm("idefics3", 25, 4, scale=3, tied=False), (((2, 1),), (ONE, (1, 2)), (ONE,))),
    "smolvlm": (lambda: smolvlm("smolvlm", 20, 5, scale=2, tied=True), (((1, 2),), ((2, 2),), (ONE,))),
    "internvl": (
        lambda: internvl(27, 4, 2, DYNAMIC, tied=False, attention_bias=True), (((1, 2),), (ONE, (3, 1)), (ONE,)),
    ),
    "internvl variants": (lambda: internvl(20, 5, 3, PLAIN, tied=True, **VARIANTS), (((1, 2),), ((2, 2),), (ONE,))),
}  # fmt: skip
SLOW = ("mha", "smolvlm", "internvl variants", "vicuna")  # gqa, idefics3, internvl and mistral run the same code
TEXT_LENGTHS = (5, 9, 2)


@dataclasses.dataclass(frozen=True)
class Pair:
    """The same weights in both frameworks, with inputs."""

    torch: Any
    graphdef: Any
    params: dict[str, jax.Array]
    config: Any
    images: list[list[np.ndarray]]  # of each prompt, [H, W, 3]
    tokens: dict[str, np.ndarray]  # padding side -> [b, t]
    mask: dict[str, np.ndarray]
    answers: dict[str, np.ndarray]  # bool [b, t]: tokens that the loss counts
    sizes: dict[int, tuple[int, int]]  # of LLaVA-1.6: id of an image -> its height and width before it was processed

    @property
    def module(self):
        return hf.family_of(self.config)

    @property
    def pads(self):
        """Whether the shorter rows of tiles are padded in transformers."""
        return self.module is not models.module_for("internvl")

    def image_run(self, image):
        """The tokens of an image, with one before and one after it."""
        return [5, *[IMAGE] * self.config.image_tokens(*image.shape[:2]), 6]


def draw_image(config, rng, grid):
    """A random image, with that many rows and columns of tiles."""
    side = config.vision.image_size

    def pixels(rows, columns):
        return rng.standard_normal((rows * side, columns * side, 3)).astype(np.float32)

    if not isinstance(config, TiledConfig):
        return pixels(*grid)
    if isinstance(config, LlavaNextConfig):
        size = config.tiled_size(*grid, best_grid(config, *grid))
        return TiledImage(tuple(pixels(*view) for view in config.grids(*size)), size)
    size = grid[0] * side, grid[1] * side
    return TiledImage(tuple(pixels(*view) for view in config.grids(*size)), size)


def best_grid(config, height, width):
    """The rows and columns of tiles that transformers chooses for an image of LLaVA-1.6."""
    pinpoints = (np.array(config.choices) * config.vision.image_size).tolist()
    rows, columns = np.array(select_best_resolution((height, width), pinpoints)) // config.vision.image_size
    return int(rows), int(columns)


@pytest.fixture(scope="session", params=[pytest.param(x, marks=[pytest.mark.slow] * (x in SLOW)) for x in MODELS])
def pair(request, tmp_path_factory) -> Pair:
    torch.manual_seed(0)
    make, grids = MODELS[request.param]
    model = transformers.AutoModelForImageTextToText.from_config(make()).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("mm_input_projection_weight"):  # initially zero
            torch.nn.init.normal_(parameter, std=0.1)
        elif request.param == "gemma3" and "vision_tower" in name and parameter.ndim > 1:  # initially large
            parameter.data.div_(3)
    parity.scale_weights(model)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    graphdef, params, config = hf.load(folder)
    rng = np.random.default_rng(0)
    images = [[draw_image(config, rng, grid) for grid in row] for row in grids]
    sizes = {
        id(image): size
        for row, of_row in zip(images, grids, strict=True)
        for image, size in zip(row, of_row, strict=True)
    }
    pair = Pair(model, graphdef, params, config, images, {}, {}, {}, sizes)
    rows = [
        [1, *rng.integers(7, 200, 2), *(t for x in row for t in pair.image_run(x)), *rng.integers(7, 200, n)]
        for row, n in zip(images, TEXT_LENGTHS, strict=True)
    ]
    return dataclasses.replace(
        pair, **dict(zip(("tokens", "mask", "answers"), parity.pad_prompts(rows, TEXT_LENGTHS), strict=True))
    )


def tiles_of(image):
    """The tiles of an image in order: [n, H, W, 3]."""
    if not isinstance(image, TiledImage):
        return image[None]
    side = min(min(view.shape[:2]) for view in image.views)
    return np.concatenate([cut(view, side) for view in image.views])


def image_inputs(pair, rows):
    """The images of all prompts in order, as transformers takes them; black tiles may pad the shorter rows of tiles."""
    if not isinstance(pair.config, TiledConfig):
        pixels = torch.tensor(np.stack([image for row in rows for image in row])).permute(0, 3, 1, 2)
        return dict(pixel_values=pixels)
    more = {}
    if isinstance(pair.config, LlavaNextConfig):  # images, not prompts, are rows
        rows = [[image] for row in rows for image in row]
        more = dict(image_sizes=torch.tensor([pair.sizes[id(image)] for (image,) in rows]))
    rows = [np.concatenate([tiles_of(image) for image in row]) for row in rows]
    if not pair.pads:
        return dict(pixel_values=torch.tensor(np.concatenate(rows)).permute(0, 3, 1, 2))
    most = max(map(len, rows))
    padded = [np.pad(row, ((0, most - len(row)), (0, 0), (0, 0), (0, 0))) for row in rows]
    return dict(pixel_values=torch.tensor(np.stack(padded)).permute(0, 1, 4, 2, 3), **more)


def to_torch(pair, tokens, mask, images):
    tokens, mask = torch.tensor(tokens, dtype=torch.long), torch.tensor(mask)
    kinds = dict(token_type_ids=(tokens == IMAGE).long()) if pair.module is models.module_for("gemma3") else {}
    return dict(
        input_ids=tokens,
        attention_mask=mask.long(),
        position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
        **image_inputs(pair, images),
        **kinds,
    )


@functools.partial(jax.jit, static_argnums=0)
def encode(graphdef, params, images):
    return bind(graphdef, params).encode(images)


@functools.partial(jax.jit, static_argnums=0)
def logits(graphdef, params, images, tokens, mask):
    model = bind(graphdef, params)
    return model(tokens, mask, features=model.encode(images)[0])[0]


def real(tokens, like):
    """Returns the tokens of all images of all prompts in order, [images, p, d] as in transformers."""
    return np.asarray(tokens.values)[np.asarray(tokens.valid)].reshape(like.shape)


def test_vision_blocks_and_projector_agree(pair):
    with torch.no_grad():
        tiles = np.concatenate([tiles_of(image) for row in pair.images for image in row])
        model = pair.torch.model
        tower = model.vision_model if hasattr(model, "vision_model") else model.vision_tower
        out = tower(torch.tensor(tiles).permute(0, 3, 1, 2), output_hidden_states=True)
        projected = pair.torch.get_image_features(**image_inputs(pair, pair.images)).pooler_output
        projected = torch.cat([features.flatten(0, -2) for features in projected])
    features, taps = encode(pair.graphdef, pair.params, pair.config.pack(pair.images))
    assert set(taps) == {f"vision/{i}" for i in range(pair.config.used_blocks)} | {"features", "projector"}
    for i in range(pair.config.used_blocks):
        parity.assert_close(real(taps[f"vision/{i}"], out.hidden_states[i + 1]), out.hidden_states[i + 1], 1e-4)
    if pair.config.uses_post_norm:
        inputs = out.last_hidden_state
    else:
        inputs = torch.cat([out.hidden_states[block + 1] for block in pair.config.feature_blocks], dim=-1)
    inputs = inputs[:, -len(pair.config.feature_coords) :]  # a class token is not a feature
    parity.assert_close(real(taps["features"], inputs), inputs, 1e-4)
    parity.assert_close(real(taps["projector"], projected), projected, 1e-4)
    np.testing.assert_array_equal(features.values, taps["projector"].values)


@pytest.mark.parametrize("side", SIDES)
def test_logits_agree(pair, side):
    tokens, mask = pair.tokens[side], pair.mask[side]
    with torch.no_grad():
        theirs = pair.torch(**to_torch(pair, tokens, mask, pair.images)).logits
    ours = logits(pair.graphdef, pair.params, pair.config.pack(pair.images), tokens, mask)
    parity.assert_close(ours[mask], theirs[torch.tensor(mask)], 1e-4)


@pytest.mark.slow
def test_bfloat16_logits_are_as_near_to_those_of_pytorch_as_these_are_to_float32(pair, tmp_path):
    tokens, mask = pair.tokens["left"], pair.mask["left"]
    pair.torch.save_pretrained(tmp_path)
    graphdef, params, config = hf.load(tmp_path, dtype="bfloat16")
    ours = np.asarray(logits(graphdef, params, config.pack(pair.images), tokens, mask))[mask]
    inputs = to_torch(pair, tokens, mask, pair.images)
    rounded = type(pair.torch).from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        exact = pair.torch(**inputs).logits[torch.tensor(mask)].numpy()
        inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
        theirs = rounded(**inputs).logits.float()[torch.tensor(mask)].numpy()
    distance = np.linalg.norm(theirs - exact)
    assert 1e-3 * np.linalg.norm(exact) < distance  # both rounded
    assert np.linalg.norm(ours - theirs) <= 1.5 * distance and np.linalg.norm(ours - exact) <= 1.2 * distance


@pytest.mark.parametrize("side", SIDES)
def test_text_only_logits_agree(pair, side):
    parity.assert_text_logits_agree(bind(pair.graphdef, pair.params), pair.torch, side, 1e-4)


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
    tokens, mask, answers = pair.tokens[side], pair.mask[side], pair.answers[side]
    inputs = to_torch(pair, tokens, mask, pair.images)
    labels = inputs["input_ids"].masked_fill(~torch.tensor(answers), -100)
    pair.torch.zero_grad()
    theirs = pair.torch(**inputs, labels=labels).loss
    theirs.backward()

    visual, frozen = parity.split_visual(pair.params)
    ours, gradients = loss(pair.graphdef, visual, frozen, pair.config.pack(pair.images), tokens, mask, answers)
    np.testing.assert_allclose(ours, theirs.item(), rtol=1e-3)
    compared = set()
    largest = max(float(jnp.abs(g).max()) for g in gradients.values())
    for name, parameter in pair.torch.named_parameters():
        slot = hf.find_slot(pair.module, pair.config, name)
        if slot.path not in visual:
            continue
        compared.add(slot.path)
        gradient = gradients[slot.path]
        if parameter.grad is None:  # blocks after the feature layer do not affect the loss
            assert not gradient.any()
            continue
        want = slot.to_param(parameter.grad.numpy())
        # Relative to the norm of the tensor. The gradient of the key bias is zero: the softmax cancels the bias.
        error, norm = np.linalg.norm(gradient - want), np.linalg.norm(want)
        assert error <= 1e-3 * norm or max(error, norm) < 1e-5 * largest, (name, error, norm)
    assert compared == set(visual)


def test_greedy_answers_to_prompts_of_different_lengths_agree(pair):
    inputs = to_torch(pair, pair.tokens["left"], pair.mask["left"], pair.images)
    del inputs["position_ids"]
    parity.assert_greedy_answers_agree(pair, inputs)


def test_option_log_probs_agree_with_a_forward_pass_per_option(pair):
    def inputs_of(row, ids):
        return to_torch(pair, [ids], np.ones((1, len(ids)), bool), pair.images[row : row + 1])

    options = [[[7, 8, 9], [10]], [[11, 12], [13, 14]], [[20], [21, 22, 23]]]
    parity.assert_option_log_probs_agree(pair, options, inputs_of)


def test_logits_of_prompts_with_two_images_agree(pair):
    """Images are encoded separately and their features concatenated, as for a worked example before a question."""
    rng, images = np.random.default_rng(1), [row[0] for row in pair.images]
    features, _ = encode(pair.graphdef, pair.params, pair.config.pack([[image] for image in images]))
    shapes, rows = [image.shape for image in images], ((0, 2), (1, 0))
    encoded_images = EncodedImages(shapes, jax.tree.map(np.asarray, features), rows)
    tokens, mask = parity.pad_rows(
        [
            [
                1,
                *pair.image_run(images[i]),
                *rng.integers(7, 200, 6),
                *pair.image_run(images[j]),
                *rng.integers(7, 200, 3),
            ]
            for i, j in rows
        ],
        "left",
    )

    @jax.jit
    def logits(params, tokens, mask, features):
        return bind(pair.graphdef, params)(tokens, mask, features=features)[0]

    ours = logits(pair.params, tokens, mask, encoded_images.tokens())
    with torch.no_grad():
        theirs = pair.torch(**to_torch(pair, tokens, mask, [[images[i] for i in row] for row in rows])).logits
    parity.assert_close(ours[mask], theirs[torch.tensor(mask)], 1e-4)
