"""multihost.py FLAG ...: `vkd_jax.main` without TensorFlow, with the metrics of each step on stdout.

With HOLD=N in the environment it waits for a line on stdin after step N of unlearning.
"""

import json
import os
import sys
from pathlib import Path


def small(number: int, folder: Path) -> dict:
    """Returns the results of `vkd_jax.runtime.multihost` in one of two processes with two devices each."""
    from vkd_jax.config.schema import RunConfig
    from vkd_jax.runs.workdir import Workdir
    from vkd_jax.runtime import multihost
    from vkd_jax.types import UserError

    results = {
        "first": multihost.is_process_0(),
        "agreed": multihost.run_on_process_0(lambda: {"process": number, "long": "x" * 3000}),
    }

    def fails(error):
        raise error

    for name, error in (("refused", UserError("no.")), ("broke", OSError(28, "full", "f")), ("odd", Odd(1, 2))):
        try:
            multihost.run_on_process_0(lambda error=error: fails(error))
        except Exception as raised:
            results[name] = [type(raised).__name__, str(raised)]

    created = []
    items = ((created.append(i), i)[1] for i in range(5))
    try:
        multihost.run_on_process_0(lambda: next(items) == 0 and fails(UserError("after one.")), meanwhile=items)
    except UserError as raised:
        results["meanwhile"] = [created, str(raised)]

    def reads():
        (folder / "one").mkdir(exist_ok=number > 0)  # fails if process 1 runs first
        return number

    results["turn"] = multihost.run_process_0_first(reads)
    results["anywhere"] = [bool(multihost.any_process(flag)) for flag in (False, number == 1, True)]

    results |= sharded()
    config = RunConfig()
    workdir = Workdir(folder / "run", config)
    workdir.write("x.json", {"by": number})
    results["written"] = json.loads((folder / "run/x.json").read_text())
    results["has"] = [workdir.has("x.json"), workdir.has("y.json")]
    try:
        Workdir(folder / "run", RunConfig(seed=1))
    except UserError as raised:
        results["other"] = str(raised)
    return results


def sharded():
    """Returns the results of gathering arrays, and of a mesh that is too small."""
    import jax
    import numpy as np
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from vkd_jax.runtime import multihost
    from vkd_jax.runtime.mesh import make_mesh, shard_rows
    from vkd_jax.types import UserError

    mesh = make_mesh(data=1, fsdp=1, tensor=4)
    whole = np.arange(24.0, dtype=np.float32).reshape(4, 6)
    cut = jax.make_array_from_callback(whole.shape, NamedSharding(mesh, P("tensor")), whole.__getitem__)
    rows = shard_rows(mesh, {"x": whole})["x"]  # every device has all rows, as the mesh has no other axis
    results = {"whole": [np.array_equal(multihost.gather(x), whole) for x in (cut, rows, whole)]}
    results["held"] = [len(x.addressable_shards[0].data) for x in (cut, rows)]
    try:
        make_mesh(data=2)
    except UserError as raised:
        results["mesh"] = str(raised)
    return results


class Odd(Exception):
    """An error that cannot be pickled."""

    def __init__(self, one, two):
        super().__init__(f"{one}{two}")


def run(flags: list[str]) -> int:
    """Runs `main` as its module does."""
    import random_llava

    random_llava.metrics_on_stdout()
    module = sys.modules["vkd_jax.training.metric_writer"]

    class Progress(module.Progress):
        """Prints the stage, and waits after step HOLD of unlearning."""

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

    main.define()
    return main.main(command_line.parse(["main", *flags]))


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
