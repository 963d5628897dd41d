"""A training of a toy model in milliseconds, for the tests of the training loop.

As a command, it trains in the folder `run`, or resumes there.
"""

import dataclasses
import json
import sys
import types
from pathlib import Path
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vkd_jax.checkpoints.bundle import ModelBundle
from vkd_jax.checkpoints.orbax_checkpoints import Checkpoints
from vkd_jax.config import command_line
from vkd_jax.config.training import TrainConfig
from vkd_jax.data.encoding import EncodedSet
from vkd_jax.data.images import PackedImages
from vkd_jax.methods.base import Prepared
from vkd_jax.methods.null_space import NullSpace
from vkd_jax.models.base import split_model
from vkd_jax.runtime import log, storage
from vkd_jax.runtime.mesh import make_mesh, replicated
from vkd_jax.training import loop
from vkd_jax.training.metric_writer import Progress
from vkd_jax.training.preemption import Stopped
from vkd_jax.types import Example, UserError

ROWS = 8


class Toy(nnx.Module):
    """y = tanh(x W + b) U, of which U is frozen."""

    def __init__(self):
        values = np.random.default_rng(0)
        self.visual = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
        self.language = nnx.Linear(4, 2, rngs=nnx.Rngs(1))
        self.visual.bias[...] = jnp.asarray(values.normal(size=4), jnp.float32)

    def __call__(self, x):
        return self.language(jnp.tanh(self.visual(x)))


@dataclasses.dataclass(frozen=True)
class ToyMethod:
    """Increases outputs on forget rows and decreases them on retain rows; logs the rows of each batch."""

    mask_scope: str = "none"
    cache_bytes: int = 2**20
    weight_retain: float = 1.0
    null_space: ClassVar[NullSpace] = NullSpace()

    def trainable(self, paths, model_config):
        return [path for path in paths if path.startswith("visual/")]

    def prepare(self, context):
        return Prepared(sets=context.sets)

    def teachers(self):
        return {}

    def adversary(self, params, model_config):
        return None

    def losses(self):
        return {"forget": self._loss("forget", -1.0), "retain": self._loss("retain", self.weight_retain)}

    def _loss(self, name, weight):
        def loss(model, batch):
            term = jnp.mean(jnp.square(model(batch.images["x"])).sum(-1) + batch.cached["extra"])
            return weight * term, {f"{name}_term": term, f"{name}_rows": jnp.sum(2.0 ** batch.tokens[:, 0])}

        return loss


@dataclasses.dataclass(frozen=True)
class Taught(ToyMethod):
    """Trains on the sign of its teacher's outputs."""

    weight: float = 1.0

    def teachers(self):
        return {"forget": lambda model, batch: {"extra": self.weight * model(batch.images["x"]).sum(-1)}}

    def losses(self):
        def loss(model, batch):
            return jnp.mean(batch.cached["extra"] * model(batch.images["x"]).sum(-1)), {}

        return {"forget": loss}


class ToyConfig:
    """The configuration of a model whose images are three numbers."""

    @staticmethod
    def packed_tokens(height, width):
        return 1

    @staticmethod
    def pack(rows, tokens):
        return {"x": np.concatenate([row[0] for row in rows])}


def rows(seed, extra=None) -> EncodedSet:
    """A set whose images are three random numbers and whose `tokens` are the row numbers."""
    numbers = np.arange(ROWS, dtype=np.int32)[:, None]
    return EncodedSet(
        examples=tuple(Example(str(i), "", b"", str(i), "", "") for i in range(ROWS)),
        tokens=numbers,
        mask=numbers >= 0,
        target_positions=numbers,
        targets=numbers,
        target_mask=numbers >= 0,
        prompt_length=np.ones(ROWS, np.int32),
        image_rows=np.arange(ROWS, dtype=np.int32),
        images=PackedImages.of(np.random.default_rng(seed).normal(size=(ROWS, 1, 3)).astype(np.float32), ToyConfig),
        per_example={"extra": np.zeros(ROWS, np.float32) if extra is None else extra},
    )


SETS = {"forget": rows(0), "retain": rows(1)}
MASK = {
    "visual/kernel": jnp.asarray(np.random.default_rng(3).random((3, 4)) < 0.5),
    "visual/bias": jnp.array([True, False, True, False]),
}


def split_toy():
    """Structure and weights of the toy."""
    graphdef, params = split_model(Toy())
    sharding = replicated(make_mesh())
    return graphdef, {path: jax.device_put(np.asarray(value), sharding) for path, value in params.items()}


def config(**changes):
    fields = dict(steps=8, batch_size=dict(forget=4, retain=4), learning_rate=0.05, warmup_steps=2, weight_decay=0.5)
    fields |= dict(b2=0.99, log_every=1, checkpoint_every=2)
    return TrainConfig(**fields | changes)


def fit(toy, folder, method=ToyMethod(), sets=SETS, mask=None, seed=0, **changes):  # noqa: B008 (frozen)
    graphdef, params = toy
    return loop.fit(
        ModelBundle(graphdef, params, types.SimpleNamespace(used_blocks=0), None, make_mesh()),
        method,
        Prepared(sets=sets, mask=mask),
        config(**changes),
        seed=seed,
        folder=folder,
    )


def logged(folder):
    """The metrics of each step."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    speed = {"data_wait_share", "examples_per_second", "step_bytes"}
    return {line["step"]: {k: v for k, v in line.items() if k not in speed} for line in lines}


def saved_steps(folder):
    return sorted(int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdigit())


def restored(folder, like, seed=0):
    """The newest checkpoint."""
    checkpoints = Checkpoints(folder / "checkpoints", seed=seed, every=2)
    try:
        return checkpoints.restore(like)
    finally:
        checkpoints.close()


def assert_same_bits(a, b):
    a, b = jax.tree.leaves_with_path(a), jax.tree.leaves_with_path(b)
    assert [path for path, _ in a] == [path for path, _ in b]
    for (path, x), (_, y) in zip(a, b, strict=True):
        np.testing.assert_array_equal(x, y, err_msg=jax.tree_util.keystr(path))


def changes(before, after):
    """The elements that differ: {path: bool array}."""
    return {path: np.asarray(before[path] != after[path]) for path in after}


def at_step(monkeypatch, step, act):
    """Calls `act` after that step."""
    tick = Progress.tick
    monkeypatch.setattr(Progress, "tick", lambda self, now: (tick(self, now), act() if now == step else None))


def main():
    log.setup()
    try:
        with storage.write_errors():
            fit(split_toy(), Path("run").absolute(), steps=4)
    except UserError as error:
        sys.exit(command_line.bad_input(error))
    except Stopped as error:
        sys.exit(error.status)


if __name__ == "__main__":
    main()
