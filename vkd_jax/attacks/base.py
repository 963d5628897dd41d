"""What an attack is, and what several of them need.

An attack is run alike on the unlearned model, on the vanilla model and on one that never met the people to forget: only
beside these two does its figure say something.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Protocol

import jax
import ml_collections

from vkd_jax import evaluate, metrics
from vkd_jax.loaded import Loaded
from vkd_jax.methods import Method
from vkd_jax.types import Example

Records = list[dict]
Summary = dict[str, dict[str, dict]]  # variant -> model -> {"mean", "low", "high", "n", ..}


@dataclasses.dataclass(frozen=True)
class Subject:
    """One model under attack, with all that an attacker may use."""

    name: str  # vanilla | unlearned | retain_only
    model: Loaded
    asked: Mapping[str, Sequence[Example]]  # the evaluation's questions of each set
    answers: Records  # what the model answered to them
    forgets: Sequence[Example]  # the questions with a picture, about the people to forget, that unlearning trained on
    held_out: Sequence[Example]  # the same kind of questions about people whom no model ever met; may be empty
    config: ml_collections.ConfigDict  # of the run
    mesh: jax.sharding.Mesh
    folder: Path  # for what an attack that trains writes

    @property
    def seed(self) -> int:
        """Of all draws: not the run's, so that a model that several runs were given is attacked in one way."""
        return self.config.attacks.seed

    def ask(self, model: Loaded, examples: Sequence[Example]) -> Records:
        """The records of `evaluate.evaluate` for the model, or a changed copy of it, by the run's first protocol."""
        options = self.config.eval
        return evaluate.evaluate(
            model.answerer(options.batch_size),
            {"forget": examples},
            protocol=evaluate.check(options.protocol)[0],
            max_new_tokens=options.max_new_tokens,
        )


class Attack(Protocol):
    """A frozen dataclass of settings."""

    TITLE: ClassVar[str]  # in the report
    ABOUT: ClassVar[str]  # what was tried and how the figures read, in a sentence or two
    UNIT: ClassVar[str]  # "right answers" or "AUC"

    def check(self, config: ml_collections.ConfigDict, method: Method) -> None:
        """Refuses, before anything is run, settings that cannot work.

        Raises:
            UserError: what is wrong.
        """
        ...

    def run(self, subject: Subject) -> Records:
        """One record per item and variant: {"variant", "set", "id", "person", ..., "correct" or another value}."""
        ...

    def summarise(self, records: Mapping[str, Records]) -> Summary:
        """Of all models' records, every variant of every model, with its 95 % interval."""
        ...


def choices(examples: Iterable[Example]) -> list[Example]:
    """The questions that attacks ask: with a picture and options to choose from, or, where there are none, any kind."""
    shown = [e for e in examples if e.image is not None]
    return [e for e in shown if e.options] or shown


def accuracy(records: Mapping[str, Records]) -> Summary:
    """The share of right answers of every variant and model, with its 95 % Wilson interval."""
    found: Summary = {}
    for model, items in records.items():
        for variant in dict.fromkeys(item["variant"] for item in items):
            summary = metrics.summarise([{"correct": i["correct"]} for i in items if i["variant"] == variant])
            found.setdefault(variant, {})[model] = {"mean": summary.pop("accuracy"), **summary}
    return found
