"""LLaVA-1.5 (Liu et al., arXiv 2310.03744): CLIP, a two-layer projector, a LLaMA decoder; and its conversion."""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P

from vkd_jax.models import base, conversion
from vkd_jax.models.clip_vit import VisionConfig
from vkd_jax.models.conversion import Row, decoder_rows, linear_rows, vit_rows
from vkd_jax.models.decoder import DecoderConfig
from vkd_jax.models.fixed_size import FixedSizeConfig, FixedSizeModel
from vkd_jax.models.layers import ACTIVATIONS, Linear
from vkd_jax.types import UserError


@dataclasses.dataclass(frozen=True)
class LlavaConfig(FixedSizeConfig):
    """Configuration of a LLaVA model."""

    image_processors: ClassVar[tuple[str, ...]] = (
        *("CLIPImageProcessor", "LlavaImageProcessor", "SiglipImageProcessor", "ViTImageProcessor"),
    )
    has_default_template: ClassVar[bool] = True
    feature_layer: int = -2  # as in transformers: an index into (embeddings, block 0, ..., last block)
    feature_select: str = "default"  # "default" drops the class token, "full" keeps it
    projector_act: str = "gelu"

    @property
    def used_blocks(self) -> int:
        """Number of vision blocks that feed the projector; later blocks are loaded and exported, never computed."""
        return self.feature_layer if self.feature_layer >= 0 else self.vision.layers + 1 + self.feature_layer

    @property
    def feature_coords(self) -> np.ndarray:
        """Image index 0, row and column of each input token of the projector: int32 [p, 3]."""
        return self.vision.patch_coords[self.feature_select == "default" :]

    @property
    def processor_fields(self) -> dict[str, Any]:
        """Of processor_config.json: what the number of image tokens follows from."""
        return dict(
            patch_size=self.vision.patch_size,
            vision_feature_select_strategy=self.feature_select,
            num_additional_image_tokens=1,  # the class token
        )

    def pack(self, rows: Sequence[Sequence[np.ndarray]], min_tokens: int = 0) -> dict[str, np.ndarray]:
        """Stacks the images of prompts, one [H, W, 3] per prompt: {"pixels": float32 [b, H, W, 3]}.

        Args:
            rows: the images of each prompt.
            min_tokens: not used, since a prompt has one image.

        Raises:
            UserError: a prompt has several images.
        """
        if any(len(row) != 1 for row in rows):
            raise UserError("The model supports one image per question. Ask about each image separately.")
        return super().pack(rows)

    @classmethod
    def from_hf(cls, hf: Any, **changes: Any) -> "LlavaConfig":
        """Reads a `transformers.LlavaConfig`; `changes` override fields, such as `remat="full"`.

        Raises:
            UserError: lists every field with a value that this implementation does not support.
        """
        check_hf_config("LLaVA", hf, ("llama",), *feature_checks(hf))
        return cls(**read_fields(hf) | read_feature_fields(hf) | changes)


def read_feature_fields(hf: Any) -> dict[str, Any]:
    """Returns the fields of a `LlavaConfig` that say which features the projector reads."""
    return dict(feature_layer=hf.vision_feature_layer, feature_select=hf.vision_feature_select_strategy)


def read_fields(hf: Any) -> dict[str, Any]:
    """Returns the other fields of a `LlavaConfig` in a `transformers.LlavaConfig`, or in that of a relative."""
    return dict(
        vision=VisionConfig.from_hf(hf.vision_config),
        text=DecoderConfig.from_hf(
            hf.text_config, head_width=hf.text_config.head_dim, tie_embeddings=bool(hf.tie_word_embeddings)
        ),
        image_token_id=hf.image_token_id,
        projector_act=hf.projector_hidden_act,
        compute_dtype=base.hf_dtype(hf),
    )


_VISION_HEADS = ("vision_config.num_attention_heads", "vision_config.hidden_size")


def feature_checks(hf: Any) -> list[tuple[bool, str, Any, str]]:
    """The checks of the fields that `read_feature_fields` reads, and of the projector's biases."""
    layer, layers = hf.vision_feature_layer, hf.vision_config.num_hidden_layers
    layer_exists = isinstance(layer, int) and -layers - 1 <= layer <= layers
    return [
        (hf.multimodal_projector_bias, "multimodal_projector_bias", False, "True"),
        (layer_exists, "vision_feature_layer", layer, f"one layer, from {-layers - 1} to {layers}"),
    ]


def check_hf_config(family: str, hf: Any, decoders: tuple[str, ...], *features: tuple[bool, str, Any, str]) -> None:
    """Checks the fields that `read_fields` reads.

    Args:
        family: name of the family in the error.
        hf: the Hugging Face configuration.
        decoders: supported values of `text_config.model_type`.
        *features: checks of the fields that say which features the projector reads.

    Raises:
        UserError: lists every field with a value that this implementation does not support.
    """
    base.check_model_types(family, hf, vision_config=("clip_vision_model",), text_config=decoders)
    vision, text, rope = hf.vision_config, hf.text_config, dict(hf.text_config.rope_parameters)
    sides = {"image_size": vision.image_size, "patch_size": vision.patch_size}
    base.check_supported(
        family, [(_is_square(side), f"vision_config.{name}", side, "a square") for name, side in sides.items()]
    )
    image_size, patch_size = (np.max(side).item() for side in sides.values())
    base.check_sizes(
        family,
        vision_config__image_size=image_size,
        vision_config__patch_size=patch_size,
        vision_config__hidden_size=vision.hidden_size,
        vision_config__intermediate_size=vision.intermediate_size,
        vision_config__num_hidden_layers=vision.num_hidden_layers,
        vision_config__num_attention_heads=vision.num_attention_heads,
        text_config__head_dim=text.head_dim,
        **base.decoder_sizes(text),
    )
    projector_act, activations = hf.projector_hidden_act, ", ".join(ACTIVATIONS)
    base.check_supported(
        family,
        [
            (patch_size <= image_size, "vision_config.patch_size", patch_size, f"at most the image size, {image_size}"),
            base.divides(vision.num_attention_heads, vision.hidden_size, _VISION_HEADS),
            base.divides(text.num_key_value_heads, text.num_attention_heads, base.KEY_VALUE_HEADS),
            (text.head_dim % 2 == 0, "text_config.head_dim", text.head_dim, "even numbers"),
            base.positive("text_config.rope_parameters.rope_theta", rope["rope_theta"]),
            base.positive("text_config.rms_norm_eps", text.rms_norm_eps),
            base.token_id("image_token_index", hf.image_token_id),
            (vision.num_channels == 3, "vision_config.num_channels", vision.num_channels, "3"),
            (vision.hidden_act in ACTIVATIONS, "vision_config.hidden_act", vision.hidden_act, activations),
            (text.hidden_act == "silu", "text_config.hidden_act", text.hidden_act, "silu"),
            (rope["rope_type"] == "default", "text_config.rope_parameters.rope_type", rope["rope_type"], "default"),
            *(
                base.off(f"text_config.{name}", getattr(text, name, False))
                for name in ("attention_bias", "mlp_bias")  # which Mistral's configuration lacks
            ),
            (projector_act in ACTIVATIONS, "projector_hidden_act", projector_act, activations),
            *features,
        ],
    )


def _is_square(size: int | list[int]) -> bool:
    return len(set(np.atleast_1d(size).tolist())) == 1


class Projector(nnx.Module):
    """Maps vision features to token embeddings: `fc2(activation(fc1(x)))`."""

    def __init__(self, config: LlavaConfig, **options):
        self.activation = config.projector_act
        self.fc1 = Linear(len(config.feature_blocks) * config.vision.width, config.text.width, bias=True, **options)
        self.fc2 = Linear(config.text.width, config.text.width, bias=True, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps the features of p patches, [b, p, d], to [b, p, text width]."""
        return self.fc2(ACTIVATIONS[self.activation](self.fc1(x)))


class Llava(FixedSizeModel):
    """LLaVA-1.5: CLIP features of one image per prompt, projected and inserted at its image tokens."""

    @staticmethod
    def build_projector(config: LlavaConfig, **options: Any) -> Projector:
        """Builds the two-layer projector."""
        return Projector(config, **options)


Config, Model = LlavaConfig, Llava

HF_ALIASES = conversion.PARTS_ALIASES
HF_SKIP = (  # constant buffers that older versions saved
    r"vision_tower\.vision_model\.embeddings\.position_ids",
    r"language_model\.model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",
)
HF_ARCHITECTURE = "LlavaForConditionalGeneration"


def hf_table(config: LlavaConfig) -> tuple[Row, ...]:
    """Returns the rows of the conversion table, which `conversion` describes."""
    return (
        *vit_rows(config.vision, conversion.VISION_PART),
        *linear_rows("multi_modal_projector.linear_1", "projector/fc1"),
        *linear_rows("multi_modal_projector.linear_2", "projector/fc2"),
        *decoder_rows(config.text, conversion.DECODER_PART, conversion.HEAD_PART),
    )


# The mesh axis of each axis of a weight.
SHARDING = (
    *conversion.DECODER_SHARDING,
    (r"(vision_tower/blocks/\d+/(attn/[qkv]|mlp/fc1)|projector/fc1)/kernel", P("fsdp", "tensor")),
    (r"(vision_tower/blocks/\d+/(attn/out|mlp/fc2)|projector/fc2)/kernel", P("tensor", "fsdp")),
    (r"(vision_tower|projector)/.*bias|.*/scale|vision_tower/\w+_embedding", P()),
)

# Fields of the published config.json files, by size.
_TEXT = dict(model_type="llama", vocab_size=32064, max_position_embeddings=4096, rms_norm_eps=1e-5)
_VISION = dict(
    model_type="clip_vision_model",
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    image_size=336,
    patch_size=14,
    projection_dim=768,
)
_WIDE = dict(hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40)
_SHARED = dict(vision_config=_VISION, image_token_index=32000, pad_token_id=32001, dtype="float16")
PRESETS = {
    "7b": ("llava-hf/llava-1.5-7b-hf", dict(text_config=_TEXT, **_SHARED)),
    "13b": (
        "llava-hf/llava-1.5-13b-hf",
        dict(text_config=dict(**_TEXT, **_WIDE, num_key_value_heads=40), **_SHARED),
    ),
}
