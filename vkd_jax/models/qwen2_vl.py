"""Qwen2-VL (Wang et al., arXiv 2409.12191): pictures of any size, M-RoPE, a Qwen2 decoder; and its conversion.

The configuration's base class, the model and the rows of its decoder serve Qwen2.5-VL as well.

Axes: b batch, t position, s key slot, p patch slot, q slot of a merged token, k values of a patch, a asked position,
d width, v vocabulary.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from vkd_jax.models import qwen_vit
from vkd_jax.models.base import VisionLanguageModel, VisualTokens, check_supported
from vkd_jax.models.decoder import DecoderConfig
from vkd_jax.models.layers import ACTIVATIONS, insert_features, shard_batch
from vkd_jax.models.qwen_vit import Merger, VisionConfig, VisionTower
from vkd_jax.types import UserError


@dataclasses.dataclass(frozen=True)
class QwenConfig:
    """A Qwen-VL of either family: its two towers, and how it is computed."""

    vision: VisionConfig
    text: DecoderConfig
    image_token_id: int
    compute_dtype: str = "float32"  # parameters have their own
    remat: str = ""  # what the backward pass computes again instead of keeping it: a key of `layers.REMAT`
    mesh: Mesh | None = None  # over whose devices the rows of activations lie

    @property
    def used_blocks(self) -> int:
        """How many vision blocks feed the projector: all."""
        return self.vision.layers

    def image_tokens(self, height: int, width: int) -> int:
        """How many image tokens a prompt needs for a picture of this size, once the image processor resized it."""
        side = self.vision.patch_size * self.vision.merge
        return (height // side) * (width // side)

    def images(self, output: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """The pictures [H, W, 3] in what the Hugging Face image processor returned: patches, each frame the same."""
        vision, pictures, start = self.vision, [], 0
        for _, rows, columns in np.asarray(output["image_grid_thw"]).tolist():
            patches = np.asarray(output["pixel_values"][start : start + rows * columns], np.float32)
            patches = patches.reshape(rows * columns, 3, vision.frames, -1)[:, :, 0]
            where = qwen_vit.patch_coords(rows, columns, vision.merge)
            pictures.append(qwen_vit.unpatchify(patches, where, vision.patch_size))
            start += rows * columns
        return pictures

    def pack(self, rows: Sequence[Sequence[np.ndarray]], tokens: int = 0) -> dict[str, np.ndarray]:
        """The pictures of each prompt, [H, W, 3] each, one after another in as many slots as the longest row needs.

        Args:
            rows: the pictures.
            tokens: room for at least so many image tokens, so that several calls give one shape.

        Returns:
            {"patches": float32 [b, p, k], "patch_coords": int32 [b, p, 3]}: the image, row and column of each patch,
            -1 at padding. p is one of a few sizes, see `qwen_vit.slot_count`.

        Raises:
            UserError: a picture cannot be cut into whole tokens.
        """
        p, merge = self.vision.patch_size, self.vision.merge
        for height, width in {x.shape[:2] for row in rows for x in row}:
            if height % (p * merge) or width % (p * merge) or not height * width:
                raise UserError(
                    f"A picture of {height} x {width} pixels cannot be cut into tokens of {p * merge} x {p * merge}; "
                    "let the model's image processor resize it."
                )
        cut = [[qwen_vit.patchify(x, p, merge) for x in row] for row in rows]
        longest = max((sum(len(patches) for patches, _ in row) for row in cut), default=0)
        count = qwen_vit.slot_count(max(longest, tokens * merge**2), merge)
        packed = {
            "patches": np.zeros((len(rows), count, 3 * p * p), np.float32),
            "patch_coords": np.full((len(rows), count, 3), -1, np.int32),
        }
        for i, row in enumerate(cut):
            start = 0
            for picture, (patches, where) in enumerate(row):
                at = slice(start, start + len(patches))
                packed["patches"][i, at] = patches
                packed["patch_coords"][i, at, 0], packed["patch_coords"][i, at, 1:] = picture, where
                start = at.stop
        return packed


def check_model_types(family: str, hf: Any, model_type: str) -> None:
    """Refuses other towers; goes first, because another kind of tower may not even have the fields that count."""
    kinds = ((f"{part}_config", f"{model_type}_{part}") for part in ("vision", "text"))
    check_supported(
        family,
        [(getattr(hf, c).model_type == kind, f"{c}.model_type", getattr(hf, c).model_type, kind) for c, kind in kinds],
    )


def common_checks(hf: Any, vision_width: int, merged_width: int) -> list[tuple[bool, str, Any, str]]:
    """What both families ask of a configuration, for `check_supported`."""
    vision, text, rope = hf.vision_config, hf.text_config, dict(hf.text_config.rope_parameters)
    vision_rope = _vision_rope(vision)
    section = _section(rope)
    fits = len(section) == 3 and 2 * sum(section) == text.hidden_size // text.num_attention_heads
    heads, kinds = vision.num_heads, sorted({*text.layer_types})
    return [
        (vision.in_channels == 3, "vision_config.in_channels", vision.in_channels, "3"),
        (isinstance(vision.patch_size, int), "vision_config.patch_size", vision.patch_size, "one number"),
        (
            isinstance(vision.temporal_patch_size, int),
            "vision_config.temporal_patch_size",
            vision.temporal_patch_size,
            "one number",
        ),
        (
            vision_width % (4 * heads) == 0,
            "vision_config.num_heads",
            heads,
            f"divisors of the width, {vision_width}, that leave a multiple of 4",
        ),
        (
            vision_rope["rope_type"] == "axial",
            "vision_config.rope_parameters",
            vision_rope,
            "rope_type axial",
        ),
        (merged_width == text.hidden_size, "the width of merged patches", merged_width, f"{text.hidden_size}"),
        (text.hidden_act == "silu", "text_config.hidden_act", text.hidden_act, "silu"),
        (rope["rope_type"] == "default", "text_config.rope_parameters", rope, "rope_type default"),
        (fits, "mrope_section", section, "three numbers that add up to half the head width"),
        (not text.use_sliding_window, "text_config.use_sliding_window", text.use_sliding_window, "False"),
        (kinds == ["full_attention"], "text_config.layer_types", kinds, "full_attention"),
    ]


def shared_fields(hf: Any) -> dict[str, Any]:
    """The fields of a configuration that both families read in the same way."""
    text, rope = hf.text_config, dict(hf.text_config.rope_parameters)
    return dict(
        text=DecoderConfig(
            vocab=text.vocab_size,
            width=text.hidden_size,
            layers=text.num_hidden_layers,
            heads=text.num_attention_heads,
            kv_heads=text.num_key_value_heads,
            head_width=text.hidden_size // text.num_attention_heads,
            mlp_width=text.intermediate_size,
            norm_eps=text.rms_norm_eps,
            rope_theta=float(rope["rope_theta"]),
            mrope_section=_section(rope),
            qkv_bias=True,
            tie_embeddings=bool(hf.tie_word_embeddings),
            max_positions=text.max_position_embeddings,
        ),
        image_token_id=hf.image_token_id,
        compute_dtype=str(hf.dtype or "float32").removeprefix("torch."),
    )


def shared_vision_fields(vision: Any) -> dict[str, Any]:
    """The fields of a vision tower that both families read in the same way."""
    return dict(
        layers=vision.depth,
        heads=vision.num_heads,
        patch_size=vision.patch_size,
        frames=vision.temporal_patch_size,
        merge=vision.spatial_merge_size,
        rope_theta=float(_vision_rope(vision)["rope_theta"]),
    )


def _section(rope: Mapping[str, Any]) -> tuple[int, ...]:
    return tuple(rope.get("mrope_section", (16, 24, 24)))  # what transformers takes without one


def _vision_rope(vision: Any) -> dict[str, Any]:
    # Fixed, until transformers 5 put it into the configuration.
    return dict(getattr(vision, "rope_parameters", None) or dict(rope_type="axial", rope_theta=10000.0))


@dataclasses.dataclass(frozen=True)
class Qwen2VLConfig(QwenConfig):
    """A Qwen2-VL."""

    @classmethod
    def from_hf(cls, hf: Any, **changes: Any) -> "Qwen2VLConfig":
        """Reads a `transformers.Qwen2VLConfig`; `changes` are fields to set otherwise (`remat="full"`).

        Raises:
            UserError: the configuration asks for what this implementation does not compute; all is listed.
        """
        check_model_types("Qwen2-VL", hf, "qwen2_vl")
        vision, act = hf.vision_config, hf.vision_config.hidden_act
        known = (act in ACTIVATIONS, "vision_config.hidden_act", act, ", ".join(ACTIVATIONS))
        check_supported("Qwen2-VL", [known, *common_checks(hf, vision.embed_dim, vision.hidden_size)])
        tower = VisionConfig(
            width=vision.embed_dim,
            mlp_width=int(vision.embed_dim * vision.mlp_ratio),
            activation=act,
            **shared_vision_fields(vision),
        )
        return cls(**dict(vision=tower, **shared_fields(hf)) | changes)


class QwenVL(VisionLanguageModel):
    """Qwen2-VL or Qwen2.5-VL."""

    tower_class = VisionTower

    @staticmethod
    def build_projector(config: QwenConfig, **options: Any) -> Merger:
        """Builds the patch merger."""
        return Merger(config.vision, config.text.width, **options)

    def encode(
        self, pictures: Mapping[str, jax.Array], *, hidden: jax.Array | None = None, start: int = 0
    ) -> tuple[VisualTokens, dict[str, VisualTokens]]:
        """Turns pictures, or cached activations, into the embeddings that stand for the pictures in a prompt.

        Args:
            pictures: from `QwenConfig.pack`; with `hidden`, "where" is enough.
            hidden: instead of patches, the activations entering block `start`: tap "vision/{start - 1}".
            start: the first block to compute.

        Returns:
            Features, and the taps: "vision/0" ... (each computed block's output), "features" (what feeds the
            projector) and "projector" (its output, the features again). At padding all are zero.
        """
        if hidden is None and start:
            raise ValueError("encode takes pictures, or hidden activations with the block they enter.")
        where = pictures["patch_coords"]
        if hidden is None:
            hidden = self.vision_tower.embed(pictures["patches"])
        outputs = self.vision_tower(hidden, where, start)
        taps = {f"vision/{i}": _tokens(output, where) for i, output in enumerate(outputs, start)}
        features = (outputs or [hidden])[-1]
        taps["features"] = _tokens(features, where)
        with jax.named_scope("projector"):
            projected = shard_batch(self.projector(features), self.config.mesh)
        taps["projector"] = _tokens(projected, qwen_vit.token_coords(where, self.config.vision.merge))
        return taps["projector"], taps

    def vision_neurons(
        self, images: Mapping[str, jax.Array], reduce: Callable[[jax.Array, jax.Array], Any]
    ) -> list[Any]:
        """Reduces the inner MLP activations of each block; padding slots are not real."""
        patch_coords = images["patch_coords"]
        hidden = self.vision_tower.embed(images["patches"])
        return self.vision_tower.neurons(hidden, patch_coords, lambda z: reduce(z, patch_coords[..., 0] >= 0))

    def embed(self, tokens: jax.Array, mask: jax.Array, features: VisualTokens | None) -> tuple[jax.Array, jax.Array]:
        """Embedded tokens [b, t, d], the pictures' features among them, and their positions."""
        x = self.language_model.embed(tokens)
        if features is None:
            return x, jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
        is_image = tokens == self.config.image_token_id
        # One beyond the last feature, as a model might generate it, is text.
        is_image &= jnp.cumsum(is_image, axis=1) <= features.valid.sum(1, keepdims=True)
        return insert_features(x, is_image, features.values), mrope_positions(is_image, mask, features.coords)


def _tokens(values: jax.Array, where: jax.Array) -> VisualTokens:
    return VisualTokens(jnp.where(where[..., :1] >= 0, values, 0), where)


def mrope_positions(is_image: jax.Array, mask: jax.Array, where: jax.Array) -> jax.Array:
    """Positions in time, row and column.

    A text token stands one behind the one before it, on every axis. The tokens of a picture that starts at n stand at
    n + (0, row, column), and what follows the picture goes on at n + max(rows, columns).

    Args:
        is_image: bool [b, t]; a row's j-th image token stands for its j-th feature.
        mask: bool [b, t], False at padding.
        where: int [b, q, 3], picture, row and column of each feature.

    Returns:
        int [b, t, 3]; 0 at padding.
    """
    which = jnp.clip(jnp.cumsum(is_image, axis=1) - 1, 0, where.shape[1] - 1)
    spot = jnp.take_along_axis(where, which[..., None], axis=1)
    # The last token of a picture is its last row's and column's, and moves on for the whole picture.
    last = where[..., 0] != jnp.pad(where[:, 1:, 0], ((0, 0), (0, 1)), constant_values=-1)
    last = jnp.take_along_axis(last, which, axis=1)
    step = jnp.where(is_image, jnp.where(last, spot[..., 1:].max(-1) + 1, 0), 1) * mask
    offset = jnp.where(is_image[..., None], spot.at[..., 0].set(0), 0)
    return jnp.where(mask[..., None], (jnp.cumsum(step, axis=1) - step)[..., None] + offset, 0)


Config, Model = Qwen2VLConfig, QwenVL

# Conversion. Names in memory are brought to those in files, which the Hub and transformers 5 agree on ...
HF_ALIASES = (
    (r"^model\.visual\.", "visual."),
    (r"^model\.language_model\.", "model."),
)
HF_SKIP = ()  # no version saved anything that is not learned
HF_ARCHITECTURE = "Qwen2VLForConditionalGeneration"

_T = (1, 0)  # torch keeps linear kernels as [out, in]
# ... and each row is a family of tensors: their name, our path, the permutation of the axes. An {i} that only
# the name has is the position on the parameter's leading, stacked axis.
VISION_ROWS = (
    ("visual.patch_embed.proj.weight", "vision_tower/patch_embedding", (2, 1, 3, 4, 0)),
    ("visual.blocks.{i}.norm1.weight", "vision_tower/blocks/{i}/norm1/scale", None),
    ("visual.blocks.{i}.norm2.weight", "vision_tower/blocks/{i}/norm2/scale", None),
    ("visual.blocks.{i}.attn.qkv.weight", "vision_tower/blocks/{i}/attn/qkv/kernel", _T),
    ("visual.blocks.{i}.attn.qkv.bias", "vision_tower/blocks/{i}/attn/qkv/bias", None),
    ("visual.blocks.{i}.attn.proj.weight", "vision_tower/blocks/{i}/attn/out/kernel", _T),
    ("visual.blocks.{i}.attn.proj.bias", "vision_tower/blocks/{i}/attn/out/bias", None),
    ("visual.merger.ln_q.weight", "projector/norm/scale", None),
    ("visual.merger.mlp.0.weight", "projector/fc1/kernel", _T),
    ("visual.merger.mlp.0.bias", "projector/fc1/bias", None),
    ("visual.merger.mlp.2.weight", "projector/fc2/kernel", _T),
    ("visual.merger.mlp.2.bias", "projector/fc2/bias", None),
)
TEXT_ROWS = (
    ("model.embed_tokens.weight", "language_model/embed/embedding", None),
    ("model.layers.{i}.input_layernorm.weight", "language_model/blocks/norm1/scale", None),
    ("model.layers.{i}.self_attn.q_proj.weight", "language_model/blocks/attn/q/kernel", _T),
    ("model.layers.{i}.self_attn.q_proj.bias", "language_model/blocks/attn/q/bias", None),
    ("model.layers.{i}.self_attn.k_proj.weight", "language_model/blocks/attn/k/kernel", _T),
    ("model.layers.{i}.self_attn.k_proj.bias", "language_model/blocks/attn/k/bias", None),
    ("model.layers.{i}.self_attn.v_proj.weight", "language_model/blocks/attn/v/kernel", _T),
    ("model.layers.{i}.self_attn.v_proj.bias", "language_model/blocks/attn/v/bias", None),
    ("model.layers.{i}.self_attn.o_proj.weight", "language_model/blocks/attn/o/kernel", _T),
    ("model.layers.{i}.post_attention_layernorm.weight", "language_model/blocks/norm2/scale", None),
    ("model.layers.{i}.mlp.gate_proj.weight", "language_model/blocks/mlp/gate/kernel", _T),
    ("model.layers.{i}.mlp.up_proj.weight", "language_model/blocks/mlp/up/kernel", _T),
    ("model.layers.{i}.mlp.down_proj.weight", "language_model/blocks/mlp/down/kernel", _T),
    ("model.norm.weight", "language_model/norm/scale", None),
)
_MLP_ROWS = (
    ("visual.blocks.{i}.norm1.bias", "vision_tower/blocks/{i}/norm1/bias", None),
    ("visual.blocks.{i}.norm2.bias", "vision_tower/blocks/{i}/norm2/bias", None),
    ("visual.blocks.{i}.mlp.fc1.weight", "vision_tower/blocks/{i}/mlp/fc1/kernel", _T),
    ("visual.blocks.{i}.mlp.fc1.bias", "vision_tower/blocks/{i}/mlp/fc1/bias", None),
    ("visual.blocks.{i}.mlp.fc2.weight", "vision_tower/blocks/{i}/mlp/fc2/kernel", _T),
    ("visual.blocks.{i}.mlp.fc2.bias", "vision_tower/blocks/{i}/mlp/fc2/bias", None),
    ("visual.merger.ln_q.bias", "projector/norm/bias", None),
)


def hf_table(config: QwenConfig) -> tuple[tuple[str, str, tuple[int, ...] | None], ...]:
    """The conversion rows: (name of the tensor, path of the parameter, permutation of the axes)."""
    return (*VISION_ROWS, *_MLP_ROWS, *TEXT_ROWS, head_row(config))


def head_row(config: QwenConfig) -> tuple[str, str, tuple[int, ...] | None]:
    """The output head's row; files of tied models may repeat the embedding as the head."""
    head = ("embed/embedding", None) if config.text.tie_embeddings else ("head/kernel", _T)
    return "lm_head.weight", f"language_model/{head[0]}", head[1]


# Which mesh axis each axis of a weight lies on. The stacked layer axis of the language model stays whole.
TEXT_SHARDING = (
    (r"language_model/embed/embedding", P("tensor", "fsdp")),
    (r"language_model/head/kernel", P("fsdp", "tensor")),  # absent from tied models
    (r"language_model/blocks/(attn/[qkv]|mlp/gate|mlp/up)/kernel", P(None, "fsdp", "tensor")),
    (r"language_model/blocks/(attn/o|mlp/down)/kernel", P(None, "tensor", "fsdp")),
)
SHARDING = (
    *TEXT_SHARDING,
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
    """The fields of a published config.json of either family."""
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
