"""Greedy decoding and scoring of options, with a key/value cache and prefix caching.

The functions take a bound model. Jit them over the parameters:

    @jax.jit
    def answer(params, tokens, mask, images):
        model = bind(graphdef, params)
        prompts = Prompts(tokens, mask, model.encode(images)[0])
        return greedy(model, prompts, max_new_tokens=16, eos_ids=(2,), pad_id=0)

Prompts of a batch often share a prefix, such as questions about one image. `SharedPrefixes` computes each prefix once.

Axes: b batch, t prompt position, u prefix, h group of rows, o option, a option token, v vocabulary.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vkd_jax.models.base import VisualTokens
from vkd_jax.models.decoder import Cache

NOT_FINITE = -1  # in place of a token whose logits are NaN, infinite, or the same for the whole vocabulary


class SharedPrefixes(NamedTuple):
    """Prefixes of the prompts of a batch; the keys and values of each are computed once and copied to its rows.

    Rows and prefixes are divided into h groups of equal size, and a row takes its prefix from its own group. Groups on
    different devices then exchange nothing.
    """

    tokens: jax.Array  # int [u, t], padded left or right
    mask: jax.Array  # bool [u, t], False at padding
    prefix_index: jax.Array  # int [h, b / h], the prefix of each row, an index into its group


class Prompts(NamedTuple):
    """The prompts of a batch."""

    tokens: jax.Array  # int [b, t], padded left or right; with `prefixes`, the tokens after the prefix
    mask: jax.Array  # bool [b, t], False at padding
    features: VisualTokens | None = None  # from `model.encode`, of the prompts or their prefixes; None for text
    prefixes: SharedPrefixes | None = None


def last_token(mask: jax.Array) -> jax.Array:
    """Returns the position of the last real token of each row, int [b], for left or right padding."""
    return mask.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1)


def greedy(model: Any, prompts: Prompts, *, max_new_tokens: int, eos_ids: tuple[int, ...], pad_id: int) -> jax.Array:
    """Decodes greedily: appends the most probable token until every row has ended.

    Args:
        model: a bound model.
        prompts: the prompts, of any lengths.
        max_new_tokens: maximum number of new tokens; prompt and answer must fit the model's positions.
        eos_ids: tokens that end a row; the one that is generated is part of the answer.
        pad_id: token that fills a row after its end.

    Returns:
        int32 [b, max_new_tokens]. The token `NOT_FINITE` ends a row at the first position where the logits choose no
        token: they are NaN, infinite, or the same for the whole vocabulary.
    """
    # The last new token is returned but never fed back, so the cache needs one slot less.
    logits, cache = _read(model, prompts, max_new_tokens - 1)
    ends = jnp.asarray((*eos_ids, NOT_FINITE), jnp.int32)
    answer = jnp.full((len(prompts.tokens), max_new_tokens), pad_id, jnp.int32)

    def unfinished(state):
        i, done, *_ = state
        return (i < max_new_tokens) & ~done.all()

    def step(state):
        i, done, token, answer, cache = state
        # Finished rows are computed along with the others; their tokens are not written.
        logits, cache = model(token[:, None], jnp.ones((len(token), 1), bool), cache=cache)
        token = _most_probable(logits[:, 0])
        answer = answer.at[:, i].set(jnp.where(done, pad_id, token))
        return i + 1, done | jnp.isin(token, ends), token, answer, cache

    first = _most_probable(logits[:, 0])
    answer = answer.at[:, 0].set(first)
    return jax.lax.while_loop(unfinished, step, (1, jnp.isin(first, ends), first, answer, cache))[3]


def _most_probable(logits: jax.Array) -> jax.Array:
    """Returns the most probable token of each row of logits [b, v], int32 [b]; `NOT_FINITE` if there is none."""
    token = jnp.argmax(logits, -1).astype(jnp.int32)  # of a NaN if there is one
    largest = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
    return jnp.where(jnp.isfinite(largest) & (largest > logits.min(-1)), token, NOT_FINITE)


def option_log_probs(model: Any, prompts: Prompts, options: jax.Array, options_mask: jax.Array) -> jax.Array:
    """Scores several options of each prompt: `log p(option | prompt)`, the sum over the option's tokens.

    Args:
        model: a bound model.
        prompts: the prompts.
        options: int [b, o, a], padded right.
        options_mask: bool [b, o, a], False at padding; an option without tokens, a missing one, scores -inf.

    Returns:
        float32 [b, o], in nats.
    """
    log_p = _next_token_log_probs(model, prompts, options, options_mask)
    scores = jnp.take_along_axis(log_p, options[..., None], axis=-1)[..., 0]
    return jnp.where(options_mask.any(-1), jnp.where(options_mask, scores, 0.0).sum(-1), -jnp.inf)


def token_log_probs(model: Any, prompts: Prompts, options: jax.Array, options_mask: jax.Array) -> jax.Array:
    """Scores each token of several options, and computes the moments of the score under the model.

    With p the distribution over the vocabulary at a position: log p(token), and the mean and standard deviation of
    log p under p.

    Args:
        model: as in `option_log_probs`.
        prompts: as in `option_log_probs`.
        options: as in `option_log_probs`.
        options_mask: as in `option_log_probs`.

    Returns:
        float32 [b, o, a, 3], in nats; undefined at padding.
    """
    log_p = _next_token_log_probs(model, prompts, options, options_mask)
    scores = jnp.take_along_axis(log_p, options[..., None], axis=-1)[..., 0]
    p = jnp.exp(log_p)
    mean = (p * log_p).sum(-1)
    # Centered before squaring, because the differences are small.
    deviation = jnp.sqrt((p * jnp.square(log_p - mean[..., None])).sum(-1))
    return jnp.stack([scores, mean, deviation], axis=-1)


def _next_token_log_probs(model: Any, prompts: Prompts, options: jax.Array, options_mask: jax.Array) -> jax.Array:
    """Returns the log-probabilities of the vocabulary at each token of several options: float32 [b, o, a, v].

    The prompt is computed once. One more pass computes all options: each attends to the cache of the prompt and to
    itself, at the positions that it has directly after the prompt.
    """
    b, o, a = options.shape
    n = o * (a - 1)  # the last token of an option is predicted, not read
    decoder = model.language_model
    logits, cache = _read(model, prompts, n)
    log_p = jnp.broadcast_to(jax.nn.log_softmax(logits)[:, :, None], (b, o, 1, logits.shape[-1]))
    if a > 1:
        option, step = jnp.divmod(jnp.arange(n), a - 1)
        positions = cache.next[:, None] + step
        within = (option[:, None] == option) & (step[:, None] >= step) & options_mask[:, :, :-1].reshape(b, 1, n)
        prompt = cache.mask[:, None, : cache.mask.shape[1] - n]
        attention_mask = jnp.concatenate([jnp.broadcast_to(prompt, (b, n, prompt.shape[-1])), within], axis=-1)
        x, _ = decoder(decoder.embed(options[:, :, :-1].reshape(b, n)), positions, attention_mask, cache)
        later = jax.nn.log_softmax(decoder.logits(x)).reshape(b, o, a - 1, -1)
        log_p = jnp.concatenate([log_p, later], axis=2)
    return log_p


def _read(model: Any, prompts: Prompts, free_slots: int) -> tuple[jax.Array, Cache]:
    """Returns the logits after each prompt, [b, 1, v], and its cache with `free_slots` slots for further tokens."""
    tokens, mask, features, prefixes = prompts
    decoder, last = model.language_model, last_token(mask)[:, None]
    b, t = tokens.shape
    if prefixes is None:
        cache = decoder.empty_cache(b, t + free_slots)
        return model(tokens, mask, features=features, query_positions=last, cache=cache)
    cache = decoder.empty_cache(*prefixes.tokens.shape)
    last_of_prefix = last_token(prefixes.mask)[:, None]
    _, cache = model(prefixes.tokens, prefixes.mask, features=features, query_positions=last_of_prefix, cache=cache)
    empty = decoder.empty_cache(b, prefixes.tokens.shape[1] + t + free_slots)
    return model(tokens, mask, query_positions=last, cache=_copy_prefixes(cache, prefixes.prefix_index, empty))


def _copy_prefixes(cache: Cache, prefix_index: jax.Array, empty: Cache) -> Cache:
    """Copies to each row of a larger, empty cache the row of its prefix; see `SharedPrefixes`."""

    def take_rows(x: jax.Array, axis: int) -> jax.Array:
        groups = x.reshape(*x.shape[:axis], len(prefix_index), -1, *x.shape[axis + 1 :])
        take = jax.vmap(lambda group, index: jnp.take(group, index, axis=axis), in_axes=(axis, 0), out_axes=axis)
        return take(groups, prefix_index).reshape(*x.shape[:axis], -1, *x.shape[axis + 1 :])

    def write(old: jax.Array, new: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice(old, new, (0,) * old.ndim)

    return Cache(
        keys=write(empty.keys, take_rows(cache.keys, 1)),
        values=write(empty.values, take_rows(cache.values, 1)),
        mask=write(empty.mask, take_rows(cache.mask, 0)),
        index=cache.index,
        next=take_rows(cache.next, 0),
        positions=None if cache.positions is None else write(empty.positions, take_rows(cache.positions, 0)),
    )
