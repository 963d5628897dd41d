"""Qwen2.5-VL (Bai et al., arXiv 2502.13923): Qwen2-VL with RMSNorm, SwiGLU and windowed attention in the vision tower.

Only a few vision blocks attend to whole images. Everything else, and the names of the axes, is in `qwen2_vl`.
"""

import dataclasses
from typing import Any

from jax.sharding import PartitionSpec as P

from vkd_jax.models import qwen2_vl
from vkd_jax.models.base import check_model_types, check_supported
from vkd_jax.models.conversion import DECODER_SHARDING, Row, linear_rows, norm_rows
from vkd_jax.models.qwen2_vl import QwenConfig, QwenVL
from vkd_jax.models.qwen_vit import VisionConfig


@dataclasses.dataclass(frozen=True)
class Qwen25VLConfig(QwenConfig):
    """Configuration of a Qwen2.5-VL model."""

    @classmethod
    def from_hf(cls, hf: Any, **changes: Any) -> "Qwen25VLConfig":
        """Reads a `transformers.Qwen2_5_VLConfig`; `changes` override fields, such as `remat="full"`.

        Raises:
            UserError: lists every field with a value that this implementation does not support.
        """
        family = "Qwen2.5-VL"
        vision_types = ("qwen2_5_vl_vision", "qwen2_5_vl")  # as in `qwen2_vl`
        check_model_types(family, hf, vision_config=vision_types, text_config=("qwen2_5_vl_text",))
        qwen2_vl.check_sizes(family, hf, "hidden_size", "intermediate_size", "out_hidden_size", "window_size")
        vision = hf.vision_config
        # A window holds a whole number of image tokens, `window` in height and width.
        window = vision.window_size // vision.spatial_merge_size // vision.patch_size
        token_size = vision.spatial_merge_size * vision.patch_size
        blocks = list(vision.fullatt_block_indexes)
        fits = set(blocks) <= set(range(vision.depth)) and len(set(blocks)) == len(blocks)
        check_supported(
            family,
            [
                (vision.hidden_act == "silu", "vision_config.hidden_act", vision.hidden_act, "silu"),
                (window > 0, "vision_config.window_size", vision.window_size, f"{token_size} and more"),
                (
                    fits,
                    "vision_config.fullatt_block_indexes",
                    blocks,
                    f"different ones from 0 to {vision.depth - 1}",
                ),
                *qwen2_vl.common_checks(hf, vision.hidden_size, vision.out_hidden_size),
            ],
        )
        tower = VisionConfig(
            width=vision.hidden_size,
            mlp_width=vision.intermediate_size,
            activation="silu",
            gated=True,
            window=window * vision.spatial_merge_size,
            full_attention_blocks=tuple(vision.fullatt_block_indexes),
            **qwen2_vl.common_vision_fields(vision),
        )
        return cls(**dict(vision=tower, **qwen2_vl.common_fields(hf)) | changes)


Config, Model = Qwen25VLConfig, QwenVL

# Conversion; the names are those of Qwen2-VL.
HF_ALIASES, HF_SKIP = qwen2_vl.HF_ALIASES, qwen2_vl.HF_SKIP
HF_ARCHITECTURE = "Qwen2_5_VLForConditionalGeneration"

_LAYER, _BLOCK = "visual.blocks.{i}", "vision_tower/blocks/{i}"
_VISION_ROWS = (
    *norm_rows(f"{_LAYER}.norm1", f"{_BLOCK}/norm1", bias=False),
    *norm_rows(f"{_LAYER}.norm2", f"{_BLOCK}/norm2", bias=False),
    *linear_rows(f"{_LAYER}.mlp.gate_proj", f"{_BLOCK}/mlp/gate"),
    *linear_rows(f"{_LAYER}.mlp.up_proj", f"{_BLOCK}/mlp/up"),
    *linear_rows(f"{_LAYER}.mlp.down_proj", f"{_BLOCK}/mlp/down"),
    *norm_rows("visual.merger.ln_q", "projector/norm", bias=False),
)


def hf_table(config: QwenConfig) -> tuple[Row, ...]:
    """Returns the rows of the conversion table, which `conversion` describes."""
    return (*qwen2_vl.common_rows(config), *_VISION_ROWS)


SHARDING = (
    *DECODER_SHARDING,
    (r"(vision_tower/blocks/\d+/(attn/qkv|mlp/gate|mlp/up)|projector/fc1)/kernel", P("fsdp", "tensor")),
    (r"(vision_tower/blocks/\d+/(attn/out|mlp/down)|projector/fc2)/kernel", P("tensor", "fsdp")),
    (r".*/(bias|scale)|vision_tower/patch_embedding", P()),
)

_VISION = dict(
    depth=32,
    hidden_size=1280,
    intermediate_size=3420,
    num_heads=16,
    hidden_act="silu",
    in_channels=3,
    patch_size=14,
    spatial_merge_size=2,
    temporal_patch_size=2,
    window_size=112,
    fullatt_block_indexes=[7, 15, 23, 31],
)
_SMALL = qwen2_vl.published_config(
    dict(**_VISION, out_hidden_size=2048), vocab=151936, width=2048, mlp_width=11008, layers=36, heads=16,
    kv_heads=2, max_positions=128000, tied=True
)  # fmt: skip
_LARGE = qwen2_vl.published_config(
    dict(**_VISION, out_hidden_size=3584), vocab=152064, width=3584, mlp_width=18944, layers=28, heads=28,
    kv_heads=4, max_positions=128000, tied=False
)  # fmt: skip
PRESETS = {"3b": ("Qwen/Qwen2.5-VL-3B-Instruct", _SMALL), "7b": ("Qwen/Qwen2.5-VL-7B-Instruct", _LARGE)}
