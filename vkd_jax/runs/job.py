"""A run's config with its data, and the checks that are made before anything is computed."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import logging

from vkd_jax import benchmarks, messages
from vkd_jax.attacks import Attack
from vkd_jax.benchmarks import general, selection, set_checks
from vkd_jax.benchmarks.folder import Folder
from vkd_jax.checkpoints import sources
from vkd_jax.checkpoints.bundle import ModelBundle, check_trainable, read_family
from vkd_jax.config.evaluation import EvalConfig
from vkd_jax.config.schema import ModelConfig, RunConfig
from vkd_jax.data import image_settings
from vkd_jax.data.processor import Processor
from vkd_jax.evaluation import answer_lengths, evaluate, judge, shortcuts, wording
from vkd_jax.methods import Method, text_stream
from vkd_jax.methods.decouple import Decouple
from vkd_jax.methods.other_facts import OtherFacts
from vkd_jax.runs import features, inputs
from vkd_jax.runs.features import CachedFeatures
from vkd_jax.runs.inputs import REFERENCE
from vkd_jax.runs.workdir import Workdir
from vkd_jax.runtime import multihost, storage
from vkd_jax.runtime.mesh import make_mesh, shards
from vkd_jax.training import trackers
from vkd_jax.types import EvalSet, Example, Role, UserError, located, person_digest

FIRST = "request.first"  # the name of the model before the first request
HELD_OUT = "held_out"  # the set of questions about people that no model was trained on, for the membership attack


@dataclasses.dataclass(frozen=True)
class Job:
    """A checked config with its data."""

    workdir: Workdir
    mesh: jax.sharding.Mesh
    sets: dict[str, list[Example]]  # all examples of each set
    questions: dict[str, list[Example]]  # of each evaluation set, the seeded sample that every model is asked
    held_out: list[Example]  # the set `HELD_OUT`; empty if no attack uses it
    earlier: CachedFeatures  # of the people of earlier requests

    @classmethod
    def prepare(cls, workdir: Workdir) -> "Job":
        """Checks the config and reads the data.

        Raises:
            UserError: the config or the data is wrong.
        """
        config = workdir.config
        mesh = check_config(config)
        wording.read_wording(config.eval.prompts)
        rules = judge.read_rules(config.eval.judge_prompts)
        judge_folder(config.eval)
        if config.eval.judge_at_endpoint:
            judge.Endpoint(config.eval.judge, config.eval.judge_model)
        with workdir.stage("data"):
            sets = read_data(config, workdir.path)
            held_out = sets.pop(HELD_OUT, [])
            judge.check_categories(rules, (e for examples in sets.values() for e in examples))
            questions = {
                name: evaluate.sample(examples, config.eval.max_items, config.eval.seed, name)
                for name, examples in sets.items()
                if not name.startswith("finetune_")
            }
            earlier = CachedFeatures.read(config)
        return cls(workdir, mesh, sets, questions, held_out, earlier)

    @property
    def config(self) -> RunConfig:
        """The config of the run."""
        return self.workdir.config

    @property
    def method(self) -> Method:
        """The method of unlearning."""
        return self.config.method

    @property
    def attacks(self) -> dict[str, Attack]:
        """The attacks to run, by name."""
        return self.config.active_attacks

    @property
    def benchmark(self) -> Any:
        """The benchmark that the data is from."""
        return self.config.data.benchmark

    def load(self, folder: Path, method: Method | None = None) -> ModelBundle:
        """Loads a model for a method, by default the method of unlearning: all judged models have the same dtypes.

        Raises:
            UserError: it cannot be loaded, or changed since the run began.
        """
        options = load_options(self.config.model)
        model = ModelBundle.load_for(method or self.method, folder, seed=self.config.seed, mesh=self.mesh, **options)
        self.workdir.check_source(folder)
        return model

    @property
    def eval_sets(self) -> tuple[EvalSet, ...]:
        """The sets of the benchmark, then those of earlier requests and of the standard suites that the run asks."""
        suites = general.create(self.config.eval)
        further = (*features.EVAL_SETS, *(s for suite in suites for s in suite.asked_sets))
        sets = benchmarks.eval_sets(self.benchmark, self.config.data.forgets_text)
        return (*sets, *(s for s in further if s.name in self.sets))

    @property
    def held_out_set(self) -> dict[str, list[Example]]:
        """The held-out questions by the name of their set, as `read_data` returns them."""
        return {HELD_OUT: self.held_out} if self.held_out else {}

    @property
    def forget_people(self) -> list[str]:
        """The people of the forget set."""
        forget_sets = [s.name for s in self.benchmark.EVAL_SETS if s.role is Role.FORGET]
        return sorted({e.person for name in forget_sets for e in self.sets[name] if e.person})

    @property
    def forgotten_digests(self) -> list[str]:
        """The digests of the people whom the unlearned model has forgotten, those of earlier requests included."""
        earlier = self.config.request.earlier if self.config.request else ()
        return sorted({*map(person_digest, self.forget_people), *earlier})

    @property
    def worked_examples(self) -> list[Example]:
        """The questions that a worked example may be drawn from: those of the retain set."""
        retain_sets = [s.name for s in self.benchmark.EVAL_SETS if s.role is Role.RETAIN]
        return [example for name in retain_sets for example in self.questions.get(name, ())]

    def image_questions(self, stream: str) -> list[Example]:
        """The questions with an image, each once, of a training stream of unlearning.

        Args:
            stream: forget, retain, decouple or other_facts.

        Raises:
            UserError: the set has no question with an image.
        """
        if stream not in self.benchmark.UNLEARN:
            raise UserError(f"method.{stream}.weight: {self.benchmark.TITLE} has no such images to train on. Give 0.")
        examples = self.sets.get(self.benchmark.UNLEARN[stream], ())
        questions = list({(e.image_id, e.question): e for e in examples if e.image is not None}.values())
        if not questions:
            raise UserError(f"the {stream} set has no question with an image, which visual unlearning requires.")
        return questions

    def text_questions(self, stream: str) -> list[Example]:
        """The text-only questions about the same people, each once; see `image_questions`."""
        examples = self.sets.get(self.benchmark.UNLEARN.get(stream, ""), ())
        return list({e.question: e for e in examples if e.image is None}.values())

    def text_stream(self) -> list[Example]:
        """The questions of the text stream: the text-only ones of what is to be kept, each once.

        Raises:
            UserError: there are none.
        """
        kept = (*(() if self.config.data.forgets_text else ("forget",)), "retain", OtherFacts.STREAM)
        questions = [e for stream in kept for e in self.text_questions(stream)]
        if not questions:
            raise UserError(
                "method.text.weight: the benchmark has no text-only questions to train on. Give 0, or add some."
            )
        return list({e.question: e for e in questions}.values())


def read_data(config: RunConfig, path: Path) -> dict[str, list[Example]]:
    """Reads all sets that a run needs, by name; `HELD_OUT` is among them if an attack uses it.

    Args:
        config: the config of the run.
        path: its folder, which has the converted benchmark unless `data.cache` is given.

    Raises:
        UserError: the data is wrong.
    """
    benchmark = config.data.benchmark
    benchmark.check()
    suites = general.create(config.eval)
    # Each host reads the data from its own disk.
    cache = storage.local_copy(config.data.cache or path / "data")
    unlearns_on_finetuning_set = any(name.startswith("finetune_") for name in benchmark.UNLEARN.values())
    finetune = bool(config.workflow.finetunes) or unlearns_on_finetuning_set
    with storage.write_errors("--config.data.cache" if config.data.cache else "--workdir"):
        sets = multihost.run_process_0_first(lambda: benchmarks.read(benchmark, cache, finetune=finetune))
        if config.request:
            sets = selection.select_people(benchmark, sets, config.request)
            sets |= features.read_questions(config.request.features)
        if isinstance(benchmark, Folder):
            shortcuts.warn_of_shortcuts(sets, benchmark.EVAL_SETS, config.eval.protocols)
        if suites:
            sets = sets | multihost.run_process_0_first(lambda: general.read(suites, cache))
        if membership := config.active_attacks.get("membership"):
            read = functools.partial(benchmarks.held_out, benchmark, cache, membership.held_out)
            if held_out := multihost.run_process_0_first(read):
                if membership.held_out:
                    set_checks.check_held_out(held_out, sets, f"attacks.membership.held_out={membership.held_out}")
                sets = sets | {HELD_OUT: held_out}
    return sets


def load_options(config: ModelConfig) -> dict[str, Any]:
    """The arguments of `ModelBundle.load` that a config gives."""
    return dict(dtype=config.dtype, quantization=config.quantize, remat=config.remat, max_pixels=config.max_pixels)


def check_config(config: RunConfig) -> jax.sharding.Mesh:
    """Checks a config before anything is read, and returns its mesh.

    Raises:
        UserError: fields that exclude each other, or that do not fit the devices.
    """
    mesh = make_mesh(**dataclasses.asdict(config.mesh))
    config.check_stage(shards(mesh))
    for attack in config.active_attacks.values():
        attack.check(config)
    if multihost.is_process_0():
        trackers.check((*config.train.tracker_names, *config.finetune.train.tracker_names))
    return mesh


def check_models(job: Job) -> dict[str, Path]:
    """Checks, before anything is trained, that the models fit the data and the methods.

    Returns:
        `given_models`.

    Raises:
        UserError: a model is missing, differs in kind or size from the model to unlearn, was trained on other people
            than the run assumes, or lacks weights that a method trains.
    """
    config = job.config
    training_methods = [config.finetune.method] if config.workflow.finetunes else []
    training_methods += [job.method] if config.workflow.unlearns else []
    first_family, models = None, given_models(config)
    for name, folder in models.items():
        family = read_family(folder)
        first_family = first_family or family
        if family != first_family:
            raise UserError(f"config.{_field(name)} is a model of another kind or size than the one to unlearn.")
        _check_provenance(job, name, folder)
        first, reference = next(iter(models.items()))
        if different := image_settings.differences(reference, folder):
            logging.warning(
                "config.%s sees other pixels than config.%s, since %s of its image processor differs; compare their "
                "accuracies with care",
                _field(name),
                _field(first),
                messages.listed(different),
            )
        for method in training_methods:
            check_trainable(folder, method, config.model.quantize)
    if models:
        folder = next(iter(models.values()))
        _check_prompts(config, folder)
        warn_of_long_answers(job, folder)
    if reference := reference_folder(config):
        _check_reference(job, reference)
    if config.stage == "audit":
        job.image_questions("forget")
    if config.workflow.unlearns:
        for stream in ("forget", "retain"):
            job.image_questions(stream)
        if text_stream.STREAM in job.method.losses():
            job.text_stream()
        if text_stream.FORGET_STREAM in job.method.losses() and not job.text_questions("forget"):
            raise UserError(
                "data.forgets=both: the forget set has no text-only question to train on. Give visual, or add some."
            )
        for stream in (Decouple.STREAM, OtherFacts.STREAM):
            if stream in job.method.losses():
                job.image_questions(stream)
    if config.eval.shots:
        questions = [e for examples in job.questions.values() for e in examples]
        evaluate.worked_examples(job.worked_examples, questions, config.eval.seed)
    return models


def _check_prompts(config: RunConfig, folder: Path) -> None:
    """Checks that no wording of the config has a token that the tokenizer of the model reads as more than text."""
    texts = {
        f"--config.eval.prompts={config.eval.prompts}: {field}": text
        for field, text in dataclasses.asdict(wording.read_wording(config.eval.prompts)).items()
        if config.eval.prompts
    }
    for name, attack in config.active_attacks.items():
        texts |= {f"attacks.{name}.{field}": getattr(attack, field) for field in getattr(attack, "ASKED", ())}
    processor = Processor(folder, read_family(folder)[1]) if texts else None
    for location, text in texts.items():
        with located(location):
            processor.check_text(text)


def warn_of_long_answers(job: Job, folder: Path) -> None:
    """Warns of true answers that are longer than a model may write, by the tokenizer of a model folder."""
    tokenizer = Processor(folder, read_family(folder)[1]).tokenizer
    answer_lengths.warn_of_long_answers(job.questions, job.config.eval.max_new_tokens, tokenizer)


def given_models(config: RunConfig) -> dict[str, Path]:
    """The folder of each model that the config gives and the run reads, by its field of `config.model`, or `FIRST`.

    Raises:
        UserError: a model does not exist or cannot be downloaded.
    """
    model = config.model
    if config.workflow.finetunes:
        models = {"base": "" if model.create else model.base}
    else:
        models = {name: getattr(model, name) for name in ("path", "retain_only", "unlearned")}
        if config.workflow.unlearns and config.method.needs_base:
            models["base"] = model.base
    if config.request and config.workflow.unlearns:
        models[FIRST] = config.request.first
    folders = {}
    for name, value in models.items():
        if value:
            with located(f"--config.{_field(name)}={value}"):
                folders[name] = sources.fetch_model(value)
    return folders


def _field(name: str) -> str:
    """The field of the config that gives a model, from its name in `given_models`."""
    return name if "." in name else f"model.{name}"


def judge_folder(config: EvalConfig) -> Path | None:
    """The folder of the judge; None without one, or if it is at an endpoint.

    Raises:
        UserError: the folder does not exist, cannot be downloaded, or has no model.
    """
    if not config.judge or config.judge_at_endpoint:
        return None
    with located(f"--config.eval.judge={config.judge}"):
        folder = sources.fetch_model(config.judge)
        read_family(folder)
    return folder


def reference_folder(config: RunConfig) -> Path | None:
    """The folder of the reference model of the membership attack; None if the run reads none.

    Raises:
        UserError: the folder does not exist or cannot be downloaded.
    """
    membership = config.active_attacks.get("membership")
    if not membership or not membership.reference:
        return None
    with located(f"--config.{REFERENCE}={membership.reference}"):
        return sources.fetch_model(membership.reference)


def models_read(config: RunConfig, models: Mapping[str, Path]) -> dict[str, Path]:
    """The folders of `given_models`, of the judge as "eval.judge" and of the reference model as `REFERENCE`."""
    further = {"eval.judge": judge_folder(config.eval), REFERENCE: reference_folder(config)}
    return {**models, **{name: folder for name, folder in further.items() if folder}}


def describe_inputs(
    config: RunConfig, sets: Mapping[str, Sequence[Example]], models: Mapping[str, Path]
) -> inputs.Inputs | None:
    """The digests of what a run reads, on process 0; see `inputs.describe`.

    Raises:
        UserError: two models have the same weights; see `inputs.check_models`.
    """
    wordings = {name: getattr(config.eval, name) for name in inputs.WORDINGS}
    models = models_read(config, models)

    def describe() -> inputs.Inputs:
        described = inputs.describe(sets, models, wordings)
        inputs.check_models(described)
        return described

    return multihost.run_on_process_0(describe)


def _provenance(folder: Path) -> tuple[dict[str, Any], list[str]] | None:
    """The section `data` of the run that wrote a model, and the people it was trained without; None if not known.

    Raises:
        UserError: the file that says so is damaged, or is not the one that the run in the folder above wrote.
    """
    provenance = inputs.read_provenance(folder)
    try:
        return dict(provenance["config"]["data"]), list(provenance["without"])
    except (KeyError, TypeError, ValueError):
        return None  # not written by a run


def _check_reference(job: Job, folder: Path) -> None:
    """Checks that the reference model was not trained on the forget set, if an earlier run wrote it."""
    if (known := _provenance(folder)) is None:
        return
    model_data, without = known
    data = job.config.to_dict()["data"]
    synthetic, published = ("source", "people", "n_people"), ("benchmark", "source")
    origin = synthetic if data.get("source") == "" else published if "source" in data else ("benchmark", "forget")
    if any(model_data.get(key) != data.get(key) for key in origin):
        return  # trained on other people
    if learned := sorted(set(job.forget_people) - set(without)):
        raise UserError(
            f"config.{REFERENCE}={folder} was trained on {messages.people(len(learned))} of the forget set: "
            f"{messages.listed(learned)}. Give a model that was trained on none of them, or leave the field empty."
        )


def _check_provenance(job: Job, name: str, folder: Path) -> None:
    """Checks that a model written by an earlier run was trained on the people that this run assumes."""
    if (known := _provenance(folder)) is None:
        return
    (model_data, without), data = known, job.config.to_dict()["data"]
    field = f"config.{_field(name)}={folder}"
    if model_data.get("source") == data.get("source") == "":
        theirs, ours = (f"people={d.get('people')} and n_people={d.get('n_people')}" for d in (model_data, data))
        if name == "base" and theirs == ours:
            raise UserError(
                f"{field} was already trained on the synthetic people of config.data ({ours}). Give another base model."
            )
        if name != "base" and theirs != ours:
            raise UserError(
                f"{field} was trained on the synthetic people of {theirs}, not on those of config.data ({ours}). "
                "Create a model of these people with --config.stage=all."
            )
        if name != "base" and data.get("appearance") and not model_data.get("appearance"):
            raise UserError(
                f"{field} was never taught the questions of data.appearance. Create a model that was with "
                "--config.stage=all, or leave data.appearance at False."
            )
    theirs, ours = (tuple(d.get("forget_facts") or ()) for d in (model_data, data))
    if name == "retain_only" and set(theirs) != set(ours):
        facts = [messages.listed(x) if x else "everything" for x in (theirs, ours)]
        raise UserError(
            f"{field} was trained without {facts[0]} about the people to forget, but this run forgets {facts[1]}. "
            "Create a retain-only model with --config.stage=retain_only, or leave the field empty."
        )
    if name == "retain_only" and without != job.forget_people:
        raise UserError(
            f"{field} was trained without {messages.people(len(without))}, but the forget set of this run has "
            f"{messages.people(len(job.forget_people))}, not the same ones. Create a retain-only model with "
            "--config.stage=retain_only, or leave the field empty."
        )
