"""Converts Hugging Face model folders to parameters and back, by the conversion table of the model's family.

A row of a table is (tensor name, parameter path, permutation of the axes); `{i}` stands for a number. A number that
only the name has is an index of the parameter's leading, stacked axis. Every tensor of a checkpoint must match exactly
one row, and every parameter must be filled. Writing a checkpoint uses the same rows in the other direction.
"""

import dataclasses
import functools
import math
import os
import pathlib
import re
import types
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx

from vkd_jax import messages, models
from vkd_jax.checkpoints import safetensors_files
from vkd_jax.checkpoints.safetensors_files import Checkpoint, Folder, ProgressLog, Tensor
from vkd_jax.messages import listed
from vkd_jax.models import base, lora
from vkd_jax.runtime import hub, json_files, memory, multihost
from vkd_jax.types import NotFinite, UserError

Sharding = Callable[[str, tuple[int, ...]], jax.sharding.Sharding]
CONFIG = "config.json"
ORIGINAL_LLAVA_FIELDS = {"mm_vision_tower", "mm_projector_type", "mm_hidden_size"}
CONVERT_ORIGINAL_LLAVA = (
    "Use a converted model, such as llava-hf/llava-1.5-7b-hf, or convert it in a clone of transformers: `python "
    "src/transformers/models/llava/convert_llava_weights_to_hf.py --old_state_dict_id ID --text_model_id "
    "lmsys/vicuna-7b-v1.5 --vision_model_id openai/clip-vit-large-patch14-336 --output_hub_path ORG/NAME`."
)
ORIGINAL_TENSORS = {  # the start of their names, the family, and what to do
    r"(.*\.)?mm_projector\.": ("LLaVA", CONVERT_ORIGINAL_LLAVA),
    r"mlp1\.": ("InternVL", f"Use a converted model, such as {models.CONVERTED['internvl_chat']}."),
}
MOST_UNKNOWN = 1000  # tensors that are no weight of the model; a crafted header can name millions
Span = Sequence[tuple[int, int]]  # (start, stop) on each axis


@dataclasses.dataclass(frozen=True)
class Slot:
    """The place of a checkpoint tensor in the parameters."""

    path: str
    layer: int | None  # index of the parameter's leading axis; None for the whole parameter
    axes: tuple[int, ...] | None  # parameter = tensor.transpose(axes)

    def to_param(self, tensor: np.ndarray) -> np.ndarray:
        """Permutes the axes of a tensor to the order of the parameter."""
        return tensor if self.axes is None else tensor.transpose(self.axes)

    def to_tensor(self, param: Any) -> np.ndarray:
        """Returns the tensor of this slot from a whole parameter; from an adapter, what it adds to the tensor."""
        if isinstance(param, lora.Lora):
            tensor = lora.delta(param, self.layer)
        else:
            tensor = multihost.gather(param if self.layer is None else param[self.layer])
        return tensor if self.axes is None else tensor.transpose(np.argsort(self.axes))

    def overlaps(self, span: Span, buffer: np.ndarray) -> list[tuple[tuple[slice, ...], np.ndarray]]:
        """Returns the part of this slot's tensor that belongs to a part of the parameter.

        Args:
            span: the part of the parameter, (start, stop) on each axis.
            buffer: array of that part.

        Returns:
            [(slices of the tensor, view of `buffer` to copy them to)], or [] if the part has another layer.
        """
        if self.layer is not None:
            (start, stop), *span = span
            if not start <= self.layer < stop:
                return []
            buffer = buffer[self.layer - start, ...]
        axes = range(len(span)) if self.axes is None else np.argsort(self.axes)
        return [(tuple(slice(*span[axis]) for axis in axes), buffer.transpose(axes))]


def canonical(module: types.ModuleType, name: str) -> str:
    """Maps the name of a tensor, of any generation of names, to the name in the conversion table."""
    for pattern, replacement in module.HF_ALIASES:
        name = re.sub(pattern, replacement, name)
    return name


def find_slot(module: types.ModuleType, config: Any, name: str) -> Slot | None:
    """Returns the slot of a tensor by its name, of any generation of names; None if no row matches."""
    name = canonical(module, name)
    slots = []
    for template, path, axes in module.hf_table(config):
        match = re.fullmatch(re.escape(template).replace(r"\{i\}", r"(0|[1-9]\d{0,8})"), name)
        if match:
            stacked = "{i}" in template and "{i}" not in path
            layer = int(match.group(1)) if stacked else None
            slots.append(Slot(path.replace("{i}", *match.groups() or ("",)), layer, axes))
    if len(slots) > 1:
        raise ValueError(f"{name} matches {len(slots)} rows of the conversion table.")
    return slots[0] if slots else None


def tensor_names(module: types.ModuleType, config: Any, shapes: Mapping[str, Any]) -> dict[str, Slot]:
    """Returns the name and slot of every tensor that a checkpoint of this model has, from the shapes of its parameters.

    If two rows have the same slot (tied embeddings), the name of the first is written and both are read.
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


def _zeros(settings: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The fields of config.json that are the whole number 0, without those of tokens."""
    names = [
        f"{prefix}{name}" for name, x in settings.items() if type(x) is int and x == 0 and not name.endswith("_id")
    ]
    return names + [zero for name, x in settings.items() if isinstance(x, dict) for zero in _zeros(x, f"{name}.")]


def read_config(folder: Folder) -> tuple[types.ModuleType, Any]:
    """Reads the model module and the transformers configuration of a folder.

    `tie_word_embeddings` of the configuration is False if the weights have another head than the embeddings, whatever
    config.json says, as in transformers 5.

    Raises:
        UserError: config.json is missing or cannot be read, its model type or a field is not supported, or the folder
            has quantized weights or a PEFT adapter.
    """
    from transformers import AutoConfig

    folder = pathlib.Path(folder)
    path = folder / CONFIG
    hub.check_not_adapter(folder)
    if not os.path.lexists(path):
        if (snapshots := folder / "snapshots").is_dir():
            raise UserError(f"{folder} is a folder of the hub's cache. Give a model folder in {snapshots}.")
        raise UserError(f"{folder} has no config.json. Give a Hugging Face model folder.")
    settings = json_files.read_json(path)
    if settings.keys() & ORIGINAL_LLAVA_FIELDS:
        raise UserError(f"{folder} is in LLaVA's original format. {CONVERT_ORIGINAL_LLAVA}")
    if "model_type" not in settings and (folder / "records.json").is_file():
        raise UserError(
            f"{folder} is the --workdir of a run. Give a model folder in it, such as {folder / 'unlearned'}."
        )
    if "model_type" not in settings:
        raise UserError(f"{path} is not a Hugging Face model configuration: it has no model_type.")
    sections = [value for value in (settings, *settings.values()) if isinstance(value, dict)]
    if quantization := next(filter(None, (section.get("quantization_config") for section in sections)), None):
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else "unknown"
        raise UserError(
            f"{path} has a quantization_config (quant_method {method!r}): quantized weights are not supported. Give "
            "the model that was quantized; --config.model.quantize=int8 quantizes its weights while they are loaded."
        )
    module = models.module_for(settings["model_type"])
    try:
        hf_config = AutoConfig.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # transformers raises many types of errors here
        problem = " ".join(str(error).split()).rstrip(".")[:200]
        if isinstance(error, ZeroDivisionError) and (zeros := _zeros(settings)):
            problem += f" (0 is the value of {listed(zeros)})"
        raise UserError(f"{path} cannot be read by transformers: {problem}; get the file again.") from error
    base.check_constants(hf_config)
    try:
        config = module.Config.from_hf(hf_config)
    except UserError:
        raise
    except Exception as error:  # fields of other types than the ones that a family expects raise many types of errors
        problem = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UserError(
            f"{path} has fields of the wrong type or form ({problem}); correct it or get it again."
        ) from error
    base.check_special_tokens(hf_config)
    if hf_config.tie_word_embeddings and _has_other_head(folder, module, config):
        message = "%s ties the output head to the embeddings, but the weights have another head, which is kept."
        logging.log_first_n(logging.WARNING, message, 1, path)
        hf_config.tie_word_embeddings = False
    return module, hf_config


def _has_other_head(folder: pathlib.Path, module: types.ModuleType, config: Any) -> bool:
    """Whether the weights of a tied model have a head with other values than the embeddings."""
    if not any((folder / name).exists() for name in (safetensors_files.WEIGHTS, safetensors_files.INDEX)):
        return False  # a configuration alone, to plan a run
    names = {name for name, path, _ in module.hf_table(config) if path == "language_model/embed/embedding"}
    tensors = [x for name, x in Checkpoint(folder).tensors.items() if canonical(module, name) in names]
    matrices = [x for x in tensors if len(x.shape) == 2]
    return len(tensors) == len(matrices) == 2 and not safetensors_files.equal(*matrices)


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

    Each file is read once, for any sharding. A host holds its devices' shards of one parameter at a time (on CPU that
    memory becomes the parameter), and a few rows of a tensor.

    Args:
        folder: folder with config.json and single-file or indexed safetensors.
        dtype: dtype of the parameters, and of the computation unless `changes` contains `compute_dtype`. None keeps
            the dtypes on disk and in config.json.
        sharding: function of (path, shape) to the sharding of a parameter; None for the default device.
        masters: function of (paths, configuration) to the parameters to read in float32, whatever `dtype` is. If
            trainable weights were rounded, an export would change weights that training never changed.
        transform: function of (path, parameter) to a replacement, such as the quantized parameter. It is called as
            soon as a parameter is read, before the next one.
        **changes: fields of the model's configuration to override, such as `remat="full"` or
            `compute_dtype="float32"`.

    Returns:
        (graphdef, parameters, configuration).

    Raises:
        UserError: the folder cannot be read, or its tensors are not those of the model; all such tensors are listed.
        NotFinite: a weight is NaN or infinite, on disk or in the dtype of the parameters.
    """
    module, hf_config = read_config(folder)
    if dtype is not None:
        changes = {"compute_dtype": base.check_dtype(dtype)} | changes
    config = module.Config.from_hf(hf_config, **changes)
    checkpoint = Checkpoint(folder)
    graphdef, shapes = abstract_model(module.Model, config)
    sources = match_tensors(module, config, checkpoint, shapes)
    _check_signal(config, sources, dtype)
    progress = ProgressLog(folder, sum(tensor.stop - tensor.start for parts in sources.values() for _, tensor in parts))
    master_paths = set(masters(list(shapes), config)) if masters else set()
    bad: list[Tensor] = []

    def dtype_of(path: str) -> np.dtype:
        return jnp.dtype(jnp.float32 if path in master_paths else dtype or sources[path][0][1].dtype)

    _check_memory(folder, {path: (x.shape, dtype_of(path)) for path, x in shapes.items()}, sharding, bool(transform))

    def read(path: str) -> Any:
        shape = shapes[path].shape
        place = sharding and sharding(path, shape)
        param, nonfinite = _read_param(sources[path], shape, dtype_of(path), place, progress)
        bad.extend(nonfinite)
        # Without waiting, copies to the devices would accumulate in the memory of this host.
        return jax.block_until_ready(param if transform is None else transform(path, param))

    params = {path: read(path) for path in shapes}
    multihost.raise_in_all(_nonfinite_error(bad))  # not earlier, because a host reads its own shards only
    return graphdef, params, config


def _check_signal(config: Any, sources: Mapping[str, Sequence[tuple[Slot, Tensor]]], dtype: str | None) -> None:
    """Checks that no matrix is zero, on disk or in `dtype`, and the weights that every text or image passes through.

    The latter are outside of the residual blocks. Without a signal in one of them no answer depends on its input, which
    looks like forgetting.

    Raises:
        UserError: one of them is zero, or, outside of the blocks, the same in all rows.
    """
    zero = -1.0 if config.text.zero_centered_norms else 0.0  # of an RMSNorm
    texts = {
        "language_model/embed/embedding": 0.0,
        "language_model/head/kernel": 0.0,
        "language_model/norm/scale": zero,
    }
    norms = {"projector/norm/scale": zero, "vision_tower/pre_norm/scale": 0.0}
    norms |= {"vision_tower/post_norm/scale": 0.0} if config.uses_post_norm else {}
    kernels = [path for path in sources if re.fullmatch(r"projector/\w+/kernel", path)]
    images = norms | dict.fromkeys((*kernels, "vision_tower/patch_embedding"), 0.0)
    for what, paths in (("a text", texts), ("an image", images)):
        for path in paths.keys() & sources.keys():
            [(_, tensor)] = sources[path]
            if safetensors_files.is_constant(tensor, paths[path]):
                raise UserError(
                    f"{tensor.file}: {tensor.name} is zero, or the same in all rows, so that no answer depends on "
                    f"{what}; use another copy of the model."
                )
    # Embeddings of positions and classes may be zero.
    matrices = [x for path, parts in sources.items() if path.endswith(("/kernel", "/embedding")) for _, x in parts]
    scales = [x for path, parts in sources.items() if re.match("language_model/.*/scale$", path) for _, x in parts]
    least = max(safetensors_files.VANISHING, float(jnp.finfo(dtype or "float32").smallest_subnormal) / 2)
    zeros = [x for x in matrices if safetensors_files.is_zero(x, least=least)]
    if zeros := [*zeros, *(x for x in scales if safetensors_files.is_zero(x, zero))]:
        raise UserError(
            f"{zeros[0].file}: {listed([x.name for x in zeros])} {'is' if len(zeros) == 1 else 'are'} zero throughout"
            f"{f' in {dtype}' if dtype else ''}, as in a copy that was cut or converted wrongly; use another copy of "
            "the model, or a larger dtype if the file is right."
        )


def _check_memory(
    folder: Folder, params: Mapping[str, tuple[tuple[int, ...], np.dtype]], sharding: Sharding | None, quantizes: bool
) -> None:
    """Checks that the weights fit in the memory of this process's devices; quantized ones have 4 bits or more."""
    needed, devices = 0, {jax.devices()[0]}
    for path, (shape, dtype) in params.items():
        size, copies = math.prod(shape), 1
        if sharding is not None:
            place = sharding(path, shape)
            devices, copies = place.device_set, len(place.addressable_devices)
            size = math.prod(place.shard_shape(shape))
        needed += copies * (size // 2 if quantizes else size * dtype.itemsize)
    remedy = "use a smaller dtype, config.model.quantize, or more devices"
    memory.check(needed, memory.device_bytes(devices), f"the weights of {folder}", remedy)


def _nonfinite_error(tensors: Sequence[Tensor]) -> UserError | None:
    """The error about tensors with NaN or infinity; None if there are no such tensors."""
    if not tensors:
        return None
    names = listed([tensor.name for tensor in tensors])
    return NotFinite(
        f"{tensors[0].file}: NaN or infinity in {names}. A model whose training diverged, or a damaged copy, gives no "
        "meaningful answers. Use another copy, or, if the file is right, a larger dtype."
    )


def match_tensors(
    module: types.ModuleType, config: Any, checkpoint: Checkpoint, shapes: Mapping[str, Any]
) -> dict[str, list[tuple[Slot, Tensor]]]:
    """Matches the tensors of a checkpoint with the parameters of a model.

    Returns:
        {path: [(slot, tensor), ...]}, with the tensors of stacked parameters in the order of layers.

    Raises:
        UserError: lists every tensor that is unknown, duplicate, missing, or of the wrong shape; of more than
            `MOST_UNKNOWN` unknown ones, the first.
    """
    expected = tensor_names(module, config, shapes)
    slots, matched = set(expected.values()), dict[str, Tensor]()
    problems, unknown = [], []
    for name, tensor in checkpoint.tensors.items():
        if len(unknown) > MOST_UNKNOWN:
            break
        slot, canonical_name = find_slot(module, config, name), canonical(module, name)
        if slot is None:
            if not any(re.fullmatch(pattern, canonical_name) for pattern in module.HF_SKIP):
                unknown.append(f"unknown tensor {name}")
        elif slot not in slots:
            unknown.append(f"unknown tensor {name} (the configuration has fewer layers)")
        elif canonical_name in matched:
            problems.append(f"{name} occurs a second time under another name")
        elif canonical_name in expected:
            matched[canonical_name] = tensor
            if not jnp.issubdtype(tensor.dtype, jnp.floating):
                problems.append(f"{name} has dtype {tensor.dtype} instead of a floating-point dtype")
            shape = shapes[slot.path].shape[0 if slot.layer is None else 1 :]
            expected_shape = tuple(shape[i] for i in np.argsort(slot.axes or range(len(shape))))
            if tensor.shape != expected_shape:
                problems.append(f"{name} has shape {tensor.shape} instead of {expected_shape}")
    problems = [*unknown, *problems, *(f"missing tensor {name}" for name in expected if name not in matched)]
    for pattern, (family, remedy) in ORIGINAL_TENSORS.items():
        if any(re.match(pattern, name) for name in checkpoint.tensors):
            raise UserError(f"The tensors in {checkpoint.folder} have {family}'s original names. {remedy}")
    if problems:
        cut = len(unknown) > MOST_UNKNOWN
        found = messages.listed(unknown[:3] if cut else problems, "; ")
        found += f" and others, more than {MOST_UNKNOWN:,} in all" * cut
        raise UserError(f"The weights in {checkpoint.folder} do not match its config.json: {found}.")
    sources: dict[str, list[tuple[Slot, Tensor]]] = {}
    for name, slot in expected.items():
        sources.setdefault(slot.path, []).append((slot, matched[name]))
    return sources


def _read_param(
    sources: list[tuple[Slot, Tensor]],
    shape: tuple[int, ...],
    dtype: np.dtype,
    sharding: jax.sharding.Sharding | None,
    progress: Callable[[int], None],
) -> tuple[jax.Array, list[Tensor]]:
    """Reads one parameter from its tensors; `sources` has one entry, or one per layer.

    Returns:
        The parameter, and the tensors that have NaN or infinity in the shards of this process.
    """

    def span_of(index: tuple[slice, ...]) -> tuple[tuple[int, int], ...]:
        return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))

    whole = (slice(None),) * len(shape)
    indices = [whole] if sharding is None else sharding.addressable_devices_indices_map(shape).values()
    # Devices with the same part of the parameter share one buffer, which is read once.
    buffers = {span: _aligned([stop - start for start, stop in span], dtype) for span in set(map(span_of, indices))}
    nonfinite = []
    for slot, tensor in sources:
        targets = [target for span, buffer in buffers.items() for target in slot.overlaps(span, buffer)]
        if not tensor.copy_to(targets, progress):
            nonfinite.append(tensor)
    if sharding is None:
        return jnp.asarray(buffers[span_of(whole)]), nonfinite
    return jax.make_array_from_callback(shape, sharding, lambda index: buffers[span_of(index)]), nonfinite


def _aligned(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """Returns an empty array aligned to 64 bytes, which a CPU device uses without a copy."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)


def init_params(config: Any, seed: int, dtype: Any = jnp.float32) -> tuple[nnx.GraphDef, base.Params]:
    """Draws random initial parameters of a model configuration; one seed gives the same parameters again."""
    module = family_of(config)
    graphdef, shapes = abstract_model(module.Model, config, dtype)
    needed = sum(math.prod(x.shape) for x in shapes.values()) * jnp.dtype(dtype).itemsize
    memory.check(needed, memory.device_bytes([jax.devices()[0]]), "the weights to create", "use smaller sizes")
    # Without jit, because to compile one program for all weights takes longer than to draw them one by one.
    model = module.Model(config, rngs=nnx.Rngs(seed), param_dtype=dtype)
    return graphdef, base.split_model(model)[1]


def abstract_model(
    model: type[base.VisionLanguageModel], config: Any, dtype: Any = jnp.float32
) -> tuple[nnx.GraphDef, dict[str, jax.ShapeDtypeStruct]]:
    """Returns the graph of a model and {path: shape of the parameter} without computing any parameter.

    The results of the last calls are kept: to trace a model takes as long as to load a small one.

    Args:
        model: the class of the model.
        config: its configuration.
        dtype: dtype of the parameters.
    """
    graphdef, shapes = _abstract_model(model, config, jnp.dtype(dtype))
    return graphdef, dict(shapes)


@functools.lru_cache(maxsize=8)
def _abstract_model(
    model: type[base.VisionLanguageModel], config: Any, dtype: np.dtype
) -> tuple[nnx.GraphDef, dict[str, jax.ShapeDtypeStruct]]:
    return base.abstract_model(lambda rngs: model(config, rngs=rngs, param_dtype=dtype))


def family_of(config: Any) -> types.ModuleType:
    """Returns the model module that the configuration belongs to: if one extends another, the extension."""
    modules = [models.module_for(model_type) for model_type in models.MODELS]
    for cls in type(config).__mro__:
        for module in modules:
            if module.Config is cls:
                return module
    raise TypeError(f"{type(config).__name__} is not the configuration of a model family.")
