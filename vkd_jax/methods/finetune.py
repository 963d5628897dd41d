"""Supervised fine-tuning: how a base model becomes the vanilla one, and what a relearning attacker does."""

import dataclasses
from collections.abc import Mapping

from vkd_jax.config.fields import setting
from vkd_jax.methods import base
from vkd_jax.methods.scope import Scope


@dataclasses.dataclass(frozen=True)
class Finetune(Scope):
    """CE(answer | question, picture) + weight_text * CE(answer | question), answer tokens only."""

    weight_text: float = setting(1.0, "Weight of the loss on text-only questions.", minimum=0)

    def losses(self) -> Mapping[str, base.LossFn]:
        """Questions with a picture and text-only questions are two streams, each of its own fixed shape.

        The loop takes those of them that have examples.
        """
        return {"image": base.descent_loss("image", 1.0), "text": base.descent_loss("text", self.weight_text)}
