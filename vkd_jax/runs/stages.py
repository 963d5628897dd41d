"""The stages of a run: fine-tuning, unlearning, export, evaluation, attacks and the report."""

import functools
from collections.abc import Sequence
from pathlib import Path

from absl import logging

import vkd_jax
from vkd_jax.attacks.base import Subject
from vkd_jax.checkpoints import certificate, export, peft, sources
from vkd_jax.checkpoints.bundle import ModelBundle
from vkd_jax.checkpoints.manifest import compare_tensors
from vkd_jax.checkpoints.new_model import create_llava
from vkd_jax.evaluation import evaluate
from vkd_jax.evaluation.cached_features import CachedAnswerer
from vkd_jax.evaluation.metrics.summary import summaries
from vkd_jax.methods import replay, text_stream
from vkd_jax.methods.base import Context
from vkd_jax.methods.decouple import Decouple
from vkd_jax.methods.other_facts import OtherFacts
from vkd_jax.models import lora
from vkd_jax.reporting import model_card, report
from vkd_jax.results import RunResults
from vkd_jax.runs import features, inputs, judging, results_writer
from vkd_jax.runs.job import Job, warn_of_long_answers
from vkd_jax.runtime import files, hub, json_files, multihost, storage
from vkd_jax.runtime.dataclass_json import encode
from vkd_jax.training import loop
from vkd_jax.types import Params, UserError

ADAPTER, MANIFEST = "adapter", "manifest.json"
FINETUNE_SETS = ("finetune_forget", "finetune_retain")
DOCUMENTS = (f"unlearned/{model_card.FILE}", f"unlearned/{certificate.FILE}")


def finetune(job: Job, name: str) -> Path:
    """Fine-tunes the base model, and returns the folder of the new one.

    Args:
        job: the run.
        name: "vanilla" trains on everybody, "retain_only" leaves out the forget set.
    """
    workdir, config, method = job.workdir, job.config, job.config.finetune.method
    source = _base_model(job)
    if workdir.has_model(name):
        return workdir.model(name)
    train = config.finetune.train
    sets = FINETUNE_SETS if name == "vanilla" else ("finetune_retain",)
    examples = [e for set_name in sets for e in job.sets.get(set_name, ())]
    by_kind = {
        "image": [e for e in examples if e.image is not None],
        "text": [e for e in examples if e.image is None],
    }
    with workdir.stage(f"load for {name}"):
        model = job.load(source, method)
        streams = {kind: model.encode(rows, train.buckets) for kind, rows in by_kind.items() if rows}
        context = Context(model.graphdef, model.params, None, model.config, streams, config.seed)
        prepared = method.prepare(context)
    with workdir.stage(f"fine-tune {name}"), workdir.training(name) as folder:
        trained = loop.fit(model, method, prepared, train, seed=config.seed, folder=folder, run=workdir.identity)
    with workdir.stage(f"export {name}"):
        without = job.forget_people if name == "retain_only" else []
        return _export(job, name, model, trained, source, without)


def _base_model(job: Job) -> Path:
    """The folder of the model that fine-tuning starts from; a new model's tokenizer is made for all examples."""
    config = job.config
    if not config.model.create:
        return job.workdir.given["base"]
    examples = [e for name in FINETUNE_SETS for e in job.sets.get(name, ())]

    def create(folder: Path) -> None:
        multihost.run_on_process_0(lambda: create_llava(folder, examples, config.model.create, config.seed))

    folder = job.workdir.model("base", create)
    warn_of_long_answers(job, folder)
    return folder


def unlearn_and_evaluate(job: Job, finetuned: dict[str, Path]) -> None:
    """Evaluates and attacks the vanilla model, unlearns, does the same with the result, and writes the results.

    Each model is released before the next is loaded, since a chip may have room for one only.

    Args:
        job: the run.
        finetuned: folders of the models that this run fine-tuned, by name; others are those of the config.
    """
    workdir, config = job.workdir, job.config
    given = workdir.given
    source = finetuned.get("vanilla") or given["path"]
    retain_only = finetuned.get("retain_only") or given.get("retain_only")
    references, changes = {}, None
    if retain_only:
        references["retain_only"] = evaluate_and_attack(job, "retain_only", _load(job, retain_only))
    model = _load(job, source)
    answers = {"vanilla": evaluate_and_attack(job, "vanilla", model)} | references
    if config.reports:
        target = given["unlearned"] if config.model.unlearned else unlearn(job, model, source)
        with workdir.stage("compare text"):
            vanilla_scores = results_writer.text_scores(job, model)
        del model
        with workdir.stage("manifest"):
            manifest = multihost.run_on_process_0(lambda: compare_tensors(source, target))
            for folder in (source, target):
                workdir.check_source(folder)
            workdir.write(MANIFEST, manifest)
        unlearned = _load(job, target)  # the exported weights, not those in memory
        answers["unlearned"] = evaluate_and_attack(job, "unlearned", unlearned)
        if config.request and job.method.replay.weight:
            with workdir.stage("cache features"):
                features.write(job, unlearned)
        with workdir.stage("compare text"):
            changes = results_writer.model_changes(job, unlearned, vanilla_scores, manifest, source)
        del unlearned
    else:
        del model
    answers = judging.ask_judge(job, answers)
    for folder in given.values():
        workdir.check_source(folder)
    results_writer.write(job, answers, changes)


def document_model(job: Job) -> None:
    """Writes the model card and the certificate of the unlearned model into its folder."""
    folder, results = job.workdir.path / "unlearned", RunResults.read(job.workdir.path)
    meta = encode(results.meta)
    facts = {
        "model": {"base": job.config.model.path, "method": meta["config"]["method"]["name"]},
        "forgotten": job.forgotten_digests,
        "vkd_jax": vkd_jax.__version__,
        **{key: meta[key] for key in ("commit", "command", "date", "versions", "config")},
        "inputs": json_files.read_json(job.workdir.path / inputs.FILE),
        "figures": {key: encode(getattr(results, key)) for key in ("models", "forget_quality", "utility", "attacks")},
    }

    def write() -> None:
        files.write_bytes(folder / model_card.FILE, model_card.render(results, job.forgotten_digests).encode())
        local = hub.fetch_model(folder)
        file, content = folder / certificate.FILE, certificate.describe(local, facts)
        job.workdir.verify_source(local)
        if not file.is_file() or file.read_bytes() != content:
            (folder / certificate.SIGNATURE).unlink(missing_ok=True)  # of another certificate
            files.write_bytes(file, content)

    with job.workdir.stage("model card"):
        multihost.run_on_process_0(write)
        job.workdir.add_record(*DOCUMENTS)


def write_report(job: Job) -> None:
    """Writes report.md with its plots, and report.html, from the results in the run's folder."""
    with job.workdir.stage("report"):
        # The folders of requests hold no image of anybody.
        questions = [] if job.config.request else [e for examples in job.questions.values() for e in examples]
        images = {e.image_id: e.image for e in questions if e.image is not None}
        page = multihost.run_on_process_0(lambda: report.write(job.workdir.path, images))
        job.workdir.replace_records(report.PREFIXES, lambda: report.files_of(job.workdir.path))
    logging.info("report: %s, and report.html for a browser", page)


def _load(job: Job, folder: Path) -> ModelBundle:
    with job.workdir.stage("load"):
        return job.load(folder)


def unlearn(job: Job, model: ModelBundle, source: Path) -> Path:
    """Unlearns, and returns the folder of the unlearned model.

    Args:
        job: the run.
        model: the vanilla model, which stays as it is.
        source: its folder.
    """
    workdir, config, method = job.workdir, job.config, job.method
    if workdir.has_model("unlearned"):
        return workdir.model("unlearned")
    with workdir.stage("prepare"):
        context = _context(job, model)
        prepared = method.prepare(context) if method.losses() else None
    with workdir.stage("unlearn"):
        if prepared is None:
            trained = method.edit(context)
        else:
            with workdir.training() as folder:
                options = dict(seed=config.seed, teacher=context.vanilla, folder=folder, run=workdir.identity)
                trained = loop.fit(model, method, prepared, config.train, **options)
    with workdir.stage("export"):
        return _export(job, "unlearned", model, trained, source, [])


def _context(job: Job, model: ModelBundle) -> Context:
    """What the method of unlearning is given: the model, the encoded streams, and the base model on demand."""
    config = job.config
    base = None
    if job.method.needs_base:
        base = job.workdir.model("base") if config.model.create else job.workdir.given["base"]
    streams = {name: job.image_questions(name) for name in ("forget", "retain")}
    streams |= {f"{name}_text": questions for name in streams if (questions := job.text_questions(name))}
    if text_stream.STREAM in job.method.losses():
        streams[text_stream.STREAM] = job.text_stream()
    for stream in (Decouple.STREAM, OtherFacts.STREAM):
        if stream in job.method.losses():
            streams[stream] = job.image_questions(stream)
    if refusals := job.sets.get(job.benchmark.UNLEARN.get("refusals", "")):
        streams["refusals"] = refusals
    encode = functools.partial(model.encode, buckets=config.train.buckets)
    sets = {name: encode(questions) for name, questions in streams.items()}
    if job.earlier.trained:
        sets[replay.STREAM] = job.earlier.encoded(model, config.train.buckets)
    return Context(
        graphdef=model.graphdef,
        params=model.params,
        load_base=(lambda: job.load(base).params) if base else None,
        model_config=model.config,
        sets=sets,
        seed=config.seed,
        encode=encode,
        vanilla=_first_model(job, model),
    )


def _first_model(job: Job, model: ModelBundle) -> Params | None:
    """The weights of the model before the first request; None if the run starts from it.

    All models of a ledger have the same frozen weights, except for kernels that adapters were merged into.
    """
    if not (job.config.request and job.config.request.first):
        return None
    first = job.load(sources.fetch_model(job.config.request.first)).params
    if job.method.adapters is not None:
        return first
    return {**model.params, **{path: first[path] for path in job.method.trainable(model.params, model.config)}}


def _export(job: Job, name: str, model: ModelBundle, trained: Params, source: Path, without: Sequence[str]) -> Path:
    """Writes a copy of the folder `source` with the trained weights, and returns it.

    If unlearning trained adapters alone, they are also written as they are, to the folder `ADAPTER`.
    """
    merged = trained | lora.adapters(model.params)
    notes = results_writer.provenance(job, name, without)

    has_adapter = bool(name == "unlearned" and trained and all(map(lora.is_adapter, trained)))
    adapter = job.workdir.path / ADAPTER

    def check() -> None:
        try:
            job.workdir.verify_source(source)
        except UserError:
            if has_adapter:
                files.remove(storage.local_copy(adapter))
            raise

    def write(folder: Path) -> None:
        if has_adapter:
            given = sources.parts_of(job.config.model.path)
            if given.folder != source:  # the run fine-tuned it, or a part was replaced meanwhile
                given = sources.Parts(str(source), source)
            peft.export(merged, source, storage.local_copy(adapter), model.config, given=given)
        export.export(merged, source, folder, model.config, notes=notes, check=check)
        if has_adapter:
            multihost.run_on_process_0(lambda: storage.upload_model(adapter, hub.ADAPTER_CONFIG))

    return job.workdir.model(name, write)


def evaluate_and_attack(job: Job, name: str, model: ModelBundle) -> list[dict]:
    """Evaluates a model and runs all attacks on it; returns the records of the evaluation."""
    answers = evaluate_model(job, name, model)
    for attack_name in job.attacks:
        attack_model(job, attack_name, name, model, answers)
    return answers


def evaluate_model(job: Job, name: str, model: ModelBundle) -> list[dict]:
    """The records of a model's evaluation: answers/NAME.jsonl."""
    workdir, options = job.workdir, job.config.eval
    path = f"answers/{name}.jsonl"
    if workdir.has(path):
        return workdir.read_lines(path)
    with workdir.stage(f"evaluate {name}"):
        answers = evaluate.evaluate(
            CachedAnswerer(model, job.earlier.hidden, job.earlier.block, batch_size=options.batch_size),
            job.questions,
            options,
            shown=job.worked_examples,
        )
        workdir.write_lines(path, answers)
    for set_name, kinds in summaries(answers).items():
        accuracies = (f"{kind} {summary.accuracy:.3f} (n={summary.n})" for kind, summary in sorted(kinds.items()))
        logging.info("%s %-11s  %s", name, set_name, "  ".join(accuracies))
    return answers


def attack_model(job: Job, attack: str, name: str, model: ModelBundle, answers: list[dict]) -> None:
    """Runs an attack on a model: attacks/ATTACK/NAME.jsonl."""
    workdir, path = job.workdir, f"attacks/{attack}/{name}.jsonl"
    if workdir.has(path):
        return
    with workdir.stage(f"attack {name}: {attack}"):
        subject = Subject(
            name=name,
            model=model,
            asked=job.questions,
            sets=job.eval_sets,
            answers=answers,
            forgets=job.image_questions("forget"),
            held_out=job.held_out,
            config=job.config,
            mesh=job.mesh,
            folder=workdir.path / "attacks" / attack / name,
        )
        workdir.write_lines(path, job.attacks[attack].run(subject))
