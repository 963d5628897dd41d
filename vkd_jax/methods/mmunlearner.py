"""MMUnlearner: gradient difference whose ascent is restricted to weights that matter more for the forget set.

    g      = mask * grad(-weight_forget * min(CE(forget), cap)) + grad(weight_retain * CE(retain))
    mask_i = [F_forget,i / (F_preserve,i + eps) >= threshold]

F is the diagonal Fisher information of the vanilla model. F_preserve of visual weights is computed on the retain set's
questions with an image. F_preserve of language-model weights is computed on these and on all text-only questions,
including those about the people to forget: the method removes what these people look like, not what the model knows
about them. With `data.forgets=both` the latter count in F_forget of language-model weights instead.

Published for LLaVA-1.5-7B: threshold 1, eps 1e-15, no bound (cap = inf), clipping at 1, learning rate 1e-5, batches of
4, one epoch. Its code alternates between forget and retain batches, squares the gradient of a batch of two, and masks
matrices alone. Here each step uses both sets, per-example gradients are squared, and every trainable weight is masked.

With train=lora, F is computed before the first step, when the adapters' B is zero and therefore the gradient of A, too:
A is never selected. B alone ascends, and A trains on the retain set alone.

Reference: Huo et al., "MMUnlearner: Reformulating Multimodal Machine Unlearning in the Era of Multimodal Large Language
Models", arXiv 2502.11051; https://github.com/Z1zs/MMUnlearner
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import ClassVar

from vkd_jax.config.fields import setting
from vkd_jax.methods import base, saliency
from vkd_jax.methods.ascent import Ascent
from vkd_jax.types import Params

TEXT_SETS = ("forget_text", "retain_text")


@dataclasses.dataclass(frozen=True)
class MMUnlearner(Ascent):
    """Gradient difference with ascent restricted to weights that matter more for the forget set."""

    mask_scope: ClassVar[str] = "forget"
    weight_forget: float = setting(1.0, "Weight of the loss on the forget set.", minimum=0)
    weight_retain: float = setting(1.0, "Weight of the loss on the retain set.", minimum=0)
    mask_threshold: float = setting(1.0, "Smallest ratio F_forget / F_preserve of a selected weight.", above=0)
    mask_eps: float = setting(1e-15, "Constant that is added to F_preserve before the division.", above=0)
    fisher_samples: int = setting(128, "Largest number of examples per set for the Fisher information.", minimum=1)
    fisher_chunk: int = setting(
        16, "Number of per-example gradients in memory at once, each the size of the trainable weights.", minimum=1
    )

    def prepare(self, context: base.Context) -> base.Prepared:
        """Also computes the mask of the ascent."""
        return dataclasses.replace(super().prepare(context), mask=self._mask(context))

    def image_losses(self) -> Mapping[str, base.LossFn]:
        """Returns ascent on the forget set, whose gradient the loop masks, and descent on the retain set."""
        return {
            "forget": self.ascent_loss(self.weight_forget),
            "retain": base.descent_loss("retain", self.weight_retain),
        }

    def _mask(self, context: base.Context) -> Params:
        """Computes the mask over all trainable weights."""
        options = dict(samples=self.fisher_samples, chunk=self.fisher_chunk, name="mmunlearner")
        paths = self.trainable(context.params, context.model_config)
        image_sets = {name: context.sets[name] for name in ("forget", "retain")}
        information = {
            name: dict(values)
            for name, values in base.fisher_information(context, paths, image_sets, **options).items()
        }
        language = [path for path in paths if path.startswith("language_model/")]
        text_sets = {name: context.sets[name] for name in TEXT_SETS if name in context.sets}
        if language and text_sets:
            text_information = base.fisher_information(context, language, text_sets, **options)
            for image_set, encoded in image_sets.items():
                pooled = [({path: information[image_set][path] for path in language}, len(encoded))]
                pooled += [
                    (text_information[name], len(text_sets[name])) for name in self._text_sets(image_set, text_sets)
                ]
                information[image_set] |= saliency.pool(pooled) if len(pooled) > 1 else {}
        return saliency.mask_from_ratio(
            information["forget"], information["retain"], threshold=self.mask_threshold, keep=None, eps=self.mask_eps
        )

    def _text_sets(self, image_set: str, text_sets: Iterable[str]) -> list[str]:
        """The sets of text-only questions that count for the language model beside those with an image."""
        forgotten = {"forget_text"} if self.forget_text.weight else set()
        return [name for name in text_sets if (name in forgotten) == (image_set == "forget")]
