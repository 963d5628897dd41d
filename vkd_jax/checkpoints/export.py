"""Writes Hugging Face model folders: new ones, and copies of a folder with trained weights."""

import contextlib
import copy
import errno
import fnmatch
import json
import pathlib
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from vkd_jax import models
from vkd_jax.checkpoints import safetensors_files
from vkd_jax.checkpoints.hf import family_of, find_slot, tensor_names
from vkd_jax.checkpoints.safetensors_files import Checkpoint, Folder, Tensor
from vkd_jax.models import lora
from vkd_jax.runtime import files, hub, multihost, storage
from vkd_jax.runtime.finite import is_finite
from vkd_jax.types import Diverged, UserError

# Suffixes of the files that an export copies besides the weights: configuration, tokenizer, processor, texts. Weights
# in other formats are not copied, because they still contain the knowledge to unlearn. Nor is the configuration of an
# adapter, of which there are no weights: transformers would look for them; nor the certificate of the source.
COMPANIONS = (".json", ".jinja", ".model", ".tiktoken", ".txt", ".md", "")
NOT_COPIED = (hub.ADAPTER_CONFIG, storage.CERTIFICATE)


def create(folder: Folder, hf_config: Any, params: Mapping[str, jax.Array]) -> None:
    """Writes a new model folder: config.json, generation_config.json and model.safetensors.

    Args:
        folder: the folder to write; it may exist and contain a tokenizer, but not a model.
        hf_config: the transformers configuration.
        params: all parameters of the model.

    Raises:
        UserError: the folder contains a model, or the disk is full.
    """
    folder, module = pathlib.Path(folder), models.module_for(hf_config.model_type)
    if (folder / safetensors_files.WEIGHTS).exists() or (folder / "config.json").exists():
        raise UserError(f"{folder} already holds a model. Choose another folder.")
    config = module.Config.from_hf(hf_config)
    names = tensor_names(module, config, params)
    hf_config = copy.deepcopy(hf_config)
    hf_config.architectures = [module.HF_ARCHITECTURE]
    hf_config.dtype = str(next(iter(params.values())).dtype)
    text = hf_config.get_text_config()
    generation = {key: getattr(text, key, None) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    with _new_folder(folder) as new:
        hf_config.save_pretrained(new)
        _write_json(new / "generation_config.json", {k: v for k, v in generation.items() if v is not None})
        # Broadcast arrays of the same shapes, which take no memory.
        empty = {path: np.broadcast_to(np.zeros((), param.dtype), param.shape) for path, param in params.items()}
        safetensors_files.write(
            new / safetensors_files.WEIGHTS,
            {name: slot.to_tensor(empty[slot.path]) for name, slot in names.items()},
            lambda name: names[name].to_tensor(params[names[name].path]),
        )
        if folder.is_dir():
            shutil.copytree(folder, new, dirs_exist_ok=True)


def _write_json(file: pathlib.Path, content: Any) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def export(
    params: Mapping[str, jax.Array],
    source: Folder,
    target: Folder,
    config: Any,
    notes: Mapping[str, str] | None = None,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Writes a copy of the model folder `source` with the given parameters.

    Shards, names, dtypes, tokenizer, processor and configuration are those of the source. A tensor that is not in
    `params`, or whose value did not change, keeps its bytes. An adapter is added to the tensor of the source, so the
    dtype or quantization of its kernel in memory does not matter. The copy is written next to the target and renamed
    when it is complete.

    Args:
        params: any subset of the model's parameters, usually the trained ones, together with `lora.adapters` of the
            model. If they are sharded over several hosts, each host calls this function, and process 0 writes.
        source: the folder that the model was loaded from.
        target: the folder to write; a model that is in it is replaced.
        config: configuration of the model, from `load`.
        notes: further text files, {name: content}; they replace files of the source with the same name.
        check: called in process 0 before the copy is renamed; if it raises, the target stays as it is.

    Raises:
        UserError: the source cannot be read, the target exists and is not a model folder, or the disk is full.
        Diverged: a parameter is NaN or infinite in the dtype of the source; the target stays as it is.
    """
    source, target = pathlib.Path(source), pathlib.Path(target)
    module, checkpoint = family_of(config), Checkpoint(source)
    slots = {name: find_slot(module, config, name) for name in checkpoint.tensors}
    params = lora.join(params)
    unknown = set(params) - {slot.path for slot in slots.values() if slot}
    if unknown:
        raise ValueError(f"{source} holds no tensor for {sorted(unknown)}.")
    names = [name for name, slot in slots.items() if slot and slot.path in params]  # in the order of the files
    values = ((name, slots[name].to_tensor(params[slots[name].path])) for name in names)

    def write() -> None:
        if source.resolve() == target.resolve():
            raise UserError(f"{target} is the folder of the source model. Choose another folder to write to.")
        if target.is_dir() and any(target.iterdir()) and not (target / "config.json").exists():
            raise UserError(f"{target} exists and is not a model folder. Choose another folder to write to.")
        with _new_folder(target) as new:
            copy_model(checkpoint, new)
            for name, text in (notes or {}).items():
                (new / name).write_text(text, encoding="utf-8")
            for name, value in values:
                tensor = checkpoint.tensors[name]
                if value.shape != tensor.shape:
                    raise ValueError(f"{name} has shape {tensor.shape} on disk and {value.shape} in memory.")
                with np.errstate(over="ignore", invalid="ignore"):  # is found below
                    if isinstance(params[slots[name].path], lora.Lora):
                        value = _add(tensor, value)
                    value = value.astype(tensor.dtype)
                if not is_finite(value):
                    raise Diverged(
                        f"{name} has NaN or infinity in the dtype of {source}, so no model was written to {target}. "
                        "Decrease the learning rate or the forget weight, and use a new --workdir."
                    )
                overwrite(new, tensor, value)
            check()

    multihost.run_on_process_0(write, meanwhile=values)


def copy_model(checkpoint: Checkpoint, target: pathlib.Path, skip: Collection[str] = ()) -> None:
    """Copies the weights of a model folder and their companions to an existing folder.

    Args:
        checkpoint: the weights.
        target: the folder to copy to.
        skip: names of further files that are not copied.
    """
    for file in sorted(checkpoint.folder.iterdir()):
        is_companion = file.suffix in COMPANIONS and file.name not in (*NOT_COPIED, *skip)
        is_companion &= bool(file.suffix) or any(fnmatch.fnmatch(file.name, pattern) for pattern in storage.TEXTS)
        if file.is_file() and not file.name.startswith(".") and is_companion:
            shutil.copyfile(file, target / file.name)
    for file in checkpoint.files:
        shutil.copyfile(file, target / file.name)


def overwrite(folder: pathlib.Path, tensor: Tensor, value: np.ndarray) -> None:
    """Writes the value of a tensor to a folder from `copy_model`; dtype and shape are those of the tensor."""
    with (folder / tensor.file.name).open("r+b") as stream:
        stream.seek(tensor.start)
        stream.write(value.tobytes())


def _add(tensor: Tensor, delta: np.ndarray) -> np.ndarray:
    """Adds float32 values to a tensor on disk, in float32 or better, and rounds once to the dtype on disk."""
    total = np.empty(tensor.shape, tensor.dtype)
    tensor.copy_to([(tuple(slice(0, size) for size in tensor.shape), total)])
    return np.add(total, delta, out=total, where=delta != 0)  # -0 + 0 would change the bytes


@contextlib.contextmanager
def _new_folder(target: pathlib.Path) -> Iterator[pathlib.Path]:
    """Like `files.atomic_folder`, but a full disk, or a target that is a file, raises a `UserError`."""
    if target.exists() and not target.is_dir():
        raise UserError(f"{target} is a file. Choose a folder to write the model to.")
    try:
        with files.atomic_folder(target) as new:
            yield new
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise UserError(f"The disk is full: {target} could not be written. Free some space.") from error
        raise
