"""Writes trained adapters as a folder of PEFT, which PEFT, transformers and `sources` read.

    lora_A.weight = A^T [r, in],    lora_B.weight = B^T [out, r],    r and lora_alpha as trained

If the model was itself a base with an adapter, both become one adapter of that base:

    W + s1 B1 A1 + s2 B2 A2 = W + [s1 B1, s2 B2] [A1; A2],    r = lora_alpha = r1 + r2

Modules that have less than the largest r are filled up with zeros.

The names are "base_model.model.", the module in the model of transformers since 4.52, and ".lora_A.weight". Reference:
https://huggingface.co/docs/peft/developer_guides/checkpoint
"""

import dataclasses
import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vkd_jax.checkpoints import adapters, safetensors_files, sources
from vkd_jax.checkpoints.hf import family_of, find_slot
from vkd_jax.checkpoints.safetensors_files import Checkpoint, Tensor
from vkd_jax.models import lora
from vkd_jax.runtime import files, hub, multihost

# Of the names of tensors in files, of any generation, to those of modules in memory.
_MODULES = (
    (r"^language_model\.lm_head", "lm_head"),
    (r"^language_model\.model\.", "model.language_model."),
    (r"^model\.(?=(layers|embed_tokens|norm)\.)", "model.language_model."),
    (r"^(?!model\.|lm_head\b)", "model."),
    (r"\.weight$", ""),
)


@dataclasses.dataclass(frozen=True)
class _Matrix:
    """A tensor to write, in float32."""

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]  # collective, if it was trained


@dataclasses.dataclass(frozen=True)
class _Pair:
    """The matrices of a module; those of a convolution have its kernel's axes at the end."""

    a: _Matrix  # [r, in]
    b: _Matrix  # [out, r]
    scale: float
    is_embedding: bool = False


def export(params: Mapping[str, Any], source: Path, target: Path, config: Any, *, given: sources.Parts) -> None:
    """Writes adapter_config.json and adapter_model.safetensors.

    The adapter is one of the base, and includes the adapter that is given on top of it. If there is a file of visual
    weights on top instead, or an adapter that replaces whole weights of modules trained here, which PEFT cannot
    express, the new adapter is one of `source`.

    Args:
        params: the trained A and B of every adapter, together with `lora.adapters` of the model. With several hosts,
            each calls this function, and process 0 writes.
        source: the folder of the model that the adapters were trained on.
        target: the folder to write; one that exists is replaced.
        config: configuration of the model, from `load`.
        given: what `source` was made of.

    Raises:
        ValueError: a parameter is no adapter.
    """
    joined = lora.join(params)
    if plain := sorted(path for path, x in joined.items() if not isinstance(x, lora.Lora)):
        raise ValueError(f"{plain} are no adapters.")
    trained = _trained(joined, source, config)
    added, replaced = _given(given)
    base = given.name if given.adapter or not given.part else str(source)
    if {_module(name) for name in replaced} & trained.keys():
        added, replaced, base = {}, {}, str(source)
    modules = {name: [pairs[name] for pairs in (added, trained) if name in pairs] for name in sorted(added | trained)}
    adapter = next(iter(joined.values()))
    rank, scale = adapter.a.shape[-1], adapter.scale
    if added:
        rank, scale = max(sum(pair.a.shape[0] for pair in pairs) for pairs in modules.values()), 1.0
    matrices = {f"{adapters.PREFIX}{name}": matrix for name, matrix in replaced.items()}
    for name, pairs in modules.items():
        matrices |= _stacked(f"{adapters.PREFIX}{name}", pairs, rank, scale)
    values = (matrices[name].read() for name in sorted(matrices))
    # An array of each shape that takes no memory.
    like = {name: np.broadcast_to(np.zeros((), np.float32), matrix.shape) for name, matrix in matrices.items()}
    settings = {
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": round(scale * rank, 9),
        "lora_dropout": adapter.dropout,
        "modules_to_save": sorted({_module(name) for name in replaced}) or None,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": list(modules),
        "task_type": None,
        "use_dora": False,
        "use_rslora": False,
    }

    def write() -> None:
        with files.atomic_folder(target) as new:
            safetensors_files.write(new / adapters.WEIGHTS, like, lambda name: next(values))  # in alphabetical order
            (new / hub.ADAPTER_CONFIG).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")

    multihost.run_on_process_0(write, meanwhile=values)


def module_name(name: str) -> str:
    """Maps the name of a tensor in a file to that of its module in the model of transformers since 4.52."""
    for pattern, replacement in _MODULES:
        name = re.sub(pattern, replacement, name)
    return name


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _trained(joined: Mapping[str, lora.Lora], source: Path, config: Any) -> dict[str, _Pair]:
    """The pairs that were trained, by module."""

    def matrix(array: jax.Array, layer: int | None) -> _Matrix:
        rows, columns = array.shape[-2:]
        return _Matrix((columns, rows), lambda: multihost.gather(array if layer is None else array[layer]).T)

    slots = {name: find_slot(family_of(config), config, name) for name in Checkpoint(source).tensors}
    return {
        module_name(name): _Pair(matrix(adapter.a, slot.layer), matrix(adapter.b, slot.layer), adapter.scale)
        for name, slot in slots.items()
        if slot and (adapter := joined.get(slot.path))
    }


def _given(given: sources.Parts) -> tuple[dict[str, _Pair], dict[str, _Matrix]]:
    """The pairs of the adapter that was given, by module, and the tensors that replace others, by name."""
    pairs, replaced = {}, {}

    def matrix(tensor: Tensor) -> _Matrix:
        return _Matrix(tensor.shape, functools.partial(adapters.read, tensor))

    for key, steps in (sources.changes_of(given)[-1] if given.adapter else {}).items():
        for step in steps:
            if isinstance(step, adapters.LowRank):
                module = step.a.name.removeprefix(adapters.PREFIX).partition(".lora_")[0]
                pair = _Pair(matrix(step.a), matrix(step.b), step.scale, is_embedding=step.transposed)
                pairs[module_name(module)] = pair
            else:
                module, _, name = key.rpartition(".")
                replaced[f"{module_name(module)}.{name}"] = matrix(step.tensor)
    return pairs, replaced


def _stacked(module: str, pairs: Sequence[_Pair], rank: int, scale: float) -> dict[str, _Matrix]:
    """A and B of the sum of some pairs, by the names of their tensors."""

    def stack(matrices: Sequence[_Matrix], factors: Sequence[float], axis: int) -> _Matrix:
        shape = matrices[0].shape

        def read() -> np.ndarray:
            values = [np.float32(factor) * matrix.read() for matrix, factor in zip(matrices, factors, strict=True)]
            missing = rank - sum(value.shape[axis] for value in values)
            empty = np.zeros((*shape[:axis], missing, *shape[axis + 1 :]), np.float32)
            return np.concatenate([*values, empty], axis)

        return _Matrix((*shape[:axis], rank, *shape[axis + 1 :]), read)

    names = ("lora_embedding_A", "lora_embedding_B") if pairs[0].is_embedding else ("lora_A.weight", "lora_B.weight")
    a = stack([pair.a for pair in pairs], [1.0] * len(pairs), 0)
    b = stack([pair.b for pair in pairs], [pair.scale / scale for pair in pairs], 1)
    return {f"{module}.{name}": matrix for name, matrix in zip(names, (a, b), strict=True)}
