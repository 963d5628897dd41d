"""The vision transformers of CLIP (Radford et al., arXiv 2103.00020) and SigLIP (Zhai et al., arXiv 2303.15343).

They are exact to `transformers.CLIPVisionModel` and, without class token and norm before the blocks and with a bias of
the patch embedding, to `transformers.SiglipVisionModel` without its head.

Axes: b batch, p patch, k pixel row, column and color inside a patch, d width, f MLP width.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vkd_jax.models.layers import (
    MLP,
    LayerNorm,
    Linear,
    apply_blocks,
    attention,
    lecun_normal,
    small_normal,
)


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """Sizes of a vision tower, and its variant; the default is CLIP's."""

    image_size: int  # height and width in pixels
    patch_size: int
    width: int
    layers: int
    heads: int
    mlp_width: int
    activation: str = "quick_gelu"
    norm_eps: float = 1e-5
    class_token: bool = True
    pre_norm: bool = True  # whether the embeddings are normalized before the first block
    patch_bias: bool = False
    post_norm: bool = True  # whether a norm follows the last block

    @classmethod
    def from_hf(cls, hf: Any, **variant: Any) -> Self:
        """Reads the `vision_config` of a family; `variant` has the fields that differ between families."""
        return cls(
            image_size=np.max(hf.image_size).item(),  # a number or (height, width), which are equal
            patch_size=np.max(hf.patch_size).item(),
            width=hf.hidden_size,
            layers=hf.num_hidden_layers,
            heads=hf.num_attention_heads,
            mlp_width=hf.intermediate_size,
            activation=hf.hidden_act,
            norm_eps=hf.layer_norm_eps,
            **variant,
        )

    @classmethod
    def of_siglip(cls, hf: Any) -> Self:
        """Reads the `vision_config` of a family with a SigLIP tower."""
        return cls.from_hf(hf, class_token=False, pre_norm=False, patch_bias=True)

    @property
    def patches(self) -> int:
        """Number of patches per image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def patch_coords(self) -> np.ndarray:
        """Image index, row and column of each token: int32 [t, 3]. A class token is first, in row and column -1."""
        patches = square_coords(self.image_size // self.patch_size)
        return np.concatenate([[[0, -1, -1]], patches]).astype(np.int32) if self.class_token else patches


def square_coords(side: int) -> np.ndarray:
    """Returns the image index 0, row and column of the cells of a square, row by row: int32 [side^2, 3]."""
    rows, columns = np.divmod(np.arange(side**2), side)
    return np.stack([np.zeros_like(rows), rows, columns], axis=-1).astype(np.int32)


class Attention(nnx.Module):
    """Full self-attention with biases."""

    def __init__(self, config: VisionConfig, **options):
        self.heads = config.heads
        self.q, self.k, self.v, self.out = (Linear(config.width, config.width, bias=True, **options) for _ in range(4))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [b, t, d] to [b, t, d]."""
        b, t, d = x.shape
        q, k, v = (project(x).reshape(b, t, self.heads, -1) for project in (self.q, self.k, self.v))
        return self.out(attention(q, k, v).reshape(b, t, d))


class Block(nnx.Module):
    """Pre-norm transformer block: `x + attn(norm1(x))`, then `x + mlp(norm2(x))`."""

    def __init__(self, config: VisionConfig, *, dtype, param_dtype, rngs):
        norm = dict(eps=config.norm_eps, dtype=dtype, param_dtype=param_dtype)
        options = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.norm1, self.norm2 = LayerNorm(config.width, **norm), LayerNorm(config.width, **norm)
        self.attn = Attention(config, **options)
        self.mlp = MLP(config.width, config.mlp_width, activation=config.activation, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [b, t, d] to [b, t, d]."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))

    def neurons(self, x: jax.Array) -> jax.Array:
        """Returns the input of the MLP's last layer: maps [b, t, d] to [b, t, f]."""
        return self.mlp.neurons(self.norm2(x + self.attn(self.norm1(x))))


class VisionTower(nnx.Module):
    """Patch embedding, class token, position embedding, transformer blocks and the norm after them."""

    block_class: ClassVar[type[nnx.Module]] = Block

    def __init__(self, config: VisionConfig, *, remat, mesh, dtype, param_dtype, rngs):
        options = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        norm = dict(eps=config.norm_eps, dtype=dtype, param_dtype=param_dtype)
        p, d = config.patch_size, config.width
        self.config, self.remat, self.mesh, self.dtype = config, remat, mesh, jnp.dtype(dtype)
        self.class_embedding = nnx.Param(small_normal(rngs.params(), (d,), param_dtype)) if config.class_token else None
        # [row, column, color, d]: conversion is a permutation of axes, and lecun_normal sees the right fan-in.
        self.patch_embedding = nnx.Param(lecun_normal(rngs.params(), (p, p, 3, d), param_dtype))
        self.patch_bias = nnx.Param(jnp.zeros((d,), param_dtype)) if config.patch_bias else None
        positions = config.patches + config.class_token
        self.position_embedding = nnx.Param(small_normal(rngs.params(), (positions, d), param_dtype))
        self.pre_norm = LayerNorm(d, **norm) if config.pre_norm else None
        self.blocks = nnx.List([self.block_class(config, **options) for _ in range(config.layers)])
        self.post_norm = LayerNorm(d, **norm) if config.post_norm else None  # LLaVA takes its features before it

    @jax.named_scope("vision_tower")
    def embed(self, pixels: jax.Array) -> jax.Array:
        """Maps pixels [b, H, W, 3] to the input of block 0, [b, t, d]; t includes the class token."""
        p, grid = self.config.patch_size, self.config.image_size // self.config.patch_size
        pixels = pixels.astype(self.dtype)[:, : grid * p, : grid * p]  # a convolution drops the remainder as well
        # Patches do not overlap, so the strided convolution is one matrix product.
        pixels = pixels.reshape(-1, grid, p, grid, p, 3).transpose(0, 1, 3, 2, 4, 5)
        kernel = self.patch_embedding[...].astype(self.dtype)
        pixels = pixels.reshape(-1, grid * grid, p * p * 3)
        x = jnp.einsum("bpk,kd->bpd", pixels, kernel.reshape(p * p * 3, -1))
        if self.patch_bias is not None:
            x += self.patch_bias[...].astype(self.dtype)
        if self.class_embedding is not None:
            class_token = self.class_embedding[...].astype(self.dtype)
            x = jnp.concatenate([jnp.broadcast_to(class_token, (x.shape[0], 1, x.shape[2])), x], axis=1)
        x += self.position_embedding[...].astype(self.dtype)
        return x if self.pre_norm is None else self.pre_norm(x)

    @jax.named_scope("vision_tower")
    def normalize(self, x: jax.Array) -> jax.Array:
        """Applies the norm after the last block."""
        return self.post_norm(x)

    @jax.named_scope("vision_tower")
    def __call__(self, hidden: jax.Array, start: int, stop: int) -> list[jax.Array]:
        """Applies blocks [start, stop) to the input of block `start` and returns the output of each."""
        return apply_blocks(lambda block, x, _: block(x), self.blocks[start:stop], hidden, self.remat, self.mesh)

    @jax.named_scope("vision_tower")
    def neurons(self, hidden: jax.Array, stop: int, reduce: Callable[[jax.Array], Any]) -> list[Any]:
        """Applies `reduce` to the inner MLP activations [b, t, f] of each block before `stop`."""
        inputs = [hidden, *self(hidden, 0, stop)][:-1]
        return [reduce(block.neurons(x)) for block, x in zip(self.blocks[:stop], inputs, strict=True)]
