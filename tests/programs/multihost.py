"""multihost.py FLAG ...: `vkd_jax.main` without TensorFlow, with the metrics on stdout, a line a step.

With HOLD=N in the environment the second waits after step N of unlearning for a line on stdin.
"""

import json
import os
import sys
from pathlib import Path


def small(number: int, folder: Path) -> dict:
    """What `vkd_jax.runtime.multihost` gives to each of two processes of two devices."""
    import jax
    import numpy as np
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from vkd_jax.config.schema import RunConfig
    from vkd_jax.runs.workdir import Workdir
    from vkd_jax.runtime import multihost
    from vkd_jax.runtime.mesh import make_mesh, shard_rows
    from vkd_jax.types import UserError

    said = {
        "first": multihost.is_process_0(),
        "agreed": multihost.run_on_process_0(lambda: {"process": number, "long": "x" * 3000}),
    }

    def fails(error):
        raise error

    for name, error in (("refused", UserError("no.")), ("broke", OSError(28, "full", "f")), ("odd", Odd(1, 2))):
        try:
            multihost.run_on_process_0(lambda error=error: fails(error))
        except Exception as raised:
            said[name] = [type(raised).__name__, str(raised)]

    made = []
    items = ((made.append(i), i)[1] for i in range(5))
    try:
        multihost.run_on_process_0(lambda: next(items) == 0 and fails(UserError("after one.")), meanwhile=items)
    except UserError as raised:
        said["meanwhile"] = [made, str(raised)]

    def reads():
        (folder / "one").mkdir(exist_ok=number > 0)  # process 1 would be the first to come without turns
        return number

    said["turn"] = multihost.run_process_0_first(reads)
    said["anywhere"] = [bool(multihost.any_process(flag)) for flag in (False, number == 1, True)]

    mesh = make_mesh(data=1, fsdp=1, tensor=4)
    whole = np.arange(24.0, dtype=np.float32).reshape(4, 6)
    cut = jax.make_array_from_callback(whole.shape, NamedSharding(mesh, P("tensor")), whole.__getitem__)
    rows = shard_rows(mesh, {"x": whole})["x"]  # every device has all rows, as the mesh has no other axis
    said["whole"] = [np.array_equal(multihost.gather(x), whole) for x in (cut, rows, whole)]
    said["held"] = [len(x.addressable_shards[0].data) for x in (cut, rows)]
    try:
        make_mesh(data=2)
    except UserError as raised:
        said["mesh"] = str(raised)

    config = RunConfig()
    workdir = Workdir(folder / "run", config)
    workdir.write("x.json", {"by": number})
    said["written"] = json.loads((folder / "run/x.json").read_text())
    said["has"] = [workdir.has("x.json"), workdir.has("y.json")]
    try:
        Workdir(folder / "run", RunConfig(seed=1))
    except UserError as raised:
        said["other"] = str(raised)
    return said


class Odd(Exception):
    """One that cannot be sent."""

    def __init__(self, one, two):
        super().__init__(f"{one}{two}")


def run(flags: list[str]) -> int:
    """`main`, as its module runs it."""
    import random_llava

    random_llava.metrics_on_stdout()
    module = sys.modules["vkd_jax.training.metric_writer"]

    class Progress(module.Progress):
        """Says which stage its lines are of, and waits where it is told to."""

        def __init__(self, folder: Path, **options):
            super().__init__(folder, **options)
            self._unlearns = folder.name == "train"
            print(json.dumps({"stage": folder.name}), flush=True)

        def write(self, step, scalars):
            super().write(step, scalars)
            if self._unlearns and step == int(os.environ.get("HOLD", 0)):
                sys.stdin.readline()

    module.Progress = Progress
    from vkd_jax import main
    from vkd_jax.config import command_line

    command_line.define()
    return main.main(command_line.parse(["main", *flags]))


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
