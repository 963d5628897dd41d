"""Runs the same short training on several meshes of devices."""

import contextlib
import io
import json
import math
import signal
from pathlib import Path

import random_llava

random_llava.metrics_on_stdout()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from vkd_jax.checkpoints.bundle import ModelBundle  # noqa: E402
from vkd_jax.methods import base, saliency  # noqa: E402
from vkd_jax.methods.base import Prepared  # noqa: E402
from vkd_jax.methods.finetune import Finetune  # noqa: E402
from vkd_jax.models.base import bind  # noqa: E402
from vkd_jax.runtime.mesh import make_mesh, shard_rows  # noqa: E402
from vkd_jax.training import loop  # noqa: E402
from vkd_jax.training.metric_writer import Progress  # noqa: E402
from vkd_jax.training.preemption import Stopped  # noqa: E402
from vkd_jax.types import UserError  # noqa: E402

SETS = {"image": random_llava.rows(1, 50)}
MESHES = ((1, 1, 1), (1, 8, 1), (2, 2, 2))


class ImagesOnly(Finetune):
    """Fine-tuning of all weights on the image stream only, to halve the compilation."""

    def losses(self):
        return {"image": super().losses()["image"]}


class Checkpoints(loop.Checkpoints):
    """Keeps the last state that was saved."""

    last = None

    def save(self, step, state, **options):
        Checkpoints.last = state
        return super().save(step, state, **options)


def fit(mesh, folder: Path, **changes):
    graphdef, params = random_llava.model(mesh)
    lines = io.StringIO()
    with contextlib.redirect_stdout(lines):
        loop.fit(
            ModelBundle(graphdef, params, random_llava.CONFIG, None, mesh),
            ImagesOnly(),
            Prepared(sets=SETS),
            random_llava.train_config(**changes),
            seed=0,
            folder=folder,
        )
    return [json.loads(line) for line in lines.getvalue().splitlines()], params


def shard(x) -> list[int]:
    return list(x.addressable_shards[0].data.shape)


def layout(state, params) -> dict:
    """Returns the share of the weights on each device, the sharded weights, and those whose shardings are wrong."""
    adam = next(state for state in jax.tree.leaves(state.opt_state, is_leaf=_is_adam) if _is_adam(state))
    shardings = {path: x.sharding for path, x in state.params.items()}
    return {
        "share": sum(math.prod(shard(x)) for x in state.params.values()) / sum(x.size for x in state.params.values()),
        "cut": sorted(path for path, x in state.params.items() if shard(x) != list(x.shape)),
        "odd": sorted(
            path
            for path, sharding in shardings.items()
            for other in (params[path].sharding, adam.mu[path].sharding, adam.nu[path].sharding)
            if not other.is_equivalent_to(sharding, state.params[path].ndim)
        ),
    }


def work(mesh) -> float:
    """Returns the FLOPs of each device for the gradient of the loss of eight rows."""
    graphdef, params = random_llava.model(mesh)
    batch = shard_rows(mesh, SETS["image"].batch(np.arange(8)))

    @jax.jit
    @jax.grad
    def gradient(params, batch):
        return jnp.mean(base.cross_entropy(bind(graphdef, params), batch))

    return gradient.lower(params, batch).compile().cost_analysis()["flops"]


def selection(mesh) -> dict:
    """Returns values at ranks among sharded and replicated arrays, by a sort and on the devices."""
    values = np.random.default_rng(0).integers(0, 40, (8, 16)).astype(np.float32)
    places = jax.sharding.PartitionSpec("fsdp", "tensor"), jax.sharding.PartitionSpec()
    arrays = [jax.device_put(values, jax.sharding.NamedSharding(mesh, place)) for place in places]
    ranks = (1, 77, 128, 256)
    information = {"sharded": arrays[0], "replicated": arrays[1]}
    ones = {path: jnp.ones_like(x) for path, x in information.items()}
    mask = saliency.mask_from_ratio(information, ones, threshold=None, keep=0.3, eps=0.0)
    return {
        "sorted": [float(np.sort(np.tile(values.ravel(), 2))[-rank]) for rank in ranks],
        "found": [saliency.ranked_value(arrays, rank) for rank in ranks],
        "gathered": "all-gather" in saliency._counts.lower(arrays, np.uint32(1)).compile().as_text(),
        "mask_shard": shard(mask["sharded"]),
        "mask_is_right": bool((np.asarray(mask["sharded"]) == (values >= np.sort(values.ravel())[-39])).all()),
    }


def _is_adam(part) -> bool:
    return hasattr(part, "mu")


@contextlib.contextmanager
def stopped_after_a_step():
    """Context manager that sends SIGTERM to the logging process after each step, and suppresses `Stopped`."""
    write = Progress.write
    Progress.write = lambda self, step, scalars: (write(self, step, scalars), signal.raise_signal(signal.SIGTERM))
    try:
        with contextlib.suppress(Stopped):
            yield
    finally:
        Progress.write = write


def main(folder: Path) -> dict:
    """The metrics, layouts and FLOPs of each mesh, and the metrics of a run that moves from eight devices to one."""
    loop.Checkpoints = Checkpoints
    results = {"devices": jax.device_count(), "meshes": {}}
    for shape in MESHES:
        mesh = make_mesh(*shape)
        metrics, params = fit(mesh, folder / "x".join(map(str, shape)))
        results["meshes"][",".join(map(str, shape))] = {
            "metrics": metrics,
            "flops": work(mesh),
            **layout(Checkpoints.last, params),
        }

    results["selection"] = selection(make_mesh(2, 2, 2))

    # Half of the run above on eight devices, the rest on one.
    with stopped_after_a_step():
        fit(make_mesh(2, 2, 2), folder / "moved")
    results["moved"], _ = fit(make_mesh(), folder / "moved")

    try:
        fit(make_mesh(2, 2, 2), folder / "odd", batch_size={"image": 6})
    except UserError as error:
        results["refused"] = str(error)
    return results
