"""Sections of a run's config: the round trip through ConfigDict and JSON, and what is refused."""

import itertools
import json
import math
import pickle

import ml_collections
import pytest

from vkd_jax import models, registry
from vkd_jax.config import defaults, fields
from vkd_jax.config.comparison import CompareConfig
from vkd_jax.config.schema import RunConfig
from vkd_jax.config.stages import STAGES
from vkd_jax.config.training import TrainConfig
from vkd_jax.methods.vkd import VKD
from vkd_jax.types import UserError

# A size of each config of published models.
SIZES = {f"{family}.py": [*models.module_for(family).PRESETS][-1] for family in models.MODELS if family != "idefics3"}
ARGUMENTS = [
    *(f"method={name}" for name in registry.METHODS if name != "finetune"),
    *(f"stage={name}" for name in STAGES),
    *(f"train={name}" for name in ("visual", "lora", "visual+lora", "all")),
    *(f"benchmark={name}" for name in registry.BENCHMARKS),
    *("forget=5", "attacks", "onechip", "compare", "onechip,compare,attacks", "robust,onechip"),
]
CONFIGS = [(file, words) for file, size in SIZES.items() for words in ["", size, *ARGUMENTS]] + [
    ("tiny.py", words)
    for words in [
        "",
        "base",
        "clear,all",
        "compare",
        "ablations",
        "robustness",
        "robust_methods",
        "attacks",
        "forget=15",
        "robust",
    ]
    + ["robust,grad_diff"]
    + [f"{name},{train}" for name, train in itertools.product(("npo", "vkd"), ("visual", "lora", "train=all"))]
]


@pytest.mark.parametrize(("file", "words"), CONFIGS)
def test_every_config_survives_json_and_config_dict(get_config, file, words):
    """A value that JSON has not, such as NaN or an object, would fail; so would a field that is left out."""
    config = RunConfig.from_config_dict(get_config(file, words))
    assert RunConfig.from_dict(json.loads(config.to_json())) == config
    assert RunConfig.from_config_dict(config.to_config_dict()) == config
    assert pickle.loads(pickle.dumps(config)) == config  # workers of a comparison are given configs


def test_an_infinite_cap_survives_json():
    config = RunConfig().override("method.cap=1e999")
    assert config.method.cap == math.inf and json.loads(config.to_json())["method"]["cap"] == "inf"
    assert RunConfig.from_dict(json.loads(config.to_json())) == config


def test_what_json_has_not_is_refused():
    config = RunConfig()
    object.__setattr__(config.train, "learning_rate", math.nan)
    with pytest.raises(ValueError, match="JSON compliant"):
        config.to_json()
    object.__setattr__(config.train, "learning_rate", object())
    with pytest.raises(TypeError, match="JSON serializable"):
        config.to_json()


def test_every_field_of_every_component_is_documented():
    components = [
        registry.create(kind, table, name, {})
        for kind, table in (
            ("method", registry.METHODS),
            ("attack", registry.ATTACKS),
            ("benchmark", registry.BENCHMARKS),
        )
        for name in table
    ]
    rows = [row for section in [RunConfig(), CompareConfig(), *components] for row in fields.describe(section)]
    assert len(rows) > 100 and all(help.split(" Allowed:")[0].endswith(".") for _, _, help in rows)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("train.learning_rate=1e999", "train.learning_rate: inf is not allowed. Give a number greater than 0."),
        ("train.learning_rate=0.0", "train.learning_rate: 0.0 is not allowed. Give a number greater than 0."),
        ("train.steps=-1", "train.steps: -1 is not allowed. Give a whole number of at least 0 and at most"),
        ("train.clip_norm=0.0", "train.clip_norm: 0.0 is not allowed. Give a number of at least 1e-06."),
        ("finetune.train.clip_norm=1e-300", "clip_norm: 1e-300 is not allowed. Give a number of at least 1e-06."),
        ("train.b2=1.0", "train.b2: 1.0 is not allowed. Give a number of at least 0 and below 1."),
        ("train.schedule=linear", "train.schedule: 'linear' is not allowed. Give one of cosine, constant."),
        ("train.batch_size.forget=0", "Give a mapping, each value a whole number of at least 1."),
        ("finetune.train.log_every=0", "finetune.train.log_every: 0 is not allowed."),
        ("finetune.method.lora_rank=0", "finetune.method.lora_rank: 0 is not allowed."),
        ("eval.batch_size=0", "eval.batch_size: 0 is not allowed. Give a whole number of at least 1."),
        ("eval.protocol=coin", "eval.protocol: 'coin' is not allowed. Give options, letter, letter:first_character, "),
        ("eval.protocol=letter,letter", "eval.protocol: 'letter,letter' is not allowed."),
        ("eval.shots=2", "eval.shots: 2 is not allowed. Give one of 0, 1."),
        ("model.dtype=bf16", "model.dtype: 'bf16' is not allowed. Give one of float32, bfloat16, float16."),
        ("model.remat=some", "model.remat: 'some' is not allowed. Give one of '', dots, full."),
        ("model.quantize=int3", "model.quantize: 'int3' is not allowed. Give int8 or int4, optionally"),
        ("stage=dream", "stage: 'dream' is not allowed. Give one of unlearn, finetune, retain_only, all, audit."),
        ("method.name=magic", "method.name: unknown method 'magic'. Available: finetune, grad_ascent, "),
        ("method.name=npo", "method.augment_forget: npo has no such field. Available: train, blocks, "),
        ("method.mask_keep=1.5", "method.mask_keep: 1.5 is not allowed. Give a number greater than 0 and at most 1"),
        ("method.mask_threshold=1.0", "method.mask_keep: the mask takes mask_threshold or mask_keep."),
        ("attacks.names=magic,leak", "attacks.names: unknown attack magic. Available: all, benign, depth, "),
        ("attacks.relearn.steps=(0,)", "attacks.relearn.steps: (0,) is not allowed."),
        ("data.benchmark=mllm", "data.benchmark: unknown benchmark 'mllm'. Available: clear, "),
        ("data.forget=7", "data.forget: 7 is not allowed. Give one of 5, 10, 15."),
        ("data.people=-1", "data.people: -1 is not allowed. Give a whole number of at least 0 and"),
        ("seed=-1", "seed: -1 is not allowed."),
        ("train.foo=1", "train.foo: unknown field 'foo'. Available: b2, batch_size, "),
        ("train.stepz=1", "train.stepz: unknown field 'stepz'. Did you mean 'steps'?"),
        ("TRAIN.steps=1", "TRAIN.steps: unknown field 'TRAIN'. Did you mean 'train'?"),
        ("train..steps=1", "train..steps: unknown field ''. Available: b2, batch_size, "),
        ("train.batch_size.forgt=1", "train.batch_size.forgt: unknown field 'forgt'. Did you mean 'forget'?"),
        ("train.steps.more=1", "train.steps.more: train.steps is a value and has no field 'more'."),
        ("=1", "settings: unknown field ''. Available: attacks, data, "),
        ("train=2", 'train: it is a section. Give its fields one by one, such as "train.FIELD".'),
    ],
)
def test_wrong_values_are_named_by_their_path(settings, message):
    with pytest.raises(UserError) as error:
        RunConfig().override(settings)
    assert message in str(error.value)


def test_a_missing_or_unknown_section_or_field_is_named():
    for path, message in (
        ("train", "train: missing."),
        ("train.steps", "train.steps: missing."),
        ("data.cache", "data.cache: missing."),
        ("method.name", "method.name: missing. Available: "),
        ("attacks.leak", "attacks.leak: missing."),
        ("finetune.train.b2", "finetune.train.b2: missing."),
    ):
        config = defaults.base()
        *sections, name = path.split(".")
        section = config
        for each in sections:
            section = section[each]
        del section[name]
        with pytest.raises(UserError) as error:
            RunConfig.from_config_dict(config)
        assert str(error.value).startswith(message)
    config = defaults.base()
    config.plans = ml_collections.ConfigDict()
    with pytest.raises(UserError, match="plans: unknown field. Available: seed, stage, "):
        RunConfig.from_config_dict(config)
    with pytest.raises(UserError, match="train: 3 is not a section"):
        RunConfig.from_dict(RunConfig().to_dict() | {"train": 3})


def test_lists_of_json_become_tuples():
    config = RunConfig(method=VKD(taps=("projector",)))
    assert RunConfig.from_dict(json.loads(config.to_json())).method.taps == ("projector",)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("", "model.path: no vanilla model is given"),
        ("stage=all", "model.base: no model to fine-tune is given"),
        ("model.path=m model.unlearned=u", "model.unlearned: only stage=audit reads it"),
        ("model.path=m method.target=base", "model.base: the method reads the model before fine-tuning"),
        ("model.path=m train.epochs=1.0", "train.steps: steps=300 and epochs=1.0. Give one of them, and 0 for"),
        ("model.path=m train.steps=0", "train.steps: steps=0 and epochs=0.0."),
        ("model.path=m train.batch_size.forget=3", "train.batch_size.forget: 3 examples do not divide over 2 devices"),
        ("stage=finetune model.base=m", "finetune.train.steps: steps=0 and epochs=0.0."),
        ("stage=finetune model.base=m finetune.train.steps=1 finetune.train.batch_size.text=1", "finetune.train.batch"),
    ],
)
def test_fields_that_a_stage_requires_are_named(settings, message):
    with pytest.raises(UserError) as error:
        RunConfig().override(settings).check_stage(shards=2)
    assert str(error.value).startswith(message)


def test_a_stream_without_a_batch_size_is_named():
    with pytest.raises(UserError, match="train.batch_size: 'retain' is missing, and the method needs it"):
        TrainConfig(batch_size={"forget": 4}).check(["forget", "retain"], shards=1)
    with pytest.raises(UserError, match="4 examples do not divide over 2 devices in 4 microbatches. Give .* of 8"):
        TrainConfig(batch_size={"forget": 4}, microbatches=4).rows("forget", shards=2)


def test_epochs_count_passes_through_the_longest_stream():
    train = TrainConfig(steps=0, epochs=1.5, batch_size={"forget": 2, "retain": 4})
    assert train.length({"forget": 3, "retain": 10}) == 4 and TrainConfig(steps=7).length({"forget": 99}) == 7


@pytest.mark.parametrize(("warmup", "steps", "warns"), [(2, 2, True), (1000, 2, True), (1, 2, False), (5, 0, False)])
def test_a_warmup_that_never_ends_is_logged(caplog, warmup, steps, warns):
    TrainConfig(steps=steps, epochs=0.0 if steps else 1.0, warmup_steps=warmup).check(("forget",), 1)
    assert (f"train.warmup_steps: the warmup takes {warmup} steps" in caplog.text) == warns
