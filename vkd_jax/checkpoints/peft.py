"""Writes trained adapters as a folder of PEFT, which PEFT, transformers and `sources` read.

    lora_A.weight = A^T [r, in],    lora_B.weight = B^T [out, r],    r and lora_alpha as trained

The names are "base_model.model.", the module in the model of transformers since 4.52, and ".lora_A.weight". Reference:
https://huggingface.co/docs/peft/developer_guides/checkpoint
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vkd_jax.checkpoints import adapters, safetensors_files
from vkd_jax.checkpoints.hf import Slot, family_of, find_slot
from vkd_jax.checkpoints.safetensors_files import Checkpoint
from vkd_jax.models import lora
from vkd_jax.runtime import files, hub, multihost

# Of the names of tensors in files, of any generation, to those of modules in memory.
_MODULES = (
    (r"^language_model\.model\.", "model.language_model."),
    (r"^model\.(?=layers\.)", "model.language_model."),
    (r"\.weight$", ""),
)


def export(params: Mapping[str, Any], source: Path, target: Path, config: Any, *, base: str) -> None:
    """Writes adapter_config.json and adapter_model.safetensors.

    Args:
        params: the trained A and B of every adapter, together with `lora.adapters` of the model. With several hosts,
            each calls this function, and process 0 writes.
        source: the folder of the model that the adapters were trained on.
        target: the folder to write; one that exists is replaced.
        config: configuration of the model, from `load`.
        base: `base_model_name_or_path`, by which PEFT finds the model.

    Raises:
        ValueError: a parameter is no adapter.
    """
    joined = lora.join(params)
    if plain := sorted(path for path, x in joined.items() if not isinstance(x, lora.Lora)):
        raise ValueError(f"{plain} are no adapters.")
    module, tensors = family_of(config), Checkpoint(source).tensors
    slots = {module_name(name): find_slot(module, config, name) for name in tensors}
    slots = {name: slot for name, slot in slots.items() if slot and slot.path in joined}
    matrices = {
        f"{adapters.PREFIX}{name}.lora_{letter}.weight": (slot, field)
        for name, slot in slots.items()
        for letter, field in (("A", "a"), ("B", "b"))
    }
    values = _values(joined, [matrices[name] for name in sorted(matrices)])
    like = {name: _like(joined[slot.path], slot, field) for name, (slot, field) in matrices.items()}
    settings = _settings(joined, sorted(slots), base)

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


def _values(joined: Mapping[str, lora.Lora], order: list[tuple[Slot, str]]) -> Iterator[np.ndarray]:
    for slot, field in order:
        array: jax.Array = getattr(joined[slot.path], field)
        yield multihost.gather(array if slot.layer is None else array[slot.layer]).T


def _like(adapter: lora.Lora, slot: Slot, field: str) -> np.ndarray:
    """An array of the dtype and shape of a matrix in the file, which takes no memory."""
    rows, columns = getattr(adapter, field).shape[-2:]
    return np.broadcast_to(np.zeros((), np.float32), (columns, rows))


def _settings(joined: Mapping[str, lora.Lora], modules: list[str], base: str) -> dict[str, Any]:
    """The content of adapter_config.json; the names of modules of other parts, such as a tower, do not match."""
    adapter = next(iter(joined.values()))
    rank = adapter.a.shape[-1]
    prefixes = sorted({re.split(r"\.\d+\.", name, maxsplit=1)[0] for name in modules})
    endings = sorted({re.split(r"\.\d+\.", name, maxsplit=1)[1] for name in modules})
    either = {"prefix": "|".join(map(re.escape, prefixes)), "ending": "|".join(map(re.escape, endings))}
    return {
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": round(adapter.scale * rank, 9),
        "lora_dropout": adapter.dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": r"({prefix})\.\d+\.({ending})".format(**either),
        "task_type": None,
        "use_dora": False,
        "use_rslora": False,
    }
