"""What an attack is, and what several of them need.

An attack is run alike on the unlearned model, on the vanilla model and on one that never met the people to forget: only
beside these two does its figure say something.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
import ml_collections

from vkd_jax.checkpoints.bundle import ModelBundle
from vkd_jax.evaluation import evaluate, metrics
from vkd_jax.evaluation.inference import Answerer
from vkd_jax.methods import Method
from vkd_jax.models import lora, quantize
from vkd_jax.types import Example, Params

Records = list[dict]
KEPT = ("set", "id", "person", "question", "answer", "prediction", "correct")  # of the evaluation's records
SETS = {"test": "other pictures", "retain": "people to keep"}  # as variants name them; the forget set goes unnamed
Summary = dict[str, dict[str, dict]]  # variant -> model -> {"mean", "low", "high", "n", ..}


@dataclasses.dataclass(frozen=True)
class Subject:
    """One model under attack, with all that an attacker may use."""

    name: str  # vanilla | unlearned | retain_only
    model: ModelBundle
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

    def ask(self, model: ModelBundle, examples: Sequence[Example]) -> Records:
        """The records of `evaluate.evaluate` for the model, or a changed copy of it, by the run's first protocol."""
        return self.ask_sets(model, {"forget": examples})

    def ask_sets(self, model: ModelBundle, sets: Mapping[str, Sequence[Example]]) -> Records:
        """`ask` of several sets in one pass."""
        options = self.config.eval
        return evaluate.evaluate(
            Answerer(model, batch_size=options.batch_size),
            sets,
            protocol=evaluate.check(options.protocol)[0],
            max_new_tokens=options.max_new_tokens,
        )

    def unattacked(self, sets: Mapping[str, Sequence[Example]]) -> Records:
        """What `ask_sets` gives for the model as it is: out of its answers, where they were asked in the same way."""
        protocol = evaluate.check(self.config.eval.protocol)[0]
        answered = {
            (record["set"], record["id"]): record
            for record in self.answers
            if record["protocol"] in (protocol, record["task"]) and "worked_example" not in record
        }
        found = [answered.get((name, example.id)) for name, part in sets.items() for example in part]
        return self.ask_sets(self.model, sets) if None in found else found


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


def questions(subject: Subject, *names: str) -> dict[str, list[Example]]:
    """`choices` of some of the evaluation's sets, without those that have none."""
    found = {name: choices(subject.asked.get(name, ())) for name in names}
    return {name: part for name, part in found.items() if part}


def named(variant: str, name: str) -> str:
    """A variant's name, asked of the questions of that set."""
    return variant if name == "forget" else f"{variant}, {SETS.get(name, name)}"


def kept(variant: str, record: Mapping, **more: Any) -> dict[str, Any]:
    """What an attack keeps of a record of `Subject.ask`."""
    return {"variant": variant, **more, **{key: record[key] for key in KEPT}}


def merged(params: Params) -> Params:
    """The parameters without adapters: each is added to its kernel, which becomes floats if it was quantised.

    One that is still the zero that it began as leaves its kernel as it is.
    """
    plain = lora.join(params)
    for path, adapted in lora.adapters(plain).items():
        plain[path] = kernel = adapted.weight
        if jnp.any(adapted.b):
            kernel = quantize.floats(kernel, jnp.float32)
            plain[path] = jax.device_put(kernel + adapted.a @ adapted.b * adapted.scale, kernel.sharding)
    return plain


def accuracy(records: Mapping[str, Records]) -> Summary:
    """The share of right answers of every variant and model, with its 95 % Wilson interval."""
    found: Summary = {}
    for model, items in records.items():
        for variant in dict.fromkeys(item["variant"] for item in items):
            summary = metrics.summarise([{"correct": i["correct"]} for i in items if i["variant"] == variant])
            found.setdefault(variant, {})[model] = {"mean": summary.pop("accuracy"), **summary}
    return found
