"""SmolVLM (Marafioti et al., arXiv 2504.05299) and Idefics3 (Laurençon et al., arXiv 2408.12637); and their conversion.

SigLIP on square tiles, a connector that joins square cells of features, a LLaMA decoder. An image becomes a grid of
tiles and the whole image in one tile, in a text that names the row and column of each tile.

Axes: b batch, p image token, r rows or columns of a cell, d width.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P

from vkd_jax.data.image_settings import setting
from vkd_jax.data.images import TiledImage
from vkd_jax.models import base, conversion
from vkd_jax.models.clip_vit import VisionConfig
from vkd_jax.models.conversion import TRANSPOSE, Row, decoder_rows, vit_rows
from vkd_jax.models.decoder import DecoderConfig
from vkd_jax.models.fixed_size import FixedSizeModel
from vkd_jax.models.layers import ACTIVATIONS, Linear, join_cells
from vkd_jax.models.tiled import GridConfig

MOST_PATCHES = 1024  # of a side of a tile
BOUNDARY, GLOBAL = "<fake_token_around_image>", "<global-img>"  # fixed in transformers; no configuration has them


@dataclasses.dataclass(frozen=True)
class IdeficsConfig(GridConfig):
    """Configuration of an Idefics3 or SmolVLM model."""

    markup_tokens: ClassVar[tuple[str, ...]] = (BOUNDARY,)
    image_processors: ClassVar[tuple[str, ...]] = ("Idefics3ImageProcessor", "SmolVLMImageProcessor")
    scale: int = 4

    @property
    def uses_post_norm(self) -> bool:
        """Whether the norm after the last vision block feeds the projector: it does."""
        return True

    @property
    def image_processor_options(self) -> dict[str, Any]:
        """Further arguments of the Hugging Face image processor."""
        return dict(return_row_col_info=True)

    def image_markup(self, token: Callable[[int], str], height: int, width: int) -> str:
        """Returns the text that replaces the placeholder of an image: the image token once in each tile, row by row."""
        (rows, columns), *whole = self.grids(height, width)
        image = token(self.image_token_id)
        end = f"{BOUNDARY}{GLOBAL}{image}{BOUNDARY}"
        if not whole:
            return end
        tiles = [
            "".join(f"{BOUNDARY}<row_{row}_col_{column}>{image}" for column in range(1, columns + 1))
            for row in range(1, rows + 1)
        ]
        return "\n".join(tiles) + f"\n\n{end}"

    def extract_images(self, output: Mapping[str, Any]) -> list[TiledImage]:
        """Returns the views of the images in the output of the Hugging Face image processor.

        Raises:
            UserError: the tiles have another size than those of the model.
        """
        rows, columns = (np.maximum(output[name][0], 1).tolist() for name in ("rows", "cols"))
        grids = zip(rows, columns, strict=True)
        return self.join_images(output["pixel_values"][0], grids, "max_image_size and do_resize")

    def pixel_limits(self, image_processor: Any) -> tuple[int, int]:
        """Returns the smallest and largest number of pixels of the grid of an image, which may be one tile."""
        side, splits = self.image_step, setting(image_processor, "do_image_splitting", bool)
        return side**2, setting(image_processor, "size", dict)["longest_edge"] ** 2 if splits else side**2

    def limit_pixels(self, image_processor: Any, max_pixels: int) -> None:
        """Sets the longest edge of an image to the largest number of tiles whose square has `max_pixels`."""
        if setting(image_processor, "do_image_splitting", bool):
            image_processor.size["longest_edge"] = math.isqrt(max_pixels) // self.image_step * self.image_step

    @property
    def processor_fields(self) -> dict[str, Any]:
        """Of processor_config.json: the number of image tokens of a tile."""
        return dict(image_seq_len=len(self.token_coords))

    def image_processor_problem(self, image_processor: Any) -> str | None:
        """Returns whether the tiles of the image processor have another size than those of the model; None if not."""
        names = ("size", "max_image_size")
        edge, side = (setting(image_processor, name, dict).get("longest_edge") for name in names)
        if edge is None:
            return "size of the image processor has no longest_edge; get its file again"
        if side != self.image_step:
            return (
                f"max_image_size.longest_edge is {side}, and vision_config.image_size of config.json is "
                f"{self.image_step}, which has to be the same; get both files again"
            )
        if edge < side:
            return f"size.longest_edge of the image processor is {edge:,}, less than the {side:,} of a tile; correct it"
        setting(image_processor, "do_image_splitting", bool)
        return None

    @classmethod
    def from_hf(cls, hf: Any, **changes: Any) -> "IdeficsConfig":
        """Reads a `transformers.Idefics3Config` or `SmolVLMConfig`; `changes` override fields, such as `remat="full"`.

        Raises:
            UserError: lists every field with a value that this implementation does not support.
        """
        _check_hf_config(hf)
        text = hf.text_config
        fields = dict(
            vision=VisionConfig.of_siglip(hf.vision_config),
            text=DecoderConfig.from_hf(text, head_width=text.head_dim, tie_embeddings=bool(hf.tie_word_embeddings)),
            image_token_id=hf.image_token_id,
            compute_dtype=base.hf_dtype(hf),
            scale=hf.scale_factor,
        )
        return cls(**fields | changes)


@dataclasses.dataclass(frozen=True)
class SmolVLMConfig(IdeficsConfig):
    """Configuration of a SmolVLM model, with `model_type` smolvlm."""


_VISION_HEADS = ("vision_config.num_attention_heads", "vision_config.hidden_size")


def _check_hf_config(hf: Any) -> None:
    family, vision, text, rope = "SmolVLM", hf.vision_config, hf.text_config, dict(hf.text_config.rope_parameters)
    base.check_model_types(family, hf, text_config=("llama",))
    names = (
        "image_size", "patch_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    )  # fmt: skip
    base.check_sizes(
        family,
        scale_factor=hf.scale_factor,
        text_config__head_dim=text.head_dim,
        **{f"vision_config__{name}": getattr(vision, name) for name in names},
        **base.decoder_sizes(text),
    )
    patches = vision.image_size // vision.patch_size
    regular = f"others: transformers gives two of {patches} patches a side one position"
    base.check_supported(
        family,
        [
            (
                vision.patch_size <= vision.image_size,
                "vision_config.patch_size",
                vision.patch_size,
                "at most image_size",
            ),
            (_is_regular(max(patches, 1)), "vision_config.image_size", vision.image_size, regular),
            base.divides(hf.scale_factor, patches, ("scale_factor", "the patches of a side")),
            base.divides(vision.num_attention_heads, vision.hidden_size, _VISION_HEADS),
            base.divides(text.num_key_value_heads, text.num_attention_heads, base.KEY_VALUE_HEADS),
            (text.head_dim % 2 == 0, "text_config.head_dim", text.head_dim, "even numbers"),
            (rope["rope_theta"] > 0, "text_config.rope_parameters.rope_theta", rope["rope_theta"], "positive numbers"),
            (rope["rope_type"] == "default", "text_config.rope_parameters.rope_type", rope["rope_type"], "default"),
            (vision.num_channels == 3, "vision_config.num_channels", vision.num_channels, "3"),
            (vision.hidden_act in ACTIVATIONS, "vision_config.hidden_act", vision.hidden_act, ", ".join(ACTIVATIONS)),
            (text.hidden_act == "silu", "text_config.hidden_act", text.hidden_act, "silu"),
            base.off("text_config.attention_bias", text.attention_bias),
            base.off("text_config.mlp_bias", text.mlp_bias),
        ],
    )


def _is_regular(patches: int) -> bool:
    """Whether each of the patches of a side has a position of its own in transformers.

    transformers looks i / patches up among the boundaries 1 / patches, 2 / patches, ... in float32, which PyTorch
    computes in vectors of several lanes. For some numbers, such as 25, but none of a published model, rounding moves a
    patch below its boundary, on some processors or on all.
    """
    if patches > MOST_PATCHES:
        return False
    step, index = 1 / patches, np.arange(patches - 1)
    fractions = (index + 1).astype(np.float32) * np.float32(step)
    for lanes in (1, 4, 8, 16):
        first = (step + step * (index // lanes * lanes)).astype(np.float32)
        if (fractions < (first.astype(np.float64) + index % lanes * step).astype(np.float32)).any():
            return False
    return True


class Connector(nnx.Module):
    """Joins the features of square cells of patches, and maps them to token embeddings."""

    def __init__(self, config: IdeficsConfig, *, dtype, param_dtype, rngs):
        self.scale = config.scale
        width = config.vision.width * self.scale**2
        self.linear = Linear(width, config.text.width, bias=False, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [b, patches, vision width] to [b, p, text width]."""
        return self.linear(join_cells(x, self.scale))


class Idefics(FixedSizeModel):
    """Idefics3 or SmolVLM: joined SigLIP features of tiles, inserted at their image tokens."""

    @staticmethod
    def build_projector(config: IdeficsConfig, **options: Any) -> Connector:
        """Builds the connector."""
        return Connector(config, **options)


Config, Model = SmolVLMConfig, Idefics

HF_ALIASES, HF_SKIP = (), ()  # names in memory are those of the files, which hold no constant buffers
HF_ARCHITECTURE = "SmolVLMForConditionalGeneration"


def hf_table(config: IdeficsConfig) -> tuple[Row, ...]:
    """Returns the rows of the conversion table, which `conversion` describes."""
    return (
        *vit_rows(config.vision, "model.vision_model"),
        ("model.connector.modality_projection.proj.weight", "projector/linear/kernel", TRANSPOSE),
        *decoder_rows(config.text, "model.text_model", "lm_head.weight"),
    )


# The mesh axis of each axis of a weight.
SHARDING = (
    *conversion.WIDTH_SHARDING,  # the vocabulary of a published model, 49,155 tokens, has odd divisors only
    (r"(vision_tower/blocks/\d+/(attn/[qkv]|mlp/fc1)|projector/linear)/kernel", P("fsdp", "tensor")),
    (r"vision_tower/blocks/\d+/(attn/out|mlp/fc2)/kernel", P("tensor", "fsdp")),
    (r"vision_tower/position_embedding", P("fsdp", "tensor")),
    (r"vision_tower/patch_embedding", P(None, None, None, ("fsdp", "tensor"))),
    (r"vision_tower/.*bias|.*/scale", P()),
)


def published_config(
    vision: Mapping[str, int],
    text: Mapping[str, int],
    *,
    scale: int,
    vocab: int,
    image_token: int,
    dtype: str = "bfloat16",
) -> dict[str, Any]:
    """Returns the fields of a published config.json, of either model type."""
    return dict(
        vision_config=dict(num_channels=3, **vision),
        text_config=dict(model_type="llama", vocab_size=vocab, head_dim=64, rms_norm_eps=1e-5, pad_token_id=2, **text),
        scale_factor=scale,
        image_token_id=image_token,
        tie_word_embeddings=False,
        dtype=dtype,
    )


# Fields of the published config.json files, by size.
BASE_TOWER = dict(
    hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, image_size=512, patch_size=16
)
LARGE_TOWER = dict(
    hidden_size=1152,
    intermediate_size=4304,
    num_hidden_layers=27,
    num_attention_heads=16,
    image_size=384,
    patch_size=14,
)
SMALL = dict(
    hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
    max_position_embeddings=8192, rope_theta=100000.0,
)  # fmt: skip
MIDDLE = dict(
    hidden_size=960, intermediate_size=2560, num_hidden_layers=32, num_attention_heads=15, num_key_value_heads=5,
    max_position_embeddings=8192, rope_theta=100000.0,
)  # fmt: skip
LARGE = dict(
    hidden_size=2048, intermediate_size=8192, num_hidden_layers=24, num_attention_heads=32, num_key_value_heads=32,
)  # fmt: skip
IDS = dict(vocab=49280, image_token=49190)
PRESETS = {
    "v2-256m": ("HuggingFaceTB/SmolVLM2-256M-Video-Instruct", published_config(BASE_TOWER, SMALL, scale=4, **IDS)),
    "v2-500m": (
        "HuggingFaceTB/SmolVLM2-500M-Video-Instruct",
        published_config(BASE_TOWER, MIDDLE, scale=4, dtype="float32", **IDS),
    ),
    "v2-2.2b": (
        "HuggingFaceTB/SmolVLM2-2.2B-Instruct",
        published_config(
            LARGE_TOWER, LARGE | dict(max_position_embeddings=8192, rope_theta=130000.0), scale=3, **IDS
        ),
    ),
}  # fmt: skip
