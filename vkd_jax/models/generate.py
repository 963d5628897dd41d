"""Greedy generation and option scoring with a key/value cache.

The functions take a bound model; jit them over the parameters:

    @jax.jit
    def answer(params, tokens, mask, pictures):
        model = bind(graphdef, params)
        return greedy(model, tokens, mask, model.encode(pictures)[0], max_new_tokens=16, eos_ids=(2,), pad_id=0)

Where several prompts of a batch begin alike, as questions about one image do, their prefix is computed once:
`SharedPrefixes`.

Axes: b batch, t prompt position, u beginning, o option, a option token, v vocabulary, h part of a batch.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vkd_jax.models.base import VisualTokens
from vkd_jax.models.decoder import Cache


class SharedPrefixes(NamedTuple):
    """How the prompts of a batch begin; each beginning is read once, and its keys and values are given to its rows.

    Rows and beginnings are in h parts of equal sizes, and a row's beginning is of the same part: parts that lie on
    different devices then need nothing of each other.
    """

    tokens: jax.Array  # int [u, t], padded left or right
    mask: jax.Array  # bool [u, t], False at padding
    prefix_index: jax.Array  # int [h, b / h]: the beginning of each row, counted in its part


def last_token(mask: jax.Array) -> jax.Array:
    """The position of each row's last real token, int [b], whichever side is padded."""
    return mask.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1)


def greedy(
    model: Any,
    tokens: jax.Array,
    mask: jax.Array,
    features: VisualTokens | None = None,
    shared: SharedPrefixes | None = None,
    *,
    max_new_tokens: int,
    eos_ids: tuple[int, ...],
    pad_id: int,
) -> jax.Array:
    """The most probable continuation, token by token, until every row has ended.

    Args:
        model: a bound model.
        tokens: prompts int [b, t], padded left or right, of any lengths.
        mask: bool [b, t], False at padding.
        features: from `model.encode`, or None for text.
        shared: how the prompts begin; `tokens` is then what follows, and `features` are those of the beginnings.
        max_new_tokens: at most so many are generated; prompt and answer must fit the model's positions.
        eos_ids: tokens that end a row; the first one generated is part of the answer.
        pad_id: fills a row after its end.

    Returns:
        int32 [b, max_new_tokens].
    """
    logits, cache = _read(model, tokens, mask, features, shared, max_new_tokens - 1)  # the last is written, never read
    ends = jnp.asarray(eos_ids, jnp.int32)
    answer = jnp.full((len(tokens), max_new_tokens), pad_id, jnp.int32)

    def unfinished(state):
        i, done, *_ = state
        return (i < max_new_tokens) & ~done.all()

    def step(state):
        i, done, token, answer, cache = state
        # Rows that are done keep running with the others; what they produce is never written.
        logits, cache = model(token[:, None], jnp.ones((len(token), 1), bool), cache=cache)
        token = jnp.argmax(logits[:, 0], -1).astype(jnp.int32)
        answer = answer.at[:, i].set(jnp.where(done, pad_id, token))
        return i + 1, done | jnp.isin(token, ends), token, answer, cache

    first = jnp.argmax(logits[:, 0], -1).astype(jnp.int32)
    answer = answer.at[:, 0].set(first)
    return jax.lax.while_loop(unfinished, step, (1, jnp.isin(first, ends), first, answer, cache))[3]


def option_log_probs(
    model: Any,
    tokens: jax.Array,
    mask: jax.Array,
    features: VisualTokens | None,
    options: jax.Array,
    options_mask: jax.Array,
    shared: SharedPrefixes | None = None,
) -> jax.Array:
    """`log p(option | prompt)` of several options: the sum over the option's tokens, in nats.

    Args:
        model: a bound model.
        tokens: prompts int [b, t], padded left or right.
        mask: bool [b, t], False at padding.
        features: from `model.encode`, or None for text.
        options: int [b, o, a], padded right.
        options_mask: bool [b, o, a], False at padding; an option without tokens (a missing one) scores -inf.
        shared: as in `greedy`.

    Returns:
        float32 [b, o].
    """
    log_p = _predicted(model, tokens, mask, features, options, options_mask, shared)
    scores = jnp.take_along_axis(log_p, options[..., None], axis=-1)[..., 0]
    return jnp.where(options_mask.any(-1), jnp.where(options_mask, scores, 0.0).sum(-1), -jnp.inf)


def token_log_probs(
    model: Any,
    tokens: jax.Array,
    mask: jax.Array,
    features: VisualTokens | None,
    options: jax.Array,
    options_mask: jax.Array,
    shared: SharedPrefixes | None = None,
) -> jax.Array:
    """What each token of several options scores, and what a token drawn from the model would score in its place.

    With p the distribution over the vocabulary at a position: log p(token), E[log p] and the standard deviation of
    log p, both under p itself.

    Args:
        model: see `option_log_probs`, as for the others.

    Returns:
        float32 [b, o, a, 3], in nats; anything at padding.
    """
    log_p = _predicted(model, tokens, mask, features, options, options_mask, shared)
    own = jnp.take_along_axis(log_p, options[..., None], axis=-1)[..., 0]
    p = jnp.exp(log_p)
    mean = (p * log_p).sum(-1)
    deviation = jnp.sqrt((p * jnp.square(log_p - mean[..., None])).sum(-1))  # centred first: differences are small
    return jnp.stack([own, mean, deviation], axis=-1)


def _predicted(
    model: Any,
    tokens: jax.Array,
    mask: jax.Array,
    features: VisualTokens | None,
    options: jax.Array,
    options_mask: jax.Array,
    shared: SharedPrefixes | None = None,
) -> jax.Array:
    """log p of every token of the vocabulary at each place of several options: float32 [b, o, a, v].

    The prompt is read once. All options are then read side by side in one pass: each sees the prompt's cache
    and itself, at the positions that it would have if it alone followed the prompt.
    """
    b, o, a = options.shape
    n = o * (a - 1)  # an option's last token is predicted, never read
    decoder = model.language_model
    logits, cache = _read(model, tokens, mask, features, shared, n)
    log_p = jnp.broadcast_to(jax.nn.log_softmax(logits)[:, :, None], (b, o, 1, logits.shape[-1]))
    if a > 1:
        owner, step = jnp.divmod(jnp.arange(n), a - 1)
        positions = cache.next[:, None] + step
        own = (owner[:, None] == owner) & (step[:, None] >= step) & options_mask[:, :, :-1].reshape(b, 1, n)
        prompt = cache.mask[:, None, : cache.mask.shape[1] - n]
        allowed = jnp.concatenate([jnp.broadcast_to(prompt, (b, n, prompt.shape[-1])), own], axis=-1)
        x, _ = decoder(decoder.embed(options[:, :, :-1].reshape(b, n)), positions, allowed, cache)
        later = jax.nn.log_softmax(decoder.logits(x)).reshape(b, o, a - 1, -1)
        log_p = jnp.concatenate([log_p, later], axis=2)
    return log_p


def _read(
    model: Any,
    tokens: jax.Array,
    mask: jax.Array,
    features: VisualTokens | None,
    shared: SharedPrefixes | None,
    room: int,
) -> tuple[jax.Array, Cache]:
    """Logits after each prompt, [b, 1, v], and its cache, with `room` slots for what follows."""
    decoder, last = model.language_model, last_token(mask)[:, None]
    b, t = tokens.shape
    if shared is None:
        return model(tokens, mask, features=features, query_positions=last, cache=decoder.empty_cache(b, t + room))
    cache = decoder.empty_cache(*shared.tokens.shape)
    last_of_prefix = last_token(shared.mask)[:, None]
    _, cache = model(shared.tokens, shared.mask, features=features, query_positions=last_of_prefix, cache=cache)
    empty = decoder.empty_cache(b, shared.tokens.shape[1] + t + room)
    return model(tokens, mask, query_positions=last, cache=_given(cache, shared.prefix_index, empty))


def _given(cache: Cache, prefix_index: jax.Array, empty: Cache) -> Cache:
    """A larger empty cache, with a copy of a row of another in each of its rows; see `SharedPrefixes`."""

    def rows(x: jax.Array, axis: int) -> jax.Array:
        parts = x.reshape(*x.shape[:axis], len(prefix_index), -1, *x.shape[axis + 1 :])
        take = jax.vmap(lambda part, own: jnp.take(part, own, axis=axis), in_axes=(axis, 0), out_axes=axis)
        return take(parts, prefix_index).reshape(*x.shape[:axis], -1, *x.shape[axis + 1 :])

    def put(old: jax.Array, new: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice(old, new, (0,) * old.ndim)

    return Cache(
        keys=put(empty.keys, rows(cache.keys, 1)),
        values=put(empty.values, rows(cache.values, 1)),
        mask=put(empty.mask, rows(cache.mask, 0)),
        index=cache.index,
        next=rows(cache.next, 0),
    )
