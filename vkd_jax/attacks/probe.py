"""Linear probe: do the visual features still identify the people to forget?

Only the vision tower and the projector run, without a question. An image is represented by the mean x of its tokens at
a tap, standardized with the mean and the standard deviation of the training images. One ridge regression per person,
in closed form,

    min_W |X W - (Y - y)|^2 + ridge * d * |W|^2,    X [n, d], Y [n, people] one-hot, y the mean of its rows,

predicts the person with the largest entry of y + x W. The dual W = X' (X X' + ridge * d * I)^-1 (Y - y) needs n^2
numbers, independent of d.

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

SetExample = tuple[str, Example]  # the name of a set, and one of its questions with an image

FOLD = 4  # without holdout images, every fourth image of each person is a test image


@dataclasses.dataclass(frozen=True)
class Probe(Section):
    """Identifies the person in an image by its features alone."""

    SECTION: ClassVar[str] = "attacks.probe"
    ridge: float = setting(0.01, "Ridge penalty per feature.", above=0, maximum=1e6)

    TITLE: ClassVar[str] = "Probe: do the visual features still identify the people?"
    ABOUT: ClassVar[str] = (
        "A linear classifier is trained to predict the person from the output of the vision tower (features) or of the "
        "projector (projector), and tested on other images of the people to forget. Faces can be distinguished even by "
        "a model that was never trained on these people, so only an accuracy above that of the *retain-only* model is "
        "a trace of the training data. With randomly permuted labels the classifier is at chance."
    )
    METRIC: ClassVar[str] = "accuracy"
    VARIANTS: ClassVar[Mapping[str, str]] = {"random_labels": f"{TAPS[0]}, random labels"}

    def check(self, config: RunConfig) -> None:
        """All valid settings can run."""

    def run(self, subject: Subject) -> Records:
        """One record per test image and classifier."""
        train, test = split(subject.asked, subject.sets)
        if not test:
            return []
        images = [e.image for _, e in (*train, *test)]
        means = Answerer(subject.model, batch_size=subject.config.eval.batch_size).means(images)
        labels = np.array([e.person for _, e in train])
        permuted = rng(subject.seed, "attacks/probe").permutation(labels)
        records = []
        for variant, tap, names in (
            *((tap, tap, labels) for tap in TAPS),
            ("random_labels", TAPS[0], permuted),
        ):
            train_means, test_means = np.split(means[tap], [len(train)])
            predictions = classify(train_means, names, test_means, self.ridge)
            for (set_name, e), name in zip(test, predictions, strict=True):
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
        """The share of images whose person is predicted correctly."""
        return base.accuracy(records)


def split(
    questions: Mapping[str, Sequence[Example]], sets: Sequence[EvalSet]
) -> tuple[list[SetExample], list[SetExample]]:
    """Training images of all people, and test images of the same people, each with the name of its set.

    If a benchmark has no holdout images of the people to forget, every fourth image of each of them is a test image.
    """
    by_role = {
        role: [(s.name, e) for s in sets if s.role is role for e in _one_per_image(questions.get(s.name, ()))]
        for role in Role
    }
    train, test = by_role[Role.FORGET] + by_role[Role.RETAIN], by_role[Role.FORGET_HOLDOUT]
    if not test:
        count: dict[str, int] = {}
        for item in by_role[Role.FORGET]:
            count[item[1].person] = count.get(item[1].person, 0) + 1
            if count[item[1].person] % FOLD == 0:
                test.append(item)
        train = [item for item in train if item not in test]
    known = {e.person for _, e in train}
    return train, [item for item in test + by_role[Role.RETAIN_HOLDOUT] if item[1].person in known]


def _one_per_image(examples: Iterable[Example]) -> list[Example]:
    """One question for each image of a person."""
    return list({e.image_id: e for e in examples if e.image is not None and e.person}.values())


def classify(train: np.ndarray, labels: np.ndarray, test: np.ndarray, ridge: float) -> np.ndarray:
    """Predicts the label of each test row by one-against-all ridge regression.

    Args:
        train: [n, d].
        labels: [n], of any sortable type.
        test: [m, d].
        ridge: penalty per feature.

    Returns:
        [m], values of `labels`.
    """
    names, scores = ridge_scores(train, labels, test, ridge)
    return names[np.argmax(scores, axis=1)]


def ridge_scores(
    train: np.ndarray, labels: np.ndarray, test: np.ndarray, ridge: float
) -> tuple[np.ndarray, np.ndarray]:
    """The different labels, and the regression's score of each for each test row, [m, labels]; see `classify`."""
    train, test = train.astype(np.float64), test.astype(np.float64)
    center, deviation = train.mean(0), train.std(0)
    deviation[deviation == 0] = 1  # a constant feature has no information
    train, test = (train - center) / deviation, (test - center) / deviation
    names, index = np.unique(labels, return_inverse=True)
    targets = np.eye(len(names))[index]
    kernel = train @ train.T + ridge * train.shape[1] * np.eye(len(train))
    dual = np.linalg.solve(kernel, targets - targets.mean(0))
    return names, targets.mean(0) + test @ (train.T @ dual)
