"""What the config files start from: every field there is, with its meaning, and the words after a config's colon."""

import ast
import dataclasses
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import ml_collections

from vkd_jax import attacks, benchmarks, methods
from vkd_jax.methods.scope import TRAIN
from vkd_jax.types import UserError

STAGES = {  # and the models that are fine-tuned on the way
    "unlearn": (),
    "finetune": ("vanilla",),
    "retain_only": ("retain_only",),
    "all": ("vanilla", "retain_only"),
    "audit": (),
}
# The word `onechip`: a language model of four bits, and little at once.
ONE_CHIP = (
    "mesh.fsdp=1 model.quantize=int4:64 model.remat=full eval.batch_size=4 "
    "train.batch_size.forget=4 train.batch_size.retain=4 finetune.train.microbatches=4"
)


def base() -> ml_collections.ConfigDict:
    """All fields, for a small model in float32 on one device."""
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.stage = "unlearn"  # unlearn | finetune | retain_only | all | audit, see vkd_jax/runs/pipeline.py
    config.model = ml_collections.ConfigDict(
        dict(
            path="",  # the model that knows the people: a Hugging Face folder, an id on its hub, or a shipped model
            base="",  # the same model before it met them: fine-tuning begins there, and method.target=base needs it
            retain_only="",  # one that met all but those to forget: what forgetting is compared with
            unlearned="",  # one that was unlearned already, here or elsewhere, for the stage `audit`
            create={},  # sizes of a model with random weights, which takes the place of `base` in fine-tuning
            dtype="float32",  # of weights and computation
            remat="",  # what the backward pass computes again: "", "dots" (all but products with weights) or "full"
            quantize="",  # the frozen language model in int8 or int4, e.g. "int8", "int4:64" (groups of 64)
            max_pixels=0,  # a smaller budget a picture than the model's own, where pictures differ in size; 0 keeps it
        )
    )
    config.data = benchmark("mllmu")
    config.mesh = ml_collections.ConfigDict(dict(data=1, fsdp=1, tensor=1))
    config.eval = ml_collections.ConfigDict(
        dict(
            protocol="options",  # options | letter, see evaluation/evaluate.py; both with a comma, the first one counts
            shots=0,  # 1 shows a worked example before each question
            batch_size=64,
            max_items=300,  # at most so many questions of each set and kind; 0 asks all
            max_new_tokens=8,
            seed=0,
        )
    )
    # After the evaluation: "all", or names of vkd_jax/attacks, separated by commas; each has its settings below.
    config.attacks = dict(names="", seed=0, **{name: _fields(attacks.create(name, {})) for name in attacks.ATTACKS})
    config.method = method("vkd")
    config.train = _train(steps=300, batch_size=dict(forget=32, retain=32))
    config.finetune = dict(method=method("finetune"), train=_train(batch_size=dict(image=64, text=16)))
    return config


def _train(batch_size: Mapping[str, int], steps: int = 0) -> ml_collections.ConfigDict:
    """How a loop trains, that of unlearning or that of fine-tuning."""
    return ml_collections.ConfigDict(
        dict(
            steps=steps,  # or, if 0,
            epochs=0.0,  # through the longest stream
            batch_size=batch_size,  # rows a step of each stream, all devices together
            microbatches=1,  # parts that a batch is computed in, one after another, so that it needs less memory
            buckets=1,  # at most so many lengths of padded rows; each pair of two streams' lengths is compiled
            learning_rate=2e-3,
            schedule="cosine",  # cosine | constant, after a linear warmup
            warmup_steps=10,
            weight_decay=0.01,
            clip_norm=1.0,
            b2=0.999,
            log_every=20,
            log_seconds=15.0,
            checkpoint_every=100,
        )
    )


def benchmark(name: str, **changes) -> ml_collections.ConfigDict:
    """A benchmark with all its fields, and where it is kept once it has been read."""
    fields = dataclasses.asdict(benchmarks.create(name, changes))
    return ml_collections.ConfigDict(dict(benchmark=name, cache="", **fields))  # "" is the workdir


def method(name: str, **changes) -> ml_collections.ConfigDict:
    """A method with all its hyperparameters, so that each can be overridden and stands in the run's config.json."""
    config = ml_collections.ConfigDict(dict(name=name))
    config.update(_fields(methods.create(name, changes)))
    return config


def _fields(chosen: Any) -> ml_collections.ConfigDict:
    """The fields of a dataclass."""
    config = ml_collections.ConfigDict()
    for field in dataclasses.fields(chosen):
        value = getattr(chosen, field.name)
        if type(None) in typing.get_args(field.type):  # of no fixed type, so that both None and a number can be given
            value = ml_collections.FieldReference(value, field_type=object)
        config[field.name] = value
    return config


def published(
    arg: str, presets: Mapping[str, tuple[str, Mapping]], onechip: str = "", **model
) -> ml_collections.ConfigDict:
    """The config of a published checkpoint, from the words after the colon.

    The words are, in any order and separated by commas, a size, a method, what it trains (visual, lora or train=all), a
    benchmark, a stage, forget=PERCENT, `attacks` for all of them, `onechip` for a chip of 16 GB, and `compare` for all
    methods: `7b`, `13b,npo,lora`, `mllmu,forget=5,size=7b,attacks`, `clear,finetune`. The first size of `presets` is
    the default. Fine-tuning follows the benchmark's published recipe.

    Args:
        arg: the words.
        presets: of the family: size -> (id on the Hugging Face hub, configuration).
        onechip: what that word sets beside `ONE_CHIP`, as `override` reads it.
        **model: fields of config.model to set otherwise.

    Raises:
        UserError: a word that is none of these.
    """
    unlearning = [name for name in methods.METHODS if name != "finetune"]
    choices = dict(size=list(presets), method=unlearning, benchmark=list(benchmarks.BENCHMARKS), stage=list(STAGES))
    choices |= dict(train=TRAIN, attacks=["attacks"], runs=["compare"], chips=["onechip"])
    words = dict(size=choices["size"][0], method="vkd", benchmark="mllmu", stage="unlearn") | parse_words(arg, choices)
    config = base()
    config.stage = words["stage"]
    config.data = benchmark(words["benchmark"])
    if "forget" in words:
        if not isinstance(config.data.get("forget"), int):
            raise UserError(f"forget={words['forget']}: the benchmark {words['benchmark']} has no such shares.")
        config.data.forget = int(words["forget"])
        benchmarks.create(words["benchmark"], {"forget": config.data.forget}).check()
    published_id = presets[words["size"]][0]
    # What is unlearned knows the people; what is fine-tuned has never met them.
    config.model.update(path=published_id, dtype="bfloat16", remat="full", **model)
    if STAGES[config.stage]:
        config.model.update(path="", base=published_id)
    config.mesh.fsdp = -1  # all devices
    config.eval.update(protocol="letter", batch_size=16, max_items=0, max_new_tokens=50)
    config.train.update(batch_size=dict(forget=8, retain=8), learning_rate=2e-5, buckets=2)
    config.method = method(words["method"], **({"train": words["train"]} if "train" in words else {}))
    config.attacks.names = "all" if "attacks" in words or "runs" in words else ""
    if "runs" in words:  # the methods that train as published: adapters, but for those that choose weights
        chosen = {name: {} if name in ("vkd", "manu", "mmunlearner") else {"train": "lora"} for name in unlearning}
        config.compare = comparison({name: entrant(name, **fields) for name, fields in chosen.items()})
    recipe = dict(benchmarks.create(words["benchmark"], {}).RECIPE)
    rows = recipe.pop("batch_size")
    config.finetune.train.update(
        epochs=float(recipe.pop("epochs")),
        learning_rate=recipe.pop("learning_rate"),
        batch_size=dict(image=rows, text=rows),
        buckets=2,
    )
    config.finetune.method = method("finetune", train="lora", **recipe)
    if "chips" in words:
        override(config, f"{ONE_CHIP} {onechip}")
        if "fisher_chunk" in config.method:
            config.method.fisher_chunk = 1
    return config


def entrant(name: str, settings: str = "", search: Sequence[str] = (), **fields) -> ml_collections.ConfigDict:
    """A method in a comparison.

    Args:
        name: of the method, with `fields`, its hyperparameters.
        settings: what else it changes in the config of a run, as `override` reads it.
        search: the settings that are tried for it; all methods of a comparison have equally many.
    """
    return ml_collections.ConfigDict(dict(method=method(name, **fields), settings=settings, search=tuple(search)))


def comparison(entrants: Mapping[str, ml_collections.ConfigDict], tuning: str = "", seeds: Sequence[int] = (0, 1, 2)):
    """The section `compare`, which makes the config of a run one of `python -m vkd_jax.compare`.

    Args:
        entrants: by the name that tables show.
        tuning: what is changed in the config, as `override` reads it, to tune on people who are not reported: a model
            that knows them is fine-tuned first. "" tunes nothing.
        seeds: a run each.
    """
    return ml_collections.ConfigDict(dict(entrants=dict(entrants), tuning=tuning, seeds=tuple(seeds)))


def override(config: ml_collections.ConfigDict, settings: str) -> None:
    """Sets fields as on a command line: "train.steps=200 method.train=visual"; values are Python literals or text.

    Raises:
        UserError: there is no such field, or it holds something else.
    """
    for setting in settings.split():
        name, _, text = setting.partition("=")
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = text
        try:
            config.copy_and_resolve_references().lock().update_from_flattened_dict({name: value})  # no field is made up
            config.update_from_flattened_dict({name: value})
        except (KeyError, AttributeError, TypeError, ValueError) as error:
            raise UserError(f"{setting!r} does not fit the config: {error}") from error


def parse_words(arg: str, choices: Mapping[str, Iterable[str]]) -> dict[str, str]:
    """The words after a config's colon, by the question that each answers; key=value names the question.

    Raises:
        UserError: a word is no answer, or two answer one question.
    """
    words: dict[str, str] = {}
    for word in filter(None, arg.split(",")):
        key, _, value = word.rpartition("=")
        key = key or next((key for key, known in choices.items() if value in known), "")
        if not (value in choices.get(key, ()) or (key == "forget" and value.isdecimal())):
            known = "; ".join(f"{key}: {', '.join(names)}" for key, names in choices.items())
            raise UserError(f"{word!r} is not a word of this config; it takes {known}; forget=PERCENT.")
        if words.setdefault(key, value) != value:
            raise UserError(f"{arg!r} gives two answers to one question: {key} is {words[key]} or {value}; keep one.")
    return words
