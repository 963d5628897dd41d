"""Membership inference: do the likelihoods of true answers reveal which people a model was trained on?

For the true answer y of L tokens (end of sequence included) after its image and question, log p_t is the
log-probability of token t. Four scores:

    loss      mean_t log p_t
    zlib      mean_t log p_t / (bytes of zlib(y))
    min_k     mean of the K lowest log p_t, K = max(1, ceil(share * L))
    min_k++   the same of (log p_t - mu_t) / sigma_t, with mu_t and sigma_t the mean and the standard deviation of log p
              over the vocabulary at t, weighed by p

A larger score suggests a member. AUC is the probability that a member's score is larger than a non-member's, with ties
counted as one half. `score` = clip(1 - 2 |AUC - 1/2|, 0, 1) of a cell is 1 if members and non-members are
indistinguishable.

References: Yeom et al., arXiv 1709.01604 (loss); Carlini et al., arXiv 2012.07805 (zlib); Shi et al., arXiv 2310.16789
(min_k); Zhang et al., arXiv 2404.02936 (min_k++).
"""

import dataclasses
import math
import zlib
from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from vkd_jax.attacks import base
from vkd_jax.attacks.base import Records, Subject
from vkd_jax.config.fields import Section, setting
from vkd_jax.config.schema import RunConfig
from vkd_jax.evaluation.inference import Answerer, TokenScores
from vkd_jax.evaluation.metrics import intervals
from vkd_jax.results import AttackCell
from vkd_jax.types import Role

HELD_OUT = "held_out"  # the set of records about people whom no model was trained on
MIN_DEVIATION = 1e-6  # lower bound of a divisor: the deviation is 0 if the model is certain of a token


@dataclasses.dataclass(frozen=True)
class Membership(Section):
    """Scores of the people to forget against scores of people whom no model was trained on."""

    SECTION: ClassVar[str] = "attacks.membership"
    share: float = setting(
        0.2, "Share of an answer's tokens, the least probable ones, that min_k and min_k++ read.", above=0, maximum=1
    )
    held_out: str = setting(
        "",
        "Folder of images and questions, in the format of the benchmark `folder`, about people whom no model was "
        "trained on, with the wording of the forget set. Synthetic people need none.",
    )

    TITLE: ClassVar[str] = "Membership: were these people in the training data?"
    ABOUT: ClassVar[str] = (
        "An attacker who knows the true answers measures how probable they are under the model, for the people to "
        "forget and for people whom no model was trained on, with the same wording. An AUC of 0.50 means that the two "
        "groups are indistinguishable. An AUC near 1 reveals the people to forget by answers that are too probable, "
        "and an AUC near 0 by answers that are avoided. The figure to aim at is that of the retain-only model."
    )
    METRIC: ClassVar[str] = "auc"
    VARIANTS: ClassVar[Mapping[str, str]] = {}

    def check(self, config: RunConfig) -> None:
        """All valid settings can run."""

    def run(self, subject: Subject) -> Records:
        """Four scores per question about the people to forget and the held-out people; [] without held-out people."""
        if not subject.held_out:
            return []
        (forget_set,) = subject.with_role(Role.FORGET)
        items = [(forget_set, e) for e in subject.forgets] + [(HELD_OUT, e) for e in subject.held_out]
        examples = [e for _, e in items]
        answerer = Answerer(subject.model, batch_size=subject.config.eval.batch_size)
        images = {(name, e.image_id): e.image for name, e in items}  # sets may use the same image ids
        rows = {key: i for i, key in enumerate(images)}
        encoded = answerer.encode_images(list(images.values())).for_prompts(
            [[rows[name, e.image_id]] for name, e in items]
        )
        scored = answerer.score_tokens([e.question for e in examples], [e.answer for e in examples], encoded)
        return [
            {
                "variant": variant,
                "set": name,
                "id": e.id,
                "person": e.person,
                "member": name == forget_set,
                "score": score,
            }
            for (name, e), tokens in zip(items, scored, strict=True)
            for variant, score in scores(tokens, e.answer, self.share).items()
        ]

    def summarize(self, records: Mapping[str, Records]) -> list[AttackCell]:
        """The AUC of each score, with its interval over people; see `intervals.auc`."""
        cells = []
        for model, answers in records.items():
            for fields, items in base.grouped(answers, by_set=False):
                groups: dict[bool, dict[str, list[float]]] = {True: {}, False: {}}
                for item in items:
                    groups[item["member"]].setdefault(item["person"] or item["id"], []).append(item["score"])
                area = intervals.auc(groups[True], groups[False])
                hidden = float(np.clip(1 - 2 * abs(area.mean - 0.5), 0, 1))
                cells.append(AttackCell(model=model, score=hidden, **fields, **dataclasses.asdict(area)))
        return cells


def scores(tokens: TokenScores, text: str, share: float) -> dict[str, float]:
    """The four scores of one text, by variant."""
    mean = float(tokens.log_probs.astype(float).mean())
    standardized = (tokens.log_probs - tokens.means) / np.maximum(tokens.deviations, MIN_DEVIATION)
    return {
        "loss": mean,
        "zlib": mean / len(zlib.compress(text.encode())),
        "min_k": lowest(tokens.log_probs, share),
        "min_k++": lowest(standardized, share),
    }


def lowest(values: np.ndarray, share: float) -> float:
    """The mean of the lowest `share` of the values, and of at least one value."""
    count = max(1, math.ceil(share * len(values)))
    return float(np.sort(values.astype(float))[:count].mean())
