"""results.json as dataclasses.

`RunResults` is the only reader and writer of that file. `docs/results_format.md` documents every field.
"""

import dataclasses
import json
import os
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from vkd_jax.runtime import files, json_files, records, storage
from vkd_jax.runtime.dataclass_json import SIBLINGS, FormatError, decode, encode
from vkd_jax.runtime.figure_ranges import check_ranges
from vkd_jax.types import PATH, EvalSet, Role, UserError, check_argument

SCHEMA_VERSION = 2
FILE = "results.json"
# Fields of one attempt of an attack. Records of attacks/*/*.jsonl with equal fields and set belong to one cell.
ATTEMPT_FIELDS = ("variant", "attacker", "steps", "batch_size", "learning_rate", "share", "unit", "taught")
UNCHANGED = "unchanged"  # the variant of an attack that is the model before it
STRONGEST = "strongest"  # the variant that is the most successful of an attacker's budgets
QUESTION_TASKS = ("", "generation_", "cloze_", "suite_")  # prefixes of a kind of question, most informative first


@dataclasses.dataclass(frozen=True)
class Figure:
    """A mean with its 95 % interval.

    Args:
        mean: over the questions.
        low: lower end of the interval.
        high: upper end of the interval.
        n: number of questions.
        people: number of people that the interval resamples; 0 if it resamples questions or images.
    """

    mean: float
    low: float
    high: float
    n: int
    people: int = 0


@dataclasses.dataclass(frozen=True)
class Summary:
    """The answers to one kind of question of one set.

    Args:
        accuracy: correct / n.
        correct: number of correct answers.
        n: number of questions.
        low: lower end of the 95 % interval of the accuracy.
        high: upper end of that interval.
        people: number of people that the interval resamples; 0 if it resamples questions or images.
        metrics: the means of other metrics, by name; in JSON they are siblings of the fields above.
    """

    accuracy: float
    correct: int
    n: int
    low: float
    high: float
    people: int = 0
    metrics: Mapping[str, Figure] = dataclasses.field(default_factory=dict, metadata=SIBLINGS)

    def figures(self) -> dict[str, Figure]:
        """The means of all metrics by name, accuracy first."""
        accuracy = Figure(self.accuracy, self.low, self.high, self.n, self.people)
        return {"accuracy": accuracy, **self.metrics}


@dataclasses.dataclass(frozen=True)
class ForgetQuality:
    """The distance of a model's truth ratios on the forget set from those of the retain-only model.

    Args:
        ks: Kolmogorov-Smirnov statistic.
        p: p-value of the permutation test that exchanges the models' answers about whole people.
        js: Jensen-Shannon divergence, in bits.
        n: number of questions.
        low: lower end of the 95 % interval of `ks`.
        high: upper end of that interval.
        p_questions: TOFU's forget quality, the p-value of the test that treats all questions as independent.
        people: number of people that are resampled; 0 if questions are resampled.
    """

    ks: float
    p: float
    js: float
    n: int
    low: float | None = None
    high: float | None = None
    p_questions: float | None = None
    people: int = 0


@dataclasses.dataclass(frozen=True)
class Confusion:
    """Whom a model takes the forgotten people for, by its answers to questions with an image about them.

    Args:
        n: number of answers.
        correct: number of correct answers.
        one: number of wrong answers that are true of exactly one retained person.
        several: number of wrong answers that are true of several retained people.
        people: for each retained person, the number of answers of `one` that are true of that person.
    """

    n: int
    correct: int
    one: int
    several: int
    people: Mapping[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class SimilarityGroup:
    """Retained people who are about equally similar to the forgotten people.

    Args:
        low: the smallest similarity: the largest share of answers that a person has in common with a forgotten one.
        high: the largest similarity.
        people: number of people.
        accuracy: accuracy of each model on the questions with an image about them.
    """

    low: float
    high: float
    people: int
    accuracy: Mapping[str, Figure]


@dataclasses.dataclass(frozen=True)
class Component:
    """One component of the model utility: the mean of a metric over a set."""

    mean: float
    n: int


@dataclasses.dataclass(frozen=True)
class Utility:
    """Model utility: the harmonic mean of its components, with its 95 % interval."""

    value: float
    low: float
    high: float
    components: Mapping[str, Component] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class AttackCell:
    """One figure of an attack: a model, a variant of the attack, and a set of questions.

    Args:
        model: vanilla, unlearned or retain_only.
        set: name of the evaluation set that was asked.
        mean: value of the attack's metric.
        n: number of questions or images.
        low: lower end of the 95 % interval.
        high: upper end of that interval.
        people: number of people that the interval resamples; 0 if it resamples questions or images.
        variant: which of the attack's variants; `AttackResults.variants` has its title.
        correct: number of correct answers, if the metric is accuracy.
        attacker: weights that the attacker trains, as for `method.train`.
        steps: training steps of the attacker; None for the strongest of several numbers.
        batch_size: batch size of the attacker.
        learning_rate: learning rate of the attacker; None for the strongest of several rates.
        share: share of the forget set that the attacker trains on.
        unit: unit of the share, "questions", "people" or "images".
        taught: whether the questions are about people whom the attacker trained on.
        before: accuracy on the same questions before the attack.
        recovery: (mean - before) / (vanilla - before); None if the vanilla model is not better.
        learned: accuracy on the questions that the attacker trained on.
        score: 1 - 2 |AUC - 1/2| for a membership attack: 1 if members are indistinguishable.
    """

    model: str
    set: str
    mean: float
    n: int
    low: float | None = None
    high: float | None = None
    people: int = 0
    variant: str = ""
    correct: int | None = None
    attacker: str | None = None
    steps: int | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    share: float | None = None
    unit: str | None = None
    taught: bool = False
    before: float | None = None
    recovery: float | None = None
    learned: float | None = None
    score: float | None = None

    @property
    def key(self) -> tuple:
        """The attempt and its set, which are the same for all models."""
        return self.set, *(getattr(self, name) for name in ATTEMPT_FIELDS)


@dataclasses.dataclass(frozen=True)
class AttackResults:
    """The results of one attack.

    Args:
        title: heading in the report.
        about: what the attack does and how to read its figures.
        metric: name of the metric of all cells, a key of `evaluation.metrics.METRICS`.
        variants: title of each variant.
        cells: the figures.
    """

    title: str
    about: str
    metric: str = "accuracy"
    variants: Mapping[str, str] = dataclasses.field(default_factory=dict)
    cells: tuple[AttackCell, ...] = ()

    def rows(self) -> list[dict[str, AttackCell]]:
        """The cells of each attempt, by model; attempts in their order."""
        rows: dict[tuple, dict[str, AttackCell]] = {}
        for cell in self.cells:
            rows.setdefault(cell.key, {})[cell.model] = cell
        return list(rows.values())

    def strongest(self, each_steps: bool = False) -> "AttackResults":
        """These results without the budgets of an attacker that are not the most successful one.

        Args:
            each_steps: whether to keep the most successful budget of each number of steps, too.
        """
        if not any(cell.variant == STRONGEST for cell in self.cells):
            return self
        cells = [cell for cell in self.cells if not cell.attacker or cell.variant == STRONGEST]
        return dataclasses.replace(self, cells=tuple(c for c in cells if each_steps or not c.attacker or not c.steps))


@dataclasses.dataclass(frozen=True)
class MeasuredSet(EvalSet):
    """An evaluation set with its number of people.

    Args:
        people: number of different people that it asks about; 0 for questions about no person.
    """

    people: int = 0


@dataclasses.dataclass(frozen=True)
class BenchmarkInfo:
    """The benchmark of a run: its title, the source of its data, and its sets in order."""

    title: str
    source: str
    sets: tuple[MeasuredSet, ...]


@dataclasses.dataclass(frozen=True)
class Meta:
    """Metadata that makes a run reproducible.

    Args:
        command: command line that was run, or the Python entry point that was called.
        config: the resolved config.
        seed: `config.seed`.
        commit: Git commit of the code; "+changes" if files had changed.
        versions: of Python and the packages that figures depend on.
        devices: number and kind.
        protocol: `config.eval.protocol`.
        protocols: the same as a list; figures without a protocol are those of the first.
        shots: worked examples before each question.
        date: of the results, UTC, ISO 8601.
        benchmark: benchmark and evaluation sets.
    """

    command: str
    config: Mapping[str, Any]
    seed: int
    commit: str
    versions: Mapping[str, str]
    devices: str
    protocol: str
    protocols: tuple[str, ...]
    shots: int
    date: str
    benchmark: BenchmarkInfo


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Numbers of tensors: changed on disk, in all, and changed in the language model."""

    changed: int
    tensors: int
    language_model_changed: int


@dataclasses.dataclass(frozen=True)
class Origins:
    """How the models were made, as far as the run knew when it wrote its results; see docs/results_format.md."""

    vanilla: str = "elsewhere"
    base: str = ""
    vanilla_forgot: int = 0
    unlearned_forgot: int | None = None
    retain_only: str = "elsewhere"


@dataclasses.dataclass(frozen=True)
class Trainable:
    """Numbers of trained parameters and of all parameters."""

    parameters: int
    of: int


@dataclasses.dataclass(frozen=True)
class RunResults:
    """Everything in results.json.

    Args:
        meta: metadata that makes the run reproducible.
        models: {model: {set: {kind of question: summary}}}; see `metrics.summary.by_kind` for the kinds.
        utility: model utility of each model.
        forget_quality: {model: {kind: ...}}; empty without a retain-only model.
        chance: {set: {"vqa" or "qa": accuracy of a random choice among the options}}.
        timing: seconds of each stage.
        attacks: by name.
        confusions: whom each model takes the forgotten people for; empty if the data names no people.
        similarity_groups: retained people, the least similar to the forgotten people first.
        text_logits_identical: whether text-only log-probabilities are bit-identical before and after.
        manifest: tensors that changed on disk.
        origins: how the models were made.
        step_bytes: memory of a training step, by the compiler's account.
        trainable: trained parameters; None for a model that was trained elsewhere.
        schema_version: version of this layout.

    Example:
        >>> results = RunResults.read("run")  # doctest: +SKIP
        >>> results.models["unlearned"]["forget"]["vqa"].accuracy  # doctest: +SKIP
        0.042
    """

    meta: Meta
    models: Mapping[str, Mapping[str, Mapping[str, Summary]]]
    utility: Mapping[str, Utility]
    forget_quality: Mapping[str, Mapping[str, ForgetQuality]]
    chance: Mapping[str, Mapping[str, float]]
    timing: Mapping[str, float]
    attacks: Mapping[str, AttackResults] = dataclasses.field(default_factory=dict)
    confusions: Mapping[str, Confusion] = dataclasses.field(default_factory=dict)
    similarity_groups: tuple[SimilarityGroup, ...] = ()
    text_logits_identical: bool | None = None
    manifest: Manifest | None = None
    origins: Origins = Origins()
    step_bytes: int | None = None
    trainable: Trainable | None = None
    schema_version: int = SCHEMA_VERSION

    @classmethod
    def read(cls, workdir: str | os.PathLike[str]) -> "RunResults":
        """Reads the results in the folder of a run.

        Raises:
            UserError: results.json is missing, is not JSON, does not follow the schema, or is not what the run wrote.
        """
        check_argument("workdir", workdir, PATH, "the folder of a finished run")
        folder, remedy = storage.resolve(workdir), "run that experiment again"
        file = folder / FILE
        if folder.is_file():
            raise UserError(f"{workdir} is a file; give the folder of a finished run, such as {folder.parent}.")
        if not file.is_file():
            raise UserError(f"{workdir} has no {FILE}: let that run finish, or give the folder of a finished run.")
        of_the_run = ("config.json", "inputs.json")  # the file alone, as somebody sends it, is beside neither
        recorded, others = (folder / records.FILE).is_file(), [x for x in of_the_run if (folder / x).exists()]
        if others and not recorded:
            problem = f"{folder} has {others[0]} but no {records.FILE}, by which {FILE} is checked"
            raise UserError(f"{problem}; restore it from a copy, or {remedy}.")
        entries = records.Records(folder)
        for name in (FILE, *of_the_run):
            entries.check(name, remedy)
        if recorded and not entries.knows(FILE):
            raise UserError(f"{file} is not the one that the run wrote, or that run has not finished; {remedy}.")
        try:
            return cls.from_json(json_files.read_json(file, remedy=remedy))
        except FormatError as error:
            raise UserError(f"{file}: {error}; {remedy}.") from error

    def write(self, workdir: str | os.PathLike[str]) -> Path:
        """Writes results.json into the folder of a run, atomically.

        Raises:
            ValueError: a figure is NaN or infinite, which JSON does not support.
            UserError: the folder cannot be written.
        """
        text = json.dumps(self.to_json(), indent=1, ensure_ascii=False, allow_nan=False)
        with storage.write_errors("folder", workdir):
            return files.write_bytes(storage.resolve(workdir) / FILE, (text + "\n").encode())

    @classmethod
    def from_json(cls, data: Any) -> "RunResults":
        """Decodes parsed JSON.

        Raises:
            FormatError: a field is missing, is unknown, or has another type or an impossible value; the message names
                it.
        """
        version = data.get("schema_version") if isinstance(data, dict) else None
        if version != SCHEMA_VERSION:
            raise FormatError(f"schema_version is {version!r}, and this version of vkd_jax reads {SCHEMA_VERSION}")
        results = decode(cls, data)
        check_ranges(results)
        return results

    def to_json(self) -> dict[str, Any]:
        """The results as JSON-compatible values; fields that are None are left out."""
        return {"schema_version": self.schema_version} | encode(self)

    @property
    def sets(self) -> tuple[MeasuredSet, ...]:
        """The evaluation sets, in the benchmark's order."""
        return self.meta.benchmark.sets

    def with_role(self, *roles: Role) -> list[MeasuredSet]:
        """The evaluation sets that have one of these roles, in the benchmark's order."""
        return [eval_set for eval_set in self.sets if eval_set.role in roles]

    def summary(self, model: str, set_name: str, kind: str) -> Summary | None:
        """The summary of one kind of question, or None if it was not asked."""
        return self.models.get(model, {}).get(set_name, {}).get(kind)

    def rows(self, part: str = "models") -> list[dict[str, Any]]:
        """The figures as flat records, one for each figure.

        Args:
            part: "models" for the means of all metrics by model, set and kind of question, or "attacks" for the cells
                of all attacks, with the fields of `AttackCell`.

        Raises:
            UserError: there is no such part.
        """
        if part == "attacks":
            attacks = self.attacks.items()
            return [{"attack": name, "metric": x.metric, **vars(cell)} for name, x in attacks for cell in x.cells]
        if part != "models":
            raise UserError(f"part={part!r}: unknown part of the results. Available: models, attacks.")
        return [
            {"model": model, "set": s.name, "role": str(s.role), "kind": kind, "metric": metric, **vars(figure)}
            for model, sets in self.models.items()
            for s in self.sets
            for kind, summary in sets.get(s.name, {}).items()
            for metric, figure in summary.figures().items()
        ]

    def table(self, part: str = "models") -> Any:
        """The figures as a `pandas.DataFrame`; see `rows`.

        Raises:
            UserError: pandas is not installed, or there is no such part.
        """
        try:
            import pandas
        except ImportError:
            raise UserError("tables of results need pandas: pip install pandas, or use rows().") from None
        return pandas.DataFrame(self.rows(part))

    def kinds(self, model: str = "vanilla") -> list[str]:
        """All kinds of question that a model was asked, in order."""
        return list(dict.fromkeys(kind for kinds in self.models[model].values() for kind in kinds))


def check_part(part: str, data: Any) -> None:
    """Checks JSON that repeats one field of `RunResults`, such as "models".

    Raises:
        FormatError: there is no such field, or it does not follow the schema or has an impossible value.
    """
    if (kind := typing.get_type_hints(RunResults).get(part)) is None:
        raise FormatError(f"{part!a:.40} is no field of results")
    check_ranges(decode(kind, data, part), part)


def main_kind(kinds: Iterable[str], modality: str) -> str | None:
    """The main kind of question of a modality, "vqa" or "qa": with options, else open, else cloze, else of a suite.

    Example:
        >>> main_kind(["generation_vqa", "cloze_vqa", "qa"], "vqa")
        'generation_vqa'
    """
    known = set(kinds)
    return next((task + modality for task in QUESTION_TASKS if task + modality in known), None)
