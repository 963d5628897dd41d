"""The protocol of an attack, the model under attack, and what several attacks share.

Every attack runs alike on the vanilla, the unlearned and the retain-only model. Its figure for the unlearned model is
only meaningful in comparison with the other two.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from vkd_jax.checkpoints.bundle import ModelBundle
from vkd_jax.config.schema import RunConfig
from vkd_jax.evaluation import evaluate
from vkd_jax.evaluation.inference import Answerer
from vkd_jax.evaluation.metrics import intervals
from vkd_jax.models import lora, quantize
from vkd_jax.results import ATTEMPT_FIELDS, AttackCell
from vkd_jax.types import EvalSet, Example, Params, Role

Records = list[dict]
ANSWER_FIELDS = ("set", "id", "person", "question", "answer", "prediction", "correct")  # of a record of the evaluation


@dataclasses.dataclass(frozen=True)
class Subject:
    """One model under attack, with everything that an attacker may use."""

    name: str  # vanilla | unlearned | retain_only
    model: ModelBundle
    asked: Mapping[str, Sequence[Example]]  # questions of each evaluation set
    sets: Sequence[EvalSet]  # with their roles
    answers: Records  # the model's answers in the evaluation
    forgets: Sequence[Example]  # the questions with an image that unlearning trained on
    held_out: Sequence[Example]  # such questions about people whom no model was trained on; may be empty
    config: RunConfig
    mesh: jax.sharding.Mesh
    folder: Path  # for files of attacks that train

    @property
    def seed(self) -> int:
        """Seed of all draws. It is not the seed of the run, so that runs that share a model attack it alike."""
        return self.config.attacks.seed

    def with_role(self, *roles: Role) -> list[str]:
        """The names of the evaluation sets with these roles."""
        return [eval_set.name for eval_set in self.sets if eval_set.role in roles]

    def ask_sets(
        self,
        model: ModelBundle,
        sets: Mapping[str, Sequence[Example]],
        *,
        context: Mapping[tuple[str, str], Sequence[Example]] | None = None,
        soft_tokens: np.ndarray | None = None,
    ) -> Records:
        """Evaluates the model, or a changed copy, under the first protocol of the run.

        Args:
            model: the model or its copy.
            sets: the questions of each set.
            context: see `evaluate.evaluate`.
            soft_tokens: see `Answerer`.
        """
        options = self.config.eval
        return evaluate.evaluate(
            Answerer(model, batch_size=options.batch_size, soft_tokens=soft_tokens),
            sets,
            dataclasses.replace(options, protocol=options.protocols[0], shots=0),
            context=context,
        )

    def unattacked(self, sets: Mapping[str, Sequence[Example]]) -> Records:
        """The records of `ask_sets` for the unchanged model, reused from `answers` if these were asked the same way."""
        protocol = self.config.eval.protocols[0]
        answered = {
            (record["set"], record["id"]): record
            for record in self.answers
            if record["protocol"] in (protocol, record["task"]) and "worked_example" not in record
        }
        records = [answered.get((name, example.id)) for name, examples in sets.items() for example in examples]
        return self.ask_sets(self.model, sets) if None in records else records


class Attack(Protocol):
    """Protocol of an attack: a frozen dataclass of settings, with these constants and methods."""

    TITLE: ClassVar[str]  # heading in the report
    ABOUT: ClassVar[str]  # what the attack does and how to read its figures; Markdown
    METRIC: ClassVar[str]  # metric of its figures, a key of `metrics.METRICS`
    VARIANTS: ClassVar[Mapping[str, str]]  # titles of variants; without a title, a variant is shown by its name

    def check(self, config: RunConfig) -> None:
        """Validates the settings against the run, before anything runs.

        Raises:
            UserError: the settings cannot work; the message says why.
        """
        ...

    def run(self, subject: Subject) -> Records:
        """Attacks one model.

        Returns:
            One record per question and attempt: {"set", "id", "person", ..., "correct" or another value}, with the
            fields of `results.ATTEMPT_FIELDS` that describe the attempt.
        """
        ...

    def summarize(self, records: Mapping[str, Records]) -> list[AttackCell]:
        """Computes the cells of all models.

        Args:
            records: the records of `run`, by model.
        """
        ...


def choices(examples: Iterable[Example]) -> list[Example]:
    """The questions that attacks ask: those with an image and options, or all with an image if none has options."""
    with_image = [e for e in examples if e.image is not None]
    return [e for e in with_image if e.options] or with_image


def questions(subject: Subject, *roles: Role) -> dict[str, list[Example]]:
    """`choices` of each evaluation set with one of these roles; sets without such questions are left out."""
    sets = {name: choices(subject.asked.get(name, ())) for name in subject.with_role(*roles)}
    return {name: examples for name, examples in sets.items() if examples}


def attack_record(variant: str, record: Mapping, **fields: Any) -> dict[str, Any]:
    """The record of an attack, from a record of `Subject.ask_sets` and the fields that describe the attempt."""
    return {"variant": variant, **fields, **{key: record[key] for key in ANSWER_FIELDS}}


def merged(params: Params) -> Params:
    """Merges each LoRA adapter into its kernel, which is dequantized if it was quantized.

    A kernel stays as it is if its adapter is still zero, as initialized.
    """
    plain = lora.join(params)
    for path, adapted in lora.adapters(plain).items():
        plain[path] = kernel = adapted.weight
        if jnp.any(adapted.b):
            kernel = quantize.dequantize(kernel, jnp.float32)
            plain[path] = jax.device_put(kernel + adapted.a @ adapted.b * adapted.scale, kernel.sharding)
    return plain


def grouped(records: Records, by_set: bool = True) -> list[tuple[dict[str, Any], Records]]:
    """Groups the records of one model by cell, each group with the fields of its cell.

    Args:
        records: of one model.
        by_set: whether each set has its own cells; otherwise the `set` of all cells is "".
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
    """The accuracy of each cell, with its 95 % interval over people; see `grouped`."""
    cells = []
    for model, answers in records.items():
        for fields, items in grouped(answers, by_set):
            correct = [bool(item["correct"]) for item in items]
            figure = intervals.proportion(correct, [item["person"] for item in items])
            cells.append(AttackCell(model=model, correct=sum(correct), **fields, **dataclasses.asdict(figure)))
    return cells
