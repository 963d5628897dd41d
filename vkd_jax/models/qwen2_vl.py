"""Qwen2-VL (Wang et al., arXiv 2409.12191): images of any size, M-RoPE, a Qwen2 decoder; and its conversion.

Qwen2.5-VL and Qwen3-VL share the base class of the configuration, the model, and most rows of the conversion.

Axes: b batch, t position, p patch slot, q slot of a merged token, k values of a patch, d width.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from vkd_jax.data.image_settings import setting
from vkd_jax.data.processor import MAX_PIXELS
from vkd_jax.models import base, qwen_vit
from vkd_jax.models.base import ModelConfig, VisionLanguageModel, VisualTokens
from vkd_jax.models.conversion import DECODER_SHARDING, Row, decoder_rows, linear_rows, norm_rows
from vkd_jax.models.decoder import DecoderConfig, Embedded
from vkd_jax.models.layers import ACTIVATIONS, shard_batch
from vkd_jax.models.qwen_vit import Merger, VisionConfig, VisionTower
from vkd_jax.types import UserError


@dataclasses.dataclass(frozen=True)
class QwenConfig(ModelConfig):
    """Configuration of a Qwen2-VL, Qwen2.5-VL or Qwen3-VL model."""

    vision: VisionConfig
    default_max_pixels: ClassVar[int] = MAX_PIXELS
    edges_are_areas: ClassVar[bool] = True
    template_frame: ClassVar[tuple[str, str]] = ("<|vision_start|>", "<|vision_end|>")
    image_processors: ClassVar[tuple[str, ...]] = ("Qwen2VLImageProcessor",)

    @property
    def image_step(self) -> int:
        """The sides of an image are multiples of this many pixels."""
        return self.vision.patch_size * self.vision.merge

    def image_tokens(self, height: int, width: int) -> int:
        """Returns the number of image tokens of an image that the image processor resized to this size."""
        return (height // self.image_step) * (width // self.image_step)

    def image_processor_problem(self, image_processor: Any) -> str | None:
        """Returns whether the image processor makes other patches than the vision tower takes; None if not."""
        vision = self.vision
        if not setting(image_processor, "do_resize", bool):
            return (
                "do_resize of the image processor is False, and sides of images have to be multiples of "
                f"{self.image_step} pixels; set it to true"
            )
        sizes = dict(patch_size=vision.patch_size, merge_size=vision.merge, temporal_patch_size=vision.frames)
        for name, size in sizes.items():
            if (actual := setting(image_processor, name, int)) != size:
                return f"{name} of the image processor is {actual!r}, and config.json has {size}; get its files again"
        largest, least = setting(image_processor, "size", dict).get("longest_edge"), self.image_step**2
        if type(largest) is not int:
            return "size of the image processor has no longest_edge; get its file again"
        if largest < least:
            return f"size.longest_edge of the image processor is {largest:,}, and one image token has {least:,} pixels"
        return None

    def extract_images(self, output: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Returns the images [H, W, 3] in the output of the Hugging Face image processor, which are patches."""
        vision, images, start = self.vision, [], 0
        for _, rows, columns in np.asarray(output["image_grid_thw"]).tolist():
            patches = np.asarray(output["pixel_values"][start : start + rows * columns], np.float32)
            patches = patches.reshape(rows * columns, 3, vision.frames, -1)[:, :, 0]  # all frames are equal
            coords = qwen_vit.patch_coords(rows, columns, vision.merge)
            images.append(qwen_vit.unpatchify(patches, coords, vision.patch_size))
            start += rows * columns
        return images

    def pack(self, rows: Sequence[Sequence[np.ndarray]], min_tokens: int = 0) -> dict[str, np.ndarray]:
        """Packs the images of each prompt, [H, W, 3] each, one after another into the slots of its row.

        Args:
            rows: the images of each prompt.
            min_tokens: least number of image tokens to allocate slots for, so that several calls give one shape.

        Returns:
            {"patches": float32 [b, p, k], "patch_coords": int32 [b, p, 3]}: the image index, row and column of each
            patch, -1 at padding. p is one of a few sizes, see `qwen_vit.slot_count`.

        Raises:
            UserError: an image is not a whole number of tokens high and wide.
        """
        p, merge = self.vision.patch_size, self.vision.merge
        for height, width in {x.shape[:2] for row in rows for x in row}:
            if height % (p * merge) or width % (p * merge) or not height * width:
                raise UserError(
                    f"An image of {height} x {width} pixels cannot be divided into tokens of {p * merge} x {p * merge} "
                    "pixels. Resize it with the image processor of the model."
                )
        patchified = [[qwen_vit.patchify(x, p, merge) for x in row] for row in rows]
        longest = max((sum(len(patches) for patches, _ in row) for row in patchified), default=0)
        count = qwen_vit.slot_count(max(longest, min_tokens * merge**2), merge)
        packed = {
            "patches": np.zeros((len(rows), count, 3 * p * p), np.float32),
            "patch_coords": np.full((len(rows), count, 3), -1, np.int32),
        }
        for i, row in enumerate(patchified):
            start = 0
            for image, (patches, coords) in enumerate(row):
                slots = slice(start, start + len(patches))
                packed["patches"][i, slots] = patches
                packed["patch_coords"][i, slots, 0], packed["patch_coords"][i, slots, 1:] = image, coords
                start = slots.stop
        return packed


_TEXT_HEADS = ("text_config.num_attention_heads", "text_config.hidden_size")


def check_sizes(family: str, hf: Any, *widths: str) -> None:
    """Checks the sizes of a configuration of a Qwen family; `widths` are those fields of the tower that differ."""
    names = ("depth", "num_heads", "patch_size", "temporal_patch_size", "spatial_merge_size", *widths)
    tower = {f"vision_config__{name}": getattr(hf.vision_config, name) for name in names}
    base.check_sizes(family, **tower, **base.decoder_sizes(hf.text_config))


def common_checks(hf: Any, vision_width: int, merged_width: int) -> list[tuple[bool, str, Any, str]]:
    """Returns the checks of a configuration that Qwen2-VL and Qwen2.5-VL make, for `check_supported`."""
    text, layer_types = hf.text_config, sorted({*hf.text_config.layer_types})
    head_width = text.hidden_size // text.num_attention_heads
    return [
        *shared_checks(hf, vision_width, merged_width, head_width, _mrope_section(hf)),
        base.divides(text.num_attention_heads, text.hidden_size, _TEXT_HEADS),
        base.off("text_config.use_sliding_window", text.use_sliding_window),
        (layer_types == ["full_attention"], "text_config.layer_types", layer_types, "full_attention"),
    ]


def shared_checks(
    hf: Any, vision_width: int, merged_width: int, head_width: int, mrope_section: tuple[int, ...]
) -> list[tuple[bool, str, Any, str]]:
    """Returns the checks of a configuration that all Qwen families make, for `check_supported`."""
    vision, text, rope = hf.vision_config, hf.text_config, dict(hf.text_config.rope_parameters)
    heads = vision.num_heads
    heads_supported = f"divisors of the width, {vision_width}, that leave a multiple of 4"
    vision_rope = _vision_rope(vision)["rope_type"]
    sizes_fit = [type(size) for size in mrope_section] == [int] * 3 and min(mrope_section) > 0
    section_fits = sizes_fit and 2 * sum(mrope_section) == head_width
    return [
        (vision.in_channels == 3, "vision_config.in_channels", vision.in_channels, "3"),
        (vision_width % (4 * heads) == 0, "vision_config.num_heads", heads, heads_supported),
        (vision_rope == "axial", "vision_config.rope_parameters.rope_type", vision_rope, "axial"),
        (merged_width == text.hidden_size, "the width of merged patches", merged_width, f"{text.hidden_size}"),
        (text.hidden_act == "silu", "text_config.hidden_act", text.hidden_act, "silu"),
        (rope["rope_type"] == "default", "text_config.rope_parameters.rope_type", rope["rope_type"], "default"),
        base.divides(text.num_key_value_heads, text.num_attention_heads, base.KEY_VALUE_HEADS),
        base.positive("text_config.rope_parameters.rope_theta", rope["rope_theta"]),
        base.positive("text_config.rms_norm_eps", text.rms_norm_eps),
        base.token_id("image_token_id", hf.image_token_id),
        (section_fits, "mrope_section", mrope_section, "three positive numbers that add up to half the head width"),
    ]


def common_fields(hf: Any) -> dict[str, Any]:
    """Reads the fields of a configuration of Qwen2-VL and Qwen2.5-VL beside the vision tower."""
    text = hf.text_config
    head_width = text.hidden_size // text.num_attention_heads
    return shared_fields(hf, head_width=head_width, mrope_section=_mrope_section(hf), qkv_bias=True)


def shared_fields(hf: Any, **decoder: Any) -> dict[str, Any]:
    """Reads the fields of a configuration that all Qwen families have; `decoder` are those of `DecoderConfig`."""
    return dict(
        text=DecoderConfig.from_hf(hf.text_config, tie_embeddings=bool(hf.tie_word_embeddings), **decoder),
        image_token_id=hf.image_token_id,
        compute_dtype=base.hf_dtype(hf),
    )


def common_vision_fields(vision: Any) -> dict[str, Any]:
    """Reads the fields of a vision tower that all Qwen families have."""
    return dict(
        layers=vision.depth,
        heads=vision.num_heads,
        patch_size=vision.patch_size,
        frames=vision.temporal_patch_size,
        merge=vision.spatial_merge_size,
        rope_theta=float(_vision_rope(vision)["rope_theta"]),
    )


def _mrope_section(hf: Any) -> tuple[int, ...]:
    return tuple(dict(hf.text_config.rope_parameters).get("mrope_section", (16, 24, 24)))  # transformers' default


def _vision_rope(vision: Any) -> dict[str, Any]:
    # Before transformers 5 the configuration had no field for these constants.
    return dict(getattr(vision, "rope_parameters", None) or dict(rope_type="axial", rope_theta=10000.0))


@dataclasses.dataclass(frozen=True)
class Qwen2VLConfig(QwenConfig):
    """Configuration of a Qwen2-VL model."""

    @classmethod
    def from_hf(cls, hf: Any, **changes: Any) -> "Qwen2VLConfig":
        """Reads a `transformers.Qwen2VLConfig`; `changes` override fields, such as `remat="full"`.

        Raises:
            UserError: lists every field with a value that this implementation does not support.
        """
        # The published config.json has the name of the whole model in its vision_config, which transformers before
        # 5.20 does not replace.
        vision_types = ("qwen2_vl_vision", "qwen2_vl")
        base.check_model_types("Qwen2-VL", hf, vision_config=vision_types, text_config=("qwen2_vl_text",))
        check_sizes("Qwen2-VL", hf, "embed_dim", "hidden_size")
        vision, act = hf.vision_config, hf.vision_config.hidden_act
        activation_check = (act in ACTIVATIONS, "vision_config.hidden_act", act, ", ".join(ACTIVATIONS))
        mlp_check = (vision.mlp_ratio * vision.embed_dim >= 1, "vision_config.mlp_ratio", vision.mlp_ratio, "1 or more")
        checks = common_checks(hf, vision.embed_dim, vision.hidden_size)
        base.check_supported("Qwen2-VL", [activation_check, mlp_check, *checks])
        tower = VisionConfig(
            width=vision.embed_dim,
            mlp_width=int(vision.embed_dim * vision.mlp_ratio),
            activation=act,
            **common_vision_fields(vision),
        )
        return cls(**dict(vision=tower, **common_fields(hf)) | changes)


class QwenVL(VisionLanguageModel):
    """A Qwen model: features of images of any size, merged and inserted at their image tokens."""

    tower_class = VisionTower

    @staticmethod
    def build_projector(config: QwenConfig, **options: Any) -> Merger:
        """Builds the patch merger."""
        return Merger(config.vision, config.text.width, **options)

    def encode(
        self, images: Mapping[str, jax.Array], *, earlier: Mapping[str, jax.Array] | None = None
    ) -> tuple[VisualTokens, dict[str, VisualTokens]]:
        """Maps images, or cached activations, to the features that replace the image tokens of a prompt.

        Args:
            images: from `QwenConfig.pack`; with `earlier`, only "patch_coords" is needed.
            earlier: as in `VisionLanguageModel.encode`.

        Returns:
            The features, and the taps by name: "vision/0" ... (the output of each computed block), "features" (the
            input of the projector) and "projector" (its output, which is the features). They are zero at padding.
        """
        coords, (hidden, start) = images["patch_coords"], base.continue_from(earlier)
        if hidden is None:
            hidden = self.vision_tower.embed(images["patches"], coords)
        outputs = self.vision_tower(hidden, coords, start)
        computed = {f"vision/{i}": output for i, output in enumerate(outputs, start)}
        taps = {name: _tokens(output, coords) for name, output in computed.items()}
        features, computed = (outputs or [hidden])[-1], {**(earlier or {}), **computed}
        taps["features"] = _tokens(features, coords)
        with jax.named_scope("projector"):
            deepstack = [computed[f"vision/{i}"] for i in self.config.vision.deepstack_blocks]
            projected = shard_batch(self.projector(features, *deepstack), self.config.mesh)
        taps["projector"] = _tokens(projected, qwen_vit.token_coords(coords, self.config.vision.merge))
        return taps["projector"], taps

    def vision_neurons(
        self, images: Mapping[str, jax.Array], reduce: Callable[[jax.Array, jax.Array], Any]
    ) -> list[Any]:
        """Applies `reduce` to the inner MLP activations of each block; padding slots are not real."""
        coords = images["patch_coords"]
        hidden = self.vision_tower.embed(images["patches"], coords)
        return self.vision_tower.neurons(hidden, coords, lambda z: reduce(z, coords[..., 0] >= 0))

    def embed(self, tokens: jax.Array, mask: jax.Array, features: VisualTokens | None) -> Embedded:
        """Embeds tokens and inserts image features; the positions are those of M-RoPE."""
        if features is None:
            return super().embed(tokens, mask, None)
        x, is_image = self.insert(tokens, features)
        return Embedded(x, mrope_positions(is_image, mask, features.coords))


def _tokens(values: jax.Array, coords: jax.Array) -> VisualTokens:
    return VisualTokens(jnp.where(coords[..., :1] >= 0, values, 0), coords)


def mrope_positions(is_image: jax.Array, mask: jax.Array, coords: jax.Array) -> jax.Array:
    """Returns the M-RoPE positions of tokens in time, row and column.

    A text token is at the position after the previous token, on every axis. The tokens of an image that starts at n are
    at n + (0, row, column), and the token after the image is at n + max(rows, columns).

    Args:
        is_image: bool [b, t]; a row's j-th image token stands for its j-th feature.
        mask: bool [b, t], False at padding.
        coords: int [b, q, 3], the image index, row and column of each feature.

    Returns:
        int [b, t, 3]; 0 at padding.
    """
    feature_index = jnp.clip(jnp.cumsum(is_image, axis=1) - 1, 0, coords.shape[1] - 1)
    token_coords = jnp.take_along_axis(coords, feature_index[..., None], axis=1)
    # The last token of an image has its last row and column, so it advances the position for the whole image.
    is_last = coords[..., 0] != jnp.pad(coords[:, 1:, 0], ((0, 0), (0, 1)), constant_values=-1)
    is_last = jnp.take_along_axis(is_last, feature_index, axis=1)
    step = jnp.where(is_image, jnp.where(is_last, token_coords[..., 1:].max(-1) + 1, 0), 1) * mask
    offset = jnp.where(is_image[..., None], token_coords.at[..., 0].set(0), 0)
    return jnp.where(mask[..., None], (jnp.cumsum(step, axis=1) - step)[..., None] + offset, 0)


Config, Model = Qwen2VLConfig, QwenVL

# Conversion. The aliases map names in memory to those in files, on which the Hub and transformers 5 agree ...
HF_ALIASES = (
    (r"^model\.visual\.", "visual."),
    (r"^model\.language_model\.", "model."),
)
HF_SKIP = ()  # files hold no constant buffers
HF_ARCHITECTURE = "Qwen2VLForConditionalGeneration"

# ... and `conversion` describes the rows.
_LAYER, _BLOCK = "visual.blocks.{i}", "vision_tower/blocks/{i}"
_VISION_ROWS = (
    *norm_rows(f"{_LAYER}.norm1", f"{_BLOCK}/norm1"),
    *norm_rows(f"{_LAYER}.norm2", f"{_BLOCK}/norm2"),
    *linear_rows(f"{_LAYER}.mlp.fc1", f"{_BLOCK}/mlp/fc1"),
    *linear_rows(f"{_LAYER}.mlp.fc2", f"{_BLOCK}/mlp/fc2"),
    *norm_rows("visual.merger.ln_q", "projector/norm"),
)


def common_rows(config: QwenConfig) -> tuple[Row, ...]:
    """Returns the rows of the conversion table that Qwen2-VL and Qwen2.5-VL have."""
    return (
        ("visual.patch_embed.proj.weight", "vision_tower/patch_embedding", (2, 1, 3, 4, 0)),
        *linear_rows(f"{_LAYER}.attn.qkv", f"{_BLOCK}/attn/qkv"),
        *linear_rows(f"{_LAYER}.attn.proj", f"{_BLOCK}/attn/out"),
        *linear_rows("visual.merger.mlp.0", "projector/fc1"),
        *linear_rows("visual.merger.mlp.2", "projector/fc2"),
        *decoder_rows(config.text, "model", "lm_head.weight"),
    )


def hf_table(config: QwenConfig) -> tuple[Row, ...]:
    """Returns the rows of the conversion table, which `conversion` describes."""
    return (*common_rows(config), *_VISION_ROWS)


# The mesh axis of each axis of a weight.
SHARDING = (
    *DECODER_SHARDING,
    (r"(vision_tower/blocks/\d+/(attn/qkv|mlp/fc1)|projector/fc1)/kernel", P("fsdp", "tensor")),
    (r"(vision_tower/blocks/\d+/(attn/out|mlp/fc2)|projector/fc2)/kernel", P("tensor", "fsdp")),
    (r".*/(bias|scale)|vision_tower/patch_embedding", P()),
)


def published_config(
    vision_config: dict[str, Any],
    *,
    vocab: int,
    width: int,
    mlp_width: int,
    layers: int,
    heads: int,
    kv_heads: int,
    max_positions: int,
    tied: bool,
) -> dict[str, Any]:
    """Returns the fields of a published config.json of either family."""
    return dict(
        vision_config=vision_config,
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=mlp_width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=max_positions,
        tie_word_embeddings=tied,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        rope_scaling=dict(type="mrope", mrope_section=[16, 24, 24]),
        image_token_id=151655,
        bos_token_id=151643,
        eos_token_id=151645,
        dtype="bfloat16",
    )


_VISION = dict(
    depth=32,
    embed_dim=1280,
    mlp_ratio=4,
    num_heads=16,
    in_channels=3,
    patch_size=14,
    spatial_merge_size=2,
    temporal_patch_size=2,
)
_SMALL = published_config(
    dict(**_VISION, hidden_size=1536), vocab=151936, width=1536, mlp_width=8960, layers=28, heads=12,
    kv_heads=2, max_positions=32768, tied=True
)  # fmt: skip
_LARGE = published_config(
    dict(**_VISION, hidden_size=3584), vocab=152064, width=3584, mlp_width=18944, layers=28, heads=28,
    kv_heads=4, max_positions=32768, tied=False
)  # fmt: skip
PRESETS = {"2b": ("Qwen/Qwen2-VL-2B-Instruct", _SMALL), "7b": ("Qwen/Qwen2-VL-7B-Instruct", _LARGE)}
