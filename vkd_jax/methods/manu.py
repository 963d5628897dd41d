"""MANU, modality-aware neuron unlearning: prunes MLP neurons that matter for the forget set, without training.

A neuron n is one inner channel of an MLP, and z is its activation at a token (the input of the MLP's last layer). Over
the tokens of the questions with an image (m) and of the text-only questions (t) let Z = mean |z|, N = share of
|z| > tau, V = variance of z, Q = mean z^2, and c(x) = |x_m - x_t| / (x_m + x_t + eps). For a set D

    I(D, n) = c(Z) + c(N) + sqrt(V_m + V_t) + sqrt(c(Q))         (abs, freq, var, rms)
    S_n     = I(forget, n) / (I(retain, n) + eps)

and the share alpha of neurons with the highest S_n is pruned (published: 2, 3, 5 and 10 %). All weights of a pruned
neuron become zero: those into it, its bias, and those out of it. Its activation is then zero, and so is the gradient of
each of these weights, so that training by gradients, such as a relearning attack, cannot restore the neuron.

Assumptions, where the paper says nothing or differs from its code:
- M1: every real token counts once, of images and text, prompt and answer; padding does not count. N and Q are shares
  and means, where the paper has counts and sums. Both are equal if the two kinds of questions have equally many tokens.
- M2: text-only questions do not reach the vision tower, where every c would be 1. For the vision tower, and for both
  towers if the data have no text-only questions, I is Z_m + N_m + sqrt(V_m) + sqrt(Q_m): the statistics that the
  published code takes, of each kind of questions separately. (That code sums the forget-to-retain ratios of the
  statistics instead, and scores the outputs of each linear layer; S_n here is the paper's.)
- M3: the vision tower and the language model are ranked separately, because by M2 their scores have different scales.
  Each ranking covers all layers of its tower, as intended in the code. The code's hooks overwrite each other by name,
  so that it prunes the last three layers alone; here all layers are pruned.
- M4: V is the variance about the mean of z. The paper writes Z for that mean, which is the mean of |z|.
- M5: tau = 0.1 and eps = 1e-5 are the code's. The code reads all forget questions and as many retain questions; here
  `samples` questions of each set are read.
- The projector is not pruned, as published: only the MLPs of the two towers are scored.

Reference: Liu et al., "Modality-Aware Neuron Pruning for Unlearning in Multimodal Large Language Models", arXiv
2502.15910; https://github.com/franciscoliu/MANU. Not verified on the paper: the formulas are from summaries of it.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vkd_jax.config.fields import setting
from vkd_jax.methods import base
from vkd_jax.methods.neuron_statistics import EPS, TERMS, Statistics, collect, importance
from vkd_jax.methods.scope import Scope
from vkd_jax.types import Params, UserError

_INTO = r"(fc1|gate|up)/(kernel|bias)"  # [.., d, f] and [.., f]: a neuron is a column or an element
_OUT = r"(fc2|down)/kernel"  # [.., f, d]: a neuron is a row
_PATHS = re.compile(rf"(vision_tower/blocks/(?P<block>\d+)|language_model/blocks)/mlp/({_INTO}|(?P<out>{_OUT}))")


@dataclasses.dataclass(frozen=True)
class Manu(Scope):
    """Pruning of the MLP neurons that matter more for the forget set than for the retain set; nothing trains."""

    share: float = setting(0.05, "Share alpha of the neurons of each tower that is pruned.", above=0, below=1)
    terms: tuple[str, ...] = setting(TERMS, "Terms of the importance.", choices=TERMS, nonempty=True)
    threshold: float = setting(0.1, "Magnitude tau above which an activation counts as active.", minimum=0)
    samples: int = setting(256, "Largest number of questions per set that are read.", minimum=1)
    batch_size: int = setting(8, "Questions per batch.", minimum=1)

    def validate(self) -> None:
        """Also checks that the scope has neurons."""
        super().validate()
        if self.train == "lora":
            raise self.error("train", "adapters have no neurons to prune. Give visual or all.")
        if self.train == "visual" and self.blocks == 0:
            raise self.error("blocks", "MANU does not prune the projector. Give at least 1, or -1 for all blocks.")

    def trainable(self, paths: Iterable[str], model_config: Any) -> list[str]:
        """Selects the weights into and out of the neurons of the scope."""
        return [path for path in super().trainable(paths, model_config) if _PATHS.fullmatch(path)]

    def edit(self, context: base.Context) -> Params:
        """Scores the neurons and returns the weights of the scope with zeros at pruned neurons.

        Raises:
            UserError: the share is less than half a neuron.
        """
        matches = {path: _PATHS.fullmatch(path) for path in self.trainable(context.params, context.model_config)}
        blocks = sorted({int(match["block"]) for match in matches.values() if match["block"]})
        statistics, pruned = self.statistics(context), {}
        for tower in statistics["forget"]:
            score = self.score({name: towers[tower] for name, towers in statistics.items() if tower in towers})
            if tower == "vision_tower":  # blocks outside the scope do not compete
                pruned |= zip(map(str, blocks), select_top(score[blocks], self.share), strict=True)
            else:
                pruned[None] = select_top(score, self.share)  # of all layers, whose weights are stacked
        return {
            path: _prune(context.params[path], pruned[match["block"]], rows=bool(match["out"]))
            for path, match in matches.items()
        }

    def losses(self) -> Mapping[str, base.LossFn]:
        """Returns no losses, because nothing trains."""
        return {}

    def score(self, statistics: Mapping[str, Statistics]) -> np.ndarray:
        """Computes S_n of one tower's neurons: [layers, f].

        Args:
            statistics: of the sets "forget" and "retain", and of "forget_text" and "retain_text" or of neither.
        """
        forget, retain = (
            importance(statistics[name], statistics.get(f"{name}_text"), self.terms) for name in ("forget", "retain")
        )
        return forget / (retain + EPS)

    def statistics(self, context: base.Context) -> dict[str, dict[str, Statistics]]:
        """Computes {set: {tower: statistics}} of the towers in scope; see `neuron_statistics.collect`."""
        names = ["forget", "retain"]
        if self.train == "all" and {"forget_text", "retain_text"} <= set(context.sets):
            names += ["forget_text", "retain_text"]
        return collect(
            context,
            names,
            threshold=self.threshold,
            samples=self.samples,
            batch_size=self.batch_size,
            language_model=self.train == "all",
        )


def select_top(scores: np.ndarray, share: float) -> np.ndarray:
    """Selects the round(share * size) highest scores: bool of the same shape. The first of equal scores win.

    Raises:
        UserError: the share is less than half a neuron.
    """
    count = round(share * scores.size)
    if not count:
        raise UserError(f"method.share: {share} of {scores.size} neurons is less than one. Give a larger share.")
    selected = np.zeros(scores.size, bool)
    selected[np.argsort(-scores, axis=None, kind="stable")[:count]] = True
    return selected.reshape(scores.shape)


def _prune(weight: jax.Array, pruned: np.ndarray, *, rows: bool) -> jax.Array:
    """Sets a weight to zero at pruned neurons; its dtype and sharding stay.

    Args:
        weight: a kernel into the neurons [.., d, f], a bias [.., f], or with `rows` a kernel out of them [.., f, d].
        pruned: bool [.., f], with the same leading layer axis as the weight or none.
        rows: whether a neuron is a row of the weight.
    """
    if rows:
        mask = pruned[..., None]
    else:
        mask = pruned if weight.ndim == pruned.ndim else pruned[..., None, :]
    return jax.device_put(jnp.where(mask, jnp.zeros((), weight.dtype), weight), weight.sharding)
