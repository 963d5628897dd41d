"""Models by name, with a PEFT adapter or other visual weights on top.

    MODEL                       a folder, gs://BUCKET/FOLDER, a shipped model, or an id on the Hugging Face Hub
    ADAPTER                     the folder or id of a PEFT adapter, whose base is in its adapter_config.json
    BASE+ADAPTER                the same with another base
    BASE+FILE.safetensors       a model with another vision tower, or vision tower and projector

The last three are merged: each changed tensor is read, changed in float32, and rounded once to the dtype of the base.
The merged model is an ordinary model folder in the cache (`storage.CACHE`), so a run, an export and a comparison treat
it like any other. It is written again when a file of one of its parts changes.
"""

import functools
import hashlib
import os
import re
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vkd_jax.checkpoints import adapters, export, hf
from vkd_jax.checkpoints.safetensors_files import Checkpoint, Tensor, read_header
from vkd_jax.messages import listed
from vkd_jax.runtime import files, hub, json_files, storage
from vkd_jax.runtime.finite import is_finite
from vkd_jax.types import NotFinite, UserError, located

VISUAL = ("vision_tower", "projector")  # the parts of a model that a file of visual weights may have


def fetch_model(name: str | os.PathLike[str]) -> Path:
    """Returns the folder of a model, after downloading and merging it if necessary.

    Args:
        name: as above.

    Raises:
        UserError: the model, its base or its adapter does not exist, cannot be downloaded, or they do not fit together.

    Example:
        >>> folder = fetch_model("tiny_llava")
    """
    base, plus, part = os.fspath(name).rpartition("+")
    if plus and base and part and not _exists(name):
        return _merge(fetch_model(base), _part(part))
    folder = hub.fetch_model(name)
    if not hub.is_adapter(folder):
        return folder
    path = folder / hub.ADAPTER_CONFIG
    config = json_files.read_json(path)
    base, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not base or not isinstance(base, str):
        raise UserError(f"{path} has no base_model_name_or_path; pass BASE+{folder} with the model that it belongs to.")
    with located(f"the base of the adapter {folder}, which BASE+{folder} replaces"):
        base_folder = hub.fetch_model(f"{base}@{revision}" if revision and hub.is_id(base) else base)
        if hub.is_adapter(base_folder):
            raise UserError(f"{base_folder} is an adapter itself; give the whole model.")
        return _merge(base_folder, folder)


def _exists(name: str | os.PathLike[str]) -> bool:
    return storage.resolve(name).exists()


def _part(name: str) -> Path:
    """The file of visual weights, or the folder of an adapter."""
    path = storage.resolve(name)
    if isinstance(path, Path) and path.is_file():
        if path.suffix != ".safetensors":
            raise UserError(
                f"{path} is not a safetensors file. Pickles can run code when they are read: write the state with "
                "save_file of safetensors.torch."
            )
        return path
    folder = hub.fetch_model(name)
    if not hub.is_adapter(folder):
        raise UserError(f"{folder} is not a PEFT adapter: it has no {hub.ADAPTER_CONFIG}, or a config.json.")
    return folder


def _merge(base: Path, part: Path) -> Path:
    """Writes the merged model to the cache unless it is there, and returns its folder."""
    parts = [*sorted(base.iterdir()), *(sorted(part.iterdir()) if part.is_dir() else [part])]
    state = [(str(x.resolve()), x.stat().st_size, x.stat().st_mtime_ns) for x in parts if x.is_file()]
    target = storage.CACHE / "merged" / hashlib.sha256(repr(state).encode()).hexdigest()[:32]
    module, hf_config = hf.read_config(base)
    checkpoint = Checkpoint(base)
    canonical = functools.partial(hf.canonical, module)
    tensors = {canonical(name): tensor for name, tensor in checkpoint.tensors.items()}
    find = adapters.changes if part.is_dir() else functools.partial(_visual_changes, module, hf_config)
    changes = find(part, canonical, tensors)
    if not (target / storage.MODEL_MARKER).is_file():
        with storage.locked(target):
            if not (target / storage.MODEL_MARKER).is_file():  # another process did not write it meanwhile
                _write(base, part, checkpoint, tensors, changes, target)
    return target


def _write(
    base: Path,
    part: Path,
    checkpoint: Checkpoint,
    tensors: Mapping[str, Tensor],
    changes: Mapping[str, Sequence[adapters.Change]],
    target: Path,
) -> None:
    with files.atomic_folder(target) as new:
        export.copy_model(checkpoint, new, skip=("provenance.json",))
        for key, steps in changes.items():
            tensor = tensors[key]
            value = adapters.read(tensor)
            for step in steps:
                value = step(value)
            with np.errstate(over="ignore"):  # is found below
                value = value.astype(tensor.dtype)
            if not is_finite(value):
                raise NotFinite(
                    f"{tensor.name} of {base} has NaN or infinity when {part} is merged into it; use another copy of "
                    "the one or the other."
                )
            export.overwrite(new, tensor, value)


def _visual_changes(
    module: types.ModuleType, hf_config: Any, file: Path, canonical: Any, base: Mapping[str, Tensor]
) -> dict[str, list[adapters.Change]]:
    """Returns the tensors of a file of visual weights, each as a replacement of one of the base.

    Raises:
        UserError: the file has tensors of other parts or unknown ones, or lacks some of a part that it has.
    """
    config = module.Config.from_hf(hf_config)
    part_of = {key: _part_of(module, config, key) for key in base}
    tensors = read_header(file)
    prefix = _prefix(tensors, canonical, base)
    found: dict[str, list[adapters.Change]] = {}
    problems = []
    for name, tensor in tensors.items():
        key = canonical(prefix + name)
        if part_of.get(key) in VISUAL and key not in found:
            found[key] = [adapters.Replacement(tensor)]
        elif not any(re.fullmatch(pattern, key) for pattern in module.HF_SKIP):
            problems.append(f"unexpected tensor {name}")
    parts = {part_of[key] for key in found}
    problems += [f"missing tensor {key}" for key in base if part_of[key] in parts and key not in found]
    if problems or not found:
        raise UserError(
            f"{file} has not the visual weights of this model, the vision tower, or vision tower and projector: "
            f"{listed(problems, '; ')}."
        )
    return found


def _part_of(module: types.ModuleType, config: Any, key: str) -> str:
    """The part of the model that a tensor belongs to; "" for constants, which are no parameters."""
    slot = hf.find_slot(module, config, key)
    return slot.path.partition("/")[0] if slot else ""


def _prefix(tensors: Mapping[str, Tensor], canonical: Any, base: Mapping[str, Tensor]) -> str:
    """What precedes the names of a file that has the tower alone, such as that of a CLIP, in the whole model."""
    for name in tensors:
        if canonical(name) in base:
            return ""
    return next((key[: -len(name)] for name in tensors for key in base if key.endswith(f".{name}")), "")
