"""The training loop, for every method and every stage that trains."""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging

from vkd_jax.checkpoints.bundle import ModelBundle
from vkd_jax.checkpoints.orbax_checkpoints import Checkpoints, NoCheckpoints
from vkd_jax.config.training import TrainConfig
from vkd_jax.data.encoding import EncodedSet
from vkd_jax.data.images import MAX_CACHED_BYTES
from vkd_jax.data.sampler import Sampler
from vkd_jax.methods import feature_targets
from vkd_jax.methods.base import Method, Prepared, TeacherFn
from vkd_jax.methods.scope import frozen_blocks
from vkd_jax.models.base import bind
from vkd_jax.runtime import multihost
from vkd_jax.runtime.mesh import shard_rows, shards
from vkd_jax.training import optimizer
from vkd_jax.training.preemption import Sigterm, Stopped
from vkd_jax.training.step import init_state, make_step
from vkd_jax.types import Params, UserError

# The fields of a `TrainConfig` that the compiled step depends on; batch sizes are shapes, and rates are arguments.
STEP_FIELDS = ("clip_norm", "b2", "weight_decay", "microbatches")


class Diverged(Exception):
    """A term of the loss is NaN or infinite."""


@functools.lru_cache(maxsize=4)
def _program(
    graphdef: Any,
    method: Method,
    streams: tuple[str, ...],
    teacher: tuple[tuple[str, TeacherFn], ...],
    config: TrainConfig,
) -> tuple[optax.GradientTransformationExtraArgs, Callable]:
    """The optimizer and the step: the same objects for fits that are alike.

    JAX traces and compiles a function once for arguments of one kind, and knows it by its identity. So the second of
    two fits that are alike, such as two attacks on one architecture, begins at once.
    """
    tx = optimizer.create(config)
    losses = {name: loss for name, loss in method.losses().items() if name in streams}
    return tx, make_step(graphdef, losses, tx, method.mask_scope, dict(teacher), config.microbatches)


def fit(
    bundle: ModelBundle,
    method: Method,
    prepared: Prepared,
    config: TrainConfig,
    *,
    seed: int,
    folder: Path | None,
) -> Params:
    """Trains, from the newest checkpoint in `folder` if there is one, and returns the trained weights alone.

    Fits that are alike in graphdef, method, optimizer and shapes are traced and compiled once a process, and, as far as
    the method's hyperparameters are, found in JAX's compilation cache by others, whatever their seed and learning rate.

    Args:
        bundle: the model, from `ModelBundle.load_for` or `prepare_for`; its weights stay as they are.
        method: what trains and by which losses.
        prepared: what the method computed beforehand; a stream without a set is left out.
        config: settings of the loop and of the optimizer, with a batch size for each stream.
        seed: of the data order and of dropout.
        folder: for checkpoints and metrics; None keeps none, for a short training that may as well begin again.

    Raises:
        Stopped: on SIGTERM, with the state saved if there is a folder.
        Diverged: a term of the loss is not finite.
    """
    graphdef, params, mesh = bundle.graphdef, bundle.params, bundle.mesh
    paths = method.trainable(params, bundle.config)
    if not paths:
        raise UserError("the method trains no weight of this model: see its fields `train` and `blocks`.")
    # In float32, since steps are smaller than what bfloat16 can add; and copied, since it is donated.
    trainable = {path: jnp.array(params[path], jnp.float32) for path in paths}
    frozen = {path: value for path, value in params.items() if path not in trainable}
    names = tuple(name for name in method.losses() if name in prepared.sets)
    prefix = frozen_blocks(paths, bundle.config)
    sets = {name: cached_prefix(graphdef, params, prepared.sets[name], prefix) for name in names}
    sizes = {name: config.rows(name, shards(mesh)) for name in names}
    steps = config.length({name: len(rows) for name, rows in sets.items()})
    streams = {name: Sampler(sets[name], sizes[name], seed=seed, name=name) for name in names}
    rates, key = optimizer.rates(config, steps), jax.random.key(seed)
    step_config = TrainConfig(**{name: getattr(config, name) for name in STEP_FIELDS})
    tx, step_fn = _program(graphdef, method, names, tuple(prepared.teachers.items()), step_config)
    state = init_state(tx, trainable, mesh)
    state_shardings = jax.tree.map(lambda x: x.sharding, state)
    step_fn = jax.jit(step_fn, donate_argnums=0, out_shardings=(state_shardings, None))
    start = {path: params[path] for path in paths} if prepared.teachers else None
    put = functools.partial(shard_rows, mesh)

    checkpoints, progress = NoCheckpoints(), NoProgress()
    if folder is not None:
        checkpoints = Checkpoints(folder / "checkpoints", seed=seed, every=config.checkpoint_every)
        if multihost.is_process_0():
            # Imported here because TensorFlow takes seconds to load, and a short training writes no metrics.
            from vkd_jax.training.metric_writer import Progress

            progress = Progress(folder, steps=steps, log_seconds=config.log_seconds)
    try:
        if checkpoints.latest is None:
            progress.overview(trainable)
            first = 0
        else:
            state = checkpoints.restore(state)
            first = int(state.step)
            logging.info("resumed at step %d of %d", first, steps)
        waiting, pending = 0.0, None
        started = time.perf_counter()
        iterators = {name: stream.batches(first, steps, put) for name, stream in streams.items()}
        with Sigterm() as stop:
            for step in range(first + 1, steps + 1):
                before = time.perf_counter()
                batches = {name: next(iterator) for name, iterator in iterators.items()}
                waiting += time.perf_counter() - before
                inputs = frozen, prepared.mask, batches, start, rates[step - 1], key
                state, metrics = step_fn(state, *inputs)
                if pending:  # one step behind, so that the device never waits for the host
                    _check(*pending, checkpoints)
                pending = (step, metrics)
                progress.tick(step)
                if step % config.log_every == 0 or step == steps:
                    _check(*pending, checkpoints)
                    seconds = time.perf_counter() - started
                    speed = {
                        "data_wait_share": waiting / seconds,
                        "examples_per_second": sum(sizes.values()) * (step - first) / seconds,
                        "step_bytes": step_bytes(step_fn.lower(state, *inputs).compile()),
                    }
                    progress.write(step, {k: float(v) for k, v in metrics.items()} | speed)
                stopping = stop()  # asked once: a signal between two askings would stop without a save
                last = stopping or step == steps
                if last or step % config.checkpoint_every == 0:
                    _check(*pending, checkpoints)
                    checkpoints.save(step, state, force=last)
                if stopping:
                    checkpoints.wait()
                    raise Stopped(step, saved=folder is not None)
            checkpoints.wait()
            if stop(now=True):  # heard too late for a step
                raise Stopped(steps, saved=folder is not None)
    finally:
        checkpoints.close()
        progress.close()
    return state.params


def cached_prefix(graphdef: Any, params: Params, encoded: EncodedSet, blocks: int) -> EncodedSet:
    """The set with the output of the first `blocks` vision blocks, none of which trains: computed once, not each step.

    Sets without images stay as they are, as do those whose activations would fill more than `MAX_CACHED_BYTES`.
    """
    if not blocks or encoded.images is None:
        return encoded
    name = f"vision/{blocks - 1}"
    picture = encoded.images[np.arange(1)]
    one = jax.eval_shape(lambda params, rows: bind(graphdef, params).encode(rows)[1][name].values, params, picture)
    if one.size * one.dtype.itemsize * len(encoded.images) > MAX_CACHED_BYTES:
        return encoded
    taps = feature_targets.record_taps(graphdef, params, encoded.images, [name])
    return dataclasses.replace(encoded, per_image={**encoded.per_image, name: taps[name].values})


def step_bytes(step: jax.stages.Compiled) -> int:
    """What a device holds while it computes a step: weights, optimizer, batches, and all that is in between."""
    memory = step.memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return held + memory.temp_size_in_bytes


class NoProgress:
    """Stands in for `metric_writer.Progress` where no metrics are written."""

    def overview(self, trainable: Params) -> None:
        """Does nothing."""

    def tick(self, step: int) -> None:
        """Does nothing."""

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""


def _check(step: int, metrics: Mapping[str, jax.Array], checkpoints: Checkpoints) -> None:
    bad = [name for name, value in metrics.items() if not math.isfinite(float(value))]
    if bad:
        checkpoints.wait()  # what is named below must be on disk
        good = "none was saved yet" if checkpoints.latest is None else f"step {checkpoints.latest}"
        raise Diverged(
            f"step {step}: {', '.join(bad)} is not finite; the last good checkpoint: {good}. "
            "Lower train.learning_rate or the forget weight, and use a new --workdir."
        )
