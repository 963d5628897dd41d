"""The vision transformers of Qwen2-VL, Qwen2.5-VL and Qwen3-VL for images of any size, exact to transformers.

The patches of all images of a prompt fill a fixed number of slots in order, and each patch attends to the patches of
its own image (in Qwen2.5-VL mostly to those of its own window of the image). Images of different sizes thus share one
compiled shape, and patches are never reordered.

Axes: b prompt, p patch slot, q slot of a merged token, k color, row and column inside a patch, d width, f MLP width,
h head, c head channel.
"""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vkd_jax.models.layers import (
    MLP,
    GatedMLP,
    LayerNorm,
    Linear,
    RMSNorm,
    RotaryTables,
    apply_blocks,
    attention,
    gelu,
    lecun_normal,
    rotary_tables,
    rotate,
    small_normal,
)

NORM_EPS = 1e-6  # fixed; the configurations have no field for it


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """Sizes of a Qwen vision tower."""

    width: int
    layers: int
    heads: int
    mlp_width: int
    patch_size: int = 14
    frames: int = 2  # frames of a patch; those of a still image are equal
    merge: int = 2  # merge x merge patches become one image token
    activation: str = "quick_gelu"
    gated: bool = False  # Qwen2.5-VL: RMSNorm and SwiGLU instead of LayerNorm and a two-layer MLP
    rope_theta: float = 10000.0
    window: int = 0  # height and width of an attention window in patches; 0 for the whole image
    full_attention_blocks: tuple[int, ...] = ()  # blocks that attend to the whole image in spite of `window`
    patch_bias: bool = False
    position_side: int = 0  # rows and columns of the grid of learned position embeddings; 0 for none
    deepstack_blocks: tuple[int, ...] = ()  # blocks whose outputs feed the projector, too, in ascending order


# Images and patches.


def slot_count(patches: int, merge: int) -> int:
    """Returns the number of slots for this many patches: the smallest of 4, 6, 8, 12, 16, 24, ... image tokens.

    Few sizes mean few compilations. With three or more image tokens at most a third of the slots is empty.
    """
    size = 4
    while size * merge**2 < patches:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size * merge**2


def patch_coords(rows: int, columns: int, merge: int) -> np.ndarray:
    """Returns the row and column of each patch, int [rows * columns, 2]; patches that merge are adjacent."""
    grid = np.indices((rows, columns)).reshape(2, rows // merge, merge, columns // merge, merge)
    return grid.transpose(1, 3, 2, 4, 0).reshape(-1, 2)


def patchify(image: np.ndarray, patch_size: int, merge: int) -> tuple[np.ndarray, np.ndarray]:
    """Splits an image [H, W, 3] into patches [p, k] and returns them with their rows and columns [p, 2]."""
    rows, columns = (side // patch_size for side in image.shape[:2])
    coords = patch_coords(rows, columns, merge)
    grid = image.reshape(rows, patch_size, columns, patch_size, 3).transpose(0, 2, 4, 1, 3)
    return grid[coords[:, 0], coords[:, 1]].reshape(len(coords), -1), coords


def unpatchify(patches: np.ndarray, coords: np.ndarray, patch_size: int) -> np.ndarray:
    """Joins the patches of an image, the inverse of `patchify`: [p, k] and [p, 2] to [H, W, 3]."""
    rows, columns = coords.max(0) + 1
    grid = np.empty((rows, columns, 3, patch_size, patch_size), np.float32)
    grid[coords[:, 0], coords[:, 1]] = patches.reshape(-1, 3, patch_size, patch_size)
    return grid.transpose(0, 3, 1, 4, 2).reshape(rows * patch_size, columns * patch_size, 3)


def token_coords(coords: jax.Array, merge: int) -> jax.Array:
    """Maps the coordinates of patches, [b, p, 3], to those of merged tokens, [b, q, 3]; padding stays -1."""
    return coords[:, :: merge**2] // jnp.array([1, merge, merge])


def attention_mask(coords: jax.Array, window: int = 0) -> jax.Array:
    """Returns the patches that each patch attends to: those of the same image and of the same window of it.

    Args:
        coords: int [b, p, 3], image index, row and column of each patch; padding, -1, attends to padding.
        window: height and width of a window in patches; 0 for the whole image.

    Returns:
        bool [b, p, p].
    """
    groups = coords // jnp.array([1, window, window]) if window else coords[..., :1]
    return (groups[:, :, None] == groups[:, None]).all(-1)


# The network.


class Attention(nnx.Module):
    """Self-attention with biases and 2D rotary positions; one kernel projects to queries, keys and values."""

    def __init__(self, config: VisionConfig, **options):
        self.heads = config.heads
        self.qkv = Linear(config.width, 3 * config.width, bias=True, **options)
        self.out = Linear(config.width, config.width, bias=True, **options)

    def __call__(self, x: jax.Array, tables: RotaryTables, mask: jax.Array) -> jax.Array:
        """Maps [b, p, d] to [b, p, d]; `tables` is from `rotary_tables` and `mask` from `attention_mask`."""
        b, p, d = x.shape
        q, k, v = jnp.moveaxis(self.qkv(x).reshape(b, p, 3, self.heads, -1), 2, 0)
        q, k = (rotate(x, tables) for x in (q, k))
        return self.out(attention(q, k, v, mask).reshape(b, p, d))


def _norm(config: VisionConfig, width: int | None = None, *, rngs: nnx.Rngs, **options) -> nnx.Module:
    del rngs  # norms are initialized to one
    return (RMSNorm if config.gated else LayerNorm)(width or config.width, eps=NORM_EPS, **options)


class Block(nnx.Module):
    """Pre-norm transformer block: `x + attn(norm1(x))`, then `x + mlp(norm2(x))`."""

    def __init__(self, config: VisionConfig, **options):
        self.norm1, self.norm2 = _norm(config, **options), _norm(config, **options)
        self.attn = Attention(config, **options)
        if config.gated:
            self.mlp = GatedMLP(config.width, config.mlp_width, bias=True, **options)
        else:
            self.mlp = MLP(config.width, config.mlp_width, activation=config.activation, **options)

    def __call__(self, x: jax.Array, tables: RotaryTables, mask: jax.Array) -> jax.Array:
        """Maps [b, p, d] to [b, p, d]; `tables` is from `rotary_tables` and `mask` from `attention_mask`."""
        x = x + self.attn(self.norm1(x), tables, mask)
        return x + self.mlp(self.norm2(x))

    def neurons(self, x: jax.Array, tables: RotaryTables, mask: jax.Array) -> jax.Array:
        """Returns the input of the MLP's last layer: maps [b, p, d] to [b, p, f]."""
        return self.mlp.neurons(self.norm2(x + self.attn(self.norm1(x), tables, mask)))


class VisionTower(nnx.Module):
    """Patch embedding and transformer blocks."""

    def __init__(self, config: VisionConfig, *, remat, mesh, dtype, param_dtype, rngs):
        options = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        p, d = config.patch_size, config.width
        self.config, self.remat, self.mesh, self.dtype = config, remat, mesh, jnp.dtype(dtype)
        # [frame, color, row, column, d]: conversion is a permutation of axes, and lecun_normal sees the right fan-in.
        self.patch_embedding = nnx.Param(lecun_normal(rngs.params(), (config.frames, 3, p, p, d), param_dtype))
        self.patch_bias = nnx.Param(jnp.zeros((d,), param_dtype)) if config.patch_bias else None
        count = config.position_side**2
        self.position_embedding = nnx.Param(small_normal(rngs.params(), (count, d), param_dtype)) if count else None
        self.blocks = nnx.List([Block(config, **options) for _ in range(config.layers)])

    @jax.named_scope("vision_tower")
    def embed(self, patches: jax.Array, coords: jax.Array) -> jax.Array:
        """Maps patches [b, p, k] to the input of block 0, [b, p, d]; `coords` are as in `attention_mask`."""
        # All frames of a still image are equal, so the kernel is summed over frames.
        kernel = self.patch_embedding[...].astype(jnp.float32).sum(0).astype(self.dtype)
        x = jnp.einsum("bpk,kd->bpd", patches.astype(self.dtype), kernel.reshape(-1, kernel.shape[-1]))
        if self.patch_bias is not None:
            x = x + self.patch_bias[...].astype(self.dtype)
        return x if self.position_embedding is None else x + self._positions(coords).astype(self.dtype)

    def _positions(self, coords: jax.Array) -> jax.Array:
        """Resamples the grid of position embeddings to each image: float32 [b, p, d].

        The interpolation is bilinear, and the corners of an image are those of the grid.
        """
        grid, last = coords[..., 1:], self.config.position_side - 1
        # The last row and column of the image of each patch.
        ends = jnp.where(attention_mask(coords)[..., None], grid[:, None], 0).max(2)
        source = (grid * last).astype(jnp.float32) / jnp.maximum(ends, 1)
        low = jnp.floor(source)
        share, low = source - low, low.astype(jnp.int32)
        embedding, embedded = self.position_embedding[...], 0.0
        for corner in itertools.product((0, 1), repeat=2):
            row, column = jnp.moveaxis(jnp.clip(low + jnp.array(corner), 0, last), -1, 0)
            weight = jnp.where(jnp.array(corner), share, 1 - share).prod(-1, keepdims=True)
            embedded += weight * jnp.take(embedding, row * (last + 1) + column, axis=0, mode="clip")
        return embedded

    @jax.named_scope("vision_tower")
    def __call__(self, hidden: jax.Array, coords: jax.Array, start: int) -> list[jax.Array]:
        """Applies the blocks from `start` on to the input of block `start` and returns the output of each."""
        image_mask, window_mask = attention_mask(coords), attention_mask(coords, self.config.window)
        tables, full_attention = self._rotary_tables(coords), jnp.asarray(self._full_attention()[start:])

        def call(block, x, index):
            return block(x, tables, jnp.where(full_attention[index], image_mask, window_mask))

        return apply_blocks(call, self.blocks[start:], hidden, self.remat, self.mesh)

    @jax.named_scope("vision_tower")
    def neurons(self, hidden: jax.Array, coords: jax.Array, reduce: Callable[[jax.Array], Any]) -> list[Any]:
        """Applies `reduce` to the inner MLP activations [b, p, f] of each block."""
        inputs = [hidden, *self(hidden, coords, 0)][:-1]
        masks = [attention_mask(coords, 0 if full else self.config.window) for full in self._full_attention()]
        tables, blocks = self._rotary_tables(coords), zip(self.blocks, inputs, masks, strict=True)
        return [reduce(block.neurons(x, tables, mask)) for block, x, mask in blocks]

    def _rotary_tables(self, coords: jax.Array) -> RotaryTables:
        """Returns the rotary tables: half of the channel pairs rotates by the row, the other half by the column."""
        c = self.config.width // self.config.heads
        frequency = np.float32(self.config.rope_theta) ** -(np.arange(0, c, 4, dtype=np.float32) / c)
        return rotary_tables(coords[..., 1:], np.tile(frequency, 2), (c // 4, c // 4), coords.shape[1], jnp.float32)

    def _full_attention(self) -> np.ndarray:
        """True for blocks whose patches attend to the whole image, False for windows: bool [layers]."""
        return np.isin(np.arange(self.config.layers), self.config.full_attention_blocks)


class Merger(nnx.Module):
    """The projector: concatenates merge x merge neighboring patches and maps them to one token embedding.

    The patches are normalized before they are concatenated, or with `norm_merged` afterwards, together.
    """

    def __init__(self, config: VisionConfig, width: int, *, norm_merged: bool = False, **options):
        self.merged_width = config.width * config.merge**2
        self.norm_merged = norm_merged
        self.norm = _norm(config, self.merged_width if norm_merged else None, **options)
        self.fc1 = Linear(self.merged_width, self.merged_width, bias=True, **options)
        self.fc2 = Linear(self.merged_width, width, bias=True, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [b, p, vision width] to [b, q, text width]."""
        merged = x.shape[0], -1, self.merged_width
        x = self.norm(x.reshape(merged)) if self.norm_merged else self.norm(x).reshape(merged)
        return self.fc2(gelu(self.fc1(x)))
