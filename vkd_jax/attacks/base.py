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

from vkd_jax.checkpoints.bundle import ModelBundle
from vkd_jax.config.schema import RunConfig
from vkd_jax.evaluation import evaluate
from vkd_jax.evaluation.inference import Answerer
from vkd_jax.evaluation.metrics import intervals
from vkd_jax.models import lora, quantize
from vkd_jax.results import ATTEMPT_FIELDS, AttackCell
from vkd_jax.types import EvalSet, Example, Params, Role

Records = list[dict]
ANSWER_FIELDS = ("set", "id", "person", "question", "answer", "prediction", "correct")  # of the evaluation's records


@dataclasses.dataclass(frozen=True)
class Subject:
    """One model under attack, with all that an attacker may use."""

    name: str  # vanilla | unlearned | retain_only
    model: ModelBundle
    asked: Mapping[str, Sequence[Example]]  # the evaluation's questions of each set
    sets: Sequence[EvalSet]  # what each of these sets measures
    answers: Records  # what the model answered to them
    forgets: Sequence[Example]  # the questions with a picture, about the people to forget, that unlearning trained on
    held_out: Sequence[Example]  # the same kind of questions about people whom no model ever met; may be empty
    config: RunConfig
    mesh: jax.sharding.Mesh
    folder: Path  # for what an attack that trains writes

    @property
    def seed(self) -> int:
        """Of all draws: not the run's, so that a model that several runs were given is attacked in one way."""
        return self.config.attacks.seed

    def with_role(self, *roles: Role) -> list[str]:
        """The names of the evaluation sets with these roles."""
        return [eval_set.name for eval_set in self.sets if eval_set.role in roles]

    def ask_sets(self, model: ModelBundle, sets: Mapping[str, Sequence[Example]]) -> Records:
        """The records of `evaluate.evaluate` for the model, or a changed copy of it, by the run's first protocol."""
        options = self.config.eval
        return evaluate.evaluate(
            Answerer(model, batch_size=options.batch_size),
            sets,
            protocol=options.protocols[0],
            max_new_tokens=options.max_new_tokens,
        )

    def unattacked(self, sets: Mapping[str, Sequence[Example]]) -> Records:
        """What `ask_sets` gives for the model as it is: out of its answers, where they were asked in the same way."""
        protocol = self.config.eval.protocols[0]
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
    METRIC: ClassVar[str]  # what its figures are, a key of `metrics.METRICS`
    VARIANTS: ClassVar[Mapping[str, str]]  # the title of each variant; one that is missing goes by its own name

    def check(self, config: RunConfig) -> None:
        """Refuses, before anything is run, settings that cannot work.

        Raises:
            UserError: what is wrong.
        """
        ...

    def run(self, subject: Subject) -> Records:
        """One record per item and variant: {"set", "id", "person", ..., "correct" or another value}, and those of
        `results.ATTEMPT_FIELDS` that say what was tried."""
        ...

    def summarize(self, records: Mapping[str, Records]) -> list[AttackCell]:
        """The figures of all models, given the records of each."""
        ...


def choices(examples: Iterable[Example]) -> list[Example]:
    """The questions that attacks ask: with a picture and options to choose from, or, where there are none, any kind."""
    shown = [e for e in examples if e.image is not None]
    return [e for e in shown if e.options] or shown


def questions(subject: Subject, *roles: Role) -> dict[str, list[Example]]:
    """`choices` of the evaluation sets with these roles, without those that have none."""
    found = {name: choices(subject.asked.get(name, ())) for name in subject.with_role(*roles)}
    return {name: examples for name, examples in found.items() if examples}


def attack_record(variant: str, record: Mapping, **fields: Any) -> dict[str, Any]:
    """What an attack keeps of a record of `Subject.ask_sets`, and what was tried."""
    return {"variant": variant, **fields, **{key: record[key] for key in ANSWER_FIELDS}}


def merged(params: Params) -> Params:
    """The parameters without adapters: each is added to its kernel, which becomes floats if it was quantised.

    One that is still the zero that it began as leaves its kernel as it is.
    """
    plain = lora.join(params)
    for path, adapted in lora.adapters(plain).items():
        plain[path] = kernel = adapted.weight
        if jnp.any(adapted.b):
            kernel = quantize.dequantize(kernel, jnp.float32)
            plain[path] = jax.device_put(kernel + adapted.a @ adapted.b * adapted.scale, kernel.sharding)
    return plain


def grouped(records: Records, by_set: bool = True) -> list[tuple[dict[str, Any], Records]]:
    """Records that belong to one cell, with the fields of that cell.

    Args:
        records: of one model.
        by_set: whether each set has cells of its own; otherwise the cells' `set` is "".
    """
    groups: dict[tuple, Records] = {}
    for record in records:
        key = (record["set"] if by_set else "", *(record.get(name) for name in ATTEMPT_FIELDS))
        groups.setdefault(key, []).append(record)
    return [
        ({"set": key[0]} | {name: items[0][name] for name in ATTEMPT_FIELDS if name in items[0]}, items)
        for key, items in groups.items()
    ]


def accuracy(records: Mapping[str, Records], by_set: bool = True) -> list[AttackCell]:
    """The share of correct answers of every cell, with its 95 % interval over people; see `grouped`."""
    cells = []
    for model, answers in records.items():
        for fields, items in grouped(answers, by_set):
            correct = [bool(item["correct"]) for item in items]
            figure = intervals.proportion(correct, [item["person"] for item in items])
            cells.append(AttackCell(model=model, correct=sum(correct), **fields, **dataclasses.asdict(figure)))
    return cells
