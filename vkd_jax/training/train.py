"""The jitted step and the loop around it, for every method and every stage that trains."""

import dataclasses
import functools
import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from absl import logging

from vkd_jax.checkpoints.checkpoint import Checkpoints
from vkd_jax.data.pictures import HELD_BYTES
from vkd_jax.data.processing import Batch, EncodedSet
from vkd_jax.data.streams import Stream
from vkd_jax.methods import base
from vkd_jax.methods.base import LossFn, Method, Prepared, TeacherFn
from vkd_jax.methods.scope import frozen_blocks
from vkd_jax.models.base import bind
from vkd_jax.runtime import multihost
from vkd_jax.runtime.mesh import replicated, shard_rows
from vkd_jax.training import optim
from vkd_jax.types import Params, UserError


class Stopped(Exception):
    """SIGTERM arrived, here or at another host.

    The state of `step` is on disk if it is `saved`, and the same command goes on from there.
    """

    def __init__(self, step: int, saved: bool):
        where = "which is saved" if saved else "where nothing is saved"
        super().__init__(f"stopped at step {step}, {where}; run the same command again to go on")


class Diverged(Exception):
    """A term of the loss is NaN or infinite."""


@functools.partial(jax.tree_util.register_dataclass, data_fields=["params", "opt_state", "step"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What training changes: all of it is donated to each step, and all of it is checkpointed."""

    params: Params  # the trainable weights alone
    opt_state: optax.OptState
    step: jax.Array  # scalar int32


def make_step(
    graphdef: Any,
    losses: Mapping[str, LossFn],
    tx: optax.GradientTransformationExtraArgs,
    mask_scope: str,
    teacher: Mapping[str, TeacherFn] = {},  # noqa: B006 (never written to)
    microbatches: int = 1,
):
    """One update: (state, frozen, mask, batches, start, rate, key) -> (state, metrics).

    Each stream's gradient is taken apart, so that a mask can cover the forget stream alone; they add up before the
    optimizer. Frozen weights are an argument that is neither differentiated nor donated, as is `start`: the trainable
    weights before the first step, for the teacher of the streams that have one. `rate` is the learning rate. Dropout,
    where the model has any, is a function of the key, the step, the stream and the microbatch.

    A batch is computed in `microbatches` parts of equally many rows, one after another, so that the activations of one
    part alone are held: the loss is the mean over rows, so the mean of the parts' gradients is that of the batch.
    """

    def gradient(params: Params, name: str, batch: Batch, frozen: Params, start: Params | None, key: jax.Array | None):
        if name in teacher:
            said = teacher[name](bind(graphdef, {**frozen, **start}), batch)
            batch = dataclasses.replace(batch, cached={**batch.cached, **said})

        def loss(params):
            return losses[name](bind(graphdef, {**frozen, **params}, key), batch)

        (value, more), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return grads, {f"{name}_loss": value, **more}

    def step(
        state: TrainState,
        frozen: Params,
        mask: Params | None,
        batches: Mapping[str, Batch],
        start: Params | None = None,
        rate: jax.Array | float = 1.0,
        key: jax.Array | None = None,
    ):
        total, metrics = None, {}
        for number, name in enumerate(losses):
            own = None if key is None else jax.random.fold_in(jax.random.fold_in(key, state.step), number)
            part = functools.partial(gradient, state.params, name, frozen=frozen, start=start)
            # One stream after the other: else a compiler may begin the second while it holds the first's activations.
            batch, total = jax.lax.optimization_barrier((batches[name], total))
            if microbatches == 1:
                grads, more = part(batch, key=own)
            else:
                grads, more = _mean_of_parts(part, batch, own, microbatches)
            metrics |= more
            if mask is not None and name == "forget" and mask_scope == "forget":
                grads = optim.apply_mask(grads, mask)
            total = grads if total is None else jax.tree.map(jnp.add, total, grads)
        metrics["loss"] = sum(metrics[f"{name}_loss"] for name in losses)
        metrics["grad_norm"] = optax.tree.norm(total)
        updates, opt_state = tx.update(
            total, state.opt_state, state.params, rate=rate, mask=mask if mask_scope == "both" else None
        )
        return TrainState(optax.apply_updates(state.params, updates), opt_state, state.step + 1), metrics

    return step


def _mean_of_parts(part: Callable, batch: Batch, key: jax.Array | None, count: int) -> Any:
    """The mean of `part(rows, key=...)` over `count` parts of a batch, one after another."""

    def cut(x: jax.Array) -> jax.Array:
        # Each part takes rows of every device: the first axis stays on the devices that it lies on.
        return x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1)

    def add(total: Any, numbered: tuple[jax.Array, Batch]) -> tuple[Any, None]:
        number, rows = numbered
        found = part(rows, key=None if key is None else jax.random.fold_in(key, number))
        return jax.tree.map(lambda a, b: a + b / count, total, found), None

    parts = jax.tree.map(cut, batch)
    shapes = jax.eval_shape(lambda rows: part(rows, key=key), jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.scan(add, zeros, (jnp.arange(count), parts))[0]


@functools.lru_cache(maxsize=4)
def _program(
    graphdef: Any,
    method: Method,
    streams: tuple[str, ...],
    teacher: tuple[tuple[str, TeacherFn], ...],
    config: ml_collections.FrozenConfigDict,
) -> tuple[optax.GradientTransformationExtraArgs, Callable]:
    """The optimizer and the step: the same objects for fits that are alike.

    JAX traces and compiles a function once for arguments of one kind, and knows it by its identity. So the second of
    two fits that are alike, such as two attacks on one architecture, begins at once.
    """
    tx = optim.create(config)
    losses = {name: loss for name, loss in method.losses().items() if name in streams}
    return tx, make_step(graphdef, losses, tx, method.mask_scope, dict(teacher), config.microbatches)


def fit(
    *,
    graphdef: Any,
    params: Params,
    model_config: Any,
    method: Method,
    prepared: Prepared,
    config: ml_collections.ConfigDict,
    seed: int,
    mesh: jax.sharding.Mesh,
    folder: Path | None,
) -> Params:
    """Trains, from the newest checkpoint in `folder` if there is one, and returns the trained weights alone.

    Fits that are alike in graphdef, method, optimizer and shapes are traced and compiled once a process, and, as far as
    the method's hyperparameters are, found in JAX's compilation cache by others, whatever their seed and learning rate.

    Args:
        graphdef: of the model, with `params`, all its weights, which are left as they are.
        model_config: of the family.
        method: what trains and by which losses; `prepared`, what it computed beforehand. A stream without a set is
            left out.
        config: steps or epochs, batch_size per stream, log_every, checkpoint_every, and what `optim.create` reads.
        seed: of the data order and of dropout.
        mesh: the devices.
        folder: for checkpoints and metrics; None keeps none, for a short training that may as well begin again.

    Raises:
        Stopped: on SIGTERM, with the state saved if there is a folder.
        Diverged: a term of the loss is not finite.
    """
    paths = method.trainable(params, model_config)
    if not paths:
        raise UserError("the method trains no weight of this model: see its fields `train` and `blocks`.")
    # In float32, since steps are smaller than what bfloat16 can add; and copied, since it is donated.
    trainable = {path: jnp.array(params[path], jnp.float32) for path in paths}
    frozen = {path: value for path, value in params.items() if path not in trainable}
    names = tuple(name for name in method.losses() if name in prepared.sets)
    prefix = frozen_blocks(paths, model_config)
    sets = {name: cached_prefix(graphdef, params, prepared.sets[name], prefix) for name in names}
    sizes = {name: batch_size(config, name, mesh) for name in names}
    steps = count_steps(config, {name: len(rows) for name, rows in sets.items()})
    streams = {name: Stream(sets[name], sizes[name], seed=seed, name=name) for name in names}
    rates, key = optim.rates(config, steps), jax.random.key(seed)
    options = {name: config[name] for name in ("clip_norm", "b2", "weight_decay", "microbatches")}
    options = ml_collections.FrozenConfigDict(options)
    tx, step_fn = _program(graphdef, method, names, tuple(prepared.teacher.items()), options)
    state = _init(tx, trainable, mesh)
    state_shardings = jax.tree.map(lambda x: x.sharding, state)
    step_fn = jax.jit(step_fn, donate_argnums=0, out_shardings=(state_shardings, None))
    start = {path: params[path] for path in paths} if prepared.teacher else None
    put = functools.partial(shard_rows, mesh)

    checkpoints = progress = _Nothing()
    if folder is not None:
        checkpoints = Checkpoints(folder / "checkpoints", seed=seed, every=config.checkpoint_every)
        if multihost.is_process_0():
            from vkd_jax.training.progress import (
                Progress,  # TensorFlow takes seconds, and a short training keeps no metrics
            )

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
        with _Sigterm() as stop:
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

    Sets without pictures stay as they are, as do those whose activations would fill more memory than `HELD_BYTES`.
    """
    if not blocks or encoded.pictures is None:
        return encoded
    name = f"vision/{blocks - 1}"
    picture = encoded.pictures[np.arange(1)]
    one = jax.eval_shape(lambda params, rows: bind(graphdef, params).encode(rows)[1][name].values, params, picture)
    if one.size * one.dtype.itemsize * len(encoded.pictures) > HELD_BYTES:
        return encoded
    taps = base.teacher_taps(graphdef, params, encoded.pictures, [name])
    return dataclasses.replace(encoded, per_image={**encoded.per_image, name: taps[name].values})


def step_bytes(step: jax.stages.Compiled) -> int:
    """What a device holds while it computes a step: weights, optimizer, batches, and all that is in between."""
    memory = step.memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return held + memory.temp_size_in_bytes


class _Nothing:
    """Stands where checkpoints and progress would, and keeps nothing."""

    latest = None

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None


def _init(tx: optax.GradientTransformation, trainable: Params, mesh: jax.sharding.Mesh) -> TrainState:
    """A fresh state, born sharded: moments lie where their weights lie, counters everywhere."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(tx, trainable, mesh).opt_state)
    return TrainState(
        params=trainable,
        opt_state=jax.jit(tx.init, out_shardings=shardings)(trainable),
        step=jax.device_put(jnp.int32(0), replicated(mesh)),
    )


def abstract_state(tx: optax.GradientTransformation, trainable: Params, mesh: jax.sharding.Mesh) -> TrainState:
    """The shapes of a fresh state, and where they lie; of the trainable weights no more than that is needed."""
    everywhere = replicated(mesh)
    opt_state = optax.tree.map_params(
        tx,
        lambda x, weight: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=weight.sharding),
        jax.eval_shape(tx.init, trainable),
        trainable,
        transform_non_params=lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere),
    )
    return TrainState(trainable, opt_state, jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere))


def check(config: ml_collections.ConfigDict, names: Iterable[str], mesh: jax.sharding.Mesh, where: str) -> None:
    """Refuses settings that no training can have, before anything is read.

    Args:
        config: as of `fit`.
        names: of the streams.
        mesh: the devices.
        where: the name of the settings in the config of a run.

    Raises:
        UserError: which one it is, and what to give.
    """
    for name in names:
        batch_size(config, name, mesh, where)
    count_steps(config, {}, where)
    optim.check(config, where)


def batch_size(config: ml_collections.ConfigDict, name: str, mesh: jax.sharding.Mesh, where: str = "train") -> int:
    """Rows of a stream's batch, all hosts together.

    Raises:
        UserError: the config names none, or it does not divide over the devices.
    """
    if name not in config.batch_size:
        raise UserError(f"{where}.batch_size has no {name!r}, which the method needs; use a config made for it.")
    size, shards = config.batch_size[name], mesh.shape["data"] * mesh.shape["fsdp"]
    if config.microbatches < 1:
        raise UserError(f"{where}.microbatches={config.microbatches}: give at least 1.")
    if size < 1:
        raise UserError(f"{where}.batch_size.{name}={size}: give at least 1; a stream without questions is left out.")
    if size % (shards * config.microbatches):
        parts = f" in {config.microbatches} microbatches" if config.microbatches > 1 else ""
        raise UserError(
            f"{where}.batch_size.{name}={size} does not divide over {shards} devices{parts}; "
            f"use a multiple of {shards * config.microbatches}."
        )
    return size


def count_steps(config: ml_collections.ConfigDict, rows: Mapping[str, int], where: str = "train") -> int:
    """How many steps a run has: `config.steps`, or as many as take every stream through `config.epochs`.

    Raises:
        UserError: both are given, or neither.
    """
    by_steps, by_epochs = config.steps > 0 and config.epochs == 0, config.steps == 0 and 0 < config.epochs < math.inf
    if not (by_steps or by_epochs):
        raise UserError(
            f"{where}.steps={config.steps} and {where}.epochs={config.epochs}: give one of them, the other 0."
        )
    for name in ("log_every", "checkpoint_every"):
        if config[name] < 1:
            raise UserError(f"{where}.{name}={config[name]}: give at least 1.")
    epochs = (math.ceil(config.epochs * n / config.batch_size[name]) for name, n in rows.items())
    return config.steps or max(epochs, default=0)


def _check(step: int, metrics: Mapping[str, jax.Array], checkpoints: Checkpoints) -> None:
    bad = [name for name, value in metrics.items() if not math.isfinite(float(value))]
    if bad:
        checkpoints.wait()  # what is named below must be on disk
        good = "none was saved yet" if checkpoints.latest is None else f"step {checkpoints.latest}"
        raise Diverged(
            f"step {step}: {', '.join(bad)} is not finite; the last good checkpoint: {good}. "
            "Lower train.learning_rate or the forget weight, and use a new --workdir."
        )


class _Sigterm:
    """Hears SIGTERM while the block runs; outside the main thread there are no signals to hear.

    Of several processes one may hear it alone, and all must stop at one step. So each says at each step whether it did,
    and what all said is looked at a step later, when it has long arrived: nobody waits. (JAX's own preemption service
    would take SIGTERM from the rest of the program, too, and answers only once, be it Orbax or us who asked.)
    """

    def __enter__(self) -> Callable[..., bool]:
        self._event, self._asked = threading.Event(), None
        self._main = threading.current_thread() is threading.main_thread()
        if self._main:
            self._previous = signal.signal(signal.SIGTERM, lambda *_: self._event.set())
        return self._heard

    def _heard(self, now: bool = False) -> bool:
        """Whether to stop after this step; `now` waits for what the others say, at the end."""
        if jax.process_count() == 1:
            return self._event.is_set()
        before, self._asked = self._asked, multihost.any_process(self._event.is_set())
        asked = self._asked if now else before
        return asked is not None and bool(asked)

    def __exit__(self, *_) -> None:
        if self._main:
            signal.signal(signal.SIGTERM, self._previous)
