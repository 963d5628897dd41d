"""kill_me.py FOLDER STEPS: unlearns a random LLaVA, resuming from FOLDER, and prints the metrics of each step.

It waits for a line on stdin after each step, so that the parent decides at which step to kill it.
"""

import sys
from pathlib import Path

import random_llava

random_llava.metrics_on_stdout(wait=True)

from vkd_jax.checkpoints.bundle import ModelBundle  # noqa: E402
from vkd_jax.methods.base import Context  # noqa: E402
from vkd_jax.methods.vkd import VKD  # noqa: E402
from vkd_jax.runtime.mesh import make_mesh  # noqa: E402
from vkd_jax.training import loop  # noqa: E402


def main(folder: Path, steps: int) -> None:
    mesh = make_mesh()
    graphdef, params = random_llava.model(mesh)
    sets = {"forget": random_llava.rows(1, 50), "retain": random_llava.rows(2, 70)}
    method = VKD(blocks=1, forget="ga", taps=("projector",), fisher_samples=8, fisher_chunk=8)
    prepared = method.prepare(Context(graphdef, params, None, random_llava.CONFIG, sets, seed=0))
    loop.fit(
        ModelBundle(graphdef, params, random_llava.CONFIG, None, mesh),
        method,
        prepared,
        random_llava.train_config(steps=steps),
        seed=0,
        folder=folder,
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
