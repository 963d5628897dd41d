"""The answers of this library to the questions that PyTorch was asked, in as few compiled programs as possible."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vkd_jax.checkpoints.bundle import ModelBundle
from vkd_jax.models import generate
from vkd_jax.models.base import VisualTokens, bind
from vkd_jax.verify.answers import Answer
from vkd_jax.verify.questions import Question


@functools.partial(jax.jit, static_argnums=0)
def _encode(graphdef: Any, params: Any, images: Any) -> VisualTokens:
    return bind(graphdef, params).encode(images)[0]


@functools.partial(jax.jit, static_argnums=0)
def _logits(graphdef: Any, params: Any, features: Any, tokens: Any, mask: Any, positions: Any) -> jax.Array:
    return bind(graphdef, params)(tokens, mask, features=features, query_positions=positions)[0]


@functools.partial(jax.jit, static_argnums=(0, 5))
def _greedy(graphdef: Any, params: Any, features: Any, tokens: Any, mask: Any, max_new_tokens: int) -> jax.Array:
    prompts = generate.Prompts(tokens, mask, features)
    return generate.greedy(bind(graphdef, params), prompts, max_new_tokens=max_new_tokens, eos_ids=(), pad_id=0)


def answers(bundle: ModelBundle, questions: Sequence[Question], expected: Sequence[Answer]) -> Iterator[Answer]:
    """Yields the answer to each question; the logits are those after the tokens of the expected answer.

    Products are computed in float32 on accelerators, too, whose default has fewer bits.

    Args:
        bundle: the model.
        questions: the questions.
        expected: the answers of PyTorch, with prompts equal to those of this library.
    """
    images = [None if q.image is None else bundle.processor.image(q.image) for q in questions]
    most = max((bundle.config.image_tokens(*x.shape[:2]) for x in images if x is not None), default=0)
    width = max(len(x.prompt) for x in expected)
    count = max(len(x.logits) for x in expected)
    with jax.default_matmul_precision("highest"):
        for image, answer in zip(images, expected, strict=True):
            features = None
            if image is not None:
                features = _encode(bundle.graphdef, bundle.params, bundle.config.pack([[image]], min_tokens=most))
            yield _answer(bundle, features, answer, width, count)


def _answer(bundle: ModelBundle, features: VisualTokens | None, expected: Answer, width: int, count: int) -> Answer:
    """Computes one answer, with the prompt padded on the left to `width` tokens and `count` query positions."""
    n, model = len(expected.tokens), (bundle.graphdef, bundle.params, features)
    tokens = _greedy(*model, *_padded(expected.prompt, width), n)
    forced, mask = _padded([*expected.prompt, *expected.tokens[:-1]], width + n - 1)
    positions = jnp.maximum(jnp.arange(width + n - 1 - count, width + n - 1), 0)[None]
    logits = _logits(*model, forced, mask, positions)[0, count - len(expected.logits) :]
    values = np.zeros((0, bundle.config.text.width), np.float32)
    if features is not None:
        values = np.asarray(features.values, np.float32)[np.asarray(features.valid)]
        values = values[:, : bundle.config.text.width]  # the others are not merged, but added in later blocks
    return Answer(expected.prompt, values, np.asarray(logits, np.float32), np.asarray(tokens[0]))


def _padded(tokens: Sequence[int], width: int) -> tuple[jax.Array, jax.Array]:
    row, mask = np.zeros((1, width), np.int32), np.zeros((1, width), bool)
    row[0, width - len(tokens) :], mask[0, width - len(tokens) :] = tokens, True
    return jnp.asarray(row), jnp.asarray(mask)
