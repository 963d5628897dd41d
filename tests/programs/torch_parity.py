"""Helpers of the comparisons with PyTorch: scaled weights, padded prompts, generation and tolerances."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vkd_jax.models.base import bind
from vkd_jax.models.generate import Prompts, greedy, option_log_probs

SIDES = ("left", "right")
IMAGE, PAD, EOS = 4, 3, 2  # token ids


def scale_weights(model: Any) -> None:
    """Scales initial weights as if they were trained; otherwise logits are near zero and norms trivial."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embed_tokens" in name and model.config.tie_word_embeddings:
                continue  # with larger embeddings each token would only predict itself
            if parameter.ndim > 1:
                parameter.mul_(6 if "language_model" in name or "text_model" in name else 3)
            else:
                parameter.add_(0.2 * torch.randn_like(parameter))


def pad_rows(rows: Sequence[Sequence[int]], side: str) -> tuple[np.ndarray, np.ndarray]:
    """Pads rows of different lengths on one side and returns (tokens, mask)."""
    width = max(map(len, rows))
    tokens, mask = np.full((len(rows), width), PAD, np.int32), np.zeros((len(rows), width), bool)
    for i, row in enumerate(rows):
        part = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        tokens[i, part], mask[i, part] = row, True
    return tokens, mask


def pad_prompts(rows: Sequence[Sequence[int]], lengths: Sequence[int]) -> tuple[dict[str, np.ndarray], ...]:
    """Returns tokens, masks and answer masks of prompts by padding side.

    Args:
        rows: the prompts.
        lengths: number of text tokens at the end of each prompt; the last four of them, or fewer, are the answer.
    """
    tokens, mask, answers = {}, {}, {}
    for side in SIDES:
        tokens[side], mask[side] = pad_rows(rows, side)
        answers[side] = np.zeros_like(mask[side])
        for i, row in enumerate(rows):
            end = mask[side].shape[1] if side == "left" else len(row)
            answers[side][i, end - min(4, lengths[i]) : end] = True
    return tokens, mask, answers


def pad_options(options: Sequence[Sequence[Sequence[int]]]) -> tuple[np.ndarray, np.ndarray]:
    """Pads two options of each prompt, of at most three tokens, on the right and returns (tokens, mask)."""
    tokens, mask = zip(*(pad_rows([*row, [0] * 3], "right") for row in options), strict=True)
    return np.stack(tokens)[:, :2], np.stack(mask)[:, :2]


def split_visual(params: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits parameters into visual ones and those of the language model."""
    visual = {path: x for path, x in params.items() if not path.startswith("language_model/")}
    return visual, {path: x for path, x in params.items() if path not in visual}


def generate(model: Any, inputs: Mapping[str, Any], max_new_tokens: int) -> tuple[np.ndarray, int]:
    """Generates greedily with transformers; the third token of the first row becomes an end token.

    Returns:
        The new tokens of each row, and the end token.
    """
    settings = dict(do_sample=False, pad_token_id=PAD, max_new_tokens=max_new_tokens)
    width = inputs["input_ids"].shape[1]
    unlimited = model.generate(**inputs, **settings, eos_token_id=None)[:, width:].numpy()
    # The answers are not trivial.
    assert len(set(map(tuple, unlimited.tolist()))) == len(unlimited) and len(np.unique(unlimited)) > 4
    end = int(unlimited[0, 2])
    return model.generate(**inputs, **settings, eos_token_id=[EOS, end])[:, width:].numpy(), end


def assert_same_answers(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Asserts that answers are equal up to the padding at their end."""
    np.testing.assert_array_equal(ours[:, : theirs.shape[1]], theirs)
    assert (ours[:, theirs.shape[1] :] == PAD).all()


def assert_greedy_answers_agree(pair: Any, inputs: Mapping[str, Any]) -> None:
    """Compares greedy answers to prompts of different lengths, padded on each side.

    Args:
        pair: a model in both libraries, with images and prompts.
        inputs: what PyTorch's model takes for the prompts with left padding, the only one that its `generate` supports.
    """
    theirs, end = generate(pair.torch, inputs, 12)

    @jax.jit
    def answer(params, images, tokens, mask):
        model = bind(pair.graphdef, params)
        prompts = Prompts(tokens, mask, model.encode(images)[0])
        return greedy(model, prompts, max_new_tokens=12, eos_ids=(EOS, end), pad_id=PAD)

    for side in SIDES:
        ours = np.asarray(answer(pair.params, pair.config.pack(pair.images), pair.tokens[side], pair.mask[side]))
        assert_same_answers(ours, theirs)


def assert_option_log_probs_agree(
    pair: Any, options: Sequence[Sequence[Sequence[int]]], inputs_of: Callable[[int, list[int]], Mapping[str, Any]]
) -> None:
    """Compares log p(option | prompt) with a forward pass of PyTorch's model per option.

    Args:
        pair: a model in both libraries, with images and prompts.
        options: token ids of two options for each of three prompts.
        inputs_of: returns what PyTorch's model takes for these tokens with the images of this prompt.
    """
    import torch

    texts, texts_mask = pad_options(options)
    want = np.empty((3, 2))
    for i, row in enumerate(options):
        prompt = pair.tokens["right"][i][pair.mask["right"][i]].tolist()
        for j, option in enumerate(row):
            with torch.no_grad():
                theirs = pair.torch(**inputs_of(i, prompt + option)).logits[0]
            log_p = torch.log_softmax(theirs, -1)[len(prompt) - 1 : -1]
            want[i, j] = log_p[torch.arange(len(option)), torch.tensor(option)].sum()

    @jax.jit
    def score(params, images, tokens, mask):
        model = bind(pair.graphdef, params)
        return option_log_probs(model, Prompts(tokens, mask, model.encode(images)[0]), texts, texts_mask)

    for side in SIDES:
        scores = score(pair.params, pair.config.pack(pair.images), pair.tokens[side], pair.mask[side])
        np.testing.assert_allclose(scores, want, atol=1e-3, err_msg=side)


def assert_close(ours: Any, theirs: Any, tolerance: float) -> None:
    """Asserts that an array and a tensor are equal up to an absolute tolerance, and not close to zero."""
    theirs = theirs.detach().numpy()
    assert ours.shape == theirs.shape
    assert np.abs(theirs).max() > 0.1  # a comparison of zeros would prove nothing
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance)


def assert_text_logits_agree(model: Any, torch_model: Any, side: str, tolerance: float) -> None:
    """Asserts that the logits of padded text prompts agree with those of each prompt in PyTorch."""
    import torch

    rows = [[1, 20, 30, 40, 50, 60], [1, 70, 80]]
    tokens, mask = pad_rows(rows, side)
    ours, _ = model(jnp.asarray(tokens), jnp.asarray(mask))
    for i, row in enumerate(rows):
        with torch.no_grad():
            theirs = torch_model(input_ids=torch.tensor([row])).logits[0]
        assert_close(ours[i][mask[i]], theirs, tolerance)
