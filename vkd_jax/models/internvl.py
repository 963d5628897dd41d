"""InternVL3 (Zhu et al., arXiv 2504.10479), as in `transformers.InternVLForConditionalGeneration`; and its conversion.

InternViT on square tiles, a projector that joins square cells of features, a Qwen2 decoder. An image becomes the grid
of tiles whose aspect ratio is nearest to its own, and the whole image in one tile.

Axes: b batch, t token of the vision tower, p token of a tile, d width.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P

from vkd_jax.data.image_settings import setting
from vkd_jax.data.images import TiledImage
from vkd_jax.models import base, clip_vit, conversion
from vkd_jax.models.conversion import Row, decoder_rows, linear_rows, norm_rows
from vkd_jax.models.decoder import DecoderConfig
from vkd_jax.models.fixed_size import FixedSizeModel
from vkd_jax.models.layers import ACTIVATIONS, MLP, LayerNorm, Linear, RMSNorm, attention, join_cells
from vkd_jax.models.tiled import Grid, GridConfig

START, END = "<img>", "</img>"  # fixed in the published tokenizers; config.json does not have them
MAX_PIXELS = 4 * 448 * 448  # of the grid of an image that one asks about or trains on: four tiles, 1,024 tokens
NORMS = ("layer_norm", "rms_norm")
QK_NORM_EPS, PROJECTOR_EPS = 1e-6, 1e-5  # fixed in transformers


@dataclasses.dataclass(frozen=True)
class VisionConfig(clip_vit.VisionConfig):
    """Sizes of an InternViT, and its variant; the default is that of the published 1B, 2B and 8B."""

    activation: str = "gelu"
    norm_eps: float = 1e-6
    pre_norm: bool = False
    patch_bias: bool = True
    post_norm: bool = False
    norm: str = "layer_norm"  # of `NORMS`
    qkv_bias: bool = True
    qk_norm: bool = False  # whether queries and keys are normalized, all heads together


@dataclasses.dataclass(frozen=True)
class InternVLConfig(GridConfig):
    """Configuration of an InternVL model."""

    vision: VisionConfig
    scale: int = 2
    feature_layer: int = -1  # as in transformers: an index into (embeddings, block 0, ..., last block)
    projector_act: str = "gelu"
    markup_tokens: ClassVar[tuple[str, ...]] = (START, END)
    default_max_pixels: ClassVar[int] = MAX_PIXELS
    image_processors: ClassVar[tuple[str, ...]] = ("GotOcr2ImageProcessor",)

    @property
    def used_blocks(self) -> int:
        """Number of vision blocks that feed the projector; later blocks are loaded and exported, never computed."""
        return self.feature_layer if self.feature_layer >= 0 else self.vision.layers + 1 + self.feature_layer

    @property
    def uses_post_norm(self) -> bool:
        """Whether the norm after the last vision block, which published models lack, feeds the projector."""
        return self.vision.post_norm and self.feature_layer == -1

    @property
    def feature_coords(self) -> np.ndarray:
        """Image index 0, row and column of each input token of the projector, without the class token: int32 [p, 3]."""
        return self.vision.patch_coords[1:]

    @property
    def image_processor_options(self) -> dict[str, Any]:
        """Further arguments of the Hugging Face image processor, which `transformers.InternVLProcessor` always sets."""
        return dict(crop_to_patches=True)

    def image_markup(self, token: Callable[[int], str], height: int, width: int) -> str:
        """Returns the text that replaces the placeholder of an image: the image token between its start and end."""
        del height, width
        return f"{START}{token(self.image_token_id)}{END}"

    def extract_images(self, output: Mapping[str, Any]) -> list[TiledImage]:
        """Returns the views of the images in the output of the Hugging Face image processor.

        Raises:
            UserError: the tiles have another size than those of the model.
        """
        sizes = np.asarray(output["image_sizes"]).tolist()
        # The whole image is one more tile, unless it is the only one.
        counts = [max(count - 1, 1) for count in np.asarray(output["num_patches"]).tolist()]
        grids = [nearest_grid(*size, count, self.image_step) for size, count in zip(sizes, counts, strict=True)]
        return self.join_images(output["pixel_values"], grids, "size")

    def pixel_limits(self, image_processor: Any) -> tuple[int, int]:
        """Returns the smallest and largest number of pixels of the grid of an image."""
        least, most = (setting(image_processor, name, int) for name in ("min_patches", "max_patches"))
        return least * self.image_step**2, most * self.image_step**2

    def limit_pixels(self, image_processor: Any, max_pixels: int) -> None:
        """Sets the largest number of tiles of a grid to those that have at most `max_pixels`."""
        image_processor.max_patches = max_pixels // self.image_step**2

    @property
    def processor_fields(self) -> dict[str, Any]:
        """Of processor_config.json: the number of image tokens of a tile."""
        return dict(image_seq_length=len(self.token_coords))

    def image_processor_problem(self, image_processor: Any) -> str | None:
        """Returns which size or number of tiles the model does not support; None if it supports all."""
        size, side = setting(image_processor, "size", dict), self.image_step
        height, width = size.get("height"), size.get("width")
        if (height, width) != (side, side):
            return (
                f"the image processor makes tiles of {height} x {width} pixels (size), and vision_config.image_size of "
                f"config.json is {side} x {side}, which has to be the same; get both files again"
            )
        least, most = (setting(image_processor, name, int) for name in ("min_patches", "max_patches"))
        if 1 <= least <= most:
            return None
        return (
            f"min_patches is {least!r} and max_patches is {most!r}, and an image has at least one tile; get the file "
            "again"
        )

    @classmethod
    def from_hf(cls, hf: Any, **changes: Any) -> "InternVLConfig":
        """Reads a `transformers.InternVLConfig`; `changes` override fields, such as `remat="full"`.

        Raises:
            UserError: lists every field with a value that this implementation does not support.
        """
        _check_hf_config(hf)
        text = hf.text_config
        fields = dict(
            vision=_read_vision(hf.vision_config),
            text=DecoderConfig.from_hf(
                text,
                head_width=text.hidden_size // text.num_attention_heads,
                qkv_bias=True,
                tie_embeddings=bool(hf.tie_word_embeddings),
            ),
            image_token_id=hf.image_token_id,
            compute_dtype=base.hf_dtype(hf),
            scale=round(1 / hf.downsample_ratio),
            feature_layer=hf.vision_feature_layer,
            projector_act=hf.projector_hidden_act,
        )
        return cls(**fields | changes)


def nearest_grid(height: int, width: int, count: int, side: int) -> Grid:
    """Returns the rows and columns of `count` tiles whose aspect ratio is nearest to that of an image.

    Of two equally near grids it is the one with more columns if the image has more than half of the grid's pixels. So
    does transformers, which chooses `count`, too.

    Args:
        height: of the image, in pixels.
        width: of the image, in pixels.
        count: number of tiles of the grid.
        side: side of a tile in pixels.
    """
    grids = [(count // columns, columns) for columns in range(1, count + 1) if count % columns == 0]
    grids = grids[::-1] if height * width > 0.5 * side**2 * count else grids
    return min(grids, key=lambda grid: abs(width / height - grid[1] / grid[0]))


_VISION_HEADS = ("vision_config.num_attention_heads", "vision_config.hidden_size")
_TEXT_HEADS = ("text_config.num_attention_heads", "text_config.hidden_size")


def _check_hf_config(hf: Any) -> None:
    family, vision, text = "InternVL", hf.vision_config, hf.text_config
    base.check_model_types(family, hf, vision_config=("internvl_vision",), text_config=("qwen2",))
    sides = {name: list(getattr(vision, name)) for name in ("image_size", "patch_size")}
    base.check_supported(
        family,
        [
            (len(side) == 2 and side[0] == side[1], f"vision_config.{name}", side, "a square")
            for name, side in sides.items()
        ],
    )
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    base.check_sizes(
        family,
        **{f"vision_config__{name}": side[0] for name, side in sides.items()},
        **{f"vision_config__{name}": getattr(vision, name) for name in names},
        **base.decoder_sizes(text),
    )
    base.check_supported(family, [*_vision_checks(hf, vision), *_text_checks(text)])


def _vision_checks(hf: Any, vision: Any) -> list[tuple[bool, str, Any, str]]:
    image_size, patch_size, layers = vision.image_size[0], vision.patch_size[0], vision.num_hidden_layers
    ratio, layer, activations = hf.downsample_ratio, hf.vision_feature_layer, ", ".join(ACTIVATIONS)
    scale = round(1 / ratio) if ratio in (1, 0.5, 0.25) else 1
    divides = f"numbers of patches a side that {scale} divides, at least {scale}"
    layer_exists = isinstance(layer, int) and -layers - 1 <= layer <= layers
    select = hf.vision_feature_select_strategy
    checks = [
        (patch_size <= image_size, "vision_config.patch_size", patch_size, f"at most the image size, {image_size}"),
        (ratio in (1, 0.5, 0.25), "downsample_ratio", ratio, "1, 0.5, 0.25"),
        (image_size // patch_size % scale == 0, "vision_config.image_size", image_size, divides),
        base.divides(vision.num_attention_heads, vision.hidden_size, _VISION_HEADS),
        base.positive("vision_config.layer_norm_eps", vision.layer_norm_eps),
        base.token_id("image_token_id", hf.image_token_id),
        (vision.num_channels == 3, "vision_config.num_channels", vision.num_channels, "3"),
        (vision.hidden_act in ACTIVATIONS, "vision_config.hidden_act", vision.hidden_act, activations),
        (vision.norm_type in NORMS, "vision_config.norm_type", vision.norm_type, ", ".join(NORMS)),
        (hf.projector_hidden_act in ACTIVATIONS, "projector_hidden_act", hf.projector_hidden_act, activations),
        (layer_exists, "vision_feature_layer", layer, f"one layer, from {-layers - 1} to {layers}"),
        (select == "default", "vision_feature_select_strategy", select, "default"),
    ]
    for name, supported in (("use_absolute_position_embeddings", True), ("use_mask_token", False)):
        value = getattr(vision, name)
        checks.append((value is supported, f"vision_config.{name}", value, f"{supported}"))
    return checks


def _text_checks(text: Any) -> list[tuple[bool, str, Any, str]]:
    rope, layer_types = dict(text.rope_parameters), sorted({*text.layer_types})
    head_width = text.hidden_size // text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or head_width
    return [
        base.divides(text.num_attention_heads, text.hidden_size, _TEXT_HEADS),
        base.divides(text.num_key_value_heads, text.num_attention_heads, base.KEY_VALUE_HEADS),
        (head_width % 2 == 0, "the width of a head of text_config", head_width, "even numbers"),
        (head_dim == head_width, "text_config.head_dim", head_dim, f"{head_width}"),
        base.positive("text_config.rope_parameters.rope_theta", rope["rope_theta"]),
        base.positive("text_config.rms_norm_eps", text.rms_norm_eps),
        # The dynamic one differs from the default beyond max_position_embeddings, where no prompt is read.
        (
            rope["rope_type"] in ("default", "dynamic"),
            "text_config.rope_parameters.rope_type",
            rope["rope_type"],
            "default, dynamic",
        ),
        (text.hidden_act == "silu", "text_config.hidden_act", text.hidden_act, "silu"),
        base.off("text_config.use_sliding_window", text.use_sliding_window),
        (layer_types == ["full_attention"], "text_config.layer_types", layer_types, "full_attention"),
    ]


def _read_vision(vision: Any) -> VisionConfig:
    return VisionConfig.from_hf(
        vision,
        post_norm=not vision.use_mean_pooling,
        norm=vision.norm_type,
        qkv_bias=bool(vision.attention_bias),
        qk_norm=bool(vision.use_qk_norm),
    )


class Attention(nnx.Module):
    """Full self-attention; the norms of queries and keys extend over all heads."""

    def __init__(self, config: VisionConfig, *, dtype, param_dtype, rngs):
        self.heads, d = config.heads, config.width
        options = dict(dtype=dtype, param_dtype=param_dtype)
        self.q, self.k, self.v = (Linear(d, d, bias=config.qkv_bias, rngs=rngs, **options) for _ in range(3))
        self.out = Linear(d, d, bias=True, rngs=rngs, **options)
        self.q_norm, self.k_norm = (
            RMSNorm(d, eps=QK_NORM_EPS, **options) if config.qk_norm else None for _ in range(2)
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [b, t, d] to [b, t, d]."""
        b, t, d = x.shape
        q, k, v = self.q(x), self.k(x), self.v(x)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (y.reshape(b, t, self.heads, -1) for y in (q, k, v))
        return self.out(attention(q, k, v).reshape(b, t, d))


class Block(nnx.Module):
    """Pre-norm transformer block with scaled sublayers (Touvron et al., arXiv 2103.17239).

    `x + attn_scale * attn(norm1(x))`, then `x + mlp_scale * mlp(norm2(x))`.
    """

    def __init__(self, config: VisionConfig, *, dtype, param_dtype, rngs):
        d, self.dtype = config.width, jnp.dtype(dtype)
        options = dict(dtype=dtype, param_dtype=param_dtype)
        norm = LayerNorm if config.norm == "layer_norm" else RMSNorm
        self.norm1, self.norm2 = (norm(d, eps=config.norm_eps, **options) for _ in range(2))
        self.attn = Attention(config, rngs=rngs, **options)
        self.mlp = MLP(d, config.mlp_width, activation=config.activation, rngs=rngs, **options)
        self.attn_scale, self.mlp_scale = (nnx.Param(jnp.full((d,), 0.1, param_dtype)) for _ in range(2))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [b, t, d] to [b, t, d]."""
        x = self._attend(x)
        return x + self.mlp_scale[...].astype(self.dtype) * self.mlp(self.norm2(x))

    def _attend(self, x: jax.Array) -> jax.Array:
        """Computes the first half of the block."""
        return x + self.attn_scale[...].astype(self.dtype) * self.attn(self.norm1(x))

    def neurons(self, x: jax.Array) -> jax.Array:
        """Returns the input of the MLP's last layer: maps [b, t, d] to [b, t, f]."""
        return self.mlp.neurons(self.norm2(self._attend(x)))


class VisionTower(clip_vit.VisionTower):
    """InternViT; class token and position embedding have a leading axis of size 1, as in the files."""

    block_class = Block

    def __init__(self, config: VisionConfig, **options):
        super().__init__(config, **options)
        self.class_embedding = nnx.Param(self.class_embedding.get_value()[None, None])
        self.position_embedding = nnx.Param(self.position_embedding.get_value()[None])


class Projector(nnx.Module):
    """Joins the features of square cells of patches: `fc2(activation(fc1(norm(cells))))`."""

    def __init__(self, config: InternVLConfig, *, dtype, param_dtype, rngs):
        options = dict(dtype=dtype, param_dtype=param_dtype)
        self.scale, self.activation = config.scale, config.projector_act
        width = config.vision.width * self.scale**2
        self.norm = LayerNorm(width, eps=PROJECTOR_EPS, **options)
        self.fc1 = Linear(width, config.text.width, bias=True, rngs=rngs, **options)
        self.fc2 = Linear(config.text.width, config.text.width, bias=True, rngs=rngs, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [b, patches, vision width] to [b, p, text width]."""
        return self.fc2(ACTIVATIONS[self.activation](self.fc1(self.norm(join_cells(x, self.scale)))))


class InternVL(FixedSizeModel):
    """InternVL: joined InternViT features of tiles, inserted at their image tokens."""

    tower_class = VisionTower

    @staticmethod
    def build_projector(config: InternVLConfig, **options: Any) -> Projector:
        """Builds the projector."""
        return Projector(config, **options)


Config, Model = InternVLConfig, InternVL

# The names of the files on the hub, and of those that transformers 4.52 and later write; see `conversion`.
HF_ALIASES = tuple(alias for alias in conversion.PARTS_ALIASES if "vision_model" not in alias[1])
HF_SKIP = ()  # files hold no constant buffers
HF_ARCHITECTURE = "InternVLForConditionalGeneration"

_TOWER, _PROJECTOR = "vision_tower", "multi_modal_projector"
_LAYER, _BLOCK = f"{_TOWER}.encoder.layer.{{i}}", "vision_tower/blocks/{i}"


def hf_table(config: InternVLConfig) -> tuple[Row, ...]:
    """Returns the rows of the conversion table, which `conversion` describes."""
    vision, embeddings = config.vision, f"{_TOWER}.embeddings"
    optional = []
    if vision.qk_norm:
        optional += norm_rows(f"{_LAYER}.attention.q_norm", f"{_BLOCK}/attn/q_norm", bias=False)
        optional += norm_rows(f"{_LAYER}.attention.k_norm", f"{_BLOCK}/attn/k_norm", bias=False)
    if vision.post_norm:
        optional += norm_rows(f"{_TOWER}.layernorm", "vision_tower/post_norm")
    return (
        *optional,
        (f"{embeddings}.cls_token", "vision_tower/class_embedding", None),
        (f"{embeddings}.position_embeddings", "vision_tower/position_embedding", None),
        (f"{embeddings}.patch_embeddings.projection.weight", "vision_tower/patch_embedding", (2, 3, 1, 0)),
        (f"{embeddings}.patch_embeddings.projection.bias", "vision_tower/patch_bias", None),
        *norm_rows(f"{_LAYER}.layernorm_before", f"{_BLOCK}/norm1", bias=vision.norm == "layer_norm"),
        *norm_rows(f"{_LAYER}.layernorm_after", f"{_BLOCK}/norm2", bias=vision.norm == "layer_norm"),
        *(
            row
            for name in "qkv"
            for row in linear_rows(f"{_LAYER}.attention.{name}_proj", f"{_BLOCK}/attn/{name}", bias=vision.qkv_bias)
        ),
        *linear_rows(f"{_LAYER}.attention.projection_layer", f"{_BLOCK}/attn/out"),
        *linear_rows(f"{_LAYER}.mlp.fc1", f"{_BLOCK}/mlp/fc1"),
        *linear_rows(f"{_LAYER}.mlp.fc2", f"{_BLOCK}/mlp/fc2"),
        (f"{_LAYER}.lambda_1", f"{_BLOCK}/attn_scale", None),
        (f"{_LAYER}.lambda_2", f"{_BLOCK}/mlp_scale", None),
        *norm_rows(f"{_PROJECTOR}.layer_norm", "projector/norm"),
        *linear_rows(f"{_PROJECTOR}.linear_1", "projector/fc1"),
        *linear_rows(f"{_PROJECTOR}.linear_2", "projector/fc2"),
        *decoder_rows(config.text, conversion.DECODER_PART, conversion.HEAD_PART),
    )


# The mesh axis of each axis of a weight.
SHARDING = (
    *conversion.WIDTH_SHARDING,  # 4, 8 or 16 devices do not divide 151,674 tokens
    (r"(vision_tower/blocks/\d+/(attn/[qkv]|mlp/fc1)|projector/fc1)/kernel", P("fsdp", "tensor")),
    (r"(vision_tower/blocks/\d+/(attn/out|mlp/fc2)|projector/fc2)/kernel", P("tensor", "fsdp")),
    (r".*bias|.*[/_]scale|vision_tower/\w+_embedding", P()),
)


def _published_config(*, width: int, mlp_width: int, layers: int, heads: int, kv_heads: int) -> dict[str, Any]:
    """Returns the fields of a published config.json."""
    vision = dict(
        model_type="internvl_vision",
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        attention_bias=True,
        image_size=[448, 448],
        patch_size=[14, 14],
    )
    text = dict(
        model_type="qwen2",
        vocab_size=151674,
        hidden_size=width,
        intermediate_size=mlp_width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=32768,
        max_window_layers=70,
        rope_theta=1e6,
        rope_scaling=dict(factor=2.0, rope_type="dynamic", type="dynamic"),
        tie_word_embeddings=False,
        bos_token_id=151643,
        eos_token_id=151645,
    )
    return dict(
        vision_config=vision,
        text_config=text,
        image_token_id=151667,
        image_seq_length=256,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )


_SIZES = {
    "1b": _published_config(width=896, mlp_width=4864, layers=24, heads=14, kv_heads=2),
    "2b": _published_config(width=1536, mlp_width=8960, layers=28, heads=12, kv_heads=2),
    "8b": _published_config(width=3584, mlp_width=18944, layers=28, heads=28, kv_heads=4),
}
PRESETS = {size: (f"OpenGVLab/InternVL3-{size.upper()}-hf", fields) for size, fields in _SIZES.items()}
