"""The vision transformers of Qwen2-VL and Qwen2.5-VL: pictures of any size, exact to transformers.

The patches of all pictures of a prompt stand one after another in a fixed number of slots, and each patch sees
those of its own picture (Qwen2.5-VL: mostly those of its own window of the picture). So pictures of different sizes
share one compiled shape, and the order of the patches never changes.

Axes: b prompt, p patch slot, q slot of a merged token, k colour, row and column inside a patch, d width, h head,
c head channel.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vkd_jax.models.clip_vit import MLP
from vkd_jax.models.layers import (
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
)

NORM_EPS = 1e-6  # no configuration says otherwise


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """Sizes of a Qwen vision tower."""

    width: int
    layers: int
    heads: int
    mlp_width: int
    patch_size: int = 14
    frames: int = 2  # of a patch in time; those of a still picture are equal
    merge: int = 2  # so many patches, squared, make one image token
    activation: str = "quick_gelu"
    gated: bool = False  # Qwen2.5-VL: RMSNorm and SwiGLU instead of LayerNorm and two layers
    rope_theta: float = 10000.0
    window: int = 0  # patches, both ways, that a patch sees together; 0 for the whole picture
    full_attention_blocks: tuple[int, ...] = ()  # blocks that see the whole picture all the same


# Pictures and patches, in NumPy.


def slot_count(patches: int, merge: int) -> int:
    """How many patch slots so many patches get: of the sizes 4, 6, 8, 12, 16, 24, ... image tokens the least.

    Few sizes mean few compilations; from three tokens on at most a third of the slots stays empty.
    """
    size = 4
    while size * merge**2 < patches:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size * merge**2


def patch_coords(rows: int, columns: int, merge: int) -> np.ndarray:
    """Row and column of each patch of a picture, int [rows * columns, 2]: those that merge stand together."""
    grid = np.indices((rows, columns)).reshape(2, rows // merge, merge, columns // merge, merge)
    return grid.transpose(1, 3, 2, 4, 0).reshape(-1, 2)


def patchify(picture: np.ndarray, patch_size: int, merge: int) -> tuple[np.ndarray, np.ndarray]:
    """A picture [H, W, 3] to its patches [p, k] and their places [p, 2]."""
    rows, columns = (side // patch_size for side in picture.shape[:2])
    where = patch_coords(rows, columns, merge)
    grid = picture.reshape(rows, patch_size, columns, patch_size, 3).transpose(0, 2, 4, 1, 3)
    return grid[where[:, 0], where[:, 1]].reshape(len(where), -1), where


def unpatchify(patches: np.ndarray, where: np.ndarray, patch_size: int) -> np.ndarray:
    """The inverse of `patchify`."""
    rows, columns = where.max(0) + 1
    grid = np.empty((rows, columns, 3, patch_size, patch_size), np.float32)
    grid[where[:, 0], where[:, 1]] = patches.reshape(-1, 3, patch_size, patch_size)
    return grid.transpose(0, 3, 1, 4, 2).reshape(rows * patch_size, columns * patch_size, 3)


def token_coords(where: jax.Array, merge: int) -> jax.Array:
    """Places of patches [b, p, 3] to the places of the tokens that they merge to, [b, q, 3]; padding stays -1."""
    return where[:, :: merge**2] // jnp.array([1, merge, merge])


def attention_mask(where: jax.Array, window: int = 0) -> jax.Array:
    """Which patches each patch sees: those of the same picture, and of the same window of it.

    Args:
        where: int [b, p, 3], picture, row and column of each patch; padding, -1, sees padding.
        window: patches both ways; 0 for the whole picture.

    Returns:
        bool [b, p, p].
    """
    groups = where // jnp.array([1, window, window]) if window else where[..., :1]
    return (groups[:, :, None] == groups[:, None]).all(-1)


# The network.


class Attention(nnx.Module):
    """Self-attention with biases and rotary places; queries, keys and values come from one kernel."""

    def __init__(self, config: VisionConfig, **options):
        self.heads = config.heads
        self.qkv = Linear(config.width, 3 * config.width, bias=True, **options)
        self.out = Linear(config.width, config.width, bias=True, **options)

    def __call__(self, x: jax.Array, tables: RotaryTables, allowed: jax.Array) -> jax.Array:
        """[b, p, d] to [b, p, d]; `tables` from `rotary_tables`, `allowed` from `attention_mask`."""
        b, p, d = x.shape
        q, k, v = jnp.moveaxis(self.qkv(x).reshape(b, p, 3, self.heads, -1), 2, 0)
        q, k = (rotate(x, tables) for x in (q, k))
        return self.out(attention(q, k, v, allowed).reshape(b, p, d))


class GatedMLP(nnx.Module):
    """SwiGLU with biases: `down(silu(gate(x)) * up(x))`."""

    def __init__(self, config: VisionConfig, **options):
        self.gate = Linear(config.width, config.mlp_width, bias=True, **options)
        self.up = Linear(config.width, config.mlp_width, bias=True, **options)
        self.down = Linear(config.mlp_width, config.width, bias=True, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[b, p, d] to [b, p, d]."""
        return self.down(self.neurons(x))

    def neurons(self, x: jax.Array) -> jax.Array:
        """The inner activations, which feed the last layer: [b, p, d] to [b, p, f]."""
        return jax.nn.silu(self.gate(x)) * self.up(x)


def _norm(config: VisionConfig, *, rngs: nnx.Rngs, **options) -> nnx.Module:
    del rngs  # norms begin at one
    return (RMSNorm if config.gated else LayerNorm)(config.width, eps=NORM_EPS, **options)


class Block(nnx.Module):
    """`x + attn(norm1(x))`, then `x + mlp(norm2(x))`."""

    def __init__(self, config: VisionConfig, **options):
        self.norm1, self.norm2 = _norm(config, **options), _norm(config, **options)
        self.attn, self.mlp = Attention(config, **options), (GatedMLP if config.gated else MLP)(config, **options)

    def __call__(self, x: jax.Array, tables: RotaryTables, allowed: jax.Array) -> jax.Array:
        """[b, p, d] to [b, p, d]; `tables` from `rotary_tables`, `allowed` from `attention_mask`."""
        x = x + self.attn(self.norm1(x), tables, allowed)
        return x + self.mlp(self.norm2(x))

    def neurons(self, x: jax.Array, tables: RotaryTables, allowed: jax.Array) -> jax.Array:
        """The inner activations of the MLP: [b, p, d] to [b, p, f]."""
        return self.mlp.neurons(self.norm2(x + self.attn(self.norm1(x), tables, allowed)))


class VisionTower(nnx.Module):
    """Patch embedding and transformer blocks."""

    def __init__(self, config: VisionConfig, *, remat, mesh, dtype, param_dtype, rngs):
        options = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        p, d = config.patch_size, config.width
        self.config, self.remat, self.mesh, self.dtype = config, remat, mesh, jnp.dtype(dtype)
        # [frame, colour, row, column, d], so that conversion is a permutation; lecun_normal gets the fan-in right.
        self.patch_embedding = nnx.Param(lecun_normal(rngs.params(), (config.frames, 3, p, p, d), param_dtype))
        self.blocks = nnx.List([Block(config, **options) for _ in range(config.layers)])

    @jax.named_scope("vision_tower")
    def embed(self, patches: jax.Array) -> jax.Array:
        """Patches [b, p, k] to the activations entering block 0, [b, p, d]."""
        # A still picture shows every frame of the kernel the same patch.
        kernel = self.patch_embedding[...].astype(jnp.float32).sum(0).astype(self.dtype)
        return jnp.einsum("bpk,kd->bpd", patches.astype(self.dtype), kernel.reshape(-1, kernel.shape[-1]))

    @jax.named_scope("vision_tower")
    def __call__(self, hidden: jax.Array, where: jax.Array, start: int) -> list[jax.Array]:
        """Runs the blocks from `start` on the activations entering it; returns each block's output."""
        everything, window = attention_mask(where), attention_mask(where, self.config.window)
        tables, whole = self._rotary_tables(where), jnp.asarray(self._whole()[start:])

        def call(block, x, number):
            return block(x, tables, jnp.where(whole[number], everything, window))

        return apply_blocks(call, self.blocks[start:], hidden, self.remat, self.mesh)

    @jax.named_scope("vision_tower")
    def neurons(self, hidden: jax.Array, where: jax.Array, reduce: Callable[[jax.Array], Any]) -> list[Any]:
        """What `reduce` makes of the MLP's inner activations [b, p, f], of each block."""
        inputs = [hidden, *self(hidden, where, 0)][:-1]
        allowed = [attention_mask(where, 0 if whole else self.config.window) for whole in self._whole()]
        tables, blocks = self._rotary_tables(where), zip(self.blocks, inputs, allowed, strict=True)
        return [reduce(block.neurons(x, tables, allowed)) for block, x, allowed in blocks]

    def _rotary_tables(self, where: jax.Array) -> RotaryTables:
        """A half of the channel pairs turns with the row, a half with the column, at the same c/4 frequencies."""
        c = self.config.width // self.config.heads
        frequency = np.float32(self.config.rope_theta) ** -(np.arange(0, c, 4, dtype=np.float32) / c)
        return rotary_tables(where[..., 1:], np.tile(frequency, 2), (c // 4, c // 4), where.shape[1], jnp.float32)

    def _whole(self) -> np.ndarray:
        """Of each block, whether a patch sees the whole picture there, and not its window alone."""
        return np.isin(np.arange(self.config.layers), self.config.full_attention_blocks)


class Merger(nnx.Module):
    """RotaryTables neighbouring patches, side by side in one vector, into one token embedding: the projector."""

    def __init__(self, config: VisionConfig, width: int, **options):
        self.norm = _norm(config, **options)
        self.wide = config.width * config.merge**2
        self.fc1 = Linear(self.wide, self.wide, bias=True, **options)
        self.fc2 = Linear(self.wide, width, bias=True, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[b, p, d] to [b, q, d]."""
        return self.fc2(gelu(self.fc1(self.norm(x).reshape(x.shape[0], -1, self.wide))))
