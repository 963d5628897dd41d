"""LLaVA against PyTorch on small random models: every block, logits, gradients, generation."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_parity as parity
from torch_parity import EOS, IMAGE, PAD, SIDES

from vkd_jax.checkpoints import hf
from vkd_jax.evaluation.inference import EncodedImages
from vkd_jax.models import llava
from vkd_jax.models.base import bind
from vkd_jax.models.generate import Prompts, greedy, option_log_probs

torch = pytest.importorskip("torch", reason="PyTorch is needed for comparison: pip install '.[test]'")
transformers = pytest.importorskip("transformers")

# Two image sizes, two patch sizes, all-head and grouped key/value heads, two feature layers.
SHAPES = {
    "mha": dict(image_size=28, patch_size=14, kv_heads=4, feature_layer=-2, select="default", tied=False),
    "gqa": dict(image_size=50, patch_size=8, kv_heads=2, feature_layer=-1, select="full", tied=True),
}


@dataclasses.dataclass(frozen=True)
class Pair:
    """The same weights in both frameworks, with inputs."""

    torch: Any
    graphdef: Any
    params: dict[str, jax.Array]
    config: Any
    folder: Any
    pixels: np.ndarray  # [b, H, W, 3]
    tokens: dict[str, np.ndarray]  # padding side -> [b, t]
    mask: dict[str, np.ndarray]
    answers: dict[str, np.ndarray]  # bool [b, t]: tokens that the loss counts


def hf_config(image_size, patch_size, kv_heads, feature_layer, select, tied):
    return transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
            image_size=image_size, patch_size=patch_size, projection_dim=32,
        ),
        text_config=transformers.LlamaConfig(
            vocab_size=200, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=kv_heads, max_position_embeddings=256, pad_token_id=PAD,
            rope_parameters={"rope_type": "default", "rope_theta": 5000.0}, tie_word_embeddings=tied,
        ),
        image_token_index=IMAGE, vision_feature_layer=feature_layer, vision_feature_select_strategy=select,
        tie_word_embeddings=tied,
    )  # fmt: skip


@pytest.fixture(scope="session", params=SHAPES)
def pair(request, tmp_path_factory) -> Pair:
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(hf_config(**SHAPES[request.param])).eval()
    parity.scale_weights(model)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    graphdef, params, config = hf.load(folder)
    rng = np.random.default_rng(0)
    lengths = (5, 9, 2)
    image = [IMAGE] * config.image_tokens(config.vision.image_size, config.vision.image_size)
    rows = [[1, *rng.integers(5, 200, 2), *image, *rng.integers(5, 200, n)] for n in lengths]
    size = config.vision.image_size
    pixels = rng.standard_normal((len(rows), size, size, 3)).astype(np.float32)
    return Pair(model, graphdef, params, config, folder, pixels, *parity.pad_prompts(rows, lengths))


def to_torch(pair, side):
    mask = torch.tensor(pair.mask[side])
    return dict(
        input_ids=torch.tensor(pair.tokens[side], dtype=torch.long),
        attention_mask=mask.long(),
        position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
        pixel_values=torch.tensor(pair.pixels).permute(0, 3, 1, 2),
    )


def test_vision_blocks_and_projector_agree(pair):
    with torch.no_grad():
        pixels = torch.tensor(pair.pixels).permute(0, 3, 1, 2)
        hidden = pair.torch.model.vision_tower(pixels, output_hidden_states=True).hidden_states
        projected = torch.stack(list(pair.torch.get_image_features(pixel_values=pixels).pooler_output))
    features, taps = jax.jit(lambda p, x: bind(pair.graphdef, p).encode({"pixels": x}))(pair.params, pair.pixels)
    assert set(taps) == {f"vision/{i}" for i in range(pair.config.used_blocks)} | {"features", "projector"}
    for i in range(pair.config.used_blocks):
        parity.assert_close(taps[f"vision/{i}"].values, hidden[i + 1], 1e-4)
    features_in_torch = hidden[pair.config.feature_layer]
    if pair.config.feature_select == "default":
        features_in_torch = features_in_torch[:, 1:]
    parity.assert_close(taps["features"].values, features_in_torch, 1e-4)
    parity.assert_close(taps["projector"].values, projected, 1e-4)
    np.testing.assert_array_equal(features.values, taps["projector"].values)


@pytest.mark.parametrize("side", SIDES)
def test_logits_agree(pair, side):
    with torch.no_grad():
        theirs = pair.torch(**to_torch(pair, side)).logits

    @jax.jit
    def logits(params, pixels, tokens, mask):
        model = bind(pair.graphdef, params)
        return model(tokens, mask, features=model.encode({"pixels": pixels})[0])[0]

    ours = logits(pair.params, pair.pixels, pair.tokens[side], pair.mask[side])
    real = pair.mask[side]
    parity.assert_close(ours[real], theirs[torch.tensor(real)], 1e-4)


@pytest.mark.parametrize("side", SIDES)
def test_text_only_logits_agree(pair, side):
    parity.assert_text_logits_agree(bind(pair.graphdef, pair.params), pair.torch, side, 1e-4)


@pytest.mark.parametrize("side", SIDES)
def test_loss_and_gradients_of_all_visual_parameters_agree(pair, side):
    inputs, answers = to_torch(pair, side), pair.answers[side]
    labels = inputs["input_ids"].masked_fill(~torch.tensor(answers), -100)
    pair.torch.zero_grad()
    theirs = pair.torch(**inputs, labels=labels).loss
    theirs.backward()

    visual, frozen = parity.split_visual(pair.params)

    @jax.jit
    @jax.value_and_grad
    def loss(visual, frozen, pixels, tokens, mask, answers):
        model = bind(pair.graphdef, {**frozen, **visual})
        logits, _ = model(tokens, mask, features=model.encode({"pixels": pixels})[0])
        log_p = jax.nn.log_softmax(logits[:, :-1])
        token_log_p = jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=-1)[..., 0]
        return -jnp.where(answers[:, 1:], token_log_p, 0).sum() / answers.sum()

    ours, gradients = loss(visual, frozen, pair.pixels, pair.tokens[side], pair.mask[side], answers)
    np.testing.assert_allclose(ours, theirs.item(), rtol=1e-3)
    compared = set()
    largest = max(float(jnp.abs(g).max()) for g in gradients.values())
    for name, parameter in pair.torch.named_parameters():
        slot = hf.find_slot(llava, pair.config, name)
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


@pytest.mark.parametrize("side", SIDES)
def test_greedy_answers_to_prompts_of_different_lengths_agree(pair, side):
    inputs = to_torch(pair, "left")  # transformers generates with left padding only
    del inputs["position_ids"]
    theirs, end = parity.generate(pair.torch, inputs, 12)

    @jax.jit
    def answer(params, pixels, tokens, mask):
        model = bind(pair.graphdef, params)
        features = model.encode({"pixels": pixels})[0]
        return greedy(model, Prompts(tokens, mask, features), max_new_tokens=12, eos_ids=(EOS, end), pad_id=PAD)

    ours = np.asarray(answer(pair.params, pair.pixels, pair.tokens[side], pair.mask[side]))
    parity.assert_same_answers(ours, theirs)


@pytest.mark.parametrize("side", SIDES)
def test_option_log_probs_agree_with_a_forward_pass_per_option(pair, side):
    options = [[[7, 8, 9], [10]], [[11, 12], [13, 14]], [[20], [21, 22, 23]]]
    texts, texts_mask = parity.pad_options(options)

    @jax.jit
    def score(params, pixels, tokens, mask):
        model = bind(pair.graphdef, params)
        prompts = Prompts(tokens, mask, model.encode({"pixels": pixels})[0])
        return option_log_probs(model, prompts, texts, texts_mask)

    scores = score(pair.params, pair.pixels, pair.tokens[side], pair.mask[side])
    for i, row in enumerate(options):
        prompt = pair.tokens[side][i][pair.mask[side][i]].tolist()
        for j, option in enumerate(row):
            with torch.no_grad():
                logits = pair.torch(
                    input_ids=torch.tensor([prompt + option]),
                    pixel_values=torch.tensor(pair.pixels[i : i + 1]).permute(0, 3, 1, 2),
                ).logits[0]
            log_p = torch.log_softmax(logits, -1)[len(prompt) - 1 : -1]
            want = log_p[torch.arange(len(option)), torch.tensor(option)].sum().item()
            np.testing.assert_allclose(scores[i, j], want, atol=1e-3)


def test_logits_of_prompts_with_two_images_agree(pair):
    """Images are encoded separately and their features concatenated, as for a worked example before a question."""
    count = pair.config.image_tokens(pair.config.vision.image_size, pair.config.vision.image_size)
    rng = np.random.default_rng(1)
    features, _ = jax.jit(lambda p, x: bind(pair.graphdef, p).encode({"pixels": x}))(pair.params, pair.pixels)
    encoded_images = EncodedImages([pair.pixels[0].shape] * 3, jax.tree.map(np.asarray, features), ((0, 2), (1, 0)))
    rows = []
    for _ in encoded_images.rows:
        rows.append([1, 7, *[IMAGE] * count, *rng.integers(5, 200, 6), *[IMAGE] * count, *rng.integers(5, 200, 3)])
    tokens = np.array(rows)

    @jax.jit
    def logits(params, tokens, features):
        return bind(pair.graphdef, params)(tokens, jnp.ones_like(tokens, bool), features=features)[0]

    ours = logits(pair.params, tokens, encoded_images.tokens())
    with torch.no_grad():
        pixels = torch.tensor(pair.pixels[np.ravel(encoded_images.rows)]).permute(0, 3, 1, 2)
        theirs = pair.torch(input_ids=torch.tensor(tokens), pixel_values=pixels).logits
    parity.assert_close(ours, theirs, 1e-4)
