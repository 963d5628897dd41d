"""MANU, modality-aware neuron unlearning: prunes MLP neurons that matter for the forget set; nothing is trained.

A neuron n is one inner channel of an MLP, z its activation at a token (what feeds the MLP's last layer). Over the
tokens of questions with a picture (m) and of text alone (t) let Z = mean |z|, N = share of |z| > tau, V = variance of
z, Q = mean z^2, and c(x) = |x_m - x_t| / (x_m + x_t + eps). For a set D of people

    I(D, n) = c(Z) + c(N) + sqrt(V_m + V_t) + sqrt(c(Q))         (abs, freq, var, rms)
    S_n     = I(forget, n) / (I(retain, n) + eps)

and the neurons with the top share alpha of S_n are pruned (published: 2, 3, 5 and 10 %). All weights of a pruned
neuron become zero, those into it, their bias, and those out of it. So its activation is zero, and so is the gradient
of each of these weights: no later training by gradients brings the neuron back, a relearning attack included.

What is assumed, as the paper is silent or differs from its code:
- M1: every real token counts once, of pictures and of text, prompt and answer; padding never does. N and Q are shares
  and means, where the paper has counts and sums: the same, if both kinds of questions have as many tokens.
- M2: text alone never reaches the vision tower, and each c there would be 1, whatever the neuron. So for it, and for
  both towers where the data have no questions of text alone, I is Z_m + N_m + sqrt(V_m) + sqrt(Q_m): the statistics
  that the published code takes, of each kind of questions by itself. (That code adds up the forget-to-retain ratios
  of the statistics instead, and scores the outputs of each linear layer; here S_n is the paper's.)
- M3: the vision tower and the language model are ranked apart, since by M2 their scores have two scales, each over all
  its layers together, as in the code. Its hooks give all layers the names of the last three, so that it prunes only
  those; here all are pruned.
- M4: V is taken about the mean of z. The paper writes Z for it, which is the mean of |z|.
- M5: tau = 0.1 and eps = 1e-5 are the code's, which looks at all forget questions and as many to retain; here at
  `samples` of each set.
- The projector is not pruned, as published: only the MLPs of the two towers are scored.

Reference: Liu et al., "Modality-Aware Neuron Pruning for Unlearning in Multimodal Large Language Models", arXiv
2502.15910; https://github.com/franciscoliu/MANU. The formulas are from summaries of the paper, which was not at hand.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vkd_jax.config.fields import setting
from vkd_jax.data.batching import padded_rows, rng
from vkd_jax.methods import base
from vkd_jax.methods.scope import Scope
from vkd_jax.models.base import bind
from vkd_jax.runtime import multihost
from vkd_jax.types import Params, UserError

TERMS = ("abs", "freq", "var", "rms")
EPS = 1e-5
_INTO = r"(fc1|gate|up)/(kernel|bias)"  # [.., d, f] and [.., f]: a column, and an element
_OUT = r"(fc2|down)/kernel"  # [.., f, d]: a row
_PATHS = re.compile(rf"(vision_tower/blocks/(?P<block>\d+)|language_model/blocks)/mlp/({_INTO}|(?P<out>{_OUT}))")


class Statistics(NamedTuple):
    """Of each neuron over the tokens of one kind of questions; arrays of one shape, [layers, f]."""

    mean: np.ndarray  # mean z
    mean_abs: np.ndarray  # mean |z|
    active_share: np.ndarray  # share of |z| > tau
    mean_square: np.ndarray  # mean z^2

    @property
    def variance(self) -> np.ndarray:
        """Of z."""
        return np.maximum(self.mean_square - self.mean**2, 0.0)  # rounding may leave less than nothing


@dataclasses.dataclass(frozen=True)
class Manu(Scope):
    """MANU: pruning of neurons, with train=visual of the vision tower's last `blocks` blocks, else of both towers."""

    share: float = setting(0.05, "Share alpha of the neurons of each tower that is pruned.", above=0, below=1)
    terms: tuple[str, ...] = setting(TERMS, "Terms of the importance.", choices=TERMS, nonempty=True)
    threshold: float = setting(0.1, "Magnitude tau from which an activation counts as active.", minimum=0)
    samples: int = setting(256, "Largest number of questions per set that are read.", minimum=1)
    batch_size: int = setting(8, "Questions per batch.", minimum=1)

    def validate(self) -> None:
        """Also refuses scopes without neurons."""
        super().validate()
        if self.train == "lora":
            raise self.error("train", "adapters have no neurons to prune. Give visual or all.")
        if self.train == "visual" and self.blocks == 0:
            raise self.error("blocks", "MANU leaves the projector alone. Give at least 1, or -1 for all blocks.")

    def trainable(self, paths: Iterable[str], model_config: Any) -> list[str]:
        """The paths of the weights that may be pruned: into and out of the neurons of the scope."""
        return [path for path in super().trainable(paths, model_config) if _PATHS.fullmatch(path)]

    def edit(self, context: base.Context) -> Params:
        """Scores the neurons and prunes: returns the weights with zeros at pruned neurons.

        Raises:
            UserError: the share is less than half a neuron.
        """
        found = {path: _PATHS.fullmatch(path) for path in self.trainable(context.params, context.model_config)}
        blocks = sorted({int(match["block"]) for match in found.values() if match["block"]})
        statistics, pruned = self._statistics(context), {}
        for tower in statistics["forget"]:
            score = self.score({name: towers[tower] for name, towers in statistics.items() if tower in towers})
            if tower == "vision_tower":  # blocks outside the scope do not compete
                pruned |= zip(map(str, blocks), select_top(score[blocks], self.share), strict=True)
            else:
                pruned[None] = select_top(score, self.share)  # of all layers, whose weights are stacked
        return {
            path: _without(context.params[path], pruned[match["block"]], rows=bool(match["out"]))
            for path, match in found.items()
        }

    def losses(self) -> Mapping[str, base.LossFn]:
        """Nothing trains."""
        return {}

    def score(self, found: Mapping[str, Statistics]) -> np.ndarray:
        """S_n, of one tower's statistics by set: "forget", "retain" and, both or neither, the same with "_text"."""
        forget, retain = (
            importance(found[name], found.get(f"{name}_text"), self.terms) for name in ("forget", "retain")
        )
        return forget / (retain + EPS)

    def _statistics(self, context: base.Context) -> dict[str, dict[str, Statistics]]:
        """{set: {tower: statistics}}, of the towers that this scope prunes."""

        def sums(neurons, real):
            z = jnp.where(real[..., None], neurons.astype(jnp.float32), 0)
            size = jnp.abs(z)
            kinds = z, size, size > self.threshold, jnp.square(z)
            return jnp.sum(real), Statistics(*(jnp.sum(kind, axis=(0, 1), dtype=jnp.float32) for kind in kinds))

        @jax.jit
        def of_batch(params, batch, new):
            found = bind(context.graphdef, params).neurons(
                batch.tokens, batch.mask, lambda z, valid: sums(z, valid & new[:, None]), images=batch.images
            )
            if "vision_tower" in found:
                found["vision_tower"] = jax.tree.map(lambda *x: jnp.stack(x), *found["vision_tower"])
            return found if self.train == "all" else {"vision_tower": found["vision_tower"]}  # the rest is not computed

        names = ["forget", "retain"]
        if self.train == "all" and {"forget_text", "retain_text"} <= set(context.sets):
            names += ["forget_text", "retain_text"]
        statistics = {}
        for name in names:
            encoded = context.sets[name]
            rows = rng(context.seed, f"manu/{name}").permutation(len(encoded))[: self.samples]
            total = None
            for part in padded_rows(len(rows), self.batch_size):
                new = np.diff(part, prepend=-1) > 0  # the last batch repeats a row, which counts once
                found = of_batch(context.params, encoded.batch(rows[part]), new)
                found = jax.tree.map(lambda x: multihost.gather(x).astype(np.float64), found)
                total = found if total is None else jax.tree.map(np.add, total, found)
            statistics[name] = {
                tower: Statistics(*(x / count[:, None] for x in sums)) for tower, (count, sums) in total.items()
            }
        return statistics


def importance(pictured: Statistics, text: Statistics | None = None, terms: Iterable[str] = TERMS) -> np.ndarray:
    """I(D, n), of the statistics of questions with a picture and, if there are any, of text alone.

    Without the latter each term is the statistic itself: see M2 of this module.
    """
    variance = pictured.variance + (0.0 if text is None else text.variance)

    def contrast(field: str) -> np.ndarray:
        x = getattr(pictured, field)
        if text is None:
            return x
        y = getattr(text, field)
        return np.abs(x - y) / (x + y + EPS)

    parts = {
        "abs": contrast("mean_abs"),
        "freq": contrast("active_share"),
        "var": np.sqrt(variance),
        "rms": np.sqrt(contrast("mean_square")),
    }
    return sum(parts[term] for term in terms)


def select_top(scores: np.ndarray, share: float) -> np.ndarray:
    """Which neurons have the highest scores: bool like `scores`, round(share * size) of them; the first of equals.

    Raises:
        UserError: that is none.
    """
    count = round(share * scores.size)
    if not count:
        raise UserError(f"method.share={share}: of {scores.size} neurons that is none; give a larger share.")
    chosen = np.zeros(scores.size, bool)
    chosen[np.argsort(-scores, axis=None, kind="stable")[:count]] = True
    return chosen.reshape(scores.shape)


def _without(weight: jax.Array, pruned: np.ndarray, *, rows: bool) -> jax.Array:
    """The weight with zeros at pruned neurons, in its dtype and its place.

    Args:
        weight: into the neurons, [.., d, f] or a bias [.., f]; or with `rows` out of them, [.., f, d].
        pruned: bool [.., f], with the same leading layer axis or none.
        rows: which of the two.
    """
    if rows:
        where = pruned[..., None]
    else:
        where = pruned if weight.ndim == pruned.ndim else pruned[..., None, :]
    return jax.device_put(jnp.where(where, jnp.zeros((), weight.dtype), weight), weight.sharding)
