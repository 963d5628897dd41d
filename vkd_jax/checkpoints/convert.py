"""Hugging Face model folders to parameters and back, by the one table that each model file holds.

A row of a table is (tensor name, parameter path, permutation of the axes); `{i}` stands for a number. A
number that only the name has is the position on the parameter's leading, stacked axis. Every tensor of a
checkpoint must match exactly one row, every parameter must be filled, and the same rows read backward write
the checkpoint.
"""

import contextlib
import copy
import dataclasses
import errno
import functools
import glob
import json
import math
import os
import pathlib
import re
import shutil
import tempfile
import types
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vkd_jax import models
from vkd_jax.checkpoints import weights
from vkd_jax.checkpoints.weights import Checkpoint, Folder, Meter, Tensor
from vkd_jax.models import base, lora
from vkd_jax.runtime import multihost
from vkd_jax.types import UserError

Sharding = Callable[[str, tuple[int, ...]], jax.sharding.Sharding]
Span = Sequence[tuple[int, int]]  # (first, behind the last) on each axis

UNFINISHED = ".tmp"  # how the name of a folder ends that is being written

# What an exported folder takes over beside the weights: configuration, tokenizer, processor, texts;
# weights in any other format stay behind: they would still hold what was unlearned.
COMPANIONS = (".json", ".jinja", ".model", ".tiktoken", ".txt", ".md", "")


@dataclasses.dataclass(frozen=True)
class Slot:
    """What one tensor of a checkpoint means to us."""

    path: str
    layer: int | None  # the position on the parameter's leading axis; None: the whole parameter
    axes: tuple[int, ...] | None  # parameter = tensor.transpose(axes)

    def to_param(self, tensor: np.ndarray) -> np.ndarray:
        """A tensor with its axes in the parameter's order."""
        return tensor if self.axes is None else tensor.transpose(self.axes)

    def to_tensor(self, param: Any) -> np.ndarray:
        """The tensor that this slot takes from a whole parameter; from an adapter, what it adds to the tensor."""
        if isinstance(param, lora.Lora):
            tensor = lora.delta(param, self.layer)
        else:
            tensor = multihost.gather(param if self.layer is None else param[self.layer])
        return tensor if self.axes is None else tensor.transpose(np.argsort(self.axes))

    def shares(self, span: Span, part: np.ndarray) -> list[tuple[tuple[slice, ...], np.ndarray]]:
        """What this slot's tensor gives to a part of the parameter: [(part of the tensor, view to fill)], or nothing.

        Args:
            span: where the part begins and ends on each axis of the parameter.
            part: the array that holds it.
        """
        if self.layer is not None:
            (first, last), *span = span
            if not first <= self.layer < last:
                return []
            part = part[self.layer - first, ...]
        axes = range(len(span)) if self.axes is None else np.argsort(self.axes)
        return [(tuple(slice(*span[axis]) for axis in axes), part.transpose(axes))]


def canonical(module: types.ModuleType, name: str) -> str:
    """A tensor's name in the naming that the tables use, whichever generation of names it comes from."""
    for pattern, replacement in module.HF_ALIASES:
        name = re.sub(pattern, replacement, name)
    return name


def find_slot(module: types.ModuleType, config: Any, name: str) -> Slot | None:
    """The slot of a tensor by its name in any generation; None when no row has it."""
    name = canonical(module, name)
    found = []
    for template, path, axes in module.hf_table(config):
        match = re.fullmatch(re.escape(template).replace(r"\{i\}", r"(0|[1-9]\d*)"), name)
        if match:
            stacked = "{i}" in template and "{i}" not in path
            layer = int(match.group(1)) if stacked else None
            found.append(Slot(path.replace("{i}", *match.groups() or ("",)), layer, axes))
    if len(found) > 1:
        raise ValueError(f"{name} matches {len(found)} rows of the conversion table.")
    return found[0] if found else None


def tensor_names(module: types.ModuleType, config: Any, shapes: Mapping[str, Any]) -> dict[str, Slot]:
    """The canonical checkpoint of a model: every tensor name with its slot (the table read backward).

    Where two rows name one slot (tied embeddings) the first one's name is written, and both are read.
    """
    names: dict[Slot, str] = {}
    for template, path, axes in module.hf_table(config):
        for key, shape in shapes.items():
            match = re.fullmatch(re.escape(path).replace(r"\{i\}", r"(\d+)"), key)
            if match and "{i}" in template and not match.groups():
                for layer in range(shape.shape[0]):
                    names.setdefault(Slot(key, layer, axes), template.replace("{i}", str(layer)))
            elif match:
                names.setdefault(Slot(key, None, axes), template.replace("{i}", *match.groups() or ("",)))
    unwritten = set(shapes) - {slot.path for slot in names}
    if unwritten:
        raise ValueError(f"No row of the conversion table writes {sorted(unwritten)}.")
    return {name: slot for slot, name in names.items()}


def read_config(folder: Folder) -> tuple[types.ModuleType, Any]:
    """The model module and the transformers configuration of a folder.

    Raises:
        UserError: no readable config.json, or a model type that is not supported.
    """
    from transformers import AutoConfig

    path = pathlib.Path(folder) / "config.json"
    if not path.is_file():
        raise UserError(f"{folder} has no config.json; a Hugging Face model folder is needed.")
    try:
        model_type = json.loads(path.read_text())["model_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a Hugging Face model configuration: no model_type.") from error
    module = models.module_for(model_type)
    try:
        return module, AutoConfig.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # transformers raises a different type for every field that may be wrong
        raise UserError(f"{path} cannot be read by transformers: {' '.join(str(error).split())}") from error


def load(
    folder: Folder,
    *,
    dtype: Any = None,
    sharding: Sharding | None = None,
    masters: Callable[[Sequence[str], Any], Collection[str]] | None = None,
    transform: Callable[[str, jax.Array], Any] | None = None,
    **changes: Any,
) -> tuple[nnx.GraphDef, base.Params, Any]:
    """Reads a Hugging Face model folder.

    The files are read once, whatever the sharding. On the way each host holds its devices' part of one parameter
    (on a CPU that memory becomes the parameter) and a few rows of a tensor.

    Args:
        folder: config.json with single-file or indexed safetensors.
        dtype: of the parameters, and of the computation too unless `changes` say otherwise. None keeps both
            as they are on disk and in config.json.
        sharding: function of (path, shape) to a parameter's sharding; None means the default device.
        masters: function of (paths, configuration) to those parameters that are held in float32 whatever `dtype` is:
            what trains must not be rounded first, or writing it back would change weights that never moved.
        transform: function of (path, parameter) to what takes its place, say a quantised one; called as soon as the
            parameter is read, and before the next one is.
        **changes: fields of the model's configuration to set otherwise, e.g. `remat="full"` or
            `compute_dtype="float32"`.

    Returns:
        (graphdef, parameters, configuration).

    Raises:
        UserError: the folder cannot be read, or its tensors are not the model's (all such are listed).
    """
    module, hf_config = read_config(folder)
    if dtype is not None:
        changes = {"compute_dtype": jnp.dtype(dtype).name} | changes
    config = module.Config.from_hf(hf_config, **changes)
    checkpoint = Checkpoint(folder)
    graphdef, shapes = base.abstract(lambda rngs: module.Model(config, rngs=rngs))
    sources = match(module, config, checkpoint, shapes)
    passed = Meter(folder, sum(tensor.stop - tensor.start for parts in sources.values() for _, tensor in parts))

    exact = set(masters(list(shapes), config)) if masters else set()

    def read(path: str) -> Any:
        shape, kind = shapes[path].shape, jnp.float32 if path in exact else dtype
        param = _read(sources[path], shape, kind, sharding and sharding(path, shape), passed)
        # Waits: otherwise copies to the devices would queue up in this host's memory.
        return jax.block_until_ready(param if transform is None else transform(path, param))

    return graphdef, {path: read(path) for path in shapes}, config


def match(
    module: types.ModuleType, config: Any, checkpoint: Checkpoint, shapes: Mapping[str, Any]
) -> dict[str, list[tuple[Slot, Tensor]]]:
    """Finds the tensors of every parameter, in the order of its stacked axis.

    Raises:
        UserError: lists every tensor that no row knows, that comes twice, or that has the wrong shape, and
            every one that is missing.
    """
    wanted = tensor_names(module, config, shapes)
    slots, found = set(wanted.values()), dict[str, Tensor]()
    problems = []
    for name, tensor in checkpoint.tensors.items():
        slot, known = find_slot(module, config, name), canonical(module, name)
        if slot is None:
            if not any(re.fullmatch(pattern, known) for pattern in module.HF_SKIP):
                problems.append(f"unknown tensor {name}")
        elif slot not in slots:
            problems.append(f"unknown tensor {name} (the configuration has fewer layers)")
        elif known in found:
            problems.append(f"{name} comes a second time under another name")
        elif known in wanted:
            found[known] = tensor
            shape = shapes[slot.path].shape[0 if slot.layer is None else 1 :]
            expected = tuple(shape[i] for i in np.argsort(slot.axes or range(len(shape))))
            if tensor.shape != expected:
                problems.append(f"{name} has shape {tensor.shape} where {expected} is needed")
    problems += [f"missing tensor {name}" for name in wanted if name not in found]
    if problems:
        raise UserError(f"The weights in {checkpoint.folder} do not fit its config: {'; '.join(problems)}.")
    sources: dict[str, list[tuple[Slot, Tensor]]] = {}
    for name, slot in wanted.items():
        sources.setdefault(slot.path, []).append((slot, found[name]))
    return sources


def _read(
    parts: list[tuple[Slot, Tensor]],
    shape: tuple[int, ...],
    dtype: Any,
    sharding: jax.sharding.Sharding | None,
    passed: Callable[[int], None],
) -> jax.Array:
    """One parameter from its tensors; `parts` has one entry, or one a layer."""
    dtype = parts[0][1].dtype if dtype is None else jnp.dtype(dtype)

    def span(index: tuple[slice, ...]) -> tuple[tuple[int, int], ...]:
        return tuple(cut.indices(size)[:2] for cut, size in zip(index, shape, strict=True))

    whole = (slice(None),) * len(shape)
    indices = [whole] if sharding is None else sharding.addressable_devices_indices_map(shape).values()
    # Devices that hold the same part of the parameter share what is read for them.
    buffers = {at: _aligned([last - first for first, last in at], dtype) for at in set(map(span, indices))}
    for slot, tensor in parts:
        tensor.copy([share for at, buffer in buffers.items() for share in slot.shares(at, buffer)], passed)
    if sharding is None:
        return jnp.asarray(buffers[span(whole)])
    return jax.make_array_from_callback(shape, sharding, lambda index: buffers[span(index)])


def _aligned(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """An empty array that begins at a multiple of 64 bytes: a CPU device then takes it as it is, without a copy."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)


def init(config: Any, seed: int, dtype: Any = jnp.float32) -> tuple[nnx.GraphDef, base.Params]:
    """Random parameters to train from, for a model configuration; the same seed gives the same parameters."""
    module = _module_of(config)
    graphdef, _ = base.abstract(lambda rngs: module.Model(config, rngs=rngs, param_dtype=dtype))
    # Runs once, so compiling it well costs more than it saves.
    options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}

    @functools.partial(jax.jit, compiler_options=options)
    def draw(key):
        return base.split(module.Model(config, rngs=nnx.Rngs(key), param_dtype=dtype))[1]

    return graphdef, draw(jax.random.key(seed))


def _module_of(config: Any) -> types.ModuleType:
    for model_type in models.MODELS:
        module = models.module_for(model_type)
        if isinstance(config, module.Config):
            return module
    raise TypeError(f"{type(config).__name__} is no model's configuration.")


def create(folder: Folder, hf_config: Any, params: Mapping[str, jax.Array]) -> None:
    """Writes a new model folder: config.json, generation_config.json and model.safetensors.

    Args:
        folder: where to; it may exist (say, with a tokenizer in it) but not hold a model.
        hf_config: the transformers configuration.
        params: every parameter of the model.

    Raises:
        UserError: the folder holds a model, or the disk is full.
    """
    folder, module = pathlib.Path(folder), models.module_for(hf_config.model_type)
    if (folder / weights.WEIGHTS).exists() or (folder / "config.json").exists():
        raise UserError(f"{folder} already holds a model; name another folder.")
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
        # Arrays of the same shapes that take no memory.
        empty = {path: np.broadcast_to(np.zeros((), param.dtype), param.shape) for path, param in params.items()}
        weights.write(
            new / weights.WEIGHTS,
            {name: slot.to_tensor(empty[slot.path]) for name, slot in names.items()},
            lambda name: names[name].to_tensor(params[names[name].path]),
        )
        if folder.is_dir():
            shutil.copytree(folder, new, dirs_exist_ok=True)


def _write_json(file: pathlib.Path, content: Any) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def export(
    params: Mapping[str, jax.Array], source: Folder, target: Folder, config: Any, notes: Mapping[str, str] | None = None
) -> None:
    """Writes a model folder that equals `source` but for the given parameters.

    Shards, names, dtypes, tokenizer, processor and configuration are the source's; a tensor that is not in
    `params`, or that comes out the same, keeps its bytes. An adapter is added to what the source holds, one tensor
    at a time, however its kernel was held in memory. The folder is made beside the target and renamed when complete.

    Args:
        params: any subset of the model's parameters, usually those that were trained, with `lora.adapters` of the
            model. They may lie on several hosts: each then makes this call, and process 0 writes.
        source: the folder that the model was loaded from.
        target: the folder to write; an earlier model there is replaced.
        config: the model's configuration, from `load`.
        notes: further text files, by name; one of the source's of that name is not taken over.

    Raises:
        UserError: the source cannot be read, the target is no model folder, or the disk is full.
    """
    source, target = pathlib.Path(source), pathlib.Path(target)
    module, checkpoint = _module_of(config), Checkpoint(source)
    slots = {name: find_slot(module, config, name) for name in checkpoint.tensors}
    params = lora.join(params)
    unknown = set(params) - {slot.path for slot in slots.values() if slot}
    if unknown:
        raise ValueError(f"{source} holds no tensor for {sorted(unknown)}.")
    ours = [name for name, slot in slots.items() if slot and slot.path in params]  # by file, as the checkpoint has them
    values = ((name, slots[name].to_tensor(params[slots[name].path])) for name in ours)

    def write() -> None:
        if source.resolve() == target.resolve():
            raise UserError(f"{target} is the folder the model came from; name another one to write to.")
        if target.is_dir() and any(target.iterdir()) and not (target / "config.json").exists():
            raise UserError(f"{target} exists and is not a model folder; name another one to write to.")
        with _new_folder(target) as new:
            for file in sorted(source.iterdir()):
                if file.is_file() and not file.name.startswith(".") and file.suffix in COMPANIONS:
                    shutil.copyfile(file, new / file.name)
            for name, text in (notes or {}).items():
                (new / name).write_text(text, encoding="utf-8")
            for file in checkpoint.files:
                shutil.copyfile(file, new / file.name)
            for name, value in values:
                tensor = checkpoint.tensors[name]
                if value.shape != tensor.shape:
                    raise ValueError(f"{name} is {tensor.shape} on disk and {value.shape} here.")
                if isinstance(params[slots[name].path], lora.Lora):
                    value = _plus(tensor, value)
                with (new / tensor.file.name).open("r+b") as stream:
                    stream.seek(tensor.start)
                    stream.write(value.astype(tensor.dtype).tobytes())

    multihost.run_on_process_0(write, meanwhile=values)


def _plus(tensor: Tensor, delta: np.ndarray) -> np.ndarray:
    """What is on disk, plus float32 values; summed in float32 or better, and rounded once to what is on disk."""
    total = np.empty(tensor.shape, tensor.dtype)
    tensor.copy([(tuple(slice(0, size) for size in tensor.shape), total)])
    return np.add(total, delta, out=total, where=delta != 0)  # -0 + 0 would be other bytes


@contextlib.contextmanager
def _new_folder(target: pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder that takes its name only when everything in it is written."""
    if target.exists() and not target.is_dir():
        raise UserError(f"{target} is a file; name a folder to write the model to.")
    new = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for left in target.parent.glob(f".{glob.escape(target.name)}.*{UNFINISHED}"):  # by a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        new = pathlib.Path(tempfile.mkdtemp(UNFINISHED, f".{target.name}.", target.parent))
        new.chmod(0o755)
        yield new
        if target.exists():
            old = pathlib.Path(tempfile.mkdtemp(UNFINISHED, f".{target.name}.old.", target.parent))
            os.replace(target, old)
            os.replace(new, target)
            shutil.rmtree(old)
        else:
            os.replace(new, target)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise UserError(f"The disk is full: {target} could not be written; free some space.") from error
        raise
    finally:
        if new is not None:
            shutil.rmtree(new, ignore_errors=True)


def manifest(before: Folder, after: Folder) -> dict[str, Any]:
    """The SHA-256 of every tensor's bytes in two model folders, and the names of those that differ.

    Returns:
        {"tensors": {name: {"before": digest, "after": digest, "changed": bool}}, "changed": [names]}; a
        digest is None where one of the folders has no such tensor.
    """
    first, second = Checkpoint(before).tensors, Checkpoint(after).tensors
    tensors = {}
    for name in sorted(first.keys() | second.keys()):
        old, new = (side[name].sha256() if name in side else None for side in (first, second))
        tensors[name] = {"before": old, "after": new, "changed": old != new}
    return {"tensors": tensors, "changed": [name for name, entry in tensors.items() if entry["changed"]]}
