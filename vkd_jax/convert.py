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
import hashlib
import json
import math
import os
import pathlib
import re
import shutil
import tempfile
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx

from vkd_jax import models
from vkd_jax.models import base
from vkd_jax.types import UserError

Folder = str | os.PathLike[str]
Sharding = Callable[[str, tuple[int, ...]], jax.sharding.Sharding]

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# What an exported folder takes over beside the weights: configuration, tokenizer, processor, texts;
# weights in any other format stay behind: they would still hold what was unlearned.
COMPANIONS = (".json", ".jinja", ".model", ".tiktoken", ".txt", ".md", "")


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where one tensor lies on disk."""

    file: pathlib.Path
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int  # bytes from the beginning of the file
    stop: int

    def view(self) -> np.ndarray:
        """The tensor as a read-only memory map: only what is sliced out is read."""
        if self.start == self.stop or not self.shape:  # neither can be mapped with its shape
            with self.file.open("rb") as stream:
                stream.seek(self.start)
                return np.frombuffer(stream.read(self.stop - self.start), self.dtype).reshape(self.shape)
        return np.memmap(self.file, self.dtype, "r", self.start, self.shape)

    def sha256(self) -> str:
        """The digest of the tensor's raw bytes."""
        digest, left = hashlib.sha256(), self.stop - self.start
        with self.file.open("rb") as stream:
            stream.seek(self.start)
            while left:
                chunk = stream.read(min(left, 1 << 24))
                digest.update(chunk)
                left -= len(chunk)
        return digest.hexdigest()


class Checkpoint:
    """The tensors of a model folder, single-file or indexed safetensors; headers are read, weights are not.

    Attributes:
        folder: the folder.
        files: the weight files, in order.
        tensors: name -> Tensor, for every tensor of every file.

    Raises:
        UserError: no weights, pickled weights, an index that names what is not there, a truncated file.
    """

    def __init__(self, folder: Folder):
        self.folder = pathlib.Path(folder)
        if not self.folder.is_dir():
            raise UserError(f"There is no model folder {self.folder}.")
        index = self.folder / INDEX
        where = _read_index(index) if index.exists() else {}
        if index.exists():
            self.files = [self.folder / name for name in sorted(set(where.values()))]
            missing = [file.name for file in self.files if not file.is_file()]
            if missing:
                raise UserError(f"{index} names files that are missing: {', '.join(missing)}.")
        elif (self.folder / WEIGHTS).is_file():
            self.files = [self.folder / WEIGHTS]
        else:
            pickles = sorted(p.name for p in self.folder.iterdir() if p.suffix in PICKLES)
            if pickles:
                raise UserError(
                    f"{self.folder} holds only pickled weights ({', '.join(pickles)}), which can run code "
                    "when read; convert them to safetensors with transformers' save_pretrained."
                )
            raise UserError(f"{self.folder} holds no weights: neither {WEIGHTS} nor {INDEX} is there.")
        self.tensors: dict[str, Tensor] = {}
        for file in self.files:
            tensors = _read_header(file)
            absent = [name for name, home in where.items() if home == file.name and name not in tensors]
            if absent:
                names = ", ".join(absent)
                raise UserError(f"{index} places tensors in {file.name} that it does not hold: {names}.")
            twice = sorted(self.tensors.keys() & tensors.keys())
            if twice:
                raise UserError(f"{self.folder} holds tensors twice: {', '.join(twice)}.")
            self.tensors |= tensors


def _read_index(index: pathlib.Path) -> dict[str, str]:
    try:
        where = json.loads(index.read_text())["weight_map"]
        if where and all(isinstance(v, str) and pathlib.PurePath(v).name == v for v in where.values()):
            return where
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise UserError(f"{index} is not a safetensors index: it has no weight_map from tensor names to file names.")


def _read_header(file: pathlib.Path) -> dict[str, Tensor]:
    """The safetensors header: 8 bytes of length, JSON, then the tensors without gaps."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or 8 + length > size:
            raise UserError(f"{file} is truncated: its header ends after the file; fetch it again.")
        try:
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            entries = {n: (e["dtype"], tuple(e["shape"]), *e["data_offsets"]) for n, e in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{file} is corrupt: its header cannot be read; fetch it again.") from error
    tensors, begin = {}, 8 + length
    for name, (dtype, shape, start, stop) in entries.items():
        if dtype not in DTYPES:
            raise UserError(f"{file} holds {name} as {dtype}; supported are {', '.join(DTYPES)}.")
        if start < 0 or stop - start != DTYPES[dtype].itemsize * math.prod(shape):
            raise UserError(f"{file} is corrupt: {name}'s bytes do not fit {dtype} {shape}; fetch it again.")
        tensors[name] = Tensor(file, DTYPES[dtype], shape, begin + start, begin + stop)
    needed = max((tensor.stop for tensor in tensors.values()), default=begin)
    if size != needed:
        raise UserError(f"{file} is truncated: it has {size} bytes and needs {needed}; fetch it again.")
    return tensors


@dataclasses.dataclass(frozen=True)
class Slot:
    """What one tensor of a checkpoint means to us."""

    path: str
    layer: int | None  # the position on the parameter's leading axis; None: the whole parameter
    axes: tuple[int, ...] | None  # parameter = tensor.transpose(axes)

    def to_param(self, tensor: np.ndarray) -> np.ndarray:
        """A tensor, or a lazy view of one, with its axes in the parameter's order."""
        return tensor if self.axes is None else tensor.transpose(self.axes)

    def to_tensor(self, param: Any) -> np.ndarray:
        """The tensor that this slot takes from a whole parameter."""
        tensor = np.asarray(param if self.layer is None else param[self.layer])
        return tensor if self.axes is None else tensor.transpose(np.argsort(self.axes))


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
    folder: Folder, *, dtype: Any = None, sharding: Sharding | None = None, **changes: Any
) -> tuple[nnx.GraphDef, base.Params, Any]:
    """Reads a Hugging Face model folder.

    Each device reads the slices that it holds, and casts them as it reads; nothing is held twice.

    Args:
        folder: config.json with single-file or indexed safetensors.
        dtype: of the parameters, and of the computation too unless `changes` say otherwise. None keeps both
            as they are on disk and in config.json.
        sharding: function of (path, shape) to a parameter's sharding; None means the default device.
        **changes: fields of the model's configuration to set otherwise, e.g. `remat=True` or
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
    params = {path: _read(sources[path], shapes[path].shape, dtype, sharding, path) for path in shapes}
    return graphdef, params, config


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


def _read(parts: list[tuple[Slot, Tensor]], shape, dtype, sharding: Sharding | None, path: str) -> jax.Array:
    """One parameter from its tensors; `parts` has one entry, or one a layer."""
    dtype = parts[0][1].dtype if dtype is None else jnp.dtype(dtype)

    def cut(slot: Slot, tensor: Tensor, index: tuple[slice, ...]) -> np.ndarray:
        # A copy, because jax may keep an aligned host array as it is, and the file may go away.
        return np.array(slot.to_param(tensor.view())[index], dtype=dtype, order="C")

    def read(index: tuple[slice, ...]) -> np.ndarray:
        if parts[0][0].layer is None:
            return cut(*parts[0], index)
        return np.stack([cut(*part, index[1:]) for part in parts[index[0]]])

    if sharding is None:
        return jnp.asarray(read((slice(None),) * len(shape)))
    return jax.make_array_from_callback(tuple(shape), sharding(path, tuple(shape)), read)


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
    if (folder / WEIGHTS).exists() or (folder / "config.json").exists():
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
        _write_tensors(new / WEIGHTS, names, params)
        if folder.is_dir():
            shutil.copytree(folder, new, dirs_exist_ok=True)


def _write_json(file: pathlib.Path, content: Any) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _write_tensors(file: pathlib.Path, names: Mapping[str, Slot], params: Mapping[str, jax.Array]) -> None:
    labels = {dtype: label for label, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers refuses files without it
    order, offset = sorted(names), 0
    for name in order:
        param = params[names[name].path]
        tensor = names[name].to_tensor(np.broadcast_to(np.zeros((), param.dtype), param.shape))  # takes no memory
        end = offset + tensor.nbytes
        header[name] = dict(dtype=labels[tensor.dtype], shape=tensor.shape, data_offsets=[offset, end])
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start aligned
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            stream.write(names[name].to_tensor(params[names[name].path]).tobytes())


def export(params: Mapping[str, jax.Array], source: Folder, target: Folder, config: Any) -> None:
    """Writes a model folder that equals `source` but for the given parameters.

    Shards, names, dtypes, tokenizer, processor and configuration are the source's; a tensor that is not in
    `params`, or that comes out the same, keeps its bytes. The folder is made beside the target and renamed
    when complete.

    Args:
        params: any subset of the model's parameters, usually those that were trained. Fully addressable.
        source: the folder that the model was loaded from.
        target: the folder to write; an earlier model there is replaced.
        config: the model's configuration, from `load`.

    Raises:
        UserError: the source cannot be read, the target is no model folder, or the disk is full.
    """
    source, target = pathlib.Path(source), pathlib.Path(target)
    module, checkpoint = _module_of(config), Checkpoint(source)
    if source.resolve() == target.resolve():
        raise UserError(f"{target} is the folder the model came from; name another one to write to.")
    if target.is_dir() and any(target.iterdir()) and not (target / "config.json").exists():
        raise UserError(f"{target} exists and is not a model folder; name another one to write to.")
    slots = {name: find_slot(module, config, name) for name in checkpoint.tensors}
    unknown = set(params) - {slot.path for slot in slots.values() if slot}
    if unknown:
        raise ValueError(f"{source} holds no tensor for {sorted(unknown)}.")
    with _new_folder(target) as new:
        for file in sorted(source.iterdir()):
            if file.is_file() and not file.name.startswith(".") and file.suffix in COMPANIONS:
                shutil.copyfile(file, new / file.name)
        for file in checkpoint.files:
            shutil.copyfile(file, new / file.name)
            with (new / file.name).open("r+b") as stream:
                for name, tensor in checkpoint.tensors.items():
                    if tensor.file == file and slots[name] and slots[name].path in params:
                        value = slots[name].to_tensor(params[slots[name].path])
                        if value.shape != tensor.shape:
                            raise ValueError(f"{name} is {tensor.shape} on disk and {value.shape} here.")
                        stream.seek(tensor.start)
                        stream.write(value.astype(tensor.dtype).tobytes())


@contextlib.contextmanager
def _new_folder(target: pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder that takes its name only when everything in it is written."""
    if target.exists() and not target.is_dir():
        raise UserError(f"{target} is a file; name a folder to write the model to.")
    new = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        new = pathlib.Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        new.chmod(0o755)
        yield new
        if target.exists():
            old = pathlib.Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
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
