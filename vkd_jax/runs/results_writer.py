"""Writes results.json at the end of a run, and provenance.json beside the weights that it exports."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vkd_jax.attacks import Attack
from vkd_jax.checkpoints import hf
from vkd_jax.checkpoints.bundle import ModelBundle
from vkd_jax.evaluation import metrics
from vkd_jax.evaluation.inference import Answerer
from vkd_jax.evaluation.metrics import confusion
from vkd_jax.evaluation.metrics.forget_quality import forget_quality
from vkd_jax.evaluation.metrics.summary import summaries
from vkd_jax.evaluation.metrics.utility import model_utility
from vkd_jax.reporting import report
from vkd_jax.results import (
    FILE,
    AttackCell,
    AttackResults,
    BenchmarkInfo,
    Manifest,
    MeasuredSet,
    Meta,
    RunResults,
    Trainable,
)
from vkd_jax.runs import origins
from vkd_jax.runs.inputs import PROVENANCE
from vkd_jax.runs.job import Job
from vkd_jax.runtime import multihost
from vkd_jax.runtime.dataclass_json import FormatError, decode, encode
from vkd_jax.runtime.figure_ranges import check_ranges
from vkd_jax.types import Example, Role, UserError


def write(job: Job, answers: Mapping[str, list[dict]], changes: Mapping[str, Any] | None = None) -> None:
    """Writes results.json.

    Args:
        job: the run.
        answers: the evaluation's records of each model.
        changes: the fields of `RunResults` on what unlearning changed; see `model_changes`.
    """
    retain_only, sets = answers.get("retain_only"), job.eval_sets
    results = RunResults(
        meta=_meta(job),
        models={name: summaries(records, sets) for name, records in answers.items()},
        utility={name: model_utility(records, sets) for name, records in answers.items()},
        forget_quality={
            name: forget_quality(records, retain_only, sets)
            for name, records in answers.items()
            if retain_only and name != "retain_only"
        },
        chance=_chance(job.questions),
        attacks={name: _attack_results(job, name, attack, answers) for name, attack in job.attacks.items()},
        **_resemblance(job, answers),
        timing=dict(job.workdir.timing),
        origins=multihost.run_on_process_0(lambda: origins.read(job)),
        **(changes or {}),
    )
    multihost.run_on_process_0(lambda: results.write(job.workdir.path) and None)
    job.workdir.add_record(FILE)


def provenance(job: Job, name: str, without: Sequence[str]) -> dict[str, str]:
    """The file beside exported weights that documents how they were made, as {name: text}.

    Args:
        job: the run.
        name: the model: vanilla, retain_only or unlearned.
        without: people that fine-tuning left out.
    """
    return {PROVENANCE: json.dumps({"model": name, "without": list(without), **encode(_meta(job))}, indent=1) + "\n"}


def text_scores(job: Job, model: ModelBundle) -> Any:
    """Log-probabilities of the options of the text-only questions; of all questions without images if none is."""
    everything = [e for examples in job.questions.values() for e in examples]
    texts = [e for e in everything if e.image is None] or everything
    answerer = Answerer(model, batch_size=job.config.eval.batch_size)
    options = [e.options or (e.answer,) for e in texts]
    return answerer.score([e.question for e in texts], options, names=[e.label for e in texts])


def model_changes(
    job: Job, unlearned: ModelBundle, vanilla_scores: Any, manifest: Mapping[str, Any], source: Path
) -> dict[str, Any]:
    """The fields of `RunResults` that compare the unlearned model with the vanilla one.

    Args:
        job: the run.
        unlearned: the unlearned model.
        vanilla_scores: `text_scores` of the vanilla model.
        manifest: `compare_tensors` of the two models' folders.
        source: folder of the vanilla model.
    """
    family, _ = hf.read_config(source)
    changed = [hf.find_slot(family, unlearned.config, name).path for name in manifest["changed"]]
    equal = jax.tree.map(np.array_equal, vanilla_scores, text_scores(job, unlearned))
    changes: dict[str, Any] = {
        "text_logits_identical": jax.tree.all(equal),
        "manifest": Manifest(
            changed=len(manifest["changed"]),
            tensors=len(manifest["tensors"]),
            language_model_changed=sum(path.startswith("language_model/") for path in changed),
        ),
    }
    log = job.workdir.path / "train" / "metrics.jsonl"
    rows = multihost.run_on_process_0(
        lambda: [x for x in report.json_lines(log, torn=True) if isinstance(x.get("step_bytes"), int | float)][-1:]
    )
    if rows:
        changes["step_bytes"] = int(rows[0]["step_bytes"])
    if job.config.workflow.unlearns:  # it is unknown what trained in a model that the config gives
        trainable = job.method.trainable(unlearned.params, unlearned.config)
        changes["trainable"] = Trainable(
            parameters=sum(math.prod(unlearned.params[path].shape) for path in trainable),
            of=sum(math.prod(value.shape) for value in unlearned.params.values()),
        )
    return changes


def _attack_results(job: Job, name: str, attack: Attack, models: Iterable[str]) -> AttackResults:
    records = {model: job.workdir.read_lines(f"attacks/{name}/{model}.jsonl") for model in models}
    cells = tuple(attack.summarize(records))
    check_cells(name, attack, cells, records)
    return AttackResults(attack.TITLE, attack.ABOUT, attack.METRIC, dict(attack.VARIANTS), cells)


def check_cells(name: str, attack: Attack, cells: Sequence[AttackCell], models: Iterable[str]) -> None:
    """Checks the figures of an attack, which may be a class of the user, before they are written.

    Args:
        name: the name of the attack.
        attack: the attack.
        cells: what its `summarize` returned.
        models: the models that were attacked.

    Raises:
        UserError: a cell is of another type, is about another model, or has an impossible figure.
    """
    metric = metrics.get(attack.METRIC)
    is_share = metric.unit == "%" or metric.direction == "half"
    try:
        for index, cell in enumerate(cells):
            decode(AttackCell, encode(cell), f"cells[{index}]")
            check_ranges(cell, f"cells[{index}]")
            if is_share and not 0 <= cell.mean <= 1:
                raise FormatError(f"cells[{index}].mean is {cell.mean!r}, expected a share from 0 to 1")
            if cell.model not in models:
                raise FormatError(f"cells[{index}].model is {cell.model!r}, expected one of {', '.join(models)}")
    except FormatError as error:
        function = f"{type(attack).__module__}.{type(attack).__qualname__}.summarize"
        raise UserError(
            f"attacks.names={name}: what {function} returned cannot be used: {error}; correct it."
        ) from error


def _resemblance(job: Job, answers: Mapping[str, list[dict]]) -> dict[str, Any]:
    """The fields of `RunResults` on people who are taken for each other."""
    sets = job.benchmark.EVAL_SETS
    forgotten, retained = (
        confusion.facts(e for s in sets if s.role is role for e in job.sets.get(s.name, ()))
        for role in (Role.FORGET, Role.RETAIN)
    )
    counts = {name: confusion.confusion(records, retained, sets) for name, records in answers.items()}
    return {
        "confusions": {name: count for name, count in counts.items() if count},
        "similarity_groups": confusion.similarity_groups(answers, forgotten, retained, sets),
    }


def _meta(job: Job) -> Meta:
    """What makes a figure reproducible, and how many people each set asks about."""
    benchmark, config = job.benchmark, job.config
    sets = tuple(
        MeasuredSet(**vars(s), people=len({e.person for e in job.sets[s.name]} - {""}))
        for s in job.eval_sets
        if s.name in job.questions
    )
    forget = getattr(benchmark, "forget", "")
    source = getattr(benchmark, "source", f"{forget}") or "synthetic people"
    return Meta(
        **job.workdir.meta(),
        benchmark=BenchmarkInfo(benchmark.TITLE + getattr(benchmark, "variant", ""), source, sets),
        protocols=config.eval.protocols,
        shots=config.eval.shots,
    )


def _chance(questions: Mapping[str, Sequence[Example]]) -> dict[str, dict[str, float]]:
    """Accuracy of a random choice among the options, by set and modality (vqa with an image, qa without)."""
    shares: dict[str, dict[str, list[float]]] = {}
    for name, examples in questions.items():
        for example in (e for e in examples if e.options):
            shares.setdefault(name, {}).setdefault(example.modality, []).append(1 / len(example.options))
    return {name: {kind: float(np.mean(x)) for kind, x in kinds.items()} for name, kinds in shares.items()}
