"""Qwen2.5-VL (Bai et al., arXiv 2502.13923): Qwen2-VL with a vision tower that looks through windows.

RMSNorm and SwiGLU in the vision blocks, of which only a few see whole pictures; the rest, and how axes are named, is
Qwen2-VL's.
"""

import dataclasses
from typing import Any

from jax.sharding import PartitionSpec as P

from vkd_jax.models import qwen2_vl
from vkd_jax.models.base import check_supported
from vkd_jax.models.qwen2_vl import QwenConfig, QwenVL
from vkd_jax.models.qwen_vit import VisionConfig


@dataclasses.dataclass(frozen=True)
class Qwen25VLConfig(QwenConfig):
    """A Qwen2.5-VL."""

    @classmethod
    def from_hf(cls, hf: Any, **changes: Any) -> "Qwen25VLConfig":
        """Reads a `transformers.Qwen2_5_VLConfig`; `changes` are fields to set otherwise (`remat="full"`).

        Raises:
            UserError: the configuration asks for what this implementation does not compute; all is listed.
        """
        family = "Qwen2.5-VL"
        qwen2_vl.check_model_types(family, hf, "qwen2_5_vl")
        vision = hf.vision_config
        common = qwen2_vl.common_checks(hf, vision.hidden_size, vision.out_hidden_size)
        # Of tokens, of which a window holds a whole number.
        window = vision.window_size // vision.spatial_merge_size // vision.patch_size
        side = vision.spatial_merge_size * vision.patch_size
        check_supported(
            family,
            [
                (vision.hidden_act == "silu", "vision_config.hidden_act", vision.hidden_act, "silu"),
                (window > 0, "vision_config.window_size", vision.window_size, f"{side} and more"),
                *common,
            ],
        )
        tower = VisionConfig(
            width=vision.hidden_size,
            mlp_width=vision.intermediate_size,
            activation="silu",
            gated=True,
            window=window * vision.spatial_merge_size,
            full_attention_blocks=tuple(vision.fullatt_block_indexes),
            **qwen2_vl.shared_vision_fields(vision),
        )
        return cls(**dict(vision=tower, **qwen2_vl.shared_fields(hf)) | changes)


Config, Model = Qwen25VLConfig, QwenVL

# Conversion; see `vkd_jax.models.qwen2_vl`, whose names these are.
HF_ALIASES, HF_SKIP = qwen2_vl.HF_ALIASES, qwen2_vl.HF_SKIP
HF_ARCHITECTURE = "Qwen2_5_VLForConditionalGeneration"

_T = (1, 0)
_MLP_ROWS = (
    ("visual.blocks.{i}.mlp.gate_proj.weight", "vision_tower/blocks/{i}/mlp/gate/kernel", _T),
    ("visual.blocks.{i}.mlp.gate_proj.bias", "vision_tower/blocks/{i}/mlp/gate/bias", None),
    ("visual.blocks.{i}.mlp.up_proj.weight", "vision_tower/blocks/{i}/mlp/up/kernel", _T),
    ("visual.blocks.{i}.mlp.up_proj.bias", "vision_tower/blocks/{i}/mlp/up/bias", None),
    ("visual.blocks.{i}.mlp.down_proj.weight", "vision_tower/blocks/{i}/mlp/down/kernel", _T),
    ("visual.blocks.{i}.mlp.down_proj.bias", "vision_tower/blocks/{i}/mlp/down/bias", None),
)


def hf_table(config: QwenConfig) -> tuple[tuple[str, str, tuple[int, ...] | None], ...]:
    """The conversion rows: (name of the tensor, path of the parameter, permutation of the axes)."""
    return (*qwen2_vl.VISION_ROWS, *_MLP_ROWS, *qwen2_vl.TEXT_ROWS, qwen2_vl.head_row(config))


SHARDING = (
    *qwen2_vl.TEXT_SHARDING,
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
