"""A LLaMA-style decoder (Touvron et al., arXiv 2302.13971), exact to `transformers.LlamaForCausalLM`.

Pre-norm blocks of grouped-query attention with rotary positions and gated MLPs, RMSNorm throughout. The fields of
`DecoderConfig` add what other families have: biases, norms of queries and keys, norms after each sublayer, sliding
windows in some of the blocks. Deep-stack features (Meng et al., arXiv 2406.04334) are added to the outputs of the first
blocks.

The blocks are stacked on a leading layer axis and scanned. Without rematerialization the scan is unrolled, so that the
backward pass reads the weights and saved activations of each block in place; the last block then computes only the
requested query positions.

Axes: l layer, b batch, t position, a query position, s key position (with a cache, its slot), d width,
m key/value head, c head channel, f MLP width, v vocabulary.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vkd_jax.models.layers import (
    Embedding,
    GatedMLP,
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
    """Sizes of a decoder, and which of the variants of its layers it has."""

    vocab: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    mlp_width: int
    norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_factor: float = 1.0  # positions are divided by it
    mrope_section: tuple[int, ...] = ()  # channel pairs that rotate by each axis of a position; () for scalar positions
    mrope_interleaved: bool = False  # whether the pairs of the axes alternate instead of following each other
    window: int = 0  # tokens, itself included, that a token attends to in a local block; 0 if no block is local
    full_attention_blocks: tuple[int, ...] = ()  # with a window, the blocks that are not local
    local_rope_theta: float = 10000.0  # of local blocks
    activation: str = "silu"  # a key of `layers.ACTIVATIONS`
    attention_scale: float | None = None  # factor of the attention scores; None for 1 / sqrt(head_width)
    embed_scale: float = 1.0  # factor of the token embeddings
    qkv_bias: bool = False
    qk_norm: bool = False  # whether the queries and keys of each head are normalized
    post_norms: bool = False  # whether the outputs of attention and MLP are normalized
    zero_centered_norms: bool = False  # whether RMSNorm multiplies by 1 + scale
    tie_embeddings: bool = False
    max_positions: int = 2048  # context length of the model; callers check the length of their prompts

    @classmethod
    def from_hf(cls, text: Any, **fields: Any) -> "DecoderConfig":
        """Reads the text configuration of a `transformers` model; `fields` are those that families read differently."""
        common = dict(
            vocab=text.vocab_size,
            width=text.hidden_size,
            layers=text.num_hidden_layers,
            heads=text.num_attention_heads,
            kv_heads=text.num_key_value_heads,
            mlp_width=text.intermediate_size,
            norm_eps=text.rms_norm_eps,
            max_positions=text.max_position_embeddings,
        )
        if "rope_theta" not in fields:
            common["rope_theta"] = float(dict(text.rope_parameters)["rope_theta"])
        return cls(**common | fields)

    @property
    def is_local(self) -> np.ndarray | None:
        """Whether each block is local, bool [l]; None if no block is."""
        if not self.window:
            return None
        return ~np.isin(np.arange(self.layers), self.full_attention_blocks)


class Embedded(NamedTuple):
    """Embedded tokens, the input of a decoder."""

    x: jax.Array  # [b, t, d]
    positions: jax.Array  # int [b, t] or [b, t, axes], rotary positions, counted from the first of these tokens
    image_index: jax.Array | None = None  # int [b, t], the image whose tokens attend to each other, -1 at text; or None
    deepstack: jax.Array | None = None  # [n, b, t, d], added to the outputs of the first n blocks, n < l; or None


class Cache(NamedTuple):
    """Keys and values of the tokens read so far, in a fixed number of slots."""

    keys: jax.Array  # [l, b, m, s, c], the layout that attention multiplies
    values: jax.Array  # [l, b, m, s, c]
    mask: jax.Array  # bool [b, s], True at slots that hold a real token
    index: jax.Array  # int [], the first free slot
    next: jax.Array  # int [b], the position of the next token of each row
    positions: jax.Array | None  # int [b, s], the position of the token in each slot; None without local blocks


class CacheSlot(NamedTuple):
    """The place in the stacked cache that a block writes to."""

    layer: jax.Array  # int []
    slot: jax.Array  # int [], the slot of the first token


class AttentionInputs(NamedTuple):
    """What the attention of a block needs besides its input."""

    tables: RotaryTables  # of all t tokens
    mask: jax.Array  # bool [b, t, s], the keys that each query attends to


def _causal_mask(mask: jax.Array, image_index: jax.Array | None = None) -> jax.Array:
    """Returns the keys that each token attends to: itself, earlier real tokens, and all tokens of its own image.

    Args:
        mask: bool [b, t], False at padding.
        image_index: as in `Embedded`.

    Returns:
        bool [b, t, t].
    """
    causal = mask[:, None, :] & jnp.tri(mask.shape[1], dtype=bool)
    return causal if image_index is None else causal | _same_image(image_index)


def _same_image(image_index: jax.Array) -> jax.Array:
    """Returns the pairs of tokens of one image: int [b, t] to bool [b, t, t]."""
    return (image_index[:, :, None] == image_index[:, None, :]) & (image_index[:, :, None] >= 0)


def _add_deepstack(x: jax.Array, deepstack: jax.Array | None, layer: jax.Array | None) -> jax.Array:
    """Adds to the output of a block, [b, t, d], what `Embedded.deepstack` has for it; `layer` is its index, int []."""
    if deepstack is None:
        return x
    # An index instead of slices of the stacked blocks, which XLA would copy.
    summand = jax.lax.dynamic_index_in_dim(deepstack, jnp.minimum(layer, len(deepstack) - 1), keepdims=False)
    return x + jnp.where(layer < len(deepstack), summand, 0).astype(x.dtype)


def _take_positions(x: jax.Array, positions: jax.Array) -> jax.Array:
    """Gathers the given positions, int [b, a], of each row: [b, t, ...] to [b, a, ...]."""
    return jnp.take_along_axis(x, jnp.expand_dims(positions, range(2, x.ndim)), axis=1)


def interleaved_axes(sections: Sequence[int]) -> np.ndarray:
    """Returns the axis of a position that each channel pair rotates by in interleaved M-RoPE: int [c / 2].

    Pairs 0, 1, 2, 3, ... take axes 0, 1, 2, 0, ...; an axis that has all its pairs leaves the others to axis 0.
    """
    pairs = np.arange(sum(sections))
    axis = pairs % len(sections)
    return np.where(pairs < len(sections) * np.asarray(sections)[axis], axis, 0)


class Attention(nnx.Module):
    """Grouped-query self-attention with rotary positions."""

    def __init__(self, config: DecoderConfig, **options):
        c = config.head_width
        self.head_width, self.scale = c, config.attention_scale
        self.q = Linear(config.width, config.heads * c, bias=config.qkv_bias, **options)
        self.k = Linear(config.width, config.kv_heads * c, bias=config.qkv_bias, **options)
        self.v = Linear(config.width, config.kv_heads * c, bias=config.qkv_bias, **options)
        self.o = Linear(config.heads * c, config.width, bias=False, **options)
        self.q_norm, self.k_norm = (_norm(config, c, **options) if config.qk_norm else None for _ in range(2))

    def __call__(self, x, tables, attention_mask, cached=None, cache_slot=None, query_positions=None):
        """Maps [b, t, d] to [b, t, d], or to [b, a, d] with `query_positions`.

        Args:
            x: [b, t, d].
            tables: from `layers.rotary_tables`, for all t positions.
            attention_mask: bool [b, t, s], the keys that each query attends to.
            cached: the keys and values of all layers, as in `Cache`; None to attend to the tokens of `x` alone.
            cache_slot: the `CacheSlot` for the new keys and values.
            query_positions: int [b, a], the positions to compute; None for all.

        Returns:
            The output, and `cached` with the new keys and values.
        """
        x_q, tables_q = x, tables
        if query_positions is not None:
            x_q, tables_q, attention_mask = jax.tree.map(
                lambda y: _take_positions(y, query_positions), (x, tables, attention_mask)
            )
        b, t, _ = x_q.shape
        q, k, v = (
            project(y).reshape(*y.shape[:2], -1, self.head_width)
            for project, y in ((self.q, x_q), (self.k, x), (self.v, x))
        )
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, tables_q), rotate(k, tables)
        if cached is not None:
            start = (cache_slot.layer, 0, 0, cache_slot.slot, 0)
            cached = tuple(
                jax.lax.dynamic_update_slice(old, new.astype(old.dtype).swapaxes(1, 2)[None], start)
                for old, new in zip(cached, (k, v), strict=True)
            )
            k, v = (jax.lax.dynamic_index_in_dim(x, cache_slot.layer, keepdims=False).swapaxes(1, 2) for x in cached)
        return self.o(attention(q, k, v, attention_mask, self.scale).reshape(b, t, -1)), cached


def _norm(config: DecoderConfig, width: int, *, dtype, param_dtype, rngs=None) -> RMSNorm:
    """Builds a norm of the decoder."""
    del rngs  # nothing is drawn
    options = dict(dtype=dtype, param_dtype=param_dtype)
    return RMSNorm(width, eps=config.norm_eps, zero_centered=config.zero_centered_norms, **options)


class Block(nnx.Module):
    """Pre-norm transformer block: `x + attn(norm1(x))`, then `x + mlp(norm2(x))`.

    With `post_norms` the two summands are normalized, too.
    """

    def __init__(self, config: DecoderConfig, **options):
        d = config.width
        self.norm1, self.norm2 = _norm(config, d, **options), _norm(config, d, **options)
        self.attn = Attention(config, **options)
        self.mlp = GatedMLP(d, config.mlp_width, bias=False, activation=config.activation, **options)
        self.post_attn_norm, self.post_mlp_norm = (
            _norm(config, d, **options) if config.post_norms else None for _ in range(2)
        )

    def __call__(self, x, tables, attention_mask, cached=None, cache_slot=None, query_positions=None):
        """Maps [b, t, d] to [b, t, d], or to [b, a, d] with `query_positions`; the arguments are those of `Attention`.

        Returns:
            The output, and `cached` with the new keys and values.
        """
        x, cached = self._attend(x, tables, attention_mask, cached, cache_slot, query_positions)
        y = self.mlp(self.norm2(x))
        return x + (y if self.post_mlp_norm is None else self.post_mlp_norm(y)), cached

    def _attend(self, x, tables, attention_mask, cached=None, cache_slot=None, query_positions=None):
        """Computes the first half of the block; arguments and results are those of `__call__`."""
        y, cached = self.attn(self.norm1(x), tables, attention_mask, cached, cache_slot, query_positions)
        y = y if self.post_attn_norm is None else self.post_attn_norm(y)
        return (x if query_positions is None else _take_positions(x, query_positions)) + y, cached

    def neurons(self, x: jax.Array, tables: RotaryTables, attention_mask: jax.Array) -> jax.Array:
        """Returns the input of the MLP's last layer: maps [b, t, d] to [b, t, f]."""
        return self.mlp.neurons(self.norm2(self._attend(x, tables, attention_mask)[0]))


class Decoder(nnx.Module):
    """Token embedding, stacked blocks, final norm, output head."""

    def __init__(self, config: DecoderConfig, *, remat, mesh, dtype, param_dtype, rngs):
        options = dict(dtype=dtype, param_dtype=param_dtype)
        self.config, self.remat, self.mesh, self.dtype = config, remat, mesh, jnp.dtype(dtype)
        self.embed = Embedding(config.vocab, config.width, rngs=rngs, scale=config.embed_scale, **options)
        self.blocks = nnx.vmap(lambda r: Block(config, rngs=r, **options))(rngs.split(config.layers))
        self.norm = _norm(config, config.width, **options)
        head = dict(bias=False, rngs=rngs, init=small_normal, **options)
        self.head = None if config.tie_embeddings else Linear(config.width, config.vocab, **head)

    @jax.named_scope("language_model")
    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        attention_mask: jax.Array,
        cache: Cache | None = None,
        *,
        layers: int | None = None,
        query_positions: jax.Array | None = None,
        deepstack: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """Applies the blocks and the final norm.

        Args:
            x: embedded tokens [b, t, d].
            positions: int [b, t] or [b, t, axes], the rotary position of each token, less than s.
            attention_mask: bool [b, t, s], the keys that each query attends to; s is t without a cache, else the
                number of its slots. Local blocks attend to those inside the window.
            cache: earlier keys and values; the new ones are written from slot `cache.index` on. The caller updates
                its `mask` and `next`.
            layers: number of blocks to apply, without the final norm; None for all. Not supported with a cache.
            query_positions: int [b, a], the positions to return; None for all. Not supported with `layers`.
            deepstack: as in `Embedded`.

        Returns:
            Hidden states [b, t, d] or [b, a, d], and the cache with the new keys and values.
        """
        if cache is not None and cache.positions is not None:
            cache = cache._replace(
                positions=jax.lax.dynamic_update_slice_in_dim(cache.positions, positions, cache.index, axis=1)
            )
        inputs_of = self._attention_inputs(positions, attention_mask, positions if cache is None else cache.positions)
        unrolled = cache is None and not self.remat
        split_last = unrolled and query_positions is not None  # the last block computes the query positions alone

        def body(carry, layer):
            block, index, block_is_local = layer
            slot = None if cache is None else CacheSlot(index, cache.index)
            x, cached = block(shard_batch(carry[0], self.mesh), *inputs_of(block_is_local), carry[1], slot)
            x = _add_deepstack(x, deepstack, index)
            return (shard_batch(x, self.mesh), cached), None

        body = rematerialize(body, self.remat)
        # The cache is carried, not scanned over: new keys and values are written in place and the others not copied.
        cached = None if cache is None else (cache.keys, cache.values)
        scanned = self.config.layers - 1 if split_last else layers
        # Every leaf has the layer axis, those of quantized and adapted kernels included.
        stacked = self.blocks, self.config.is_local
        blocks, local = stacked if scanned is None else jax.tree.map(lambda leaf: leaf[:scanned], stacked)
        indexed = cache is not None or deepstack is not None
        indices = jnp.arange(self.config.layers)[:scanned] if indexed else None
        (x, cached), _ = jax.lax.scan(body, (x, cached), (blocks, indices, local), unroll=unrolled)
        if split_last:
            block, last_is_local = jax.tree.map(lambda leaf: leaf[-1], stacked)
            x, _ = block(shard_batch(x, self.mesh), *inputs_of(last_is_local), query_positions=query_positions)
            x = shard_batch(x, self.mesh)
        if cache is not None:
            cache = cache._replace(keys=cached[0], values=cached[1], index=cache.index + x.shape[1])
        x = self.norm(x) if layers is None else x
        return (x if query_positions is None or split_last else _take_positions(x, query_positions)), cache

    def read(
        self, embedded: Embedded, mask: jax.Array, cache: Cache | None = None, **options: Any
    ) -> tuple[jax.Array, Cache | None]:
        """Applies the blocks causally: a token attends to itself, earlier tokens and the real tokens of the cache.

        The tokens of an image also attend to each other if the embedded tokens have an `image_index`.

        Args:
            embedded: the embedded tokens.
            mask: bool [b, t], False at padding.
            cache: keys and values of earlier tokens, or None.
            **options: `layers` and `query_positions` of `__call__`.

        Returns:
            Hidden states [b, t, d] or [b, a, d], and the cache with these tokens added.
        """
        x, positions, image_index, deepstack = embedded
        t, options = x.shape[1], options | dict(deepstack=deepstack)
        if cache is None:
            return self(x, positions, _causal_mask(mask, image_index), **options)
        positions = positions + jnp.expand_dims(cache.next, range(1, positions.ndim))
        last = positions if positions.ndim == 2 else positions.max(-1)
        filled = jax.lax.dynamic_update_slice_in_dim(cache.mask, mask, cache.index, axis=1)
        attention_mask = filled[:, None, :] & (jnp.arange(filled.shape[1]) <= cache.index + jnp.arange(t)[:, None])
        if image_index is not None:
            same_image = jnp.zeros_like(attention_mask)
            same_image = jax.lax.dynamic_update_slice_in_dim(same_image, _same_image(image_index), cache.index, axis=2)
            attention_mask |= same_image
        cache = cache._replace(mask=filled, next=jnp.maximum(cache.next, jnp.where(mask, last + 1, 0).max(1)))
        return self(x, positions, attention_mask, cache, **options)

    @jax.named_scope("language_model")
    def neurons(self, embedded: Embedded, mask: jax.Array, reduce: Callable[[jax.Array], Any]) -> Any:
        """Applies `reduce` to the inner MLP activations [b, t, f] of each layer; one layer is in memory at a time.

        Args:
            embedded: the embedded tokens, as in `read`.
            mask: bool [b, t], False at padding.
            reduce: function of the activations to a tree of small arrays.

        Returns:
            That tree; each array has a leading layer axis.
        """
        x, positions, image_index, deepstack = embedded
        inputs_of = self._attention_inputs(positions, _causal_mask(mask, image_index), positions)

        def body(x, layer):
            block, index, block_is_local = layer
            inputs = inputs_of(block_is_local)
            return _add_deepstack(block(x, *inputs)[0], deepstack, index), reduce(block.neurons(x, *inputs))

        layers = self.blocks, jnp.arange(self.config.layers), self.config.is_local
        return jax.lax.scan(body, x, layers)[1]

    def _attention_inputs(
        self, positions: jax.Array, attention_mask: jax.Array, key_positions: jax.Array | None
    ) -> Callable[[jax.Array | None], AttentionInputs]:
        """Returns a function from whether a block is local, bool [], to the inputs of its attention.

        Args:
            positions: int [b, t] or [b, t, axes].
            attention_mask: bool [b, t, s].
            key_positions: int [b, s]; only local blocks need it.
        """
        length, window = attention_mask.shape[-1], self.config.window
        full = AttentionInputs(self._rotary_tables(positions, length), attention_mask)
        if not window:
            return lambda block_is_local: full
        inside = positions[:, :, None] - key_positions[:, None, :] < window
        local = AttentionInputs(self._rotary_tables(positions, length, local=True), attention_mask & inside)
        return lambda block_is_local: jax.tree.map(functools.partial(jnp.where, block_is_local), local, full)

    def _rotary_tables(self, positions: jax.Array, length: int, local: bool = False) -> RotaryTables:
        """Returns the rotary tables of positions less than `length`, for full or local attention."""
        c, sections, order = self.config.head_width, self.config.mrope_section, None
        positions = positions[..., None] if positions.ndim == 2 else positions
        if positions.shape[-1] == 1:  # the same position on every axis
            sections = (c // 2,)
        elif self.config.mrope_interleaved:
            axes = interleaved_axes(sections)
            sections, order = np.bincount(axes), np.argsort(axes, kind="stable")
        theta = self.config.local_rope_theta if local else self.config.rope_theta
        frequency = np.float32(theta) ** -(np.arange(0, c, 2, dtype=np.float32) / c)
        if not local:
            frequency /= np.float32(self.config.rope_factor)
        return rotary_tables(positions, frequency, sections, length, self.dtype, order)

    @jax.named_scope("head")
    def logits(self, x: jax.Array) -> jax.Array:
        """Maps hidden states [..., d] to float32 logits [..., v]."""
        return (self.embed.attend(x) if self.head is None else self.head(x)).astype(jnp.float32)

    def empty_cache(self, batch: int, slots: int) -> Cache:
        """Returns a cache of `slots` free slots for each of `batch` rows."""
        config = self.config
        keys = jnp.zeros((config.layers, batch, config.kv_heads, slots, config.head_width), self.dtype)
        nothing = jnp.zeros((batch, slots), bool)
        positions = jnp.zeros((batch, slots), jnp.int32) if config.window else None
        return Cache(keys, keys, nothing, index=jnp.int32(0), next=jnp.zeros(batch, jnp.int32), positions=positions)
