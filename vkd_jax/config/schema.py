"""Sections of a run's config: frozen dataclasses with documented fields, `RunConfig` as the root.

>>> config = RunConfig(train=TrainConfig(steps=100), method=registry.create("method", registry.METHODS, "npo", {}))
>>> RunConfig.from_config_dict(config.to_config_dict()) == config
True

The sections of methods, attacks and benchmarks are these components themselves: `config.method` is the method,
`config.data.benchmark` the benchmark, and `config.attacks.selected` holds the attacks that a run asks for.
"""

import ast
import contextlib
import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import ml_collections
import numpy as np

from vkd_jax import messages, registry
from vkd_jax.config import fields
from vkd_jax.config.comparison import CompareConfig, EntrantConfig
from vkd_jax.config.evaluation import EvalConfig
from vkd_jax.config.fields import FieldError, Section, setting
from vkd_jax.config.model import ModelConfig
from vkd_jax.config.request import RequestConfig
from vkd_jax.config.stages import STAGES, Stage
from vkd_jax.config.training import TrainConfig
from vkd_jax.types import check_argument

INFINITY = "inf"  # in JSON
OPTIONAL = {"compare", "request"}  # sections that a config may lack
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class DataConfig(Section):
    """The benchmark, whose fields are on the same level as these in a ConfigDict."""

    SECTION: ClassVar[str] = "data"

    benchmark: Any = dataclasses.field(
        default=None, metadata={"help": "Benchmark: a dataclass of vkd_jax/benchmarks.", fields.INLINE: True}
    )
    cache: str = setting("", "Folder for the converted benchmark; '' is the workdir.")
    forgets: str = setting(
        "visual",
        "What is forgotten about the people: 'visual' is who is in an image, but not text about them; 'both' is "
        "everything, in images and in text.",
        choices=("visual", "both"),
    )

    @property
    def forgets_text(self) -> bool:
        """Whether text-only questions about the people are to be forgotten, too."""
        return self.forgets == "both"


@dataclasses.dataclass(frozen=True)
class MeshConfig(Section):
    """Sizes of the device mesh; one of them may be -1, which takes all remaining devices."""

    SECTION: ClassVar[str] = "mesh"

    data: int = setting(1, "Copies of the model.", minimum=-1)
    fsdp: int = setting(1, "Shards of each weight that are gathered before use.", minimum=-1)
    tensor: int = setting(1, "Shards of each weight that are used without gathering (tensor parallelism).", minimum=-1)


@dataclasses.dataclass(frozen=True)
class AttacksConfig(Section):
    """Attacks after the evaluation, each with a section on the same level as these fields in a ConfigDict."""

    SECTION: ClassVar[str] = "attacks"

    names: str = setting("", "Attacks to run, separated by commas; 'all' runs all, '' none.")
    seed: int = setting(0, "Seed of all attacks.", **fields.SEED)
    settings: Mapping[str, Any] = dataclasses.field(
        default_factory=lambda: components("attack", registry.ATTACKS),
        metadata={"help": "Settings of each attack: dataclasses of vkd_jax/attacks, by name.", fields.INLINE: True},
    )

    def validate(self) -> None:
        """Also checks the names of the attacks."""
        super().validate()
        if "all" in self._names():
            raise self.error("names", f"{self.names!r} is not allowed. Give 'all' alone, or the names of attacks.")
        if unknown := [name for name in self._names() if name not in self.settings]:
            raise self.error(
                "names",
                f"unknown attack {messages.listed(unknown)}. Available: all, {messages.choices(self.settings)}.",
            )

    def _names(self) -> list[str]:
        names = fields.comma_separated(self.names)
        return list(self.settings) if set(names) == {"all"} else names

    @property
    def selected(self) -> dict[str, Any]:
        """The attacks to run, by name."""
        return {name: self.settings[name] for name in self._names()}


def component(kind: str, table: Mapping[str, str], name: str) -> Callable[[], Any]:
    """Default factory of a component with its default hyperparameters."""
    return lambda: registry.create(kind, table, name, {})


def components(kind: str, table: Mapping[str, str]) -> dict[str, Any]:
    """All components of a table with their default hyperparameters, by name."""
    return {name: registry.create(kind, table, name, {}) for name in table}


@dataclasses.dataclass(frozen=True)
class FinetuneConfig(Section):
    """How the vanilla and the retain-only model are fine-tuned."""

    SECTION: ClassVar[str] = "finetune"

    method: Any = dataclasses.field(
        default_factory=component("method", registry.METHODS, "finetune"),
        metadata={"help": "Method of fine-tuning: a dataclass of vkd_jax/methods."},
    )
    train: TrainConfig = dataclasses.field(
        default_factory=lambda: TrainConfig(steps=0, batch_size={"image": 64, "text": 16}),
        metadata={"help": "Training loop of fine-tuning."},
    )


@dataclasses.dataclass(frozen=True)
class RunConfig(Section):
    """Everything that decides what a run computes."""

    seed: int = setting(0, "Seed of data order, dropout and all random draws of a method.", **fields.SEED)
    stage: str = setting("unlearn", "What the run does; see `STAGES`.", choices=tuple(STAGES))
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig, metadata={"help": ModelConfig.__doc__})
    data: DataConfig = dataclasses.field(
        default_factory=lambda: DataConfig(registry.create("benchmark", registry.BENCHMARKS, "mllmu", {})),
        metadata={"help": DataConfig.__doc__},
    )
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig, metadata={"help": MeshConfig.__doc__})
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig, metadata={"help": EvalConfig.__doc__})
    attacks: AttacksConfig = dataclasses.field(default_factory=AttacksConfig, metadata={"help": AttacksConfig.__doc__})
    method: Any = dataclasses.field(
        default_factory=component("method", registry.METHODS, "vkd"),
        metadata={"help": "Method of unlearning: a dataclass of vkd_jax/methods."},
    )
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig, metadata={"help": TrainConfig.__doc__})
    finetune: FinetuneConfig = dataclasses.field(
        default_factory=FinetuneConfig, metadata={"help": FinetuneConfig.__doc__}
    )
    compare: CompareConfig | None = dataclasses.field(default=None, metadata={"help": CompareConfig.__doc__})
    request: RequestConfig | None = dataclasses.field(default=None, metadata={"help": RequestConfig.__doc__})

    @property
    def workflow(self) -> Stage:
        """What the stage consists of."""
        return STAGES[self.stage]

    @property
    def reports(self) -> bool:
        """Whether the run has an unlearned model, which it writes a report on."""
        return self.workflow.unlearns or (self.workflow.attacks and bool(self.model.unlearned))

    @property
    def active_attacks(self) -> dict[str, Any]:
        """Attacks that the run makes, by name; a stage that attacks no model makes none."""
        return self.attacks.selected if self.workflow.attacks else {}

    def check_stage(self, shards: int) -> None:
        """Checks that the config has what its stage needs.

        Args:
            shards: number of devices that a batch is sharded over.

        Raises:
            UserError: what is missing.
        """
        stage, model = self.workflow, self.model
        if stage.finetunes and not model.has_base:
            raise model.error("base", "no model to fine-tune is given. Give a folder or a hub id.")
        if not stage.finetunes and not model.path:
            raise model.error("path", "no vanilla model is given. Give a folder or a hub id.")
        if model.unlearned and self.stage != "audit":
            raise model.error("unlearned", "only stage=audit reads it. Pass --config.stage=audit, or leave it empty.")
        if registry.name_of(registry.METHODS, self.method) == "finetune":
            raise FieldError("method.name", "finetune does not unlearn. Use the section finetune for fine-tuning.")
        if stage.unlearns:
            self._check_forgets()
            self._check_facts()
            self.train.check(tuple(self.method.losses()), shards)
            if self.method.needs_base and not model.has_base:
                raise model.error("base", "the method reads the model before fine-tuning. Give a folder or a hub id.")
        if stage.finetunes:
            with_section("finetune", lambda: self.finetune.train.check(tuple(self.finetune.method.losses()), shards))

    def _check_forgets(self) -> None:
        """Checks that the method forgets in text if and only if `data.forgets` asks for it."""
        weight = self.method.forget_text.weight if hasattr(self.method, "forget_text") else None
        if not self.data.forgets_text:
            if weight:
                raise self.data.error(
                    "forgets", "visual keeps text about the people. Give both, or method.forget_text.weight=0."
                )
            return
        remedy = "Give the config argument forgets=both, which sets it, or data.forgets=visual."
        if self.method.train == "visual":
            raise self.data.error(
                "forgets",
                "both needs a method.train whose weights text reaches: visual+lora, lora or all, not visual. " + remedy,
            )
        if weight == 0:
            raise self.data.error("forgets", f"both needs method.forget_text.weight greater than 0. {remedy}")
        if self.request:
            raise self.data.error(
                "forgets",
                "requests keep the features of earlier people's images alone, so that both cannot be kept up. Give "
                "visual.",
            )

    def _check_facts(self) -> None:
        """Checks that the method retains other facts about the people to forget if and only if the data has them."""
        facts = getattr(self.data.benchmark, "forget_facts", ())
        if not hasattr(self.method, "other_facts"):
            if facts:
                problem = "the method trains nothing that would retain the other facts. Give another method."
                raise self.data.error("forget_facts", problem)
        elif facts and not self.method.other_facts.weight:
            raise self.data.error(
                "forget_facts",
                "method.other_facts.weight, which retains the other facts, is 0. Give a weight, such as 1.0, or leave "
                "data.forget_facts empty.",
            )
        elif self.method.other_facts.weight and not facts:
            raise FieldError(
                "method.other_facts.weight",
                "all facts about the people are forgotten, so that there are no others. Give 0, or name those to "
                "forget in data.forget_facts.",
            )

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON types, except tuples; the layout of ConfigDicts and of config.json."""
        return self._values(references=False)

    def _values(self, references: bool) -> dict[str, Any]:
        values = _fields(self, references)
        return {name: x for name, x in values.items() if name not in OPTIONAL or getattr(self, name) is not None}

    def to_json(self) -> str:
        """All fields as JSON, which has no infinity: an infinite number becomes the text "inf".

        Raises:
            ValueError: a value is NaN.
            TypeError: JSON has no such type.
        """
        return json.dumps(_without_infinity(self.to_dict()), allow_nan=False)

    def to_config_dict(self) -> ml_collections.ConfigDict:
        """The config as configs/ and the command line see it; fields that may be None have no fixed type."""
        return ml_collections.ConfigDict(self._values(references=True))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "RunConfig":
        """The config of a `to_dict`, or of JSON.

        Raises:
            UserError: a section or field is missing or unknown, or a value is not allowed.
        """
        check_argument("config", values, Mapping, "what to_dict() returns")
        values = dict(values)
        sections: dict[str, Callable[[Any], Any]] = dict(
            model=lambda v: _section(ModelConfig, v),
            data=_data,
            mesh=lambda v: _section(MeshConfig, v),
            eval=lambda v: _section(EvalConfig, v),
            attacks=_attacks,
            method=lambda v: _method("method", v),
            train=lambda v: _section(TrainConfig, v),
            finetune=_finetune,
            compare=_compare,
            request=lambda v: _section(RequestConfig, v),
        )
        known = [field.name for field in dataclasses.fields(cls)]
        _check_names("", values, known, set(known) - OPTIONAL)
        return cls(**{name: sections.get(name, lambda v: v)(value) for name, value in values.items()})

    @classmethod
    def from_config_dict(cls, config: ml_collections.ConfigDict) -> "RunConfig":
        """The config that config files and the command line gave; see `from_dict`."""
        expected = "an ml_collections.ConfigDict, such as get_config() of a file of configs/ returns"
        check_argument("config", config, (ml_collections.ConfigDict, cls), expected)
        return cls.from_dict(config.to_dict())

    def override(self, settings: str) -> "RunConfig":
        """The config with settings as on a command line: "train.steps=200 method.train=visual".

        Values are Python literals or text.

        Raises:
            UserError: a field is unknown, or a value is not allowed.
        """
        config = self.to_config_dict()
        override(config, settings)
        return self.from_config_dict(config)


def section_dict(section: Any) -> ml_collections.ConfigDict:
    """A section or a method as a ConfigDict; see `RunConfig.to_config_dict`."""
    return ml_collections.ConfigDict(_plain(section, references=True))


def override(config: ml_collections.ConfigDict, settings: str | Mapping[str, Any]) -> None:
    """Sets fields of a ConfigDict in place, from {field: value} or from a text; see `RunConfig.override`."""
    check_argument("settings", settings, (str, Mapping), "fields with their values, such as train.steps=100")
    for name, value in (_parsed(settings) if isinstance(settings, str) else settings).items():
        check_argument("settings", name, str, "the fields' names as texts, such as train.steps")
        current = fields.value_of(config, name)
        if isinstance(value, Mapping) or ml_collections.ConfigDict in {type(current)} - {type(value)}:
            given = f"{value!r:.60}" if isinstance(value, Mapping) else "it"
            raise FieldError(name, f'{given} is a section. Give its fields one by one, such as "{name}.FIELD".')
        value = _plain_value(value)
        try:
            config.copy_and_resolve_references().lock().update_from_flattened_dict({name: value})  # adds no field
            config.update_from_flattened_dict({name: value})
        except TypeError as error:
            problem = f"{value!r:.60} is of type {type(value).__name__}. Give a value of type {type(current).__name__}."
            raise FieldError(name, problem) from error
        except (KeyError, AttributeError, ValueError) as error:
            text = f"{name}={value}"
            raise FieldError(name, f"{text!r} does not fit the config ({_message(error)}).") from error


def _plain_value(value: Any) -> Any:
    """A value of Python in place of one of NumPy, and a tuple in place of another sequence."""
    if isinstance(value, np.generic) or (isinstance(value, np.ndarray) and not value.shape):
        return value.item()
    return tuple(map(_plain_value, value)) if isinstance(value, range | list | np.ndarray) else value


def _parsed(settings: str) -> dict[str, Any]:
    """The fields and values of a text of settings."""
    values: dict[str, Any] = {}
    for name, equals, value in (text.partition("=") for text in settings.split()):
        if not equals:
            raise FieldError(name, "has no value. Give FIELD=VALUE, without spaces in them.")
        values[name] = value
        with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):  # otherwise it is a text
            values[name] = ast.literal_eval(value)
    return values


def with_section(section: str, call: Callable[[], T]) -> T:
    """The result of a call whose errors name the section around the section that failed."""
    try:
        return call()
    except FieldError as error:
        raise error.within(section) from None


def _message(error: Exception) -> str:
    """An exception's message; str(KeyError) would be quoted."""
    return str(error.args[0] if error.args else error).splitlines()[0]


def _check_names(section: str, values: Any, known: Sequence[str], required: set[str]) -> None:
    """Refuses a section that has other fields than its dataclass."""
    if not isinstance(values, Mapping):
        raise FieldError(section, f"{values!r} is not a section. Give its fields.")
    prefix = f"{section}." if section else ""
    if unknown := sorted(set(values) - set(known)):
        raise FieldError(f"{prefix}{unknown[0]}", f"unknown field. Available: {messages.choices(known)}.")
    if missing := [name for name in known if name in required and name not in values]:
        raise FieldError(f"{prefix}{missing[0]}", "missing. Build configs from vkd_jax.config.defaults.base().")


def _section(cls: type, values: Any, section: str = "") -> Any:
    """A section of its fields, all of which are given; lists become tuples, and "inf" a number where one belongs."""
    known = [field.name for field in dataclasses.fields(cls)]
    _check_names(section or cls.SECTION, values, known, set(known))
    values = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
    for name, kind in fields.annotations(cls).items():  # sections in a section
        if isinstance(kind, type) and issubclass(kind, Section):
            values[name] = _section(kind, values[name], f"{section or cls.SECTION}.{name}")
    infinite = [field.name for field in dataclasses.fields(cls) if field.metadata.get("infinity")]
    return cls(**values | {name: math.inf for name in infinite if values[name] == INFINITY})


def _without_infinity(value: Any) -> Any:
    """Nested values with `INFINITY` instead of infinite numbers."""
    if isinstance(value, Mapping):
        return {name: _without_infinity(item) for name, item in value.items()}
    return INFINITY if value == math.inf else value


def _chosen(kind: str, table: Mapping[str, str], section: str, key: str, values: Any) -> Any:
    """The component that the field `key` of a section names, of the section's other fields."""
    if not isinstance(values, Mapping) or key not in values:
        raise FieldError(f"{section}.{key}", f"missing. Available: {messages.choices(sorted(table))}.")
    name, rest = values[key], {field: value for field, value in values.items() if field != key}
    if name not in table:
        raise FieldError(
            f"{section}.{key}",
            f"unknown {kind} {name!r}. Available: {messages.choices(sorted(table))}.",
        )
    cls = registry.lookup(kind, table, name)
    known = [field.name for field in dataclasses.fields(cls)]
    if unknown := sorted(set(rest) - set(known)):
        raise FieldError(
            f"{section}.{unknown[0]}",
            f"{name} has no such field. Available: {messages.choices(known)}. Another {kind} is chosen, with its "
            f"fields, after the colon of --config: configs/FILE.py:{kind}=NAME.",
        )
    return _section(cls, rest, section)


def _method(section: str, values: Any) -> Any:
    return _chosen("method", registry.METHODS, section, "name", values)


def _data(values: Any) -> DataConfig:
    own = {field.name for field in dataclasses.fields(DataConfig)} - {"benchmark"}
    _check_names("data", values, list(values), set())
    if missing := [name for name in ("cache", "forgets") if name not in values]:
        raise FieldError(f"data.{missing[0]}", "missing. Build configs from vkd_jax.config.defaults.base().")
    rest = {name: value for name, value in values.items() if name not in own}
    benchmark = _chosen("benchmark", registry.BENCHMARKS, "data", "benchmark", rest)
    return DataConfig(benchmark, **{name: values[name] for name in own})


def _attacks(values: Any) -> AttacksConfig:
    known = ["names", "seed", *registry.ATTACKS]
    _check_names("attacks", values, known, set(known))
    settings = {
        name: _section(registry.lookup("attack", registry.ATTACKS, name), values[name]) for name in registry.ATTACKS
    }
    return AttacksConfig(names=values["names"], seed=values["seed"], settings=settings)


def _finetune(values: Any) -> FinetuneConfig:
    _check_names("finetune", values, ["method", "train"], {"method", "train"})
    return FinetuneConfig(
        with_section("finetune", lambda: _method("method", values["method"])),
        with_section("finetune", lambda: _section(TrainConfig, values["train"])),
    )


def _compare(values: Any) -> CompareConfig:
    known = [field.name for field in dataclasses.fields(CompareConfig)]
    _check_names("compare", values, known, set(known))
    entrants = values["entrants"]
    _check_names("compare.entrants", entrants, list(entrants) if isinstance(entrants, Mapping) else (), set())
    entrants = {name: _entrant(f"compare.entrants.{name}", value) for name, value in entrants.items()}
    return _section(CompareConfig, {**values, "entrants": entrants})


def _entrant(section: str, values: Any) -> EntrantConfig:
    known = [field.name for field in dataclasses.fields(EntrantConfig)]
    _check_names(section, values, known, set(known))

    def read() -> EntrantConfig:
        method = None if values["method"] is None else _method("method", values["method"])
        return _section(EntrantConfig, {**values, "method": method})

    return with_section(section, read)


def _plain(value: Any, references: bool) -> Any:
    """A section, component or value as JSON types, except tuples.

    Args:
        value: what to convert.
        references: whether a field that may be None becomes a reference without a type, so that a ConfigDict accepts
            both None and a number for it.
    """
    if isinstance(value, DataConfig):
        name = registry.name_of(registry.BENCHMARKS, value.benchmark)
        own = {"cache": value.cache, "forgets": value.forgets}
        return {"benchmark": name, **own, **_fields(value.benchmark, references)}
    if isinstance(value, AttacksConfig):
        settings = {name: _fields(attack, references) for name, attack in value.settings.items()}
        return {"names": value.names, "seed": value.seed, **settings}
    if dataclasses.is_dataclass(value):
        named = f"{type(value).__module__}:{type(value).__qualname__}" in registry.METHODS.values()
        name = {"name": registry.name_of(registry.METHODS, value)} if named else {}
        return name | _fields(value, references)
    return {name: _plain(item, references) for name, item in value.items()} if isinstance(value, Mapping) else value


def _fields(section: Any, references: bool) -> dict[str, Any]:
    values = {}
    for field in dataclasses.fields(section):
        value = _plain(getattr(section, field.name), references)
        if references and field.name not in OPTIONAL and fields.optional(fields.annotations(type(section))[field.name]):
            value = ml_collections.FieldReference(value, field_type=object)
        values[field.name] = value
    return values
