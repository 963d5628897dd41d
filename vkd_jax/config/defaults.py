"""Building blocks of the files of configs/: a config with all fields, its sections, and runs of published models."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections

from vkd_jax import registry
from vkd_jax.config import arguments, schema
from vkd_jax.config.arguments import Argument
from vkd_jax.config.comparison import CompareConfig, EntrantConfig
from vkd_jax.config.schema import DataConfig, RunConfig
from vkd_jax.config.stages import STAGES
from vkd_jax.types import UserError

# Arguments of several config files. A value that two arguments have in common is only accepted with its key.
WEIGHTS = Argument(
    "train",
    "Weights that the method trains.",
    {
        "default": "the method's own choice",
        "visual": "vision tower and projector",
        "lora": "adapters on the language model",
        "visual+lora": "vision tower, projector, and adapters on the language model",
        "all": "all weights",
    },
    default="default",
    needs_key=frozenset(["all", "default"]),
)
SETTING = Argument(
    "setting",
    "Settings of the method.",
    {
        "published": "as published",
        "robust": "against relearning: worst-case forgetting, a text stream, and forgetting toward a look-alike",
    },
    default="published",
)
FORGETS = Argument(
    "forgets",
    "What is forgotten about the people.",
    {
        "visual": "who is in an image, but not text about the people",
        "both": "everything, in images and in text",
    },
    default="visual",
    needs_key=frozenset(["visual"]),
)
STAGE = Argument("stage", "Stages of the run.", {name: stage.help for name, stage in STAGES.items()}, "unlearn")
ATTACKS = Argument(
    "attacks",
    "Attacks after the evaluation.",
    {"none": "no attack", "all": "every attack"},
    default="none",
    needs_key=frozenset(["all", "none"]),
    bare_key="all",
)
# Settings of the argument setting=robust: of every method that trains, of those that ascend, and of VKD.
ROBUST = "method.text.weight=4.0 method.worst_case.radius=1e-3 method.worst_case.steps=2"
ROBUST_ASCENT = "method.bound=look_alike"
ROBUST_VKD = "method.target=none method.mask_scope=none method.weight_retain_distill=16.0"
# Weights of the forgotten and the retained text stream with the argument forgets=both.
FORGET_TEXT, KEEP_TEXT = 1.0, 4.0
# Settings of the argument chips=onechip: a language model in int4, and small batches.
ONE_CHIP = (
    "mesh.fsdp=1 model.quantize=int4:64 model.remat=full eval.batch_size=4 "
    "train.batch_size.forget=4 train.batch_size.retain=4 train.batch_size.text=4 train.batch_size.forget_text=4 "
    "finetune.train.microbatches=4"
)


def unlearning_methods() -> list[str]:
    """Names of the methods of unlearning."""
    return [name for name in registry.METHODS if name != "finetune"]


def method_argument() -> Argument:
    """Argument that selects the method of unlearning."""
    meanings = {name: registry.doc("method", registry.METHODS, name) for name in unlearning_methods()}
    return Argument("method", "Method of unlearning.", meanings, default="vkd")


def synthetic_benchmarks() -> list[str]:
    """Names of the benchmarks that are written about the synthetic people if they have no source."""
    classes = {name: registry.lookup("benchmark", registry.BENCHMARKS, name) for name in registry.BENCHMARKS}
    return [name for name, cls in classes.items() if "n_people" in {field.name for field in dataclasses.fields(cls)}]


def benchmark_argument(*names: str) -> Argument:
    """Argument that selects one of these benchmarks."""
    meanings = {name: registry.doc("benchmark", registry.BENCHMARKS, name) for name in names}
    return Argument("benchmark", "Benchmark.", meanings, default="mllmu")


def add_streams(config: ml_collections.ConfigDict, benchmark: str) -> None:
    """Gives the further training streams that a benchmark has images for the batch size of the forget set."""
    for stream in ("decouple", "other_facts"):
        if stream in registry.lookup("benchmark", registry.BENCHMARKS, benchmark).UNLEARN:
            config.train.batch_size[stream] = config.train.batch_size.forget


def forget_argument(*names: str) -> Argument:
    """Argument that selects the size of the forget set, for these benchmarks."""
    values: dict[int, list[str]] = {}
    for name in names:
        for percent in _forget_percentages(name):
            values.setdefault(percent, []).append(name)
    meanings = {str(percent): f"percent of the people of {', '.join(values[percent])}" for percent in sorted(values)}
    return Argument("forget", "Size of the forget set.", meanings, "10", needs_key=frozenset(meanings))


def _forget_percentages(benchmark: str) -> Sequence[int]:
    cls = registry.lookup("benchmark", registry.BENCHMARKS, benchmark)
    field = {field.name: field for field in dataclasses.fields(cls)}.get("forget")
    return field.metadata.get("choices", ()) if field else ()


def base() -> ml_collections.ConfigDict:
    """All fields, for a small model in float32 on one device."""
    return RunConfig().to_config_dict()


def benchmark(name: str, cache: str = "", **changes: Any) -> ml_collections.ConfigDict:
    """The section `data` of a benchmark with all its fields."""
    return schema.section_dict(DataConfig(registry.create("benchmark", registry.BENCHMARKS, name, changes), cache))


def method(name: str, **changes: Any) -> ml_collections.ConfigDict:
    """The section `method` of a method with all its hyperparameters."""
    return schema.section_dict(registry.create("method", registry.METHODS, name, changes))


def entrant(name: str, settings: str = "", search: Sequence[str] = (), **changes: Any) -> EntrantConfig:
    """A method in a comparison.

    Args:
        name: name of the method.
        settings: further settings of its runs, as `schema.override` reads them.
        search: settings that are tried for it; all methods of a comparison have equally many.
        **changes: hyperparameters of the method.
    """
    return EntrantConfig(registry.create("method", registry.METHODS, name, changes), settings, tuple(search))


def variant(of: str, settings: str) -> EntrantConfig:
    """A variant of another entrant in a comparison: its method and best settings, overridden by these settings."""
    return EntrantConfig(settings=settings, variant_of=of)


def comparison(
    entrants: Mapping[str, EntrantConfig], tuning: str = "", seeds: Sequence[int] = (0, 1, 2)
) -> ml_collections.ConfigDict:
    """The section `compare`, which makes a config one of `python -m vkd_jax.compare`; see `CompareConfig`."""
    return schema.section_dict(CompareConfig(entrants, tuning, tuple(seeds)))


def published(
    text: str, sizes: Mapping[str, tuple[str, Any]], one_chip: str = "", **model: Any
) -> ml_collections.ConfigDict:
    """The config of a published model.

    Fine-tuning follows the recipe that the benchmark publishes.

    Args:
        text: arguments after the colon of a config.
        sizes: PRESETS of the model's family, {size: (id on the Hugging Face hub, ...)}; the first one is the default.
        one_chip: settings of chips=onechip beside `ONE_CHIP`, as `schema.override` reads them.
        **model: fields of config.model that differ.

    Raises:
        UserError: unknown or contradictory arguments.
    """
    given = arguments.parse(text, _published_arguments(sizes))
    config = base()
    config.stage = given["stage"]
    config.data = benchmark_of(given)
    checkpoint = sizes[given["size"]][0]
    # The published checkpoint was not trained on the benchmark: it is the base, or in place of the vanilla model.
    role = "base" if STAGES[config.stage].finetunes else "path"
    config.model.update({role: checkpoint}, dtype="bfloat16", remat="full", **model)
    config.mesh.fsdp = -1  # all devices
    config.eval.update(protocol="letter", batch_size=16, max_items=0, max_new_tokens=50)
    config.train.update(batch_size=dict(forget=8, retain=8, text=8, forget_text=8), learning_rate=2e-5, buckets=2)
    config.method = method_of(given)
    if given["setting"] == "robust":
        make_robust(config, given["train"], default="visual+lora")
    if given["forgets"] == "both":
        make_both(config, given["train"], default="visual+lora")
    config.attacks.names = "all" if given["runs"] == "compare" or given["attacks"] == "all" else ""
    if given["runs"] == "compare":  # adapters, as published, except for methods that select weights
        selecting = ("vkd", "manu", "mmunlearner")
        config.compare = comparison(
            {name: entrant(name, **({} if name in selecting else {"train": "lora"})) for name in unlearning_methods()}
        )
        if given["forgets"] == "both":
            compare_both(config, default="visual+lora")
    recipe = dict(registry.lookup("benchmark", registry.BENCHMARKS, given["benchmark"]).RECIPE)
    rows = recipe.pop("batch_size")
    config.finetune.train.update(
        epochs=float(recipe.pop("epochs")),
        learning_rate=recipe.pop("learning_rate"),
        batch_size=dict(image=rows, text=rows),
        buckets=2,
    )
    config.finetune.method = method("finetune", **{"train": "lora", **recipe})
    if given["chips"] == "onechip":
        schema.override(config, f"{ONE_CHIP} {one_chip}")
        if "fisher_chunk" in config.method:
            config.method.fisher_chunk = 1
    add_streams(config, given["benchmark"])
    return config


def _published_arguments(sizes: Mapping[str, tuple[str, Any]]) -> list[Argument]:
    """The arguments of a published model's config."""
    names = list(registry.BENCHMARKS)
    chips = {"many": "shards the model over all devices", "onechip": "fits on one chip of 16 GB"}
    runs = {"one": "one run", "compare": "a comparison of all methods, for python -m vkd_jax.compare"}
    return [
        Argument("size", "Model.", {size: row[0] for size, row in sizes.items()}, next(iter(sizes))),
        method_argument(),
        WEIGHTS,
        SETTING,
        FORGETS,
        benchmark_argument(*names),
        forget_argument(*names),
        STAGE,
        ATTACKS,
        Argument("chips", "Devices.", chips, "many"),
        Argument("runs", "Number of runs.", runs, "one"),
    ]


def method_of(given: Mapping[str, str]) -> ml_collections.ConfigDict:
    """The section `method` that the arguments `method` and `train` ask for."""
    return method(given["method"], **({} if given["train"] == "default" else {"train": given["train"]}))


def make_robust(config: ml_collections.ConfigDict, train: str, default: str) -> None:
    """Applies the settings of setting=robust to the section `method`.

    Args:
        config: a config with its method.
        train: the argument `train`.
        default: what trains if the argument leaves it to the method: the language model has to train as well.

    Raises:
        UserError: the method trains nothing.
    """
    if "worst_case" not in config.method:
        raise UserError(f"setting=robust: method={config.method.name} trains nothing. Give another method.")
    config.method.train = default if train == "default" else train
    settings = [ROBUST, ROBUST_ASCENT * ("bound" in config.method), ROBUST_VKD * (config.method.name == "vkd")]
    schema.override(config, " ".join(settings))
    if config.method.train == "visual":  # no text reaches what trains
        config.method.text.weight = 0.0


def make_both(config: ml_collections.ConfigDict, train: str, default: str) -> None:
    """Applies the settings of forgets=both to a config with its method.

    Args:
        config: a config with its method.
        train: the argument `train`.
        default: what trains if the argument leaves it to a method that trains no language model by default.

    Raises:
        UserError: no text reaches what trains.
    """
    if train == "visual":
        raise UserError(
            "forgets=both: train=visual trains no weight that text reaches. Give train=visual+lora, lora or all."
        )
    config.data.forgets = "both"
    _forget_text(config.method, default)


def compare_both(config: ml_collections.ConfigDict, default: str) -> None:
    """Applies the settings of forgets=both to the methods of a comparison; see `make_both`."""
    for entrant in config.compare.entrants.values():
        if entrant.method is not None:
            _forget_text(entrant.method, default)


def _forget_text(section: ml_collections.ConfigDict, default: str) -> None:
    """Makes a section `method` forget in text as well; a method without training reads such questions anyway."""
    if section.train == "visual":
        section.train = default
    if "forget_text" in section:
        section.forget_text.weight, section.text.weight = FORGET_TEXT, KEEP_TEXT


def benchmark_of(given: Mapping[str, str]) -> ml_collections.ConfigDict:
    """The section `data` that the arguments `benchmark` and `forget` ask for.

    Raises:
        UserError: the benchmark has no forget set of that size.
    """
    name, percent = given["benchmark"], int(given["forget"])
    if percent not in (sizes := _forget_percentages(name)) and (sizes or given["forget"] != "10"):
        available = ", ".join(map(str, sizes)) or "its data decide what is forgotten"
        raise UserError(f"forget={percent}: benchmark={name} has no such forget set. Available: {available}.")
    return benchmark(name, **({"forget": percent} if sizes else {}))
