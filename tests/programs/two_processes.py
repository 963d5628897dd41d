"""two_processes.py PROCESS PORT FOLDER SUBJECT...: prints results of two-process tests as JSON; two devices each."""

import json
import sys
from pathlib import Path

import devices
import evaluate_devices
import jax
import multihost
import shared_contexts
from jax.sharding import AxisType

from vkd_jax.runtime.mesh import AXES, make_mesh


def training(folder: Path) -> dict:
    """Returns the checkpoint of a training that only process 0 is asked to stop, and the metrics after resuming."""
    mesh = make_mesh(data=1, fsdp=1, tensor=4)  # no process holds a whole weight
    with devices.stopped_after_a_step():
        devices.fit(mesh, folder)
    saved = sorted(int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdigit())
    return {"saved": saved, "resumed": devices.fit(mesh, folder)[0]}


def main(process: int, port: str, folder: Path, chosen: list[str]) -> dict:
    jax.config.update("jax_num_cpu_devices", 2)
    jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=process)
    mesh = jax.make_mesh((2, 2, 1), AXES, axis_types=(AxisType.Auto,) * 3)
    subjects = {
        "agreement": lambda: multihost.small(process, folder),
        "evaluation": lambda: evaluate_devices.computed(mesh),
        "training": lambda: training(folder / "training"),
    }
    results = {name: run() for name, run in subjects.items() if name in chosen}
    return {"devices": [jax.device_count(), jax.local_device_count()]} | results


if __name__ == "__main__":
    process, port, folder, *chosen = sys.argv[1:]
    shared_contexts.install()
    print(json.dumps(main(int(process), port, Path(folder), chosen)), flush=True)
