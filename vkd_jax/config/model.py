"""The section `model`: which models a run reads, and their form in memory."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from vkd_jax.config.fields import Section, setting

INTEGER_FORMAT = r"int[84](:[1-9]\d*)?"  # of quantized weights, with an optional group size
QUANTIZATIONS = "int8 or int4, optionally with a group size as in int4:64, w8a8, or ''"


@dataclasses.dataclass(frozen=True)
class ModelConfig(Section):
    """Input models of a run, and their form in memory."""

    SECTION: ClassVar[str] = "model"

    path: str = setting(
        "", "Vanilla model: a Hugging Face folder, an id on its hub, a shipped model, an adapter, or BASE+ADAPTER."
    )
    base: str = setting(
        "", "The same model before fine-tuning: fine-tuning starts from it, and method.target=base reads it."
    )
    retain_only: str = setting("", "A model that was fine-tuned without the forget set, for comparison.")
    unlearned: str = setting("", "An unlearned model to evaluate, for stage=audit.")
    create: Mapping[str, Any] = setting(
        {}, "Sizes of a model with random weights, which replaces `base` in fine-tuning; {} creates none."
    )
    dtype: str = setting("float32", "Type of weights and computation.", choices=("float32", "bfloat16", "float16"))
    remat: str = setting(
        "",
        "What the backward pass computes again: '' nothing, 'dots' all but products with weights, 'full' everything.",
        choices=("", "dots", "full"),
    )
    quantize: str = setting(
        "",
        "Quantization of the frozen language model.",
        pattern=rf"({INTEGER_FORMAT}|w8a8)?",
        expected=QUANTIZATIONS,
    )
    max_pixels: int = setting(
        0,
        "Largest number of pixels per image, for models that take images of any size; 0 keeps the model's limit.",
        minimum=0,
    )

    @property
    def has_base(self) -> bool:
        """Whether a model to fine-tune is given."""
        return bool(self.base or self.create)
