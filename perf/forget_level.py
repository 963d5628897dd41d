"""Times how long VKD takes to reach the level of forgetting of GradDiff on all weights, on the tiny demo.

python perf/forget_level.py [--steps 25,50,100,300] [--seed N] [--json FILE]      a quarter of an hour

Each row is a separate run of `python -m vkd_jax.main` with the hyperparameters of `configs/tiny.py`: one of GradDiff,
and one of VKD for each number of steps. The table shows the accuracy on questions about images of the forget set and
the retain set, the seconds of preparation (teacher features and mask), and the seconds of training without compilation
(the median time of a step times the number of steps). The line below names the shortest VKD run that forgets at least
as much as GradDiff.
"""

import json
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import tables
from command import ROOT, run

from vkd_jax.results import RunResults


def unlearn(method: str, folder: Path, cache: Path, seed: int, steps: int | None) -> dict[str, Any]:
    """Unlearns in a child process; returns the accuracies and times of the run."""
    command = [sys.executable, "-m", "vkd_jax.main", f"--config=configs/tiny.py:{method}", f"--workdir={folder}"]
    command += [f"--config.data.cache={cache}", f"--config.seed={seed}", "--config.train.log_every=5"]
    command += [f"--config.train.steps={steps}"] * (steps is not None)
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if process.returncode:
        raise SystemExit(f"{shlex.join(command)}\n{process.stderr[-2000:]}")
    results = RunResults.read(folder)
    timing = json.loads((folder / "timing.json").read_text())
    config = json.loads((folder / "config.json").read_text())
    logged = [json.loads(line) for line in (folder / "train" / "metrics.jsonl").read_text().splitlines()]
    # `examples_per_second` is the mean since the start; it gives the time of each logged step.
    batch_size = sum(config["train"]["batch_size"].values())
    rows = [row for row in logged if "examples_per_second" in row]
    times = [(row["step"], row["step"] * batch_size / row["examples_per_second"]) for row in rows]
    step_seconds = statistics.median((b - a) / (n - m) for (m, a), (n, b) in zip(times, times[1:], strict=False))
    unlearned = results.models["unlearned"]
    return {
        "method": config["method"]["name"],
        "steps": config["train"]["steps"],
        "forget": unlearned["forget"]["vqa"].accuracy,
        "retain": unlearned["retain"]["vqa"].accuracy,
        "questions": unlearned["forget"]["vqa"].n,
        "prepare_seconds": timing["prepare"],
        "step_seconds": step_seconds,
        "train_seconds": step_seconds * config["train"]["steps"],
        "data_wait_share": logged[-1]["data_wait_share"],
    }


def measure(steps: str, seed: int) -> dict[str, Any]:
    """Runs GradDiff on all weights, then VKD with each number of steps."""
    runs = [("grad_diff", None)] + [("vkd", int(count)) for count in steps.split(",")]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for number, (method, count) in enumerate(runs):
            rows.append(unlearn(method, Path(folder) / str(number), Path(folder) / "data", seed, count))
            print(f"{method} {rows[-1]['steps']}: forget {100 * rows[-1]['forget']:.1f} %", file=sys.stderr, flush=True)
    return {"rows": rows}


if __name__ == "__main__":
    run(__doc__, measure, tables.levels, steps=("25,50,100,300", "the steps of the VKD runs"), seed=(0, "the seed"))
