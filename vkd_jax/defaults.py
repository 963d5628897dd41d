"""What the config files start from: every field there is, with its meaning, and the words after a config's colon."""

import dataclasses
import typing
from collections.abc import Mapping, Sequence

import ml_collections

from vkd_jax import data, methods
from vkd_jax.types import UserError


def base() -> ml_collections.ConfigDict:
    """All fields but those of the method, for a small model in float32 on one device."""
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.stage = "unlearn"
    config.model = ml_collections.ConfigDict(
        dict(
            path="",  # a Hugging Face folder, or an id on its hub; "" is the tiny LLaVA that comes with the package
            base="",  # the same model before it met the people, for method.target=base
            dtype="float32",  # of weights and computation
            remat=False,  # computes activations again in the backward pass instead of keeping them
            quantize="",  # the frozen language model in int8 or int4, e.g. "int8", "int4:64" (groups of 64)
            max_pixels=0,  # a smaller budget a picture than the model's own, where pictures differ in size; 0 keeps it
        )
    )
    config.data = ml_collections.ConfigDict(
        dict(
            benchmark="mllmu",
            folder="",  # a snapshot in the benchmark's layout; "" writes the made-up people there
            forget=10,  # percent of the people: 5, 10 or 15
            retain_only=False,  # of the fine-tuning stage: leaves those people out
        )
    )
    config.mesh = ml_collections.ConfigDict(dict(data=1, fsdp=1, tensor=1))
    config.eval = ml_collections.ConfigDict(
        dict(
            protocol="options",  # options | letter, see vkd_jax/evaluate.py
            batch_size=64,
            max_items=300,  # at most so many questions of each set and kind; 0 asks all
            max_new_tokens=8,
            seed=0,
        )
    )
    config.train = ml_collections.ConfigDict(
        dict(
            steps=300,
            batch_size=dict(forget=32, retain=32),
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
    return config


def method(name: str, **changes) -> ml_collections.ConfigDict:
    """A method with all its hyperparameters, so that each can be overridden and stands in the run's config.json."""
    chosen = methods.create(name, changes)
    config = ml_collections.ConfigDict(dict(name=name))
    for field in dataclasses.fields(chosen):
        value = getattr(chosen, field.name)
        if type(None) in typing.get_args(field.type):  # of no fixed type, so that both None and a number can be given
            value = ml_collections.FieldReference(value, field_type=object)
        config[field.name] = value
    return config


def published(arg: str, presets: Mapping[str, tuple[str, Mapping]], **model) -> ml_collections.ConfigDict:
    """The config of a published checkpoint, from the words after the colon.

    The words are, in any order and separated by commas, a size, a method, a benchmark, and forget=PERCENT:
    `7b`, `13b,grad_diff`, `mllmu,forget=5,size=7b`. The first size of `presets` is the default.

    Args:
        arg: the words.
        presets: of the family: size -> (id on the Hugging Face hub, configuration).
        **model: fields of config.model to set otherwise.

    Raises:
        UserError: a word that is none of these.
    """
    unlearning = [name for name in methods.METHODS if name != "finetune"]
    words = _words(arg, dict(size=list(presets), method=unlearning, benchmark=list(data.BENCHMARKS)))
    config = base()
    config.model.update(path=presets[words["size"]][0], dtype="bfloat16", remat=True, **model)
    config.data.update(benchmark=words["benchmark"], forget=words["forget"])
    config.mesh.fsdp = -1  # all devices
    config.eval.update(protocol="letter", batch_size=16, max_items=0, max_new_tokens=16)
    config.train.update(batch_size=dict(forget=8, retain=8), learning_rate=2e-5)
    config.method = method(words["method"])
    return config


def _words(arg: str, choices: Mapping[str, Sequence[str]]) -> dict:
    words = {}
    for word in filter(None, arg.split(",")):
        key, _, value = word.rpartition("=")
        key = key or next((key for key, known in choices.items() if value in known), "")
        if not (value in choices.get(key, ()) or (key == "forget" and value.isdecimal())):
            known = "; ".join(f"{key}: {', '.join(names)}" for key, names in choices.items())
            raise UserError(f"{word!r} is not a word of this config; it takes {known}; forget=PERCENT.")
        if words.setdefault(key, value) != value:
            raise UserError(f"{arg!r} gives two answers to one question: {key} is {words[key]} or {value}; keep one.")
    chosen = dict(size=choices["size"][0], method="vkd", benchmark="mllmu", forget=10) | words
    return chosen | dict(forget=int(chosen["forget"]))
