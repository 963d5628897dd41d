"""MMUnlearner: gradient difference whose ascent is confined to weights that matter more for forgetting.

    g      = mask * grad(-weight_forget * min(CE(forget), cap)) + grad(weight_retain * CE(retain))
    mask_i = [F_forget,i / (F_preserve,i + eps) >= threshold]

F is the diagonal Fisher information of the vanilla model. What is to be preserved is, for visual weights, the retain
set's questions with a picture; for weights of the language model these and all questions of text alone, those about the
people to forget among them: what is to go is how they look, and not what is known about them.

Published for LLaVA-1.5-7B: threshold 1, eps 1e-15, no bound (cap = inf), clipping at 1, learning rate 1e-5, batches of
4, one epoch. Its code steps on forget and on retain batches in turns, squares the gradient of a batch of two and not a
sample's own, and masks the matrices alone; here one step is on both, with samples' own gradients, and every weight that
trains is masked.

With train=lora, F is that of the adapters before the first step, when B is zero: so is the gradient of A then, and A is
never selected. Only B ascends; A moves by the retain set alone.

Reference: Huo et al., "MMUnlearner: Reformulating Multimodal Machine Unlearning in the Era of Multimodal Large Language
Models", arXiv 2502.11051; https://github.com/Z1zs/MMUnlearner
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from vkd_jax.config.fields import setting
from vkd_jax.methods import base, saliency
from vkd_jax.methods.scope import Scope
from vkd_jax.types import Params

TEXT_SETS = ("forget_text", "retain_text")


@dataclasses.dataclass(frozen=True)
class MMUnlearner(Scope):
    """Masked ascent on the forget set, descent of all that trains on the retain set."""

    mask_scope: ClassVar[str] = "forget"
    weight_forget: float = setting(1.0, "Weight of the loss on the forget set.", minimum=0)
    weight_retain: float = setting(1.0, "Weight of the loss on the retain set.", minimum=0)
    cap: float = setting(6.0, "Cross-entropy at which ascent stops, in nats per token.", above=0)
    mask_threshold: float = setting(1.0, "Smallest ratio F_forget / F_preserve of a selected weight.", above=0)
    mask_eps: float = setting(1e-15, "Number that is added to F_preserve before dividing.", above=0)
    fisher_samples: int = setting(128, "Largest number of examples per set for the Fisher information.", minimum=1)
    fisher_chunk: int = setting(
        16, "Per-example gradients in memory at once, each the size of the trainable weights.", minimum=1
    )

    def prepare(self, context: base.Context) -> base.Prepared:
        """Makes the masks."""
        return base.Prepared(sets=context.sets, mask=self._mask(context))

    def losses(self) -> Mapping[str, base.LossFn]:
        """One stream ascends, where the mask lets it; the other descends."""
        return {
            "forget": base.ascent_loss(self.weight_forget, self.cap),
            "retain": base.descent_loss("retain", self.weight_retain),
        }

    def _mask(self, context: base.Context) -> Params:
        """Over all that trains."""
        options = dict(samples=self.fisher_samples, chunk=self.fisher_chunk, name="mmunlearner")
        paths = self.trainable(context.params, context.model_config)
        pictures = {name: context.sets[name] for name in ("forget", "retain")}
        information = base.fisher_information(context, paths, pictures, **options)
        preserve = dict(information["retain"])
        language = [path for path in paths if path.startswith("language_model/")]
        texts = {name: context.sets[name] for name in TEXT_SETS if name in context.sets}
        if language and texts:
            said = base.fisher_information(context, language, texts, **options)
            shown = {path: preserve[path] for path in language}
            parts = [(shown, len(pictures["retain"])), *((said[name], len(rows)) for name, rows in texts.items())]
            preserve |= saliency.pool(parts)
        return saliency.mask_from_ratio(
            information["forget"], preserve, threshold=self.mask_threshold, keep=None, eps=self.mask_eps
        )
