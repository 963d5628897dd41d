"""Supervised fine-tuning: the training of the vanilla model, and of a relearning attacker.

    L = CE(answer | question, image) + weight_text * CE(answer | question)

CE is the mean cross-entropy of the answer tokens.
"""

import dataclasses
from collections.abc import Mapping

from vkd_jax.config.fields import setting
from vkd_jax.methods import base
from vkd_jax.methods.scope import Scope


@dataclasses.dataclass(frozen=True)
class Finetune(Scope):
    """Supervised fine-tuning on the answers, with and without images."""

    weight_text: float = setting(1.0, "Weight of the loss on text-only questions.", minimum=0)

    def losses(self) -> Mapping[str, base.LossFn]:
        """Returns two streams, each of its own shape; the loop trains on those that have examples."""
        return {"image": base.descent_loss("image", 1.0), "text": base.descent_loss("text", self.weight_text)}
