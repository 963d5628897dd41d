"""The training loop, for every method and every stage that trains."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging

from vkd_jax.checkpoints.bundle import ModelBundle
from vkd_jax.checkpoints.orbax_checkpoints import Checkpoints, NoCheckpoints
from vkd_jax.config.training import TrainConfig
from vkd_jax.data.encoding import Batch, EncodedSet
from vkd_jax.data.sampler import Sampler
from vkd_jax.messages import listed
from vkd_jax.methods import feature_targets, null_space
from vkd_jax.methods.base import Method, Metrics, Prepared
from vkd_jax.methods.scope import frozen_blocks
from vkd_jax.methods.worst_case import Adversary
from vkd_jax.models.base import bind
from vkd_jax.runtime import finite, memory, multihost
from vkd_jax.runtime.mesh import shard_rows, shards
from vkd_jax.training import optimizer
from vkd_jax.training.preemption import Stopped, StopSignals
from vkd_jax.training.step import TrainState, init_state, make_losses, make_step
from vkd_jax.types import Diverged, Params, UserError

if TYPE_CHECKING:
    from vkd_jax.training.metric_writer import Progress

# The fields of a `TrainConfig` that the compiled step depends on; batch sizes are shapes, and rates are arguments.
STEP_FIELDS = ("clip_norm", "b2", "weight_decay", "microbatches")


Observer = Callable[[Params], None]


@functools.lru_cache(maxsize=4)
def _program(
    graphdef: Any,
    method: Method,
    streams: tuple[str, ...],
    config: TrainConfig,
    adversary: Adversary | None,
) -> tuple[optax.GradientTransformationExtraArgs, Callable, Callable]:
    """Returns the optimizer, the step function and that of its losses: the same objects for equal arguments.

    JAX's cache of traced and compiled functions goes by the identity of the function, so the second of two equal fits,
    such as two attacks on one architecture, starts without compiling.
    """
    tx = optimizer.create(config)
    losses = {name: loss for name, loss in method.losses().items() if name in streams}
    teachers = {name: teacher for name, teacher in method.teachers().items() if name in streams}
    step = make_step(graphdef, losses, tx, method.mask_scope, teachers, config.microbatches, adversary)
    return tx, step, jax.jit(make_losses(graphdef, losses, teachers, config.microbatches))


def fit(
    bundle: ModelBundle,
    method: Method,
    prepared: Prepared,
    config: TrainConfig,
    *,
    seed: int,
    folder: Path | None,
    observers: Mapping[int, Observer] = {},  # noqa: B006 (never written to)
    teacher: Params | None = None,
    run: str = "",
) -> Params:
    """Trains a model, from the newest checkpoint in `folder` if one exists.

    Interrupted runs resume bit-identically. In one process the step is compiled once for all fits with equal graphdef,
    method, optimizer settings and shapes; other processes find it in JAX's compilation cache.

    Args:
        bundle: the model, from `ModelBundle.load_for` or `prepare_for`; its weights are not changed.
        method: determines the weights that train and the losses.
        prepared: what the method computed before training; a stream without a set does not train.
        config: settings of the loop and of the optimizer.
        seed: the seed of the data order and of dropout.
        folder: the folder for checkpoints and metrics; None writes neither.
        observers: called with the trained weights after these steps, once the weights are known to be finite. The
            weights are donated to the next step, so an observer keeps none of them.
        teacher: the weights of the method's teachers, whose frozen weights are those of the model; None for the
            weights before training.
        run: identity of the run, such as a digest of its config and inputs; checkpoints of another one are refused.

    Returns:
        The trained weights, without the frozen ones.

    Raises:
        UserError: the method trains no weight of this model, a batch or a step does not fit the mesh or the memory, or
            the checkpoints are of another run.
        Stopped: SIGTERM or SIGINT arrived; the state is saved if `folder` is given.
        Diverged: a metric or a weight is not finite, or a loss is not after the last update.

    Example:
        >>> trained = fit(bundle, method, method.prepare(context), config.train, seed=0, folder=Path("train"))
    """
    trainable, frozen = _split_weights(bundle, method)
    adversary = method.adversary(bundle.params, bundle.config)
    moving = {*trainable, *(adversary.paths if adversary else ())}
    sets = _cached_sets(bundle, method, prepared, moving)
    samplers = {k: Sampler(v, config.rows(k, shards(bundle.mesh)), seed=seed, name=k) for k, v in sets.items()}
    for sampler in samplers.values():
        sampler.check_memory(bundle.mesh)
    steps = config.length({name: len(encoded) for name, encoded in sets.items()})
    step_config = TrainConfig(**{name: getattr(config, name) for name in STEP_FIELDS})
    tx, step_fn, losses_fn = _program(bundle.graphdef, method, tuple(sets), step_config, adversary)
    state = init_state(tx, trainable, bundle.mesh)
    step = _Step(
        jax.jit(step_fn, donate_argnums=0, out_shardings=(jax.tree.map(lambda x: x.sharding, state), None)),
        frozen=frozen,
        mask=prepared.mask,
        start={path: (teacher or bundle.params)[path] for path in trainable} if method.teachers() else None,
        rates=optimizer.learning_rates(config, steps),
        key=jax.random.key(seed),
        losses_fn=losses_fn,
        projections=_projections(bundle, method, {**prepared.sets, **sets}, config, seed),
    )
    checkpoints, progress = _open_outputs(folder, config, steps=steps, seed=seed, run=run)
    with contextlib.closing(progress), contextlib.closing(checkpoints):
        state, first = _resume(checkpoints, state, steps)
        if not first:
            progress.overview(trainable)
        run = _Run(config, step, checkpoints, progress, saves=folder is not None, observers=observers)
        state = run.train(state, samplers, first, steps, functools.partial(shard_rows, bundle.mesh))
    return state.params


def _split_weights(bundle: ModelBundle, method: Method) -> tuple[Params, Params]:
    """Splits the weights into the trainable ones, copied in float32, and the frozen ones.

    The copies are donated to the first step. Updates are often smaller than the resolution of bfloat16.
    """
    paths = method.trainable(bundle.params, bundle.config)
    if not paths:
        raise UserError("The method trains no weight of this model. Check method.train and method.blocks.")
    trainable = {path: jnp.array(bundle.params[path], jnp.float32) for path in paths}
    return trainable, {path: value for path, value in bundle.params.items() if path not in trainable}


def _cached_sets(
    bundle: ModelBundle, method: Method, prepared: Prepared, moving: Iterable[str]
) -> dict[str, EncodedSet]:
    """Returns the set of each stream, with the cached output of the vision blocks before the `moving` weights."""
    blocks = frozen_blocks(moving, bundle.config)
    return {
        name: cache_prefix(bundle.graphdef, bundle.params, prepared.sets[name], blocks, method.cache_bytes)
        for name in method.losses()
        if name in prepared.sets
    }


def _projections(
    bundle: ModelBundle, method: Method, sets: Mapping[str, EncodedSet], config: TrainConfig, seed: int
) -> Params | None:
    """Returns the projections of the updates, or None if the method projects nothing."""
    if not method.null_space.energy:
        return None
    rows = config.rows("forget", shards(bundle.mesh)) // config.microbatches
    retained = {name: sets[name] for name in sets if name == "retain" or name in method.losses().keys() - {"forget"}}
    logging.info("null space: inputs of %s ...", listed(retained))
    return null_space.projections(
        bundle.graphdef,
        bundle.params,
        method.trainable(bundle.params, bundle.config),
        retained,
        method.null_space,
        batch_size=rows,
        seed=seed,
        put=functools.partial(shard_rows, bundle.mesh),
    )


def _open_outputs(
    folder: Path | None, config: TrainConfig, *, steps: int, seed: int, run: str
) -> tuple[Checkpoints | NoCheckpoints, Progress | NoProgress]:
    """Opens the checkpoints and the metrics in `folder`.

    Without a folder both are no-ops, and metrics are on processes other than the first.
    """
    if folder is None:
        return NoCheckpoints(), NoProgress()
    checkpoints = Checkpoints(folder / "checkpoints", seed=seed, every=config.checkpoint_every, run=run)
    if not multihost.is_process_0():
        return checkpoints, NoProgress()
    # Imported here because TensorFlow takes seconds to load, and a short training writes no metrics.
    from vkd_jax.training.metric_writer import Progress

    resumed, options = checkpoints.latest or 0, dict(every=config.log_every, log_seconds=config.log_seconds)
    return checkpoints, Progress(folder, steps=steps, resumed=resumed, trackers=config.tracker_names, **options)


def _resume(checkpoints: Checkpoints | NoCheckpoints, state: TrainState, steps: int) -> tuple[TrainState, int]:
    """Returns the newest saved state, or the given one, and the number of steps that it has trained."""
    if checkpoints.latest is None:
        return state, 0
    state = checkpoints.restore(state)
    logging.info("resumed at step %d of %d", int(state.step), steps)
    return state, int(state.step)


@dataclasses.dataclass(frozen=True)
class _Step:
    """The jitted step with the arguments that all steps share; see `step.make_step`."""

    step_fn: Any
    frozen: Params
    mask: Params | None
    start: Params | None
    rates: np.ndarray
    key: jax.Array
    losses_fn: Any  # jitted; see `step.make_losses`
    projections: Params | None

    def __call__(self, number: int, state: TrainState, batches: Mapping[str, Batch]) -> tuple[TrainState, Metrics]:
        """Runs step `number`, counted from 1. Donates the state."""
        return self.step_fn(state, *self._arguments(number, batches))

    def losses(self, state: TrainState, batches: Mapping[str, Batch]) -> Metrics:
        """Returns the losses of a state on the batches of a step. The state is not donated."""
        return self.losses_fn(state.params, self.frozen, batches, self.start)

    def memory(self, number: int, state: TrainState, batches: Mapping[str, Batch]) -> int:
        """Returns the `memory.program_bytes` of the compiled step."""
        return memory.program_bytes(self.step_fn.lower(state, *self._arguments(number, batches)).compile())

    def check_memory(self, number: int, state: TrainState, batches: Mapping[str, Batch]) -> None:
        """Checks that the step fits in the memory of the devices; the lengths of texts decide how much it needs."""
        memory.check_program(
            self.step_fn,
            state,
            *self._arguments(number, batches),
            devices=state.step.sharding.device_set,
            subject="training steps",
            remedy="decrease train.batch_size, increase train.microbatches, set model.remat, or shorten the texts",
        )

    def _arguments(self, number: int, batches: Mapping[str, Batch]) -> tuple[Any, ...]:
        return self.frozen, self.mask, batches, self.start, self.rates[number - 1], self.key, self.projections


@dataclasses.dataclass(frozen=True)
class _Run:
    """The loop over steps, with the checkpoints and metrics that it writes."""

    config: TrainConfig
    step: _Step
    checkpoints: Checkpoints | NoCheckpoints
    progress: Progress | NoProgress
    saves: bool  # whether a stopped run is saved
    observers: Mapping[int, Observer]

    def train(
        self,
        state: TrainState,
        samplers: Mapping[str, Sampler],
        first: int,
        steps: int,
        put: Callable[[Batch], Batch],
    ) -> TrainState:
        """Runs the steps after `first` up to `steps`.

        Args:
            state: the state after step `first`.
            samplers: the batches of each stream.
            first: the number of steps that have run.
            steps: the number of steps of the whole training.
            put: moves a batch to the devices.
        """
        clock = _Clock(examples_per_step=sum(sampler.batch_size for sampler in samplers.values()))
        iterators = {name: sampler.batches(first, steps, put) for name, sampler in samplers.items()}
        pending = None
        signals = StopSignals()
        with signals as should_stop:
            for number in range(first + 1, steps + 1):
                with clock.waiting():
                    batches = {name: next(iterator) for name, iterator in iterators.items()}
                if number == first + 1:
                    self.step.check_memory(number, state, batches)
                state, metrics = self.step(number, state, batches)
                if pending:  # checks the previous step, so that the device does not wait for the host
                    self._check(*pending)
                pending = (number, metrics)
                self.progress.tick(number)
                if number % self.config.log_every == 0 or number == steps:
                    self._check(*pending)
                    speed = clock.speed(number - first) | {"step_bytes": self.step.memory(number, state, batches)}
                    self.progress.write(number, {k: float(v) for k, v in metrics.items()} | speed)
                stopping = should_stop()  # called once per step: a signal between two calls would stop without a save
                last = stopping or number == steps
                saving = last or number % self.config.checkpoint_every == 0
                if saving or number in self.observers:
                    self._check(*pending)
                    self._check_state(number, state)
                    if number == steps:  # weights can be finite and so large that no loss is
                        self._check(number, self.step.losses(state, batches), after=" after the update")
                    if number in self.observers:
                        self.observers[number](state.params)
                    if saving:
                        self.checkpoints.save(number, state, force=last)
                if stopping:
                    self.checkpoints.wait()
                    raise Stopped(number, self.saves, signals.number)
            self.checkpoints.wait()
            if should_stop(now=True):  # a signal arrived after the last step
                raise Stopped(steps, self.saves, signals.number)
        return state

    def _check(self, number: int, metrics: Metrics, after: str = "") -> None:
        """Raises `Diverged` if a metric is not finite."""
        if bad := [name for name, value in metrics.items() if not math.isfinite(float(value))]:
            self._diverged(number, f"{', '.join(bad)} is not finite{after}")

    def _check_state(self, number: int, state: TrainState) -> None:
        """Raises `Diverged` if a weight or a moment is not finite; metrics are those before the update."""
        if bad := finite.nonfinite_paths({"weights": state.params, "moments": state.opt_state}):
            self._diverged(number, f"{listed(bad)} is not finite after the update")

    def _diverged(self, number: int, problem: str) -> NoReturn:
        self.checkpoints.wait()  # the checkpoint that the message names must be on disk
        latest = self.checkpoints.latest
        raise Diverged(
            f"step {number}: {problem}; the last checkpoint: "
            f"{'none was saved yet' if latest is None else f'step {latest}'}. "
            "Training diverged: decrease train.learning_rate or the forget weight, and use a new --workdir."
        )


class _Clock:
    """Measures the speed of training, and the share of time that it waits for data."""

    def __init__(self, examples_per_step: int):
        self._examples_per_step = examples_per_step
        self._started, self._waited = time.perf_counter(), 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time in the block as waiting for data."""
        before = time.perf_counter()
        yield
        self._waited += time.perf_counter() - before

    def speed(self, steps: int) -> dict[str, float]:
        """Returns the metrics of speed after so many steps."""
        seconds = time.perf_counter() - self._started
        return {
            "data_wait_share": self._waited / seconds,
            "examples_per_second": self._examples_per_step * steps / seconds,
        }


def cache_prefix(
    graphdef: Any, params: Params, encoded: EncodedSet, blocks: int, budget: int = memory.CACHE_BYTES
) -> EncodedSet:
    """Caches the outputs of the first `blocks` vision blocks that `encode` needs: they do not train.

    Sets without images are returned unchanged, as are those that have such outputs, and those whose outputs need
    more than the budget: each step computes these again, since many images are rarely all seen more than once.

    Args:
        graphdef: the structure of the model.
        params: its weights.
        encoded: the set.
        blocks: the number of vision blocks before the first weight that moves; see `scope.frozen_blocks`.
        budget: the largest number of bytes of outputs.
    """
    if not blocks or encoded.images is None or any(name.startswith("vision/") for name in encoded.per_image):
        return encoded
    names = bind(graphdef, params).config.taps_before(blocks)
    image = encoded.images[np.arange(1)]
    shapes = jax.eval_shape(lambda params, rows: bind(graphdef, params).encode(rows)[1], params, image)
    arrays = {name: shapes[name].values for name in names}
    if sum(x.size * x.dtype.itemsize for x in arrays.values()) * len(encoded.images) > budget:
        return encoded
    taps = feature_targets.record_taps(graphdef, params, encoded.images, names)
    values = {name: taps[name].values for name in names}
    return dataclasses.replace(encoded, per_image={**encoded.per_image, **values})


class NoProgress:
    """No-op in place of `metric_writer.Progress`, for processes and trainings that write no metrics."""

    def overview(self, trainable: Params) -> None:
        """Does nothing."""

    def tick(self, step: int) -> None:
        """Does nothing."""

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""
