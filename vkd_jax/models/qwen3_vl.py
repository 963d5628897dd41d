"""Qwen3-VL, dense (Bai et al., arXiv 2511.21631): Qwen2-VL with deep-stack features and a Qwen3 decoder.

The vision tower adds learned position embeddings, resampled to each image. Outputs of a few of its blocks have a merger
of their own, whose results are added to the outputs of the decoder's first blocks at the image tokens (deep-stack, Meng
et al., arXiv 2406.04334). Everything else, and the names of the axes, is in `qwen2_vl`.
"""

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from vkd_jax.models import base, qwen2_vl
from vkd_jax.models.base import VisualTokens
from vkd_jax.models.conversion import DECODER_SHARDING, Row, decoder_rows, linear_rows, norm_rows
from vkd_jax.models.decoder import Embedded
from vkd_jax.models.layers import ACTIVATIONS, insert_features
from vkd_jax.models.qwen2_vl import QwenConfig, QwenVL
from vkd_jax.models.qwen_vit import Merger, VisionConfig

MAX_PIXELS = 256 * 32 * 32  # 256 image tokens, as `data.processor.MAX_PIXELS` for patches of 14 pixels


@dataclasses.dataclass(frozen=True)
class Qwen3VLConfig(QwenConfig):
    """Configuration of a dense Qwen3-VL model."""

    default_max_pixels: ClassVar[int] = MAX_PIXELS

    def taps_before(self, block: int) -> tuple[str, ...]:
        """Returns the taps from which `encode` continues at a vision block; deep-stack features need earlier ones."""
        earlier = [i for i in self.vision.deepstack_blocks if i < block - 1]
        return tuple(f"vision/{i}" for i in (*earlier, block - 1))

    @classmethod
    def from_hf(cls, hf: Any, **changes: Any) -> "Qwen3VLConfig":
        """Reads a `transformers.Qwen3VLConfig`; `changes` override fields, such as `remat="full"`.

        Raises:
            UserError: lists every field with a value that this implementation does not support.
        """
        vision, text = hf.vision_config, hf.text_config
        section = tuple(dict(text.rope_parameters).get("mrope_section", (24, 20, 20)))  # transformers' default
        _check_hf_config(hf, section)
        tower = VisionConfig(
            width=vision.hidden_size,
            mlp_width=vision.intermediate_size,
            activation=vision.hidden_act,
            patch_bias=True,
            position_side=math.isqrt(vision.num_position_embeddings),
            deepstack_blocks=tuple(vision.deepstack_visual_indexes),
            **qwen2_vl.common_vision_fields(vision),
        )
        decoder = dict(head_width=text.head_dim, mrope_section=section, mrope_interleaved=True, qk_norm=True)
        return cls(**dict(vision=tower, **qwen2_vl.shared_fields(hf, **decoder)) | changes)


def _check_hf_config(hf: Any, mrope_section: tuple[int, ...]) -> None:
    family, vision, text = "Qwen3-VL", hf.vision_config, hf.text_config
    vision_types = ("qwen3_vl_vision", "qwen3_vl")  # as in `qwen2_vl`
    base.check_model_types(family, hf, vision_config=vision_types, text_config=("qwen3_vl_text",))
    widths = ("hidden_size", "intermediate_size", "out_hidden_size", "num_position_embeddings")
    qwen2_vl.check_sizes(family, hf, *widths)
    base.check_sizes(family, text_config__head_dim=text.head_dim)
    act, positions, blocks = vision.hidden_act, vision.num_position_embeddings, list(vision.deepstack_visual_indexes)
    # Transformers leaves out the features that the decoder has no block for.
    deepstack = f"ascending numbers from 0 to {vision.depth - 1}, at most {text.num_hidden_layers - 1} of them"
    fits = blocks == sorted({*blocks} & {*range(vision.depth)}) and len(blocks) < text.num_hidden_layers
    base.check_supported(
        family,
        [
            (act in ACTIVATIONS, "vision_config.hidden_act", act, ", ".join(ACTIVATIONS)),
            (
                math.isqrt(positions) ** 2 == positions,
                "vision_config.num_position_embeddings",
                positions,
                "square numbers",
            ),
            (fits, "vision_config.deepstack_visual_indexes", blocks, deepstack),
            base.off("text_config.attention_bias", text.attention_bias),
            *qwen2_vl.shared_checks(hf, vision.hidden_size, vision.out_hidden_size, text.head_dim, mrope_section),
        ],
    )


class Projector(Merger):
    """The merger of the last vision block, and one for each deep-stack block, whose patches are normalized together."""

    def __init__(self, config: VisionConfig, width: int, **options):
        super().__init__(config, width, **options)
        self.deepstack = nnx.List([Merger(config, width, norm_merged=True, **options) for _ in config.deepstack_blocks])

    def __call__(self, x: jax.Array, *deepstack: jax.Array) -> jax.Array:
        """Maps the outputs of the last and the deep-stack blocks, [b, p, vision width] each, to their features.

        Returns:
            [b, q, (1 + deep-stack blocks) * text width]: the merged patches, then those of each deep-stack block.
        """
        merged = [merger(y) for merger, y in zip(self.deepstack, deepstack, strict=True)]
        return jnp.concatenate([super().__call__(x), *merged], axis=-1)


class Qwen3VL(QwenVL):
    """Qwen3-VL: a feature holds what replaces its image token, and what is added to it after each of the first blocks.

    Parts of the program that store, move or distill features thus treat both alike.
    """

    @staticmethod
    def build_projector(config: Qwen3VLConfig, **options: Any) -> Projector:
        """Builds the mergers."""
        return Projector(config.vision, config.text.width, **options)

    def embed(self, tokens: jax.Array, mask: jax.Array, features: VisualTokens | None) -> Embedded:
        """Embeds tokens and inserts image features; the positions are those of M-RoPE."""
        if features is None:
            return super().embed(tokens, mask, None)
        merged, *deepstack = jnp.split(features.values, 1 + len(self.config.vision.deepstack_blocks), axis=-1)
        x, is_image = self.insert(tokens, features._replace(values=merged))
        summands = [insert_features(jnp.zeros_like(x), is_image, values) for values in deepstack]
        positions = qwen2_vl.mrope_positions(is_image, mask, features.coords)
        return Embedded(x, positions, deepstack=jnp.stack(summands) if summands else None)


Config, Model = Qwen3VLConfig, Qwen3VL

# Conversion. Files have the names that transformers has in memory; those of a model without its head lack a prefix.
HF_ALIASES = ((r"^(visual|language_model)\.", r"model.\1."),)
HF_SKIP = ()  # files hold no constant buffers
HF_ARCHITECTURE = "Qwen3VLForConditionalGeneration"

_TOWER = "model.visual"
_LAYER, _BLOCK = f"{_TOWER}.blocks.{{i}}", "vision_tower/blocks/{i}"
_MERGERS = {f"{_TOWER}.merger": "projector", f"{_TOWER}.deepstack_merger_list.{{i}}": "projector/deepstack/{i}"}
_VISION_ROWS = (
    (f"{_TOWER}.patch_embed.proj.weight", "vision_tower/patch_embedding", (2, 1, 3, 4, 0)),
    (f"{_TOWER}.patch_embed.proj.bias", "vision_tower/patch_bias", None),
    (f"{_TOWER}.pos_embed.weight", "vision_tower/position_embedding", None),
    *norm_rows(f"{_LAYER}.norm1", f"{_BLOCK}/norm1"),
    *norm_rows(f"{_LAYER}.norm2", f"{_BLOCK}/norm2"),
    *linear_rows(f"{_LAYER}.attn.qkv", f"{_BLOCK}/attn/qkv"),
    *linear_rows(f"{_LAYER}.attn.proj", f"{_BLOCK}/attn/out"),
    *linear_rows(f"{_LAYER}.mlp.linear_fc1", f"{_BLOCK}/mlp/fc1"),
    *linear_rows(f"{_LAYER}.mlp.linear_fc2", f"{_BLOCK}/mlp/fc2"),
    *(row for name, path in _MERGERS.items() for row in norm_rows(f"{name}.norm", f"{path}/norm")),
    *(row for name, path in _MERGERS.items() for row in linear_rows(f"{name}.linear_fc1", f"{path}/fc1")),
    *(row for name, path in _MERGERS.items() for row in linear_rows(f"{name}.linear_fc2", f"{path}/fc2")),
)


def hf_table(config: Qwen3VLConfig) -> tuple[Row, ...]:
    """Returns the rows of the conversion table, which `conversion` describes."""
    return (*_VISION_ROWS, *decoder_rows(config.text, "model.language_model", "lm_head.weight"))


# The mesh axis of each axis of a weight.
SHARDING = (
    *DECODER_SHARDING,
    (r"(vision_tower/blocks/\d+/(attn/qkv|mlp/fc1)|projector/(deepstack/\d+/)?fc1)/kernel", P("fsdp", "tensor")),
    (r"(vision_tower/blocks/\d+/(attn/out|mlp/fc2)|projector/(deepstack/\d+/)?fc2)/kernel", P("tensor", "fsdp")),
    (r"vision_tower/position_embedding", P("fsdp", "tensor")),
    (r".*/(bias|scale)|vision_tower/patch_(bias|embedding)", P()),
)


def _published_config(
    vision: dict[str, Any], *, width: int, mlp_width: int, layers: int, heads: int, tied: bool
) -> dict[str, Any]:
    """Returns the fields of a published config.json."""
    text = dict(
        model_type="qwen3_vl_text",
        vocab_size=151936,
        hidden_size=width,
        intermediate_size=mlp_width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=262144,
        rms_norm_eps=1e-6,
        rope_theta=5e6,
        rope_scaling=dict(rope_type="default", mrope_interleaved=True, mrope_section=[24, 20, 20]),
        attention_bias=False,
        bos_token_id=151643,
        eos_token_id=151645,
        dtype="bfloat16",
    )
    shared = dict(
        model_type="qwen3_vl",
        hidden_act="gelu_pytorch_tanh",
        num_heads=16,
        in_channels=3,
        patch_size=16,
        spatial_merge_size=2,
        temporal_patch_size=2,
        num_position_embeddings=2304,
        out_hidden_size=width,
    )
    return dict(
        vision_config=shared | vision,
        text_config=text | dict(tie_word_embeddings=tied),
        image_token_id=151655,
        tie_word_embeddings=tied,
    )


_SMALL_TOWER = dict(depth=24, hidden_size=1024, intermediate_size=4096, deepstack_visual_indexes=[5, 11, 17])
_LARGE_TOWER = dict(depth=27, hidden_size=1152, intermediate_size=4304, deepstack_visual_indexes=[8, 16, 24])
_SIZES = {
    "2b": _published_config(_SMALL_TOWER, width=2048, mlp_width=6144, layers=28, heads=16, tied=True),
    "4b": _published_config(_SMALL_TOWER, width=2560, mlp_width=9728, layers=36, heads=32, tied=True),
    "8b": _published_config(_LARGE_TOWER, width=4096, mlp_width=12288, layers=36, heads=32, tied=False),
}
PRESETS = {size: (f"Qwen/Qwen3-VL-{size.upper()}-Instruct", fields) for size, fields in _SIZES.items()}
