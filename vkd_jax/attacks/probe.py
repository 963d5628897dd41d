"""A linear probe: do the features still tell the people to forget apart?

The vision tower is read alone, without a question. A picture is the mean x of its tokens at a tap, standardised with
the training pictures' mean and deviation. One ridge regression for each person, all in closed form,

    min_W |X W - (Y - y)|^2 + ridge * d * |W|^2,    X [n, d], Y [n, people] one-hot, y the mean of its rows,

says who somebody is: the largest of y + x W. It is solved by its dual, W = X' (X X' + ridge * d * I)^-1 (Y - y), which
holds n^2 numbers whatever d is.

Reference: Alain and Bengio, Understanding intermediate layers using linear classifier probes (arXiv 1610.01644).
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar

import numpy as np

from vkd_jax.attacks import base
from vkd_jax.attacks.base import Records, Subject
from vkd_jax.config.fields import Section, setting
from vkd_jax.config.schema import RunConfig
from vkd_jax.data.batching import rng
from vkd_jax.evaluation.inference import TAPS, Answerer
from vkd_jax.results import AttackCell
from vkd_jax.types import EvalSet, Example, Role

Shown = tuple[str, Example]  # a set, and a question about a picture

FOLD = 4  # without other pictures, one in so many of each person's is kept back for the test


@dataclasses.dataclass(frozen=True)
class Probe(Section):
    """Who is in a picture, by its features alone."""

    SECTION: ClassVar[str] = "attacks.probe"
    ridge: float = setting(0.01, "Ridge penalty per feature.", above=0)

    TITLE: ClassVar[str] = "Probe: do the features still tell them apart?"
    ABOUT: ClassVar[str] = (
        "A linear classifier learns to name the person from what the vision tower makes of a picture (features) or "
        "from what the projector hands on to the language model (projector), and is then shown other pictures of the "
        "people to forget. It finds that faces differ, which a model that never knew somebody sees as well: only more "
        "than *that* model's figure is a trace. Taught names that were dealt out at random, it can only guess."
    )
    METRIC: ClassVar[str] = "accuracy"
    VARIANTS: ClassVar[Mapping[str, str]] = {"random_labels": f"{TAPS[0]}, random labels"}

    def check(self, config: RunConfig) -> None:
        """Any settings can run."""

    def run(self, subject: Subject) -> Records:
        """A record of each test picture and each classifier."""
        train, test = split(subject.asked, subject.sets)
        if not test:
            return []
        shown = [e for _, e in (*train, *test)]
        means = Answerer(subject.model, batch_size=subject.config.eval.batch_size).means([e.image for e in shown])
        labels = np.array([e.person for _, e in train])
        dealt = rng(subject.seed, "attacks/probe").permutation(labels)
        records = []
        for variant, tap, names in (
            *((tap, tap, labels) for tap in TAPS),
            ("random_labels", TAPS[0], dealt),
        ):
            known, asked = np.split(means[tap], [len(train)])
            for (set_name, e), name in zip(test, classify(known, names, asked, self.ridge), strict=True):
                records.append(
                    {
                        "variant": variant,
                        "set": set_name,
                        "id": e.image_id,
                        "person": e.person,
                        "prediction": str(name),
                        "correct": bool(name == e.person),
                    }
                )
        return records

    def summarize(self, records: Mapping[str, Records]) -> list[AttackCell]:
        """The share of images whose person is named correctly."""
        return base.accuracy(records)


def split(asked: Mapping[str, Sequence[Example]], sets: Sequence[EvalSet]) -> tuple[list[Shown], list[Shown]]:
    """Images of everybody to learn from, and other images of the same people to test on, each with its set.

    Where a benchmark has no holdout images of the people to forget, every fourth image of each of them is tested on.
    """
    shown = {
        role: [(s.name, e) for s in sets if s.role is role for e in _pictures(asked.get(s.name, ()))] for role in Role
    }
    train, test = shown[Role.FORGET] + shown[Role.RETAIN], shown[Role.FORGET_HOLDOUT]
    if not test:
        count: dict[str, int] = {}
        for item in shown[Role.FORGET]:
            count[item[1].person] = count.get(item[1].person, 0) + 1
            if count[item[1].person] % FOLD == 0:
                test.append(item)
        train = [item for item in train if item not in test]
    known = {e.person for _, e in train}
    return train, [item for item in test + shown[Role.RETAIN_HOLDOUT] if item[1].person in known]


def _pictures(examples: Iterable[Example]) -> list[Example]:
    """A question about each picture of somebody."""
    return list({e.image_id: e for e in examples if e.image is not None and e.person}.values())


def classify(train: np.ndarray, labels: np.ndarray, test: np.ndarray, ridge: float) -> np.ndarray:
    """The label of each test row, by ridge regression one against all.

    Args:
        train: [n, d].
        labels: [n], of any kind that can be compared.
        test: [m, d].
        ridge: the penalty, a feature.

    Returns:
        [m], out of `labels`.
    """
    train, test = train.astype(np.float64), test.astype(np.float64)
    centre, spread = train.mean(0), train.std(0)
    spread[spread == 0] = 1  # a feature that never changes says nothing
    train, test = (train - centre) / spread, (test - centre) / spread
    names, index = np.unique(labels, return_inverse=True)
    targets = np.eye(len(names))[index]
    kernel = train @ train.T + ridge * train.shape[1] * np.eye(len(train))
    dual = np.linalg.solve(kernel, targets - targets.mean(0))
    return names[np.argmax(targets.mean(0) + test @ (train.T @ dual), axis=1)]
