"""Models by name, with a PEFT adapter or other visual weights on top.

    MODEL                       a folder, gs://BUCKET/FOLDER, a shipped model, or an id on the Hugging Face Hub
    ADAPTER                     the folder or id of a PEFT adapter, whose base is in its adapter_config.json
    BASE+ADAPTER                the same with another base
    BASE+FILE.safetensors       a model with another vision tower, or vision tower and projector

The last three are merged: each changed tensor is read, changed in float32, and rounded once to the dtype of the base.
The merged model is an ordinary model folder in the cache (`storage.CACHE`), so a run, an export and a comparison treat
it like any other. It is written again when one of its files, or a file of one of its parts, changes.
"""

import dataclasses
import functools
import hashlib
import json
import os
import re
import shutil
import types
from collections.abc import Iterable, Mapping, Sequence
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


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a model is made of: a base, and an adapter or visual weights on top of it."""

    name: str  # of the base: its id on the hub if that is how it is given, without a revision, else its folder
    base: Path  # its folder
    part: Path | None = None  # folder of an adapter, or file of visual weights

    @property
    def folder(self) -> Path:
        """The folder of the model, which is in the cache if it is merged; it depends on the state of all files."""
        if not self.part:
            return self.base
        files_of_part = sorted(self.part.iterdir()) if self.part.is_dir() else [self.part]
        state = _state((*sorted(self.base.iterdir()), *files_of_part))
        return storage.CACHE / "merged" / hashlib.sha256(repr(state).encode()).hexdigest()[:32]

    @property
    def adapter(self) -> Path | None:
        """The folder of the adapter; None if the model has none."""
        return self.part if self.part and self.part.is_dir() else None


def fetch_model(name: str | os.PathLike[str]) -> Path:
    """Returns the folder of a model, after downloading and merging it if necessary.

    Args:
        name: as above.

    Raises:
        UserError: the model, its base or its adapter does not exist, cannot be downloaded, or they do not fit together.

    Example:
        >>> folder = fetch_model("tiny_llava")
    """
    parts = parts_of(name)
    return _merge(parts) if parts.part else parts.base


def parts_of(name: str | os.PathLike[str]) -> Parts:
    """Returns what a model is made of, after downloading it if necessary.

    Args:
        name: as for `fetch_model`.

    Raises:
        UserError: the model, its base or its adapter does not exist, or cannot be downloaded.
    """
    base, plus, part = os.fspath(name).rpartition("+")
    if plus and base and part and not _exists(name):
        if part in base.split("+")[1:]:
            raise UserError(f"{os.fspath(name)}: {part} is given twice, and would be added twice; give it once.")
        return Parts(*_base(base, fetch_model(base)), _part(part))
    folder = hub.fetch_model(name)
    if not hub.is_adapter(folder):
        return Parts(*_base(os.fspath(name), folder))
    path = folder / hub.ADAPTER_CONFIG
    config = json_files.read_json(path)
    base, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not base or not isinstance(base, str):
        raise UserError(f"{path} has no base_model_name_or_path; pass BASE+{folder} with the model that it belongs to.")
    if revision and hub.is_id(base):
        base = f"{base}@{revision}"
    with located(f"the base {base} of the adapter {folder}, which BASE+{folder} replaces"):
        base_folder = hub.fetch_model(base)
        if hub.is_adapter(base_folder):
            raise UserError("it is an adapter itself; give the whole model.")
        if not (base_folder / storage.MODEL_MARKER).is_file():
            raise UserError(f"it has no {storage.MODEL_MARKER}; give a model folder.")
    return Parts(*_base(base, base_folder), folder)


def _base(name: str, folder: Path) -> tuple[str, Path]:
    """The name and folder of a base, as in `Parts`."""
    is_plain_id = hub.is_id(name) and "@" not in name and not _exists(name)
    return (name if is_plain_id else str(folder)), folder


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


def _merge(parts: Parts) -> Path:
    """Writes the merged model to the cache unless it is there as it was written, and returns its folder."""
    target = parts.folder
    seal = target.with_name(f"{target.name}.json")  # the state of the files of the merged model
    checkpoint, tensors, changes = changes_of(parts)

    def state() -> bytes:
        return json.dumps(_state(sorted(target.iterdir()))).encode()

    def is_whole() -> bool:
        return seal.is_file() and target.is_dir() and seal.read_bytes() == state()

    if not is_whole():
        with storage.locked(target):
            if not is_whole():  # another process did not write it meanwhile
                shutil.rmtree(target, ignore_errors=True)
                _write(parts, checkpoint, tensors, changes, target)
                files.write_bytes(seal, state())
    return target


def _state(paths: Iterable[Path]) -> list[list[str | int]]:
    """What identifies the content of files without reading them: replacing a file changes the last number."""
    stats = {str(path.resolve()): path.stat() for path in paths if path.is_file()}
    return [[path, x.st_size, x.st_mtime_ns, x.st_ctime_ns] for path, x in stats.items()]


def changes_of(parts: Parts) -> tuple[Checkpoint, dict[str, Tensor], dict[str, list[adapters.Change]]]:
    """Returns what an adapter, or a file of visual weights, changes.

    Args:
        parts: a base, and what is on top of it.

    Returns:
        The checkpoint of the base, its tensors by canonical names, and the changes by the same names.

    Raises:
        UserError: they do not fit together.
    """
    module, hf_config = hf.read_config(parts.base)
    checkpoint = Checkpoint(parts.base)
    canonical = functools.partial(hf.canonical, module)
    tensors = {canonical(name): tensor for name, tensor in checkpoint.tensors.items()}
    find = adapters.changes if parts.adapter else functools.partial(_visual_changes, module, hf_config)
    changes = find(parts.part, canonical, tensors)
    if parts.adapter:
        _check_tied(parts.part, module, hf_config, changes)
    return checkpoint, tensors, changes


def _write(
    parts: Parts,
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
            with np.errstate(over="ignore", invalid="ignore"):  # is found below
                for step in steps:
                    value = step(value)
                value = value.astype(tensor.dtype)
            if not is_finite(value):
                raise NotFinite(
                    f"{tensor.name} of {parts.base} has NaN or infinity when {parts.part} is merged into it; use "
                    "another copy of the one or the other."
                )
            export.overwrite(new, tensor, value)


def _check_tied(part: Path, module: types.ModuleType, hf_config: Any, changed: Iterable[str]) -> None:
    """Checks that an adapter does not change embeddings that are the head as well: peft changes the embeddings alone.

    Raises:
        UserError: it does.
    """
    config = module.Config.from_hf(hf_config)
    slots = {key: hf.find_slot(module, config, key) for key in changed}
    tied = [key for key, slot in slots.items() if slot and slot.path == "language_model/embed/embedding"]
    if tied and config.text.tie_embeddings:
        raise UserError(
            f"{part} changes {tied[0]}, which is the head of this model as well (tie_word_embeddings): merge the "
            "adapter with merge_and_unload() of peft, and pass the merged model."
        )


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
    if VISUAL[0] not in parts:
        problems.append("no tensor of the vision tower")
    if problems:
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
