"""PEFT adapters: which tensors of a base model a LoRA adapter changes, and how.

    W' = W + scale * B A,    scale = alpha / r, or alpha / sqrt(r) with use_rslora

in float32, rounded once to the dtype of W. `B A` has the shape of W; a convolution is one matrix [out, in * kernel].
Tensors of `modules_to_save` replace those of the base.

A folder has adapter_config.json and adapter_model.safetensors, whose names are "base_model.model.", the module in the
base model, and ".lora_A.weight", or ".lora_A.default.weight" with the name of the adapter, as older versions and copies
of a training state have. Reference: https://huggingface.co/docs/peft/developer_guides/checkpoint
"""

import dataclasses
import functools
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from vkd_jax.checkpoints.safetensors_files import PICKLE_SUFFIXES, Tensor, read_header
from vkd_jax.messages import listed
from vkd_jax.runtime import hub, json_files
from vkd_jax.types import UserError, located

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
_LORA = re.compile(r"(.+)\.lora_(?:embedding_)?([AB])(?:\.\w+)?(?<!\.bias)")
_BLOCK = re.compile(r"(?P<stack>.*?)\.(?P<rest>\d+\..+)")  # the name of a module in a numbered block
# Initial values that leave the weights of the base as they are. PiSSA, OLoRA, CorDA and others change them.
_INITIAL = (True, False, None, "gaussian", "orthogonal", "eva")
# Further fields that change what an adapter computes, and the values with which they do not. peft ignores
# `fan_in_fan_out` for linear layers, and fields that it does not know.
_PLAIN = {
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM", "SEQ_2_SEQ_LM", "FEATURE_EXTRACTION", None),
    "bias": ("none", None),
    "init_lora_weights": _INITIAL,
    **dict.fromkeys(("use_dora", "lora_bias", "use_qalora", "ensure_weight_tying"), (False, None)),
    **dict.fromkeys(("use_rslora", "fan_in_fan_out"), (True, False, None)),
    **dict.fromkeys(("layer_replication", "alora_invocation_tokens", "megatron_config"), (None,)),
    **dict.fromkeys(("use_bdlora", "monteclora_config", "kasa_config", "arrow_config"), (None,)),
    **dict.fromkeys(("target_parameters", "trainable_token_indices"), (None, [])),
}

_NAMES = ("target_modules", "modules_to_save", "exclude_modules", "layers_pattern")  # fields that name modules
MOST_RANK = 2**20  # larger than any weight
ALPHA = ("alpha_pattern", 8, 1e9)  # the field of other values, the default, and the largest value
MOST_SCALE = 1e4  # of a product, such as lora_alpha / r; those of training are at most about 100
MOST_SECONDS = 1.0  # that a regular expression may take: some take years
MOST_NAMES = 2**12  # of a field that names modules; the largest models have about 1,000

Change = Callable[[np.ndarray], np.ndarray]  # from a tensor of the base, float32, to its new value


@dataclasses.dataclass(frozen=True)
class LowRank:
    """The product that an adapter adds to a tensor of the base."""

    a: Tensor  # [r, in]; of an embedding [r, tokens]; of a convolution [r, in, ...]
    b: Tensor  # [out, r]; of a convolution [out, r, 1, ...]
    scale: float
    transposed: bool  # whether the tensor is (B A)^T, as of an embedding

    def __call__(self, base: np.ndarray) -> np.ndarray:
        """Adds the product to a tensor.

        Raises:
            UserError: it has another shape.
        """
        rank = self.a.shape[0]
        a, b = read(self.a).reshape(rank, -1), read(self.b).reshape(self.b.shape[0], -1)
        shape = (a.shape[1], b.shape[0]) if self.transposed else (b.shape[0], *self.a.shape[1:])
        if shape != base.shape or b.shape[1] != rank or len(self.b.shape) != len(base.shape):
            raise UserError(
                f"{self.a.file}: {self.a.name} {self.a.shape} and {self.b.name} {self.b.shape} do not fit a weight of "
                f"shape {base.shape}; use the base model of the adapter."
            )
        delta = b @ a
        return base + np.float32(self.scale) * (delta.T if self.transposed else delta.reshape(base.shape))


@dataclasses.dataclass(frozen=True)
class Replacement:
    """A tensor that replaces one of the base."""

    tensor: Tensor

    def __call__(self, base: np.ndarray) -> np.ndarray:
        """Returns the tensor in float32.

        Raises:
            UserError: it has another shape.
        """
        if self.tensor.shape != base.shape:
            raise UserError(
                f"{self.tensor.file}: {self.tensor.name} has shape {self.tensor.shape}, and the base model has "
                f"{base.shape}; use its own base model."
            )
        return read(self.tensor)


def read(tensor: Tensor) -> np.ndarray:
    """Reads a tensor in float32."""
    array = np.empty(tensor.shape, np.float32)
    tensor.copy_to([(tuple(slice(0, size) for size in tensor.shape), array)])
    return array


def read_config(folder: Path) -> dict[str, Any]:
    """Reads adapter_config.json.

    Raises:
        UserError: it cannot be read, or has a setting that is not supported.
    """
    path = folder / hub.ADAPTER_CONFIG
    config = json_files.read_json(path, remedy="get it again")
    if "peft_type" not in config:
        raise UserError(
            f"{path}: it has no peft_type, so it is not an adapter of PEFT. Merge it into its base model with the "
            "program that made it, such as MLX, and pass the merged model."
        )
    for field, supported in _PLAIN.items():
        value = config.get(field)
        if not any(type(value) is type(x) and value == x for x in supported):
            raise UserError(
                f"{path}: {field} is {value!r} (supported: {', '.join(map(repr, supported))}); merge the adapter with "
                "merge_and_unload() of peft, and pass the merged model."
            )
    for field in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(field) or {}, dict):
            raise UserError(f"{path}: {field} is {config[field]!r}, and should be an object of names and numbers.")
    for field, pattern, default, largest in (("r", "rank_pattern", None, MOST_RANK), ("lora_alpha", *ALPHA)):
        named = {f"{pattern}[{name!r}]": value for name, value in (config.get(pattern) or {}).items()}
        for name, value in ({field: config.get(field, default)} | named).items():
            kinds = (int,) if field == "r" else (int, float)
            if type(value) not in kinds or not 0 < value <= largest:
                expected = f"a positive {'whole ' * (field == 'r')}number up to {largest:g}"
                raise UserError(f"{path}: {name} is {value!r:.40}, and should be {expected}; get the file again.")
    for field in _NAMES:
        value = config.get(field)
        if not isinstance(value, str | None) and not _is_texts(value):
            raise UserError(f"{path}: {field} is {value!r:.40}, and should be a text or an array of texts.")
    for field in ("rank_pattern", "alpha_pattern", *_NAMES):
        if not isinstance(config.get(field), str | None) and (count := len(config[field])) > MOST_NAMES:
            raise UserError(f"{path}: {field} has {count:,} names, and at most {MOST_NAMES:,} are read; get it again.")
    if problem := _layers_problem(config):
        raise UserError(f"{path}: {problem}; get the file again.")
    return config


def _layers_problem(config: Mapping[str, Any]) -> str | None:
    """What is wrong with the fields that choose layers; None if nothing is."""
    layers, pattern = config.get("layers_to_transform"), config.get("layers_pattern")
    numbers = layers if isinstance(layers, list) else [] if layers is None else [layers]
    if not all(type(number) is int and number >= 0 for number in numbers):
        return f"layers_to_transform is {layers!r:.40}, and should be the number of a layer or an array of them"
    if isinstance(config.get("target_modules"), str) and (layers is not None or pattern is not None):
        return "layers_to_transform and layers_pattern need target_modules that are an array, and it is a text"
    return "layers_pattern needs layers_to_transform" if pattern and layers is None else None


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def changes(folder: Path, canonical: Callable[[str], str], base: Mapping[str, Tensor]) -> dict[str, list[Change]]:
    """Returns what an adapter changes, after its whole header was checked.

    Args:
        folder: folder of the adapter.
        canonical: function of the name of a tensor, of any generation of names, to its key in `base`.
        base: the tensors of the base model.

    Returns:
        {key in `base`: changes, in the order in which they are applied}.

    Raises:
        UserError: a setting is not supported, or a tensor is unknown, missing, or not a part of what the settings say.
    """
    config, file = read_config(folder), folder / WEIGHTS
    if not file.is_file():
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLE_SUFFIXES)
        kind = f"only pickled weights ({listed(pickles)}), which can run code when they are read" if pickles else ""
        raise UserError(
            f"{folder} has {kind or f'no {WEIGHTS}'}. Save the adapter again with save_pretrained(..., "
            "safe_serialization=True) of peft."
        )
    pairs, replaced, problems = _sorted(read_header(file))
    found: dict[str, list[Change]] = {}

    def add(name: str, key: str, change: Change) -> None:
        if key in found:
            problems.append(f"{name} occurs a second time under another name")
        found[key] = [change]

    for name, tensor in replaced.items():
        if (key := _replaced(name, canonical, base)) is None:
            problems.append(f"unknown tensor {name}")
        else:
            add(name, key, Replacement(tensor))
    with located(os.fspath(folder)):
        for (module, embedding), parts in pairs.items():
            key = canonical(f"{module}.weight")
            if problem := _problem(config, module, parts, key in base):
                problems.append(problem)
            else:
                add(module, key, LowRank(parts["A"], parts["B"], _scale(config, module), embedding))
        problems = problems or _missing(config, found) or _missing_layers(config, pairs, canonical, base)
    if problems:
        raise UserError(f"{file} does not fit its {hub.ADAPTER_CONFIG} and base model: {listed(problems, '; ')}.")
    return found


def _sorted(
    tensors: Mapping[str, Tensor],
) -> tuple[dict[tuple[str, bool], dict[str, Tensor]], dict[str, Tensor], list[str]]:
    """The matrices of each module, by its name and whether it is an embedding; other tensors; and problems."""
    pairs: dict[tuple[str, bool], dict[str, Tensor]] = {}
    others, problems = dict[str, Tensor](), list[str]()
    for name, tensor in tensors.items():
        match = _LORA.fullmatch(name.removeprefix(PREFIX).removesuffix(".weight"))
        if not jnp.issubdtype(tensor.dtype, jnp.floating):
            problems.append(f"{name} has the dtype {tensor.dtype}, and weights are floating-point numbers")
        elif match:
            parts = pairs.setdefault((match[1], ".lora_embedding_" in name), {})
            if match[2] in parts:
                problems.append(f"a second {name}, of another adapter")
            parts[match[2]] = tensor
        else:
            others[name] = tensor
    return pairs, others, problems


def _missing(config: Mapping[str, Any], found: Mapping[str, Sequence[Change]]) -> list[str]:
    """What is wrong if the changes that were found are fewer than the settings say."""
    if not found:
        return ["it has no tensors, so that it would change nothing"]
    steps = [step for several in found.values() for step in several]
    if not any(isinstance(step, Replacement) or (read(step.b).any() and read(step.a).any()) for step in steps):
        return ["A or B of each of its modules is zero, as before training, so that it would change nothing"]
    if cut := [problem for step in steps if isinstance(step, LowRank) and (problem := _cut(step))]:
        return cut
    replaced = [f".{key}" for key, steps in found.items() if isinstance(steps[0], Replacement)]
    names = config.get("modules_to_save") or []
    return [
        f"modules_to_save names {name!a}, of which it has no tensor"
        for name in ([names] if isinstance(names, str) else names)
        if not any(f".{name.rpartition('.')[2]}." in key for key in replaced)
    ]


def _cut(step: LowRank) -> str | None:
    """What shows that the end of a file was lost and became zeros; None if nothing does.

    Training begins with a random A and a B of zeros, or with both the other way round for an embedding. Ranks that a
    module does not use are zero in both.
    """
    first, second = (step.b, step.a) if step.transposed else (step.a, step.b)
    drawn, trained = read(first), read(second)
    lost = None
    if not drawn.any():
        lost = first
    elif not trained.any() and not step.transposed and not drawn.reshape(len(drawn), -1).any(axis=1).all():
        lost = first
    elif trained.any() and not step.transposed and not trained[-1].any():
        lost = second
    return f"{lost.name.removeprefix(PREFIX)} ends with zeros, so that the end of the file was lost" if lost else None


def _missing_layers(
    config: Mapping[str, Any],
    pairs: Mapping[tuple[str, bool], Any],
    canonical: Callable[[str], str],
    base: Mapping[str, Tensor],
) -> list[str]:
    """The linear layers that the settings name and that have no matrices, in the stacks that have some.

    A stack is all numbered blocks of one part of the model, such as its language model. Other parts may have names that
    the settings name as well: they are not adapted if PEFT has wrapped one part alone.
    """
    if config.get("target_modules") is None:  # PEFT's defaults for each type of model
        return []
    keys, stacks = set[str](), dict[str, str]()
    for module, _ in pairs:
        keys.add(key := canonical(f"{module}.weight"))
        if (named := _BLOCK.fullmatch(module)) and (known := _BLOCK.fullmatch(key)):
            stacks[known["stack"]] = named["stack"]
    problems = []
    for key, tensor in base.items():
        block = _BLOCK.fullmatch(key.removesuffix(".weight"))
        if key in keys or len(tensor.shape) != 2 or not key.endswith(".weight") or not block:
            continue
        if block["stack"] not in stacks:
            continue
        module = f"{stacks[block['stack']]}.{block['rest']}"  # under the names of the adapter
        if canonical(f"{module}.weight") == key and _settings_problem(config, module) is None:
            problems.append(f"target_modules names {module}, of which it has no tensor")
    return problems


def _replaced(name: str, canonical: Callable[[str], str], base: Mapping[str, Tensor]) -> str | None:
    """The key in `base` of the tensor that a tensor of `modules_to_save` replaces; None if there is none."""
    plain = name.removeprefix(PREFIX).replace(".base_layer.", ".")
    module, _, rest = plain.partition(".modules_to_save.")
    names = [plain] if not rest else [f"{module}.{rest}", f"{module}.{rest.partition('.')[2]}"]
    return next((canonical(x) for x in names if canonical(x) in base), None)


def _problem(config: Mapping[str, Any], module: str, parts: Mapping[str, Tensor], is_known: bool) -> str | None:
    """What is wrong with the matrices of a module; None if nothing is."""
    if len(parts) < 2:
        return f"{module} lacks lora_{'B' if 'A' in parts else 'A'}"
    if not is_known:
        return f"the base model has no weight of {module}"
    if problem := _settings_problem(config, module):
        return problem
    if config.get("target_modules") == "all-linear" and (
        len(parts["A"].shape) > 2 or ".lora_embedding_" in parts["A"].name or module.endswith("lm_head")
    ):
        return f"target_modules is all-linear, which does not name {module}"
    rank = _of(config.get("rank_pattern"), module, config["r"])
    return None if parts["A"].shape[:1] == (rank,) else f"{module} has shape {parts['A'].shape}, and rank {rank}"


def _settings_problem(config: Mapping[str, Any], module: str) -> str | None:
    """Why the settings give a module no matrices; None if they give it some."""
    if not _is_target(config.get("target_modules"), module):
        return f"target_modules does not name {module}"
    if config.get("exclude_modules") and _is_target(config["exclude_modules"], module):
        return f"exclude_modules names {module}"
    saved = config.get("modules_to_save") or []
    if any(_matches(rf"(.*\.)?{name}(\..*)?", module) for name in ([saved] if isinstance(saved, str) else saved)):
        return f"modules_to_save names {module}, which then has no matrices"
    return None if _is_in_layers(config, module) else f"layers_to_transform leaves out the layer of {module}"


def _is_target(targets: Any, module: str) -> bool:
    """Whether `target_modules`, a regular expression of the whole name or a list of its endings, names a module."""
    if isinstance(targets, str) and targets != "all-linear":
        return _matches(targets, module)
    return not isinstance(targets, list) or any(module == x or module.endswith(f".{x}") for x in targets)


def _is_in_layers(config: Mapping[str, Any], module: str) -> bool:
    """Whether `layers_to_transform` allows a module, by the number after `layers_pattern` in its name.

    Without a pattern it is the first number that follows two other parts of the name.
    """
    layers, patterns = config.get("layers_to_transform"), config.get("layers_pattern")
    if layers is None or layers == []:
        return True
    patterns = [patterns] if isinstance(patterns, str) and patterns else patterns
    starts = [rf"(?:.*?\.)?{pattern}" for pattern in patterns] if patterns else [r".*?\.[^.]*"]
    match = next(filter(None, (_match(rf"{start}\.(?P<number>\d+)\..*", module) for start in starts)), None)
    return match is not None and int(match["number"]) in (layers if isinstance(layers, list) else [layers])


def _matches(pattern: str, module: str) -> bool:
    return _match(pattern, module) is not None


def _match(pattern: str, module: str) -> Any:
    """The match of a regular expression of adapter_config.json with a whole name; None if it does not match.

    Raises:
        UserError: it is no regular expression, or takes too long.
    """
    try:
        return _compiled(pattern).fullmatch(module, timeout=MOST_SECONDS)
    except TimeoutError as error:
        raise UserError(
            f"{hub.ADAPTER_CONFIG}: the regular expression {pattern!r} takes longer than {MOST_SECONDS:g} s for "
            f"{module}; name the modules in an array."
        ) from error


@functools.lru_cache(4 * MOST_NAMES)
def _compiled(pattern: str) -> Any:
    import regex  # unlike `re`, it has a limit of time

    try:
        return regex.compile(pattern)
    except regex.error as error:
        raise UserError(
            f"{hub.ADAPTER_CONFIG}: {pattern!r} is not a regular expression ({error}); correct it."
        ) from error


def _of(pattern: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The value of the first key of `rank_pattern` or `alpha_pattern` that a name ends with, else the default."""
    return next((value for key, value in (pattern or {}).items() if _matches(rf"(.*\.)?({key})", module)), default)


def _scale(config: Mapping[str, Any], module: str) -> float:
    alpha = _of(config.get("alpha_pattern"), module, config.get("lora_alpha", 8))
    rank = _of(config.get("rank_pattern"), module, config["r"])
    divisor, name = (math.sqrt(rank), "sqrt(r)") if config.get("use_rslora") else (rank, "r")
    if alpha / divisor > MOST_SCALE:
        raise UserError(
            f"{hub.ADAPTER_CONFIG}: lora_alpha / {name} is {alpha / divisor:g} for {module}, and should be at most "
            f"{MOST_SCALE:,.0f}; get the file again."
        )
    return alpha / divisor
