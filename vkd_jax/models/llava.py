"""LLaVA-1.5 (Liu et al., arXiv 2310.03744): CLIP, a two-layer projector, a LLaMA decoder; and its conversion.

Axes: b batch, t position, s key slot, p patch, a asked position, d width, v vocabulary.
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

from vkd_jax.models.base import VisionLanguageModel, VisualTokens, check_supported
from vkd_jax.models.clip_vit import VisionConfig, VisionTower
from vkd_jax.models.decoder import DecoderConfig
from vkd_jax.models.layers import ACTIVATIONS, Linear, insert_features, shard_batch
from vkd_jax.types import UserError


@dataclasses.dataclass(frozen=True)
class LlavaConfig:
    """A LLaVA: its two towers, how they are joined, and how it is computed."""

    vision: VisionConfig
    text: DecoderConfig
    image_token_id: int
    feature_layer: int = -2  # as in transformers: index into (embeddings, block 0, ..., last block)
    feature_select: str = "default"  # "default" drops the class token, "full" keeps it
    projector_act: str = "gelu"
    compute_dtype: str = "float32"  # parameters have their own
    remat: str = ""  # what the backward pass computes again instead of keeping it: a key of `layers.REMAT`
    mesh: Mesh | None = None  # over whose devices the rows of activations lie

    @property
    def used_blocks(self) -> int:
        """How many vision blocks feed the projector; later ones are loaded and exported, never computed."""
        return self.feature_layer if self.feature_layer >= 0 else self.vision.layers + 1 + self.feature_layer

    def image_tokens(self, height: int, width: int) -> int:
        """How many image tokens a prompt needs for a picture; all have one size here."""
        del height, width
        return self.vision.patches + (self.feature_select == "full")

    def images(self, output: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """The pictures [H, W, 3] in what the Hugging Face image processor returned."""
        return [np.ascontiguousarray(x.transpose(1, 2, 0), np.float32) for x in output["pixel_values"]]

    def pack(self, rows: Sequence[Sequence[np.ndarray]], tokens: int = 0) -> dict[str, np.ndarray]:
        """The pictures of each prompt, one [H, W, 3] a prompt, as arrays: {"pixels": [b, H, W, 3]}.

        Raises:
            UserError: a prompt has several pictures.
        """
        if any(len(row) != 1 for row in rows):
            raise UserError("LLaVA-1.5 was made for one picture a question; ask about them one by one.")
        return {"pixels": np.stack([row[0] for row in rows])}

    @classmethod
    def from_hf(cls, hf: Any, **changes: Any) -> "LlavaConfig":
        """Reads a `transformers.LlavaConfig`; `changes` are fields to set otherwise (`remat="full"`).

        Raises:
            UserError: the configuration asks for what this implementation does not compute; all is listed.
        """
        vision, text = hf.vision_config, hf.text_config
        kinds = (("vision_config", vision, "clip_vision_model"), ("text_config", text, "llama"))
        # First, because another kind of tower may not even have the other fields.
        check_supported(
            "LLaVA", [(c.model_type == kind, f"{name}.model_type", c.model_type, kind) for name, c, kind in kinds]
        )
        layer, layers = hf.vision_feature_layer, vision.num_hidden_layers
        rope = dict(text.rope_parameters)
        acts = ", ".join(ACTIVATIONS)
        check_supported(
            "LLaVA",
            [
                (_is_square(vision.image_size), "vision_config.image_size", vision.image_size, "a square"),
                (_is_square(vision.patch_size), "vision_config.patch_size", vision.patch_size, "a square"),
                (vision.num_channels == 3, "vision_config.num_channels", vision.num_channels, "3"),
                (vision.hidden_act in ACTIVATIONS, "vision_config.hidden_act", vision.hidden_act, acts),
                (text.hidden_act == "silu", "text_config.hidden_act", text.hidden_act, "silu"),
                (rope["rope_type"] == "default", "text_config.rope_parameters", rope, "rope_type default"),
                (not text.attention_bias, "text_config.attention_bias", text.attention_bias, "False"),
                (not text.mlp_bias, "text_config.mlp_bias", text.mlp_bias, "False"),
                (
                    hf.projector_hidden_act in ACTIVATIONS,
                    "projector_hidden_act",
                    hf.projector_hidden_act,
                    acts,
                ),
                (hf.multimodal_projector_bias, "multimodal_projector_bias", False, "True"),
                (
                    isinstance(layer, int) and -layers - 1 <= layer <= layers,
                    "vision_feature_layer",
                    layer,
                    f"one layer, from {-layers - 1} to {layers}",
                ),
            ],
        )
        fields = dict(
            vision=VisionConfig(
                image_size=np.max(vision.image_size).item(),
                patch_size=np.max(vision.patch_size).item(),
                width=vision.hidden_size,
                layers=layers,
                heads=vision.num_attention_heads,
                mlp_width=vision.intermediate_size,
                activation=vision.hidden_act,
                norm_eps=vision.layer_norm_eps,
            ),
            text=DecoderConfig(
                vocab=text.vocab_size,
                width=text.hidden_size,
                layers=text.num_hidden_layers,
                heads=text.num_attention_heads,
                kv_heads=text.num_key_value_heads,
                head_width=text.head_dim,
                mlp_width=text.intermediate_size,
                norm_eps=text.rms_norm_eps,
                rope_theta=float(rope["rope_theta"]),
                tie_embeddings=bool(hf.tie_word_embeddings),
                max_positions=text.max_position_embeddings,
            ),
            image_token_id=hf.image_token_id,
            feature_layer=layer,
            feature_select=hf.vision_feature_select_strategy,
            projector_act=hf.projector_hidden_act,
            compute_dtype=str(hf.dtype or "float32").removeprefix("torch."),
        )
        return cls(**fields | changes)


def _is_square(size: int | list[int]) -> bool:
    return len(set(np.atleast_1d(size).tolist())) == 1


class Projector(nnx.Module):
    """Two linear layers that turn vision features into token embeddings."""

    def __init__(self, config: LlavaConfig, **options):
        self.activation = config.projector_act
        self.fc1 = Linear(config.vision.width, config.text.width, bias=True, **options)
        self.fc2 = Linear(config.text.width, config.text.width, bias=True, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[b, p, d] to [b, p, d]."""
        return self.fc2(ACTIVATIONS[self.activation](self.fc1(x)))


class Llava(VisionLanguageModel):
    """LLaVA-1.5."""

    tower_class = VisionTower

    @staticmethod
    def build_projector(config: LlavaConfig, **options: Any) -> Projector:
        """Builds the two-layer projector."""
        return Projector(config, **options)

    def encode(
        self, pictures: Mapping[str, jax.Array] | None = None, *, hidden: jax.Array | None = None, start: int = 0
    ) -> tuple[VisualTokens, dict[str, VisualTokens]]:
        """Turns pictures, or cached activations, into the embeddings that stand for the picture in a prompt.

        Args:
            pictures: from `LlavaConfig.pack`.
            hidden: instead of pixels, the activations entering block `start`: tap "vision/{start - 1}".
            start: the first block to compute; at most `config.used_blocks`.

        Returns:
            Features, and the taps: "vision/0" ... (each computed block's output, with the class token),
            "features" (what feeds the projector) and "projector" (its output, the features again).
        """
        if hidden is None and (pictures is None or start):
            raise ValueError("encode takes pictures, or hidden activations with the block they enter.")
        if hidden is None:
            hidden = self.vision_tower.embed(pictures["pixels"])
        outputs = self.vision_tower(hidden, start, self.config.used_blocks)
        where = self.config.vision.patch_coords  # with the class token first
        taps = {f"vision/{i}": _tokens(output, where) for i, output in enumerate(outputs, start)}
        features = (outputs or [hidden])[-1]
        if self.config.feature_select == "default":
            features, where = features[:, 1:], where[1:]
        taps["features"] = _tokens(features, where)
        with jax.named_scope("projector"):
            projected = shard_batch(self.projector(features), self.config.mesh)
        taps["projector"] = _tokens(projected, where)
        return taps["projector"], taps

    def vision_neurons(
        self, images: Mapping[str, jax.Array], reduce: Callable[[jax.Array, jax.Array], Any]
    ) -> list[Any]:
        """Reduces the inner MLP activations of each used block; every patch and the class token are real."""
        hidden = self.vision_tower.embed(images["pixels"])
        return self.vision_tower.neurons(
            hidden, self.config.used_blocks, lambda z: reduce(z, jnp.ones(z.shape[:2], bool))
        )

    def embed(self, tokens: jax.Array, mask: jax.Array, features: VisualTokens | None) -> tuple[jax.Array, jax.Array]:
        """Embedded tokens [b, t, d], the pictures' features among them, and their positions."""
        x = self.language_model.embed(tokens)
        if features is not None:
            x = insert_features(x, tokens == self.config.image_token_id, features.values)
        return x, jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)


def _tokens(values: jax.Array, where: np.ndarray) -> VisualTokens:
    return VisualTokens(values, jnp.broadcast_to(jnp.asarray(where), (*values.shape[:2], 3)))


Config, Model = LlavaConfig, Llava

# Conversion. Three generations of names are brought to the one that transformers 5 writes ...
HF_ALIASES = (
    (r"^model\.(vision_tower|multi_modal_projector|language_model)\.", r"\1."),
    (r"^vision_tower\.vision_model\.", "vision_tower."),
    (r"^language_model\.(embed_tokens|layers|norm)\.", r"language_model.model.\1."),
    (r"^lm_head\.", "language_model.lm_head."),
)
# ... buffers that older versions saved hold nothing learned ...
HF_SKIP = (
    r"vision_tower\.embeddings\.position_ids",
    r"language_model\.model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",
)
HF_ARCHITECTURE = "LlavaForConditionalGeneration"

_T = (1, 0)  # torch keeps linear kernels as [out, in]
# ... and each row is a family of tensors: their name, our path, the permutation of the axes. An {i} that only
# the name has is the position on the parameter's leading, stacked axis.
_HF_TABLE = (
    ("vision_tower.embeddings.class_embedding", "vision_tower/class_embedding", None),
    ("vision_tower.embeddings.patch_embedding.weight", "vision_tower/patch_embedding", (2, 3, 1, 0)),
    ("vision_tower.embeddings.position_embedding.weight", "vision_tower/position_embedding", None),
    ("vision_tower.pre_layrnorm.weight", "vision_tower/pre_norm/scale", None),
    ("vision_tower.pre_layrnorm.bias", "vision_tower/pre_norm/bias", None),
    ("vision_tower.encoder.layers.{i}.layer_norm1.weight", "vision_tower/blocks/{i}/norm1/scale", None),
    ("vision_tower.encoder.layers.{i}.layer_norm1.bias", "vision_tower/blocks/{i}/norm1/bias", None),
    ("vision_tower.encoder.layers.{i}.self_attn.q_proj.weight", "vision_tower/blocks/{i}/attn/q/kernel", _T),
    ("vision_tower.encoder.layers.{i}.self_attn.q_proj.bias", "vision_tower/blocks/{i}/attn/q/bias", None),
    ("vision_tower.encoder.layers.{i}.self_attn.k_proj.weight", "vision_tower/blocks/{i}/attn/k/kernel", _T),
    ("vision_tower.encoder.layers.{i}.self_attn.k_proj.bias", "vision_tower/blocks/{i}/attn/k/bias", None),
    ("vision_tower.encoder.layers.{i}.self_attn.v_proj.weight", "vision_tower/blocks/{i}/attn/v/kernel", _T),
    ("vision_tower.encoder.layers.{i}.self_attn.v_proj.bias", "vision_tower/blocks/{i}/attn/v/bias", None),
    (
        "vision_tower.encoder.layers.{i}.self_attn.out_proj.weight",
        "vision_tower/blocks/{i}/attn/out/kernel",
        _T,
    ),
    (
        "vision_tower.encoder.layers.{i}.self_attn.out_proj.bias",
        "vision_tower/blocks/{i}/attn/out/bias",
        None,
    ),
    ("vision_tower.encoder.layers.{i}.layer_norm2.weight", "vision_tower/blocks/{i}/norm2/scale", None),
    ("vision_tower.encoder.layers.{i}.layer_norm2.bias", "vision_tower/blocks/{i}/norm2/bias", None),
    ("vision_tower.encoder.layers.{i}.mlp.fc1.weight", "vision_tower/blocks/{i}/mlp/fc1/kernel", _T),
    ("vision_tower.encoder.layers.{i}.mlp.fc1.bias", "vision_tower/blocks/{i}/mlp/fc1/bias", None),
    ("vision_tower.encoder.layers.{i}.mlp.fc2.weight", "vision_tower/blocks/{i}/mlp/fc2/kernel", _T),
    ("vision_tower.encoder.layers.{i}.mlp.fc2.bias", "vision_tower/blocks/{i}/mlp/fc2/bias", None),
    ("vision_tower.post_layernorm.weight", "vision_tower/post_norm/scale", None),
    ("vision_tower.post_layernorm.bias", "vision_tower/post_norm/bias", None),
    ("multi_modal_projector.linear_1.weight", "projector/fc1/kernel", _T),
    ("multi_modal_projector.linear_1.bias", "projector/fc1/bias", None),
    ("multi_modal_projector.linear_2.weight", "projector/fc2/kernel", _T),
    ("multi_modal_projector.linear_2.bias", "projector/fc2/bias", None),
    ("language_model.model.embed_tokens.weight", "language_model/embed/embedding", None),
    ("language_model.model.layers.{i}.input_layernorm.weight", "language_model/blocks/norm1/scale", None),
    ("language_model.model.layers.{i}.self_attn.q_proj.weight", "language_model/blocks/attn/q/kernel", _T),
    ("language_model.model.layers.{i}.self_attn.k_proj.weight", "language_model/blocks/attn/k/kernel", _T),
    ("language_model.model.layers.{i}.self_attn.v_proj.weight", "language_model/blocks/attn/v/kernel", _T),
    ("language_model.model.layers.{i}.self_attn.o_proj.weight", "language_model/blocks/attn/o/kernel", _T),
    (
        "language_model.model.layers.{i}.post_attention_layernorm.weight",
        "language_model/blocks/norm2/scale",
        None,
    ),
    ("language_model.model.layers.{i}.mlp.gate_proj.weight", "language_model/blocks/mlp/gate/kernel", _T),
    ("language_model.model.layers.{i}.mlp.up_proj.weight", "language_model/blocks/mlp/up/kernel", _T),
    ("language_model.model.layers.{i}.mlp.down_proj.weight", "language_model/blocks/mlp/down/kernel", _T),
    ("language_model.model.norm.weight", "language_model/norm/scale", None),
)


def hf_table(config: LlavaConfig) -> tuple[tuple[str, str, tuple[int, ...] | None], ...]:
    """The conversion rows: (name of the tensor, path of the parameter, permutation of the axes)."""
    # Files of tied models may repeat the embedding as the head.
    head = ("embed/embedding", None) if config.text.tie_embeddings else ("head/kernel", _T)
    return (*_HF_TABLE, ("language_model.lm_head.weight", f"language_model/{head[0]}", head[1]))


# Which mesh axis each axis of a weight lies on. The stacked layer axis of the language model stays whole.
SHARDING = (
    (r"language_model/embed/embedding", P("tensor", "fsdp")),
    (r"language_model/head/kernel", P("fsdp", "tensor")),
    (r"language_model/blocks/(attn/[qkv]|mlp/gate|mlp/up)/kernel", P(None, "fsdp", "tensor")),
    (r"language_model/blocks/(attn/o|mlp/down)/kernel", P(None, "tensor", "fsdp")),
    (r"(vision_tower/blocks/\d+/(attn/[qkv]|mlp/fc1)|projector/fc1)/kernel", P("fsdp", "tensor")),
    (r"(vision_tower/blocks/\d+/(attn/out|mlp/fc2)|projector/fc2)/kernel", P("tensor", "fsdp")),
    (r"(vision_tower|projector)/.*bias|.*/scale|vision_tower/\w+_embedding", P()),
)

# What the published config.json files say, by size.
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
