"""The stages in order. Each leaves its result in the workdir, and a stage whose result is there is not run again.

finetune      base -> vanilla                     retain_only   base -> a model that never met the people to forget
unlearn       vanilla -> unlearned -> report      all           finetune, retain_only, unlearn
audit         given models -> report: nothing is trained but by attackers
"""

import dataclasses
import functools
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
from absl import logging

from vkd_jax import attacks, benchmarks, methods
from vkd_jax.attacks.base import Subject
from vkd_jax.checkpoints import export, hf
from vkd_jax.checkpoints.bundle import ModelBundle, check_trainable, read_family
from vkd_jax.checkpoints.manifest import compare_tensors
from vkd_jax.checkpoints.new_model import create_llava
from vkd_jax.config.schema import RunConfig
from vkd_jax.config.stages import STAGES
from vkd_jax.evaluation import evaluate
from vkd_jax.evaluation.inference import Answerer
from vkd_jax.evaluation.metrics.forget_quality import forget_quality
from vkd_jax.evaluation.metrics.summary import summaries
from vkd_jax.evaluation.metrics.utility import model_utility
from vkd_jax.methods.base import Context
from vkd_jax.models import lora
from vkd_jax.reporting import report
from vkd_jax.results import (
    AttackResults,
    BenchmarkInfo,
    Manifest,
    MeasuredSet,
    Meta,
    RunResults,
    Trainable,
    to_json,
)
from vkd_jax.runs.workdir import Workdir
from vkd_jax.runtime import hub, multihost, storage
from vkd_jax.runtime.mesh import make_mesh, shards
from vkd_jax.training import loop
from vkd_jax.types import Example, Params, Role, UserError

UNLEARNS = ("unlearn", "all")
PROVENANCE = "provenance.json"  # in the folder of a fine-tuned model: what it was made from


def run(
    config: ml_collections.ConfigDict,
    path: str | Path,
    command: str = "called from Python: vkd_jax.runs.pipeline.run",
) -> dict[str, Any]:
    """Runs or continues what `config.stage` names.

    Args:
        config: of the run.
        path: the run's folder.
        command: how the program was started, as results.json and the report will say.

    Returns:
        The content of results.json; see docs/results_format.md.
    """
    RunConfig.from_config_dict(config)  # before anything is written
    tuned, last = STAGES[config.stage].finetunes, "report.md" if _reports(config) else "results.json"
    workdir = Workdir(path, config, command)
    if workdir.has(last):
        logging.info("%s is there: nothing is left to do", workdir.path / last)
        return RunResults.read(workdir.path).to_json()
    job = Job.prepare(workdir, finetunes=bool(tuned))
    check_models(job)
    made = {name: finetune(job, name) for name in tuned}
    if config.stage in UNLEARNS or config.stage == "audit":
        unlearn(job, made)
    else:
        answers = {name: evaluated(job, name, job.load(folder)) for name, folder in made.items()}
        write_results(job, answers)
    return RunResults.read(workdir.path).to_json()


def _reports(config: ml_collections.ConfigDict) -> bool:
    """Whether there is an unlearned model to report on."""
    return config.stage in UNLEARNS or (config.stage == "audit" and bool(config.model.unlearned))


@dataclasses.dataclass(frozen=True)
class Job:
    """A config that was found to be right, with its data."""

    workdir: Workdir
    config: ml_collections.ConfigDict
    typed: RunConfig
    mesh: jax.sharding.Mesh
    method: methods.Method  # of unlearning
    tuning: methods.Method  # of fine-tuning
    attacks: dict[str, attacks.Attack]
    benchmark: Any
    sets: dict[str, list[Example]]
    asked: dict[str, list[Example]]  # what the evaluation asks: a seeded sample, the same for every model and method
    held_out: list[Example]  # questions about people whom no model ever met, for the attack that compares with them

    @classmethod
    def prepare(cls, workdir: Workdir, finetunes: bool) -> "Job":
        """Checks the config and reads the data, the fine-tuning questions only where they are needed."""
        config = workdir.config
        mesh, method, tuning, chosen = checked(config)
        fields = config.data.to_dict()
        # Every host reads the data from its own disk.
        cache = storage.local_copy(fields.pop("cache") or workdir.path / "data")
        benchmark = benchmarks.create(fields.pop("benchmark"), fields)
        benchmark.check()
        with workdir.stage("data"):
            trained = any(name.startswith("finetune_") for name in benchmark.UNLEARN.values())
            sets = multihost.run_process_0_first(
                lambda: benchmarks.read(benchmark, cache, finetune=finetunes or trained)
            )
            asked = {
                name: evaluate.sample(part, config.eval.max_items, config.eval.seed, name)
                for name, part in sets.items()
                if not name.startswith("finetune_")
            }
            held_out = []
            if "membership" in chosen:
                own = chosen["membership"].held_out
                held_out = multihost.run_process_0_first(lambda: benchmarks.held_out(benchmark, cache, own))
        typed = RunConfig.from_config_dict(config)
        return cls(workdir, config, typed, mesh, method, tuning, chosen, benchmark, sets, asked, held_out)

    def load(self, folder: Path, method: methods.Method | None = None) -> ModelBundle:
        """Loads a model for a method, by default that of unlearning: every judged model has the same dtypes."""
        options = load_options(self.config)
        return ModelBundle.load_for(method or self.method, folder, seed=self.config.seed, mesh=self.mesh, **options)

    @property
    def forgotten(self) -> list[str]:
        """The people to forget."""
        forget_sets = [s.name for s in self.benchmark.EVAL_SETS if s.role is Role.FORGET]
        return sorted({e.person for name in forget_sets for e in self.sets[name] if e.person})

    @property
    def worked_examples(self) -> list[Example]:
        """The questions that a worked example may be drawn from: those of the retain set."""
        retain_sets = [s.name for s in self.benchmark.EVAL_SETS if s.role is Role.RETAIN]
        return [example for name in retain_sets for example in self.asked.get(name, ())]


def load_options(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The arguments of `ModelBundle.load` that a config gives."""
    section = config.model
    return dict(dtype=section.dtype, quantization=section.quantize, remat=section.remat, max_pixels=section.max_pixels)


def checked(
    config: ml_collections.ConfigDict,
) -> tuple[jax.sharding.Mesh, methods.Method, methods.Method, dict[str, attacks.Attack]]:
    """The mesh, the method of unlearning, that of fine-tuning, and the attacks.

    Raises:
        UserError: what is wrong with the config alone, before anything is read.
    """
    typed = RunConfig.from_config_dict(config)
    mesh = make_mesh(**config.mesh)
    typed.check_stage(shards(mesh))
    chosen = typed.attacks.selected if typed.workflow.judges else {}
    for attack in chosen.values():
        attack.check(typed)
    return mesh, typed.method, typed.finetune.method, chosen


def check_models(job: Job) -> None:
    """Refuses, before anything is trained, models that do not go with the data or the methods.

    Raises:
        UserError: a model is not there, is of another kind than the one to unlearn, is known to have met other people
            than it should have, or has not the weights that a method trains.
    """
    config = job.config
    unlearns, finetunes = config.stage in UNLEARNS, bool(STAGES[config.stage].finetunes)
    if not finetunes:
        given = {name: config.model[name] for name in ("path", "retain_only", "unlearned")}
        given |= {"base": config.model.base} if unlearns and job.method.needs_base else {}
    else:
        given = {"base": "" if config.model.create.to_dict() else config.model.base}
    kinds: list[Any] = []
    for name, value in given.items():
        if value:
            folder = hub.fetch_model(value)
            kinds.append(read_family(folder))
            if kinds[0] != kinds[-1]:
                raise UserError(f"config.model.{name} is a model of another kind or size than the one to unlearn.")
            _check_provenance(job, name, value, folder)
            for method in [job.tuning] * finetunes + [job.method] * unlearns:
                check_trainable(folder, method, config.model.quantize)
    if unlearns:
        for name in ("forget", "retain"):
            _pairs(job, name)
    if config.eval.shots:
        asked = [e for examples in job.asked.values() for e in examples]
        evaluate.worked(job.worked_examples, asked, config.eval.seed)


def _check_provenance(job: Job, name: str, value: str, folder: Path) -> None:
    """Whom a model of ours has met: those whose knowledge the run assumes, and no other."""
    try:
        provenance = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))
        theirs, without = provenance["config"]["data"], provenance["without"]
    except (OSError, ValueError, KeyError, TypeError):
        return  # made elsewhere: nothing is known of it
    ours, field = job.config.data.to_dict(), f"config.model.{name}={value}"
    if theirs.get("source") == ours.get("source") == "":
        if name == "base" and theirs["people"] == ours["people"]:
            raise UserError(f"{field} knows the made-up people of config.data.people={ours['people']} already.")
        if name != "base" and theirs["people"] != ours["people"]:
            raise UserError(
                f"{field} knows the made-up people of seed {theirs['people']}, not those of config.data.people="
                f"{ours['people']}: make one that does with --config.stage=all."
            )
    if name == "retain_only" and without != job.forgotten:
        raise UserError(
            f"{field} was made without {len(without)} people, and not those {len(job.forgotten)} whom this run "
            "forgets: make one with --config.stage=retain_only, or leave it empty."
        )


def finetune(job: Job, name: str) -> Path:
    """base -> `name`: "vanilla" learns everybody, "retain_only" all but the people to forget."""
    workdir, config, section = job.workdir, job.typed, job.typed.finetune.train
    if workdir.has_model(name):
        return workdir.model(name)
    parts = ("finetune_retain",) if name == "retain_only" else ("finetune_forget", "finetune_retain")
    everything = [e for part in ("finetune_forget", "finetune_retain") for e in job.sets.get(part, ())]
    examples = [e for part in parts for e in job.sets.get(part, ())]
    with workdir.stage(f"load for {name}"):
        if config.model.create:
            shape = config.model.create
            source = workdir.model(
                "base",
                lambda folder: multihost.run_on_process_0(lambda: create_llava(folder, everything, shape, config.seed)),
            )
        else:
            source = hub.fetch_model(config.model.base)
        model = job.load(source, job.tuning)
        kinds = {
            "image": [e for e in examples if e.image is not None],
            "text": [e for e in examples if e.image is None],
        }
        streams = {kind: model.encode(rows, section.buckets) for kind, rows in kinds.items() if rows}
        context = Context(model.graphdef, model.params, None, model.config, streams, config.seed)
        prepared = job.tuning.prepare(context)
    with workdir.stage(f"fine-tune {name}"):
        trained = loop.fit(model, job.tuning, prepared, section, seed=config.seed, folder=workdir.path / "train" / name)
    with workdir.stage(f"export {name}"):
        without = job.forgotten if name == "retain_only" else []
        return _exported(job, name, model, trained, source, without)


def unlearn(job: Job, made: dict[str, Path]) -> None:
    """load -> evaluate before -> prepare -> unlearn -> export -> evaluate after -> report.

    Each model is evaluated, attacked and let go before the next is loaded: a chip may have room for no more than one.

    Args:
        job: what to do.
        made: models that were fine-tuned just now, "vanilla" and "retain_only"; others are those of the config.
    """
    workdir, config = job.workdir, job.config
    source = made.get("vanilla") or hub.fetch_model(config.model.path)
    reference = made.get("retain_only") or (config.model.retain_only and hub.fetch_model(config.model.retain_only))
    if not workdir.has("results.json"):
        others, evidence = {}, None
        if reference:
            others["retain_only"] = judged(job, "retain_only", _opened(job, reference))
        model = _opened(job, source)
        answers = {"vanilla": judged(job, "vanilla", model)} | others
        if _reports(config):
            given = config.model.unlearned
            target = hub.fetch_model(given) if given else _unlearned(job, model, source)
            with workdir.stage("compare text"):
                before = _text_scores(job, model)
            del model
            with workdir.stage("manifest"):
                manifest = multihost.run_on_process_0(lambda: compare_tensors(source, target))
                workdir.write("manifest.json", manifest)
            unlearned = _opened(job, target)  # what is judged is what was written
            answers["unlearned"] = judged(job, "unlearned", unlearned)
            with workdir.stage("compare text"):
                evidence = _evidence(job, unlearned, before, manifest, source)
        write_results(job, answers, evidence)
    if _reports(config):
        with workdir.stage("report"):
            images = {e.image_id: e.image for part in job.asked.values() for e in part if e.image is not None}
            page = multihost.run_on_process_0(lambda: report.write(workdir.path, images))
        logging.info("the report: %s", page)


def _opened(job: Job, folder: Path) -> ModelBundle:
    with job.workdir.stage("load"):
        return job.load(folder)


def _unlearned(job: Job, model: ModelBundle, source: Path) -> Path:
    """The folder of the unlearned model: made from the vanilla one, unless it is there."""
    workdir, config = job.workdir, job.config
    if workdir.has_model("unlearned"):
        return workdir.model("unlearned")
    base = None
    if job.method.needs_base:
        base = hub.fetch_model(workdir.path / "base" if config.model.create.to_dict() else config.model.base)
    with workdir.stage("prepare"):
        sets = {name: _pairs(job, name) for name in ("forget", "retain")}
        sets |= {f"{name}_text": rows for name in sets if (rows := _texts(job, name))}
        context = Context(
            graphdef=model.graphdef,
            params=model.params,
            load_base=(lambda: job.load(base).params) if base else None,
            model_config=model.config,
            sets={name: model.encode(rows, config.train.buckets) for name, rows in sets.items()},
            seed=config.seed,
            encode=functools.partial(model.encode, buckets=config.train.buckets),
        )
        prepared = job.method.prepare(context) if job.method.losses() else None
    with workdir.stage("unlearn"):
        if prepared is None:
            trained = job.method.edit(context)
        else:
            trained = loop.fit(
                model, job.method, prepared, job.typed.train, seed=config.seed, folder=workdir.path / "train"
            )
    with workdir.stage("export"):
        return _exported(job, "unlearned", model, trained, source, [])


def _exported(job: Job, name: str, model: ModelBundle, trained: Params, source: Path, without: Sequence[str]) -> Path:
    """The folder of a new model: `source` with what was trained."""
    merged, notes = trained | lora.adapters(model.params), _provenance(job, name, without)
    return job.workdir.model(name, lambda folder: export.export(merged, source, folder, model.config, notes=notes))


def judged(job: Job, name: str, model: ModelBundle) -> list[dict]:
    """The answers of a model, which is then attacked: attacks/<attack>/<name>.jsonl."""
    answers = evaluated(job, name, model)
    workdir = job.workdir
    for attack_name, attack in job.attacks.items():
        path = f"attacks/{attack_name}/{name}.jsonl"
        if workdir.has(path):
            continue
        with workdir.stage(f"attack {name}: {attack_name}"):
            subject = Subject(
                name=name,
                model=model,
                asked=job.asked,
                sets=job.benchmark.EVAL_SETS,
                answers=answers,
                forgets=_pairs(job, "forget"),
                held_out=job.held_out,
                config=job.typed,
                mesh=job.mesh,
                folder=workdir.path / "attacks" / attack_name / name,
            )
            workdir.write_lines(path, attack.run(subject))
    return answers


def evaluated(job: Job, name: str, model: ModelBundle) -> list[dict]:
    """The answers of a model, from answers/<name>.jsonl if they were given before."""
    workdir, options = job.workdir, job.config.eval
    path = f"answers/{name}.jsonl"
    if workdir.has(path):
        return workdir.read_lines(path)
    with workdir.stage(f"evaluate {name}"):
        answers = evaluate.evaluate(
            Answerer(model, batch_size=options.batch_size),
            job.asked,
            protocol=options.protocol,
            max_new_tokens=options.max_new_tokens,
            shots=options.shots,
            shown=job.worked_examples,
            seed=options.seed,
        )
        workdir.write_lines(path, answers)
    for part, kinds in summaries(answers).items():
        logging.info(
            "%s %-11s  %s",
            name,
            part,
            "  ".join(f"{k} {v.accuracy:.3f} (n={v.n})" for k, v in sorted(kinds.items())),
        )
    return answers


def write_results(job: Job, answers: dict[str, list[dict]], evidence: dict[str, Any] | None = None) -> None:
    """Writes results.json: every figure, with what makes it reproducible."""
    reference, sets = answers.get("retain_only"), job.benchmark.EVAL_SETS
    results = RunResults(
        meta=_meta(job),
        models={name: summaries(records) for name, records in answers.items()},
        utility={name: model_utility(records, sets) for name, records in answers.items()},
        forget_quality={
            name: forget_quality(records, reference, sets)
            for name, records in answers.items()
            if reference and name != "retain_only"
        },
        chance=_chance(job.asked),
        attacks={name: _attack(job, name, attack, answers) for name, attack in job.attacks.items()},
        timing=dict(job.workdir.timing),
        **(evidence or {}),
    )
    multihost.run_on_process_0(lambda: results.write(job.workdir.path) and None)


def _attack(job: Job, name: str, attack: attacks.Attack, models: Iterable[str]) -> AttackResults:
    """What an attack measured of each model, and how to read it."""
    records = {model: job.workdir.read_lines(f"attacks/{name}/{model}.jsonl") for model in models}
    return AttackResults(
        title=attack.TITLE,
        about=attack.ABOUT,
        metric=attack.METRIC,
        variants=dict(attack.VARIANTS),
        cells=tuple(attack.summarize(records)),
    )


def _pairs(job: Job, name: str) -> list[Example]:
    """The questions with a picture, each once: what unlearning trains on."""
    rows = job.sets.get(job.benchmark.UNLEARN[name], ())
    pairs = list({(e.image_id, e.question): e for e in rows if e.image is not None}.values())
    if not pairs:
        raise UserError(f"the {name} set has no question with a picture: visual unlearning needs some.")
    return pairs


def _texts(job: Job, name: str) -> list[Example]:
    """The questions of text alone about the same people, each once."""
    rows = job.sets.get(job.benchmark.UNLEARN[name], ())
    return list({e.question: e for e in rows if e.image is None}.values())


def _provenance(job: Job, name: str, without: Sequence[str]) -> dict[str, str]:
    """A file beside the weights that says how they were made."""
    return {PROVENANCE: json.dumps({"model": name, "without": list(without), **to_json(_meta(job))}, indent=1) + "\n"}


def _meta(job: Job) -> Meta:
    """What makes a figure reproducible, and what was measured on how many people."""
    sets = tuple(
        MeasuredSet(s.name, s.role, s.title, s.short, people=len({e.person for e in job.sets[s.name]} - {""}))
        for s in job.benchmark.EVAL_SETS
        if s.name in job.asked
    )
    config = job.config.data
    share = f", forgetting {config.forget} %" if isinstance(config.forget, int) else ""
    source = config.get("source") or ("the made-up people" if "source" in config else f"{config.forget}")
    return Meta(
        **job.workdir.meta(),
        benchmark=BenchmarkInfo(job.benchmark.TITLE + share, source, sets),
        protocols=job.typed.eval.protocols,
        shots=job.config.eval.shots,
    )


def _evidence(job: Job, unlearned: ModelBundle, before: Any, manifest: dict[str, Any], source: Path) -> dict[str, Any]:
    """What changed in the model, and what did not; `before` are the `_text_scores` of the vanilla one."""
    family, _ = hf.read_config(source)
    changed = [hf.find_slot(family, unlearned.config, name).path for name in manifest["changed"]]
    found: dict[str, Any] = {
        "text_logits_identical": jax.tree.all(jax.tree.map(np.array_equal, before, _text_scores(job, unlearned))),
        "manifest": Manifest(
            changed=len(manifest["changed"]),
            tensors=len(manifest["tensors"]),
            language_model_changed=sum(path.startswith("language_model/") for path in changed),
        ),
    }
    log = job.workdir.path / "train" / "metrics.jsonl"
    logged = multihost.run_on_process_0(
        lambda: [row for row in report.json_lines(log, torn=True) if "step_bytes" in row][-1:]
    )
    if logged:
        found["step_bytes"] = int(logged[0]["step_bytes"])
    if job.config.stage in UNLEARNS:  # of a model that was given nobody says what trained
        trainable = job.method.trainable(unlearned.params, unlearned.config)
        found["trainable"] = Trainable(
            parameters=sum(math.prod(unlearned.params[path].shape) for path in trainable),
            of=sum(math.prod(value.shape) for value in unlearned.params.values()),
        )
    return found


def _chance(asked: dict[str, list[Example]]) -> dict[str, dict[str, float]]:
    """The accuracy of guessing among the options, of each set, shown a picture (vqa) or not (qa)."""
    counts: dict[str, dict[str, list[float]]] = {}
    for name, part in asked.items():
        for example in (e for e in part if e.options):
            counts.setdefault(name, {}).setdefault(example.modality, []).append(1 / len(example.options))
    return {name: {kind: float(np.mean(x)) for kind, x in kinds.items()} for name, kinds in counts.items()}


def _text_scores(job: Job, model: ModelBundle) -> Any:
    """What the model says of every answer that is offered to a text-only question, to the bit."""
    everything = [e for part in job.asked.values() for e in part]
    texts = [e for e in everything if e.image is None] or everything  # a question about a picture is a text without it
    answerer = Answerer(model, batch_size=job.config.eval.batch_size)
    return answerer.score([e.question for e in texts], [e.options or (e.answer,) for e in texts])
