"""ViP-LLaVA (Cai et al., arXiv 2312.00784): LLaVA whose projector reads the features of several CLIP layers."""

import dataclasses
from typing import Any, ClassVar

import jax
import numpy as np

from vkd_jax.models import llava
from vkd_jax.models.conversion import Row, norm_rows
from vkd_jax.models.layers import LayerNorm


@dataclasses.dataclass(frozen=True)
class VipLlavaConfig(llava.LlavaConfig):
    """Configuration of a ViP-LLaVA model; `feature_layers` takes the place of LLaVA's `feature_layer`."""

    has_default_template: ClassVar[bool] = False
    feature_layers: tuple[int, ...] = (-2, -5, -8, -11, 6)  # as in transformers, in the order of the projector's input
    projector_norm_eps: float = 1e-5

    @property
    def feature_blocks(self) -> tuple[int, ...]:
        """The vision blocks whose outputs the projector reads."""
        return tuple(layer % (self.vision.layers + 1) - 1 for layer in self.feature_layers)

    @property
    def used_blocks(self) -> int:
        """Number of vision blocks that feed the projector; later blocks are loaded and exported, never computed."""
        return max(self.feature_blocks) + 1

    @classmethod
    def from_hf(cls, hf: Any, **changes: Any) -> "VipLlavaConfig":
        """Reads a `transformers.VipLlavaConfig`; `changes` override fields, such as `remat="full"`.

        Raises:
            UserError: lists every field with a value that this implementation does not support.
        """
        layers, count = np.atleast_1d(hf.vision_feature_layer).tolist(), hf.vision_config.num_hidden_layers
        eps, allowed = hf.projector_layernorm_eps, [*range(1, count + 1), *range(-count, 0)]
        llava.check_hf_config(
            "ViP-LLaVA",
            hf,
            ("llama",),
            (
                bool(layers) and all(type(layer) is int and layer in allowed for layer in layers),
                "vision_feature_layer",
                hf.vision_feature_layer,
                f"layers from {-count} to {count} without 0",
            ),
            (isinstance(eps, float) and 0 < eps < 1, "projector_layernorm_eps", eps, "a number between 0 and 1"),
        )
        return cls(**dict(feature_layers=tuple(layers), projector_norm_eps=eps, **llava.read_fields(hf)) | changes)


class Projector(llava.Projector):
    """A norm of the joined features of all layers, and LLaVA's projector."""

    def __init__(self, config: VipLlavaConfig, *, dtype, param_dtype, **options):
        super().__init__(config, dtype=dtype, param_dtype=param_dtype, **options)
        width = len(config.feature_blocks) * config.vision.width
        self.norm = LayerNorm(width, eps=config.projector_norm_eps, dtype=dtype, param_dtype=param_dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps the features of p patches, [b, p, layers * vision width], to [b, p, text width]."""
        return super().__call__(self.norm(x))


class VipLlava(llava.Llava):
    """ViP-LLaVA: features of several CLIP layers, normalized, projected and inserted at the image tokens."""

    @staticmethod
    def build_projector(config: VipLlavaConfig, **options: Any) -> Projector:
        """Builds the norm and the two-layer projector."""
        return Projector(config, **options)


Config, Model = VipLlavaConfig, VipLlava

HF_ALIASES, HF_SKIP, HF_ARCHITECTURE = llava.HF_ALIASES, llava.HF_SKIP, "VipLlavaForConditionalGeneration"


def hf_table(config: VipLlavaConfig) -> tuple[Row, ...]:
    """Returns the rows of the conversion table, which `conversion` describes."""
    return (*llava.hf_table(config), *norm_rows("multi_modal_projector.projector_layernorm", "projector/norm"))


SHARDING = llava.SHARDING

# Fields of config.json, by size: those of LLaVA-1.5. No copy of the published files was found.
PRESETS = {size: (f"llava-hf/vip-llava-{size}-hf", fields) for size, (_, fields) in llava.PRESETS.items()}
