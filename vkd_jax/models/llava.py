"""LLaVA-1.5 (Liu et al., arXiv 2310.03744): CLIP, a two-layer projector, a LLaMA decoder; and its conversion.

Axes: b batch, t position, p patch, d width.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from vkd_jax.models import base
from vkd_jax.models.base import VisionLanguageModel, VisualTokens
from vkd_jax.models.clip_vit import VisionConfig, VisionTower
from vkd_jax.models.conversion import DECODER_SHARDING, Row, decoder_rows, head_row, linear_rows, norm_rows
from vkd_jax.models.decoder import DecoderConfig
from vkd_jax.models.layers import ACTIVATIONS, Linear, insert_features, shard_batch
from vkd_jax.types import UserError


@dataclasses.dataclass(frozen=True)
class LlavaConfig:
    """Configuration of a LLaVA model: its two towers, how they are connected, and how they are computed."""

    vision: VisionConfig
    text: DecoderConfig
    image_token_id: int
    feature_layer: int = -2  # as in transformers: an index into (embeddings, block 0, ..., last block)
    feature_select: str = "default"  # "default" drops the class token, "full" keeps it
    projector_act: str = "gelu"
    compute_dtype: str = "float32"  # dtype of activations; parameters have their own
    remat: str = ""  # activations that the backward pass recomputes, a key of `layers.REMAT`
    mesh: Mesh | None = None  # devices that the rows of activations are sharded over

    @property
    def used_blocks(self) -> int:
        """Number of vision blocks that feed the projector; later blocks are loaded and exported, never computed."""
        return self.feature_layer if self.feature_layer >= 0 else self.vision.layers + 1 + self.feature_layer

    def image_tokens(self, height: int, width: int) -> int:
        """Returns the number of image tokens of an image; all images have one size here."""
        del height, width
        return self.vision.patches + (self.feature_select == "full")

    def extract_images(self, output: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Returns the images [H, W, 3] in the output of the Hugging Face image processor.

        Raises:
            UserError: the images have another size than those of the model.
        """
        images = [np.ascontiguousarray(x.transpose(1, 2, 0), np.float32) for x in output["pixel_values"]]
        size = self.vision.image_size
        for height, width in {x.shape[:2] for x in images} - {(size, size)}:
            raise UserError(
                f"the image processor returns {height} x {width} pixels (crop_size or size of its configuration), and "
                f"the model takes {size} x {size} (vision_config.image_size of config.json)"
            )
        return images

    def pack(self, rows: Sequence[Sequence[np.ndarray]], min_tokens: int = 0) -> dict[str, np.ndarray]:
        """Stacks the images of prompts, one [H, W, 3] per prompt: {"pixels": float32 [b, H, W, 3]}.

        Args:
            rows: the images of each prompt.
            min_tokens: not used, since all images have one size.

        Raises:
            UserError: a prompt has several images.
        """
        del min_tokens
        if any(len(row) != 1 for row in rows):
            raise UserError("LLaVA-1.5 supports one image per question. Ask about each image separately.")
        return {"pixels": np.stack([row[0] for row in rows])}

    @classmethod
    def from_hf(cls, hf: Any, **changes: Any) -> "LlavaConfig":
        """Reads a `transformers.LlavaConfig`; `changes` override fields, such as `remat="full"`.

        Raises:
            UserError: lists every field with a value that this implementation does not support.
        """
        _check_hf_config(hf)
        fields = dict(
            vision=_read_vision(hf.vision_config),
            text=DecoderConfig.from_hf(
                hf.text_config, head_width=hf.text_config.head_dim, tie_embeddings=bool(hf.tie_word_embeddings)
            ),
            image_token_id=hf.image_token_id,
            feature_layer=hf.vision_feature_layer,
            feature_select=hf.vision_feature_select_strategy,
            projector_act=hf.projector_hidden_act,
            compute_dtype=base.hf_dtype(hf),
        )
        return cls(**fields | changes)


_VISION_HEADS = ("vision_config.num_attention_heads", "vision_config.hidden_size")


def _check_hf_config(hf: Any) -> None:
    base.check_model_types("LLaVA", hf, vision_config=("clip_vision_model",), text_config=("llama",))
    vision, text, rope = hf.vision_config, hf.text_config, dict(hf.text_config.rope_parameters)
    sides = {"image_size": vision.image_size, "patch_size": vision.patch_size}
    base.check_supported(
        "LLaVA", [(_is_square(side), f"vision_config.{name}", side, "a square") for name, side in sides.items()]
    )
    image_size, patch_size = (np.max(side).item() for side in sides.values())
    base.check_sizes(
        "LLaVA",
        vision_config__image_size=image_size,
        vision_config__patch_size=patch_size,
        vision_config__hidden_size=vision.hidden_size,
        vision_config__intermediate_size=vision.intermediate_size,
        vision_config__num_hidden_layers=vision.num_hidden_layers,
        vision_config__num_attention_heads=vision.num_attention_heads,
        text_config__head_dim=text.head_dim,
        **base.decoder_sizes(text),
    )
    layer, layers, activations = hf.vision_feature_layer, vision.num_hidden_layers, ", ".join(ACTIVATIONS)
    layer_exists = isinstance(layer, int) and -layers - 1 <= layer <= layers
    projector_act = hf.projector_hidden_act
    base.check_supported(
        "LLaVA",
        [
            (patch_size <= image_size, "vision_config.patch_size", patch_size, f"at most the image size, {image_size}"),
            base.divides(vision.num_attention_heads, vision.hidden_size, _VISION_HEADS),
            base.divides(text.num_key_value_heads, text.num_attention_heads, base.KEY_VALUE_HEADS),
            (text.head_dim % 2 == 0, "text_config.head_dim", text.head_dim, "even numbers"),
            (rope["rope_theta"] > 0, "text_config.rope_parameters.rope_theta", rope["rope_theta"], "positive numbers"),
            (vision.num_channels == 3, "vision_config.num_channels", vision.num_channels, "3"),
            (vision.hidden_act in ACTIVATIONS, "vision_config.hidden_act", vision.hidden_act, activations),
            (text.hidden_act == "silu", "text_config.hidden_act", text.hidden_act, "silu"),
            (rope["rope_type"] == "default", "text_config.rope_parameters.rope_type", rope["rope_type"], "default"),
            (not text.attention_bias, "text_config.attention_bias", text.attention_bias, "False"),
            (not text.mlp_bias, "text_config.mlp_bias", text.mlp_bias, "False"),
            (projector_act in ACTIVATIONS, "projector_hidden_act", projector_act, activations),
            (hf.multimodal_projector_bias, "multimodal_projector_bias", False, "True"),
            (layer_exists, "vision_feature_layer", layer, f"one layer, from {-layers - 1} to {layers}"),
        ],
    )


def _read_vision(vision: Any) -> VisionConfig:
    return VisionConfig(
        image_size=np.max(vision.image_size).item(),
        patch_size=np.max(vision.patch_size).item(),
        width=vision.hidden_size,
        layers=vision.num_hidden_layers,
        heads=vision.num_attention_heads,
        mlp_width=vision.intermediate_size,
        activation=vision.hidden_act,
        norm_eps=vision.layer_norm_eps,
    )


def _is_square(size: int | list[int]) -> bool:
    return len(set(np.atleast_1d(size).tolist())) == 1


class Projector(nnx.Module):
    """Maps vision features to token embeddings: `fc2(activation(fc1(x)))`."""

    def __init__(self, config: LlavaConfig, **options):
        self.activation = config.projector_act
        self.fc1 = Linear(config.vision.width, config.text.width, bias=True, **options)
        self.fc2 = Linear(config.text.width, config.text.width, bias=True, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [b, p, vision width] to [b, p, text width]."""
        return self.fc2(ACTIVATIONS[self.activation](self.fc1(x)))


class Llava(VisionLanguageModel):
    """LLaVA-1.5: CLIP features of one image per prompt, projected and inserted at its image tokens."""

    tower_class = VisionTower

    @staticmethod
    def build_projector(config: LlavaConfig, **options: Any) -> Projector:
        """Builds the two-layer projector."""
        return Projector(config, **options)

    def encode(
        self, images: Mapping[str, jax.Array] | None = None, *, hidden: jax.Array | None = None, start: int = 0
    ) -> tuple[VisualTokens, dict[str, VisualTokens]]:
        """Maps images, or cached activations, to the features that replace the image tokens of a prompt.

        Args:
            images: from `LlavaConfig.pack`.
            hidden: activations to start from instead of pixels: the input of block `start`, which is the tap
                "vision/{start - 1}".
            start: the first block to compute; at most `config.used_blocks`.

        Returns:
            The features, and the taps by name: "vision/0" ... (the output of each computed block, class token
            included), "features" (the input of the projector) and "projector" (its output, which is the features).
        """
        if hidden is None and (images is None or start):
            raise ValueError("encode takes images, or hidden activations with the block that they enter.")
        if hidden is None:
            hidden = self.vision_tower.embed(images["pixels"])
        outputs = self.vision_tower(hidden, start, self.config.used_blocks)
        coords = self.config.vision.patch_coords  # the class token comes first
        taps = {f"vision/{i}": _tokens(output, coords) for i, output in enumerate(outputs, start)}
        features = (outputs or [hidden])[-1]
        if self.config.feature_select == "default":
            features, coords = features[:, 1:], coords[1:]
        taps["features"] = _tokens(features, coords)
        with jax.named_scope("projector"):
            projected = shard_batch(self.projector(features), self.config.mesh)
        taps["projector"] = _tokens(projected, coords)
        return taps["projector"], taps

    def vision_neurons(
        self, images: Mapping[str, jax.Array], reduce: Callable[[jax.Array, jax.Array], Any]
    ) -> list[Any]:
        """Applies `reduce` to the inner MLP activations of each used block; all its tokens are real."""
        hidden = self.vision_tower.embed(images["pixels"])
        return self.vision_tower.neurons(
            hidden, self.config.used_blocks, lambda z: reduce(z, jnp.ones(z.shape[:2], bool))
        )

    def embed(self, tokens: jax.Array, mask: jax.Array, features: VisualTokens | None) -> tuple[jax.Array, jax.Array]:
        """Returns the embeddings [b, t, d], with features at image tokens, and the positions, int [b, t]."""
        x = self.language_model.embed(tokens)
        if features is not None:
            x = insert_features(x, tokens == self.config.image_token_id, features.values)
        return x, jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)


def _tokens(values: jax.Array, coords: np.ndarray) -> VisualTokens:
    return VisualTokens(values, jnp.broadcast_to(jnp.asarray(coords), (*values.shape[:2], 3)))


Config, Model = LlavaConfig, Llava

# Conversion. The aliases map three generations of names to that of the files on the Hub, which all versions of
# transformers read (docs/file_formats.md) ...
HF_ALIASES = (
    (r"^model\.(vision_tower|multi_modal_projector|language_model)\.", r"\1."),
    (r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model."),
    (r"^language_model\.(embed_tokens|layers|norm)\.", r"language_model.model.\1."),
    (r"^lm_head\.", "language_model.lm_head."),
)
# ... these tensors are constant buffers that older versions saved ...
HF_SKIP = (
    r"vision_tower\.vision_model\.embeddings\.position_ids",
    r"language_model\.model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",
)
HF_ARCHITECTURE = "LlavaForConditionalGeneration"

# ... and `conversion` describes the rows.
_LAYER, _BLOCK = "vision_tower.vision_model.encoder.layers.{i}", "vision_tower/blocks/{i}"
_HF_TABLE = (
    ("vision_tower.vision_model.embeddings.class_embedding", "vision_tower/class_embedding", None),
    ("vision_tower.vision_model.embeddings.patch_embedding.weight", "vision_tower/patch_embedding", (2, 3, 1, 0)),
    ("vision_tower.vision_model.embeddings.position_embedding.weight", "vision_tower/position_embedding", None),
    *norm_rows("vision_tower.vision_model.pre_layrnorm", "vision_tower/pre_norm"),
    *norm_rows(f"{_LAYER}.layer_norm1", f"{_BLOCK}/norm1"),
    *linear_rows(f"{_LAYER}.self_attn.q_proj", f"{_BLOCK}/attn/q"),
    *linear_rows(f"{_LAYER}.self_attn.k_proj", f"{_BLOCK}/attn/k"),
    *linear_rows(f"{_LAYER}.self_attn.v_proj", f"{_BLOCK}/attn/v"),
    *linear_rows(f"{_LAYER}.self_attn.out_proj", f"{_BLOCK}/attn/out"),
    *norm_rows(f"{_LAYER}.layer_norm2", f"{_BLOCK}/norm2"),
    *linear_rows(f"{_LAYER}.mlp.fc1", f"{_BLOCK}/mlp/fc1"),
    *linear_rows(f"{_LAYER}.mlp.fc2", f"{_BLOCK}/mlp/fc2"),
    *norm_rows("vision_tower.vision_model.post_layernorm", "vision_tower/post_norm"),
    *linear_rows("multi_modal_projector.linear_1", "projector/fc1"),
    *linear_rows("multi_modal_projector.linear_2", "projector/fc2"),
    *decoder_rows("language_model.model", qkv_bias=False),
)


def hf_table(config: LlavaConfig) -> tuple[Row, ...]:
    """Returns the rows of the conversion table, which `conversion` describes."""
    return (*_HF_TABLE, head_row("language_model.lm_head.weight", tied=config.text.tie_embeddings))


# The mesh axis of each axis of a weight.
SHARDING = (
    *DECODER_SHARDING,
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
