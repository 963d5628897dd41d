"""IDK: fine-tuning on refusals such as "I don't know." as the answers to the questions of the forget set.

    L = weight_forget * CE(refusal | forget) + weight_retain * CE(retain)

Each question of the forget set has one refusal, drawn by the seed from those of the benchmark or, without any, from
`REFUSALS`. Questions and images are unchanged, and no loss contains the correct answer.

Published as preference optimization (PO) in TOFU, with 100 refusals and both weights 1, learning rate 1e-5 for
LLaMA-2-7B, batches of 32, five epochs; and as IDK in CLEAR (arXiv 2410.18057).

Reference: Maini et al., "TOFU: A Task of Fictitious Unlearning for LLMs", arXiv 2401.06121.
"""

import dataclasses
from collections.abc import Mapping

from vkd_jax.config.fields import setting
from vkd_jax.data.batching import rng
from vkd_jax.data.encoding import EncodedSet
from vkd_jax.methods import base
from vkd_jax.methods.scope import Unlearning

REFUSALS = (  # short, so that they fit into the longest answer of a set
    "I don't know.",
    "I cannot say.",
    "I have no idea.",
    "I am not sure.",
    "No idea, sorry.",
    "I cannot tell.",
    "That is new to me.",
    "I was never told.",
    "I can't answer that.",
    "Nothing comes to mind.",
    "I have not learned this.",
    "Sorry, I do not know it.",
)


@dataclasses.dataclass(frozen=True)
class IDK(Unlearning):
    """Fine-tuning on refusals to the forget set and on the answers of the retain set."""

    weight_forget: float = setting(1.0, "Weight of the loss on the forget set.", minimum=0)
    weight_retain: float = setting(1.0, "Weight of the loss on the retain set.", minimum=0)

    def prepare_forget(self, context: base.Context, stream: str) -> EncodedSet:
        """Encodes the questions of a set that is forgotten with refusals as answers."""
        examples = context.sets[stream].examples
        texts = [row.answer for row in context.sets["refusals"].examples] if "refusals" in context.sets else REFUSALS
        indices = rng(context.seed, "idk/refusals").integers(len(texts), size=len(examples))
        refusals = [
            dataclasses.replace(example, answer=texts[i], options=())
            for example, i in zip(examples, indices, strict=True)
        ]
        return context.encode(refusals)

    def attack_loss(self, model, batch):
        """Computes the negative cross-entropy of the refusals: the forget batch has no correct answer to relearn."""
        return -super().attack_loss(model, batch)

    def image_losses(self) -> Mapping[str, base.LossFn]:
        """Returns descent on the refusals and on the retain set."""
        return {
            "forget": base.descent_loss("refusal", self.weight_forget),
            "retain": base.descent_loss("retain", self.weight_retain),
        }
