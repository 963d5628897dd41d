"""Hugging Face model folders to parameters and back, by the one table that each model file holds.

A row of a table is (tensor name, parameter path, permutation of the axes); `{i}` stands for a number. A
number that only the name has is the position on the parameter's leading, stacked axis. Every tensor of a
checkpoint must match exactly one row, every parameter must be filled, and the same rows read backward write
the checkpoint.
"""

import dataclasses
import functools
import json
import math
import pathlib
import re
import types
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vkd_jax import models
from vkd_jax.checkpoints.safetensors_files import Checkpoint, Folder, Meter, Tensor
from vkd_jax.models import base, lora
from vkd_jax.runtime import multihost
from vkd_jax.types import UserError

Sharding = Callable[[str, tuple[int, ...]], jax.sharding.Sharding]
Span = Sequence[tuple[int, int]]  # (first, behind the last) on each axis


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
    graphdef, shapes = base.abstract_model(lambda rngs: module.Model(config, rngs=rngs))
    sources = match_tensors(module, config, checkpoint, shapes)
    passed = Meter(folder, sum(tensor.stop - tensor.start for parts in sources.values() for _, tensor in parts))

    exact = set(masters(list(shapes), config)) if masters else set()

    def read(path: str) -> Any:
        shape, kind = shapes[path].shape, jnp.float32 if path in exact else dtype
        param = _read(sources[path], shape, kind, sharding and sharding(path, shape), passed)
        # Waits: otherwise copies to the devices would queue up in this host's memory.
        return jax.block_until_ready(param if transform is None else transform(path, param))

    return graphdef, {path: read(path) for path in shapes}, config


def match_tensors(
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


def init_params(config: Any, seed: int, dtype: Any = jnp.float32) -> tuple[nnx.GraphDef, base.Params]:
    """Random parameters to train from, for a model configuration; the same seed gives the same parameters."""
    module = family_of(config)
    graphdef, _ = base.abstract_model(lambda rngs: module.Model(config, rngs=rngs, param_dtype=dtype))
    # Runs once, so compiling it well costs more than it saves.
    options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}

    @functools.partial(jax.jit, compiler_options=options)
    def draw(key):
        return base.split_model(module.Model(config, rngs=nnx.Rngs(key), param_dtype=dtype))[1]

    return graphdef, draw(jax.random.key(seed))


def family_of(config: Any) -> types.ModuleType:
    """Finds the model module whose `Config` this configuration is."""
    for model_type in models.MODELS:
        module = models.module_for(model_type)
        if isinstance(config, module.Config):
            return module
    raise TypeError(f"{type(config).__name__} is no model's configuration.")
