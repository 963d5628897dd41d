"""Gemma-3 (Gemma Team, arXiv 2503.19786): SigLIP, pooled features, local and global attention; and its conversion.

Each image becomes a square of image tokens, which attend to each other in both directions. Pan-and-scan, which adds
crops of elongated images, is not supported.

Axes: b batch, t position, p image token, r patch rows or columns, k patches in a cell, d width.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P

from vkd_jax.models import base, conversion
from vkd_jax.models.base import VisualTokens
from vkd_jax.models.clip_vit import VisionConfig, square_coords
from vkd_jax.models.conversion import Row, decoder_rows, norm_rows, vit_rows
from vkd_jax.models.decoder import DecoderConfig, Embedded
from vkd_jax.models.fixed_size import FixedSizeConfig, FixedSizeModel
from vkd_jax.models.layers import ACTIVATIONS, Linear, RMSNorm

LAYER_TYPES = ("full_attention", "sliding_attention")
PAN_AND_SCAN = "do_pan_and_scan is on, which is not supported; set it to false"


@dataclasses.dataclass(frozen=True)
class Gemma3Config(FixedSizeConfig):
    """Configuration of a Gemma-3 model."""

    image_processors: ClassVar[tuple[str, ...]] = ("Gemma3ImageProcessor",)
    tokens_per_side: int = 16  # rows and columns of the image tokens of an image
    image_start_token_id: int = 255999  # stands for an image in the chat template
    image_end_token_id: int = 256000

    @property
    def uses_post_norm(self) -> bool:
        """Whether the norm after the last vision block feeds the projector: it does."""
        return True

    @property
    def token_coords(self) -> np.ndarray:
        """Image index 0, row and column of each image token: int32 [p, 3]."""
        return square_coords(self.tokens_per_side)

    @property
    def placeholder_id(self) -> int:
        """Token that stands for an image in a rendered chat template."""
        return self.image_start_token_id

    def image_markup(self, token: Callable[[int], str], height: int, width: int) -> str:
        """Returns the text that replaces the placeholder of an image: the image token between its start and end."""
        del height, width
        start, image, end = map(token, (self.image_start_token_id, self.image_token_id, self.image_end_token_id))
        return f"\n\n{start}{image}{end}\n\n"

    @property
    def processor_fields(self) -> dict[str, Any]:
        """Of processor_config.json: the number of image tokens of an image."""
        return dict(image_seq_length=self.tokens_per_side**2)

    def image_processor_problem(self, image_processor: Any) -> str | None:
        """Returns whether the image processor would add crops of elongated images; None if not."""
        return PAN_AND_SCAN if getattr(image_processor, "do_pan_and_scan", False) else None

    @classmethod
    def from_hf(cls, hf: Any, **changes: Any) -> "Gemma3Config":
        """Reads a `transformers.Gemma3Config`; `changes` override fields, such as `remat="full"`.

        Raises:
            UserError: lists every field with a value that this implementation does not support.
        """
        _check_hf_config(hf)
        text = hf.text_config
        rope = {name: dict(text.rope_parameters[name]) for name in LAYER_TYPES}
        fields = dict(
            vision=VisionConfig.of_siglip(hf.vision_config),
            text=DecoderConfig.from_hf(
                text,
                head_width=text.head_dim,
                rope_theta=float(rope["full_attention"]["rope_theta"]),
                rope_factor=float(rope["full_attention"].get("factor", 1.0)),
                window=text.sliding_window,
                full_attention_blocks=tuple(i for i, kind in enumerate(text.layer_types) if kind == "full_attention"),
                local_rope_theta=float(rope["sliding_attention"]["rope_theta"]),
                activation=text.hidden_activation,
                attention_scale=text.query_pre_attn_scalar**-0.5,
                embed_scale=text.hidden_size**0.5,
                qk_norm=True,
                post_norms=True,
                zero_centered_norms=True,
                tie_embeddings=bool(hf.tie_word_embeddings),
            ),
            image_token_id=hf.image_token_id,
            compute_dtype=base.hf_dtype(hf),
            tokens_per_side=math.isqrt(hf.mm_tokens_per_image),
            image_start_token_id=hf.boi_token_id,
            image_end_token_id=hf.eoi_token_id,
        )
        return cls(**fields | changes)


_VISION_HEADS = ("vision_config.num_attention_heads", "vision_config.hidden_size")


def _check_hf_config(hf: Any) -> None:
    family, vision, text = "Gemma-3", hf.vision_config, hf.text_config
    base.check_model_types(family, hf, vision_config=("siglip_vision_model",), text_config=("gemma3_text",))
    names = (
        "image_size", "patch_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    )  # fmt: skip
    base.check_sizes(
        family,
        mm_tokens_per_image=hf.mm_tokens_per_image,
        text_config__head_dim=text.head_dim,
        text_config__sliding_window=text.sliding_window,
        text_config__query_pre_attn_scalar=text.query_pre_attn_scalar,
        **{f"vision_config__{name}": getattr(vision, name) for name in names},
        **base.decoder_sizes(text),
    )
    tokens = ("image_token_id", "boi_token_id", "eoi_token_id")
    token_checks = [base.token_id(name, getattr(hf, name)) for name in tokens]
    base.check_supported(family, [*_vision_checks(hf, vision), *_text_checks(text), *token_checks])


def _vision_checks(hf: Any, vision: Any) -> list[tuple[bool, str, Any, str]]:
    patches, tokens = vision.image_size // vision.patch_size, hf.mm_tokens_per_image
    side = math.isqrt(tokens)
    # The pooled grid must have as many cells as transformers expects features.
    pools = side**2 == tokens and side <= patches and patches // (patches // side) == side
    fits = f"squares of numbers that divide the {patches} patches of a side, up to a remainder"
    return [
        (vision.patch_size <= vision.image_size, "vision_config.patch_size", vision.patch_size, "at most image_size"),
        (pools, "mm_tokens_per_image", tokens, fits),
        base.divides(vision.num_attention_heads, vision.hidden_size, _VISION_HEADS),
        (vision.num_channels == 3, "vision_config.num_channels", vision.num_channels, "3"),
        (vision.hidden_act in ACTIVATIONS, "vision_config.hidden_act", vision.hidden_act, ", ".join(ACTIVATIONS)),
        base.off("vision_config.vision_use_head", vision.vision_use_head),
    ]


def _text_checks(text: Any) -> list[tuple[bool, str, Any, str]]:
    checks = [
        base.positive("text_config.rms_norm_eps", text.rms_norm_eps),
        base.divides(text.num_key_value_heads, text.num_attention_heads, base.KEY_VALUE_HEADS),
        (text.head_dim % 2 == 0, "text_config.head_dim", text.head_dim, "even numbers"),
        (
            text.hidden_activation in ACTIVATIONS,
            "text_config.hidden_activation",
            text.hidden_activation,
            ", ".join(ACTIVATIONS),
        ),
        (
            len(text.layer_types) == text.num_hidden_layers and {*text.layer_types} <= {*LAYER_TYPES},
            "text_config.layer_types",
            sorted({*text.layer_types}),
            f"{text.num_hidden_layers} of {', '.join(LAYER_TYPES)}",
        ),
    ]
    for name in ("attention_bias", "final_logit_softcapping", "attn_logit_softcapping", "use_bidirectional_attention"):
        checks.append(base.off(f"text_config.{name}", getattr(text, name), "False or null"))
    for name, kinds in (("full_attention", ("default", "linear")), ("sliding_attention", ("default",))):
        rope, field = dict(text.rope_parameters[name]), f"text_config.rope_parameters.{name}"
        checks.append((rope["rope_type"] in kinds, f"{field}.rope_type", rope["rope_type"], ", ".join(kinds)))
        for number in ("rope_theta", "factor"):
            checks.append(base.positive(f"{field}.{number}", rope.get(number, 1.0)))
    return checks


class Projector(nnx.Module):
    """Averages square cells of vision features, normalizes the averages and maps them to token embeddings."""

    def __init__(self, config: Gemma3Config, *, dtype, param_dtype, rngs):
        options = dict(dtype=dtype, param_dtype=param_dtype)
        self.patches_per_side = config.vision.image_size // config.vision.patch_size
        self.tokens_per_side = config.tokens_per_side
        self.norm = RMSNorm(config.vision.width, eps=config.vision.norm_eps, zero_centered=True, **options)
        self.linear = Linear(config.vision.width, config.text.width, bias=False, rngs=rngs, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [b, patches, vision width] to [b, p, text width]."""
        r, p = self.patches_per_side, self.tokens_per_side
        k, (b, _, d) = r // p, x.shape
        x = x.reshape(b, r, r, d)[:, : p * k, : p * k]  # pooling drops the remainder
        x = x.reshape(b, p, k, p, k, d).mean((2, 4)).reshape(b, p * p, d)
        return self.linear(self.norm(x))


class Gemma3(FixedSizeModel):
    """Gemma-3: pooled SigLIP features, inserted at the image tokens, which attend to each other."""

    @staticmethod
    def build_projector(config: Gemma3Config, **options: Any) -> Projector:
        """Builds the pooling projector."""
        return Projector(config, **options)

    def embed(self, tokens: jax.Array, mask: jax.Array, features: VisualTokens | None) -> Embedded:
        """Embeds tokens and inserts image features; consecutive image tokens attend to each other."""
        x, is_image = self.insert(tokens, features)
        return Embedded(x, base.token_positions(mask), None if is_image is None else image_index(is_image))


def image_index(is_image: jax.Array) -> jax.Array:
    """Returns the number of the run of image tokens that each token is part of, -1 at text: bool [b, t] to int."""
    starts = is_image & ~jnp.pad(is_image, ((0, 0), (1, 0)))[:, :-1]
    return jnp.where(is_image, jnp.cumsum(starts, axis=1) - 1, -1)


Config, Model = Gemma3Config, Gemma3

HF_ALIASES, HF_SKIP = conversion.PARTS_ALIASES, ()  # files hold no constant buffers
HF_ARCHITECTURE = "Gemma3ForConditionalGeneration"


def hf_table(config: Gemma3Config) -> tuple[Row, ...]:
    """Returns the rows of the conversion table, which `conversion` describes."""
    return (
        *vit_rows(config.vision, conversion.VISION_PART),
        *norm_rows("multi_modal_projector.mm_soft_emb_norm", "projector/norm", bias=False),
        ("multi_modal_projector.mm_input_projection_weight", "projector/linear/kernel", None),
        *decoder_rows(config.text, conversion.DECODER_PART, conversion.HEAD_PART),
    )


# The mesh axis of each axis of a weight.
SHARDING = (
    *conversion.DECODER_SHARDING,
    (r"(vision_tower/blocks/\d+/(attn/[qkv]|mlp/fc1)|projector/linear)/kernel", P("fsdp", "tensor")),
    (r"vision_tower/blocks/\d+/(attn/out|mlp/fc2)/kernel", P("tensor", "fsdp")),
    (r"vision_tower/position_embedding", P("fsdp", "tensor")),  # 4,096 positions
    (r"vision_tower/.*bias|.*/scale|vision_tower/patch_embedding", P()),
)

# Fields of the published config.json files, by size; transformers has the defaults of the others.
_VISION = dict(
    model_type="siglip_vision_model",
    hidden_size=1152,
    intermediate_size=4304,
    num_hidden_layers=27,
    num_attention_heads=16,
    image_size=896,
    patch_size=14,
    vision_use_head=False,
)
_TEXT = dict(
    model_type="gemma3_text",
    sliding_window=1024,
    rope_scaling=dict(factor=8.0, rope_type="linear"),
)
_SHARED = dict(
    vision_config=_VISION,
    boi_token_index=255999,
    eoi_token_index=256000,
    image_token_index=262144,
    mm_tokens_per_image=256,
    dtype="bfloat16",
)
_SMALL = dict(hidden_size=2560, intermediate_size=10240, num_hidden_layers=34)
_LARGE = dict(
    hidden_size=3840, intermediate_size=15360, num_hidden_layers=48, num_attention_heads=16, num_key_value_heads=8
)
PRESETS = {
    "4b": ("google/gemma-3-4b-it", dict(text_config=dict(**_TEXT, **_SMALL), **_SHARED)),
    "12b": ("google/gemma-3-12b-it", dict(text_config=dict(**_TEXT, **_LARGE), **_SHARED)),
}
