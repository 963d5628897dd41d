"""A LLaMA-style decoder (Touvron et al., arXiv 2302.13971), exact to `transformers.LlamaForCausalLM`.

RMSNorm before each half-block, rotary positions, grouped-query attention, SwiGLU. The blocks are stacked on a
leading layer axis and scanned. Where the backward pass finds everything kept, the scan is unrolled: the weights and
what is kept of each block are then read where they lie, and the last block computes what is asked for alone.

Axes: l layer, b batch, t query position, a asked position, s key slot, d width, m key/value head, c head channel,
v vocabulary.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vkd_jax.models.layers import (
    Embedding,
    Linear,
    RMSNorm,
    RotaryTables,
    attention,
    rematerialize,
    rotary_tables,
    rotate,
    shard_batch,
    small_normal,
)


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes of a decoder."""

    vocab: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    mlp_width: int
    norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    mrope_section: tuple[int, ...] = ()  # channel pairs that turn with each axis of a position; () for plain positions
    qkv_bias: bool = False
    tie_embeddings: bool = False
    max_positions: int = 2048  # what the model was made for; callers check their lengths against it


class Cache(NamedTuple):
    """Keys and values of the tokens read so far, in fixed-size slots."""

    keys: jax.Array  # [l, b, m, s, c], as the products of attention read them
    values: jax.Array  # [l, b, m, s, c]
    mask: jax.Array  # bool [b, s]: slots that hold a real token
    index: jax.Array  # int []: the first free slot
    next: jax.Array  # int [b]: the position of each row's next token


def _causal(mask: jax.Array) -> jax.Array:
    """What each of these tokens sees, itself and those before it: bool [b, t], False at padding, to [b, t, t]."""
    return mask[:, None, :] & jnp.tri(mask.shape[1], dtype=bool)


def _pick(x: jax.Array, at: jax.Array) -> jax.Array:
    """[b, t, ...] to [b, a, ...], the positions `at`, int [b, a]."""
    return jnp.take_along_axis(x, jnp.expand_dims(at, range(2, x.ndim)), axis=1)


class Attention(nnx.Module):
    """Causal self-attention with rotary positions."""

    def __init__(self, config: DecoderConfig, **options):
        c = config.head_width
        self.head_width = c
        self.q = Linear(config.width, config.heads * c, bias=config.qkv_bias, **options)
        self.k = Linear(config.width, config.kv_heads * c, bias=config.qkv_bias, **options)
        self.v = Linear(config.width, config.kv_heads * c, bias=config.qkv_bias, **options)
        self.o = Linear(config.heads * c, config.width, bias=False, **options)

    def __call__(self, x, turned, allowed, cached, at, asked=None):
        """[b, t, d] to [b, t, d], or to [b, a, d] for the positions `asked`, int [b, a].

        `turned` is what `layers.rotary_tables` gives, `allowed`, bool [b, t, s], which keys each query sees, and
        `cached` every layer's (keys, values), written from `at`, (layer, slot), on.
        """
        own, own_tables = x, turned
        if asked is not None:
            own, own_tables, allowed = jax.tree.map(lambda y: _pick(y, asked), (x, turned, allowed))
        b, t, _ = own.shape
        q, k, v = (
            project(y).reshape(*y.shape[:2], -1, self.head_width)
            for project, y in ((self.q, own), (self.k, x), (self.v, x))
        )
        q, k = rotate(q, own_tables), rotate(k, turned)
        if cached is not None:
            layer, slot = at
            cached = tuple(
                jax.lax.dynamic_update_slice(old, new.astype(old.dtype).swapaxes(1, 2)[None], (layer, 0, 0, slot, 0))
                for old, new in zip(cached, (k, v), strict=True)
            )
            k, v = (jax.lax.dynamic_index_in_dim(x, layer, keepdims=False).swapaxes(1, 2) for x in cached)
        return self.o(attention(q, k, v, allowed).reshape(b, t, -1)), cached


class MLP(nnx.Module):
    """SwiGLU: `down(silu(gate(x)) * up(x))`."""

    def __init__(self, config: DecoderConfig, **options):
        self.gate = Linear(config.width, config.mlp_width, bias=False, **options)
        self.up = Linear(config.width, config.mlp_width, bias=False, **options)
        self.down = Linear(config.mlp_width, config.width, bias=False, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[b, t, d] to [b, t, d]."""
        return self.down(self.neurons(x))

    def neurons(self, x: jax.Array) -> jax.Array:
        """The inner activations, which feed the last layer: [b, t, d] to [b, t, f]."""
        return jax.nn.silu(self.gate(x)) * self.up(x)


class Block(nnx.Module):
    """`x + attn(norm1(x))`, then `x + mlp(norm2(x))`."""

    def __init__(self, config: DecoderConfig, *, dtype, param_dtype, rngs):
        norm = dict(eps=config.norm_eps, dtype=dtype, param_dtype=param_dtype)
        options = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.norm1, self.norm2 = RMSNorm(config.width, **norm), RMSNorm(config.width, **norm)
        self.attn, self.mlp = Attention(config, **options), MLP(config, **options)

    def __call__(self, x, turned, allowed, cached, at, asked=None):
        """[b, t, d] to [b, t, d], or to [b, a, d]; `cached`, `at` and `asked` as in `Attention`."""
        y, cached = self.attn(self.norm1(x), turned, allowed, cached, at, asked)
        x = (x if asked is None else _pick(x, asked)) + y
        return x + self.mlp(self.norm2(x)), cached

    def neurons(self, x: jax.Array, turned: RotaryTables, allowed: jax.Array) -> jax.Array:
        """The inner activations of the MLP: [b, t, d] to [b, t, f]."""
        return self.mlp.neurons(self.norm2(x + self.attn(self.norm1(x), turned, allowed, None, None)[0]))


class Decoder(nnx.Module):
    """Token embedding, stacked blocks, final norm, output head."""

    def __init__(self, config: DecoderConfig, *, remat, mesh, dtype, param_dtype, rngs):
        options = dict(dtype=dtype, param_dtype=param_dtype)
        self.config, self.remat, self.mesh, self.dtype = config, remat, mesh, jnp.dtype(dtype)
        self.embed = Embedding(config.vocab, config.width, rngs=rngs, **options)
        self.blocks = nnx.vmap(lambda r: Block(config, rngs=r, **options))(rngs.split(config.layers))
        self.norm = RMSNorm(config.width, eps=config.norm_eps, **options)
        head = dict(bias=False, rngs=rngs, init=small_normal, **options)
        self.head = None if config.tie_embeddings else Linear(config.width, config.vocab, **head)

    @jax.named_scope("language_model")
    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        allowed: jax.Array,
        cache: Cache | None = None,
        layers: int | None = None,
        query_positions: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """Runs the blocks and the final norm.

        Args:
            x: embedded tokens [b, t, d].
            positions: int [b, t] or [b, t, axes], the rotary position of each token, below s.
            allowed: bool [b, t, s], which keys each query sees; s is t, or the number of slots of the cache.
            cache: where earlier keys and values stand; the new ones are written from slot `cache.index` on.
                Its mask and next positions are the caller's to update.
            layers: to run only so many of the first blocks, without the norm; takes no cache.
            query_positions: int [b, a], the positions to return; None for all. Takes all layers.

        Returns:
            Hidden states [b, t or a, d] and the cache with the new keys and values.
        """
        turned = self._rotary_tables(positions, allowed.shape[-1])
        unrolled = cache is None and not self.remat
        short = unrolled and query_positions is not None  # the last block stands apart

        def body(carried, layer):
            block, number = layer
            at = None if cache is None else (number, cache.index)
            x, cached = block(shard_batch(carried[0], self.mesh), turned, allowed, carried[1], at)
            return (shard_batch(x, self.mesh), cached), None

        body = rematerialize(body, self.remat)
        # Carried, not scanned over, so that the new keys and values are written in place and the others stay put.
        cached = None if cache is None else (cache.keys, cache.values)
        # Every leaf is stacked, those of quantised and adapted kernels among them.
        first = layers if not short else self.config.layers - 1
        blocks = self.blocks if first is None else jax.tree.map(lambda leaf: leaf[:first], self.blocks)
        numbers = None if cache is None else jnp.arange(self.config.layers)
        (x, cached), _ = jax.lax.scan(body, (x, cached), (blocks, numbers), unroll=unrolled)
        if short:
            block = jax.tree.map(lambda leaf: leaf[-1], self.blocks)
            x, _ = block(shard_batch(x, self.mesh), turned, allowed, None, None, query_positions)
            x = shard_batch(x, self.mesh)
        if cache is not None:
            cache = cache._replace(keys=cached[0], values=cached[1], index=cache.index + x.shape[1])
        x = self.norm(x) if layers is None else x
        return (x if query_positions is None or short else _pick(x, query_positions)), cache

    def read(
        self,
        x: jax.Array,
        mask: jax.Array,
        positions: jax.Array,
        cache: Cache | None = None,
        layers: int | None = None,
        query_positions: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """Reads tokens in order: each sees itself, those before it, and what the cache holds.

        Args:
            x: embedded tokens [b, t, d].
            mask: bool [b, t], False at padding.
            positions: int [b, t] or [b, t, axes], counted from the first of these tokens.
            cache: of the tokens before these; filled and returned.
            layers: as in `__call__`.
            query_positions: as in `__call__`.

        Returns:
            Hidden states [b, t or a, d] and the cache.
        """
        t = x.shape[1]
        if cache is None:
            return self(x, positions, _causal(mask), layers=layers, query_positions=query_positions)
        positions = positions + jnp.expand_dims(cache.next, range(1, positions.ndim))
        last = positions if positions.ndim == 2 else positions.max(-1)
        seen = jax.lax.dynamic_update_slice_in_dim(cache.mask, mask, cache.index, axis=1)
        allowed = seen[:, None, :] & (jnp.arange(seen.shape[1]) <= cache.index + jnp.arange(t)[:, None])
        cache = cache._replace(mask=seen, next=jnp.maximum(cache.next, jnp.where(mask, last + 1, 0).max(1)))
        return self(x, positions, allowed, cache, query_positions=query_positions)

    @jax.named_scope("language_model")
    def neurons(self, x: jax.Array, mask: jax.Array, positions: jax.Array, reduce: Callable[[jax.Array], Any]) -> Any:
        """What `reduce` makes of the MLP's inner activations [b, t, f] in each layer; those of one are held at once.

        Args:
            x: embedded tokens [b, t, d], as for `read`.
            mask: bool [b, t], False at padding.
            positions: int [b, t] or [b, t, axes].
            reduce: to small arrays, in any tree.

        Returns:
            That tree, its arrays with a leading layer axis.
        """
        turned, allowed = self._rotary_tables(positions, mask.shape[1]), _causal(mask)

        def body(x, block):
            return block(x, turned, allowed, None, None)[0], reduce(block.neurons(x, turned, allowed))

        return jax.lax.scan(body, x, self.blocks)[1]

    def _rotary_tables(self, positions: jax.Array, length: int) -> RotaryTables:
        """By how much each token is turned, all positions being below `length`."""
        c, sections = self.config.head_width, self.config.mrope_section
        places = positions[..., None] if positions.ndim == 2 else positions
        if places.shape[-1] == 1:  # the same on every axis
            sections = (c // 2,)
        frequency = np.float32(self.config.rope_theta) ** -(np.arange(0, c, 2, dtype=np.float32) / c)
        return rotary_tables(places, frequency, sections, length, self.dtype)

    @jax.named_scope("head")
    def logits(self, x: jax.Array) -> jax.Array:
        """Hidden states [..., d] to float32 logits [..., v]."""
        return (self.embed.attend(x) if self.head is None else self.head(x)).astype(jnp.float32)

    def empty_cache(self, batch: int, slots: int) -> Cache:
        """A cache with `slots` free slots for each of `batch` rows."""
        config = self.config
        keys = jnp.zeros((config.layers, batch, config.kv_heads, slots, config.head_width), self.dtype)
        nothing = jnp.zeros((batch, slots), bool)
        return Cache(keys, keys, nothing, index=jnp.int32(0), next=jnp.zeros(batch, jnp.int32))
