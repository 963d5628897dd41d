"""A training step whose arrays are shapes with shardings, so that it can be compiled without a chip.

It follows what a run does, from the config to `loop.fit`: weights as `ModelBundle.load_for` loads them, batches as
`data.encoding` makes them, and caches as the method declares them (`Method.cache_spec`, from the taps of an abstract
forward pass). Only config.json is read.
"""

import copy
import dataclasses
import functools
import types
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import ShapeDtypeStruct as Shape

from vkd_jax import messages, models, registry
from vkd_jax.checkpoints import hf, sources
from vkd_jax.checkpoints.bundle import ModelBundle
from vkd_jax.config.schema import RunConfig
from vkd_jax.data.encoding import Batch
from vkd_jax.methods import null_space, replay
from vkd_jax.methods.scope import Scope, frozen_blocks
from vkd_jax.methods.text_stream import TEXT_STREAMS
from vkd_jax.models import base
from vkd_jax.runtime import hub, storage
from vkd_jax.runtime.mesh import batch_sharding, replicated, shards
from vkd_jax.training import optimizer
from vkd_jax.training.step import TrainState, abstract_state, make_step
from vkd_jax.types import Params, UserError


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Lengths of the questions, since the data is not read."""

    text: int = 128  # tokens of a row that are not image tokens, including the answer
    answer: int = 64  # tokens of the answer
    row: str = "a row"  # the longest one, for messages

    def __post_init__(self):
        if not 1 <= self.answer <= self.text:
            raise UserError(
                f"--answer_tokens={self.answer}, --text_tokens={self.text}: the answer is part of the text, and has at "
                "least one token."
            )


@dataclasses.dataclass(frozen=True)
class AbstractStep:
    """A training step and the shapes that it is compiled for."""

    method: Scope
    model_config: Any
    mesh: jax.sharding.Mesh
    step: Any  # of `make_step`
    state: TrainState
    frozen: Params
    original: Params  # the trainable weights as loaded
    mask: Params | None
    batches: Mapping[str, Batch]
    start: Params | None
    projections: Params | None  # of updates, into the null space

    @property
    def shapes(self) -> dict[str, Any]:
        """Shapes of all parameters."""
        return {**self.frozen, **self.state.params}

    @property
    def inputs(self) -> tuple[Any, ...]:
        """The arguments of the step."""
        everywhere = replicated(self.mesh)
        key = jax.eval_shape(lambda: jax.random.key(0))
        rate, key = (Shape(x.shape, x.dtype, sharding=everywhere) for x in (Shape((), jnp.float32), key))
        return self.state, self.frozen, self.mask, self.batches, self.start, rate, key, self.projections

    @functools.cached_property
    def traced(self) -> jax.stages.Traced:
        """The step as `loop.fit` jits it, traced."""
        shardings = jax.tree.map(lambda x: x.sharding, self.state)
        return jax.jit(self.step, donate_argnums=0, out_shardings=(shardings, None)).trace(*self.inputs)

    @property
    def from_batch(self) -> list[bool]:
        """For each input of the traced step, whether it is part of a batch."""
        batches = {id(x) for x in jax.tree.leaves(self.batches)}
        return [id(x) in batches for x in jax.tree.leaves(self.inputs)]


def build(
    config: RunConfig,
    mesh: jax.sharding.Mesh,
    lengths: Lengths,
    method: Scope | None = None,
    quantized: bool = True,
) -> AbstractStep:
    """Builds the training step that a config describes.

    Args:
        config: The config of a run.
        mesh: The mesh; its devices need not exist.
        lengths: The lengths of the questions.
        method: A method to plan instead of the config's.
        quantized: Whether model.quantize holds; False for a method that trains all weights.

    Raises:
        UserError: The model is unknown, a batch does not divide over the mesh, or the method trains nothing.
    """
    method = method or config.method
    losses = method.losses()
    if not losses:
        name = registry.name_of(registry.METHODS, method)
        raise UserError(f"method {name} trains nothing, so it has no step to plan.")
    family, hf_config = read_model(config.model.path or config.model.base)
    bundle = ModelBundle.abstract_for(
        method,
        family,
        hf_config,
        dtype=config.model.dtype,
        mesh=mesh,
        quantization=config.model.quantize if quantized else "",
        remat=config.model.remat,
    )
    graphdef, params, model_config = bundle.graphdef, bundle.params, bundle.config
    method.check_model(params, model_config)
    paths = set(method.trainable(params, model_config))
    trainable = {path: Shape(x.shape, jnp.float32, sharding=x.sharding) for path, x in params.items() if path in paths}
    frozen = {path: x for path, x in params.items() if path not in paths}
    adversary = method.adversary(params, model_config)
    moving = paths | set(adversary.paths if adversary else ())
    batches = {
        name: batch(name, config, mesh, lengths, method, graphdef, params, model_config, moving) for name in losses
    }
    tx, teachers = optimizer.create(config.train), method.teachers()
    masked = method.mask_scope != "none"
    return AbstractStep(
        method=method,
        model_config=model_config,
        mesh=mesh,
        step=make_step(graphdef, losses, tx, method.mask_scope, teachers, config.train.microbatches, adversary),
        state=abstract_state(tx, trainable, mesh),
        frozen=frozen,
        original={path: params[path] for path in trainable},
        mask=_mask(method, trainable, model_config, mesh) if masked else None,
        batches=batches,
        start={path: params[path] for path in trainable} if teachers else None,
        projections=null_space.projection_shapes(params, paths) if method.null_space.energy else None,
    )


def _mask(
    method: Scope, trainable: Params, model_config: Any, mesh: jax.sharding.Mesh
) -> dict[str, jax.ShapeDtypeStruct]:
    shapes = {path: method.mask_shape(path, x.shape, model_config) for path, x in trainable.items()}
    everywhere = replicated(mesh)
    return {
        path: Shape(shapes[path], bool, sharding=x.sharding if shapes[path] == x.shape else everywhere)
        for path, x in trainable.items()
    }


def read_model(name: str) -> tuple[types.ModuleType, Any]:
    """Returns the family and transformers configuration of a published model or a folder; reads only config.json."""
    from transformers import AutoConfig

    if not name:
        raise UserError("config.model.path and config.model.base are empty: pass the model to plan for.")
    if "://" not in name and (folder := storage.resolve(name)).is_dir():
        return hf.read_config(folder)
    for family in models.MODELS:
        for published, fields in models.module_for(family).PRESETS.values():
            if name == published:
                fields = copy.deepcopy(fields)  # transformers changes the dicts in it
                return models.module_for(family), AutoConfig.for_model(family, **fields)
    if hub.is_id(name):
        known = [row[0] for family in models.MODELS for row in models.module_for(family).PRESETS.values()]
        raise UserError(
            f"the planner knows no sizes of {name}; pass a model folder, or one of {messages.choices(known)}."
        )
    return hf.read_config(sources.fetch_model(name))


def batch(
    stream: str,
    config: RunConfig,
    mesh: jax.sharding.Mesh,
    lengths: Lengths,
    method: Scope,
    graphdef: Any,
    params: Mapping[str, Any],
    model_config: Any,
    moving: Collection[str],
) -> Batch:
    """Returns the shapes of a stream's batch, with one image a question, and of what the method caches for it.

    The streams of text have no images.
    """
    rows, sharding = config.train.rows(stream, shards(mesh)), batch_sharding(mesh)
    if stream in TEXT_STREAMS:
        kinds = _token_kinds(lengths.text, lengths.answer)
        arrays = {name: Shape((rows, length), kind, sharding=sharding) for name, (length, kind) in kinds.items()}
        entries = method.cache_spec(stream, {}, model_config).per_example
        cached = {name: Shape((rows, *x.shape), x.dtype, sharding=sharding) for name, x in entries.items()}
        return Batch(**arrays, images=None, cached=cached)
    size = image_size(config, model_config)
    packed = model_config.pack([[np.broadcast_to(np.float32(0), (*size, 3))]])
    pictures = {name: Shape((rows, *x.shape[1:]), x.dtype, sharding=sharding) for name, x in packed.items()}
    _, taps = jax.eval_shape(lambda params, pictures: base.bind(graphdef, params).encode(pictures), params, pictures)
    t, a = model_config.image_tokens(*size) + lengths.text, lengths.answer
    if t > model_config.text.max_positions:
        limit = model_config.text.max_positions
        raise UserError(f"{lengths.row} of {t} tokens is longer than the model's {limit}; shorten its texts.")
    replayed = stream == replay.STREAM
    spec = replay.cache_spec(taps) if replayed else method.cache_spec(stream, taps, model_config)
    entries = {**spec.per_image, **spec.per_example}
    cached = {name: Shape((rows, *x.shape), x.dtype) for name, x in entries.items()}
    if prefix := frozen_blocks(moving, model_config):
        cached |= {name: taps[name].values for name in model_config.taps_before(prefix)}
    return Batch(
        **{name: Shape((rows, size), kind, sharding=sharding) for name, (size, kind) in _token_kinds(t, a).items()},
        images=pictures,
        cached={name: Shape(x.shape, x.dtype, sharding=sharding) for name, x in cached.items()},
    )


def _token_kinds(t: int, a: int) -> dict[str, tuple[int, Any]]:
    """Length and dtype of the token arrays of a batch, for rows of t tokens with a answer tokens."""
    return dict(
        tokens=(t, jnp.int32),
        mask=(t, bool),
        target_positions=(a, jnp.int32),
        targets=(a, jnp.int32),
        target_mask=(a, bool),
    )


def image_size(config: RunConfig, model_config: Any) -> tuple[int, int]:
    """Returns the height and width of an image in pixels: the model's own, or the largest that the config allows."""
    if model_config.image_step is None:
        return (model_config.vision.image_size,) * 2
    if not config.model.max_pixels:
        raise UserError("config.model.max_pixels: images differ in size, so set their maximum, such as 200704.")
    return model_config.largest_image(config.model.max_pixels)
