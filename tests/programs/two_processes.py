"""two_processes.py PROCESS PORT FOLDER: prints the results of the two-process tests (two devices each) as JSON."""

import json
import sys
from pathlib import Path

import devices
import evaluate_devices
import jax
import multihost
from jax.sharding import AxisType

from vkd_jax.runtime.mesh import AXES, make_mesh


def training(folder: Path) -> dict:
    """Returns the checkpoint of a training that only process 0 is asked to stop, and the metrics after resuming."""
    mesh = make_mesh(data=1, fsdp=1, tensor=4)  # no process holds a whole weight
    with devices.stopped_after_a_step():
        devices.fit(mesh, folder)
    saved = sorted(int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdigit())
    return {"saved": saved, "resumed": devices.fit(mesh, folder)[0]}


def main(process: int, port: str, folder: Path) -> dict:
    jax.config.update("jax_num_cpu_devices", 2)
    jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=process)
    mesh = jax.make_mesh((2, 2, 1), AXES, axis_types=(AxisType.Auto,) * 3)
    return {
        "devices": [jax.device_count(), jax.local_device_count()],
        "agreement": multihost.small(process, folder),
        "evaluation": evaluate_devices.computed(mesh),
        "training": training(folder / "training"),
    }


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))), flush=True)
