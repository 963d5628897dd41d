"""How long VKD takes to forget as much as GradDiff on all weights ends up forgetting: on the tiny demo, start to end.

python perf/forget_level.py [--steps 25,50,100,300] [--seed N] [--json FILE]      a quarter of an hour

Each row is a run of `python -m vkd_jax.main` of its own, with the settings that `configs/tiny.py` has for the method:
GradDiff once, VKD with several lengths of the whole schedule. Printed are the right answers to questions about the
pictures of the people to forget and of the others, the seconds of preparing (teacher features, the mask) and of
training without those of compiling (the median time of a step times the steps), and the shortest VKD run that forgets
at least as much.
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


def unlearn(words: str, folder: Path, cache: Path, seed: int, steps: int | None) -> dict[str, Any]:
    """A run, and what came of it."""
    command = [sys.executable, "-m", "vkd_jax.main", f"--config=configs/tiny.py:{words}", f"--workdir={folder}"]
    command += [f"--config.data.cache={cache}", f"--config.seed={seed}", "--config.train.log_every=5"]
    command += [f"--config.train.steps={steps}"] * (steps is not None)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{shlex.join(command)}\n{done.stderr[-2000:]}")
    results = RunResults.read(folder)
    timing = json.loads((folder / "timing.json").read_text())
    config = json.loads((folder / "config.json").read_text())
    logged = [json.loads(line) for line in (folder / "train" / "metrics.jsonl").read_text().splitlines()]
    # Examples a second are those since the start: from them the time at each logged step, and of each step in between.
    rows = sum(config["train"]["batch_size"].values())
    at = [(x["step"], x["step"] * rows / x["examples_per_second"]) for x in logged if "examples_per_second" in x]
    each = statistics.median((b - a) / (n - m) for (m, a), (n, b) in zip(at, at[1:], strict=False))
    unlearned = results.models["unlearned"]
    return {
        "method": config["method"]["name"],
        "steps": config["train"]["steps"],
        "forget": unlearned["forget"]["vqa"].accuracy,
        "retain": unlearned["retain"]["vqa"].accuracy,
        "questions": unlearned["forget"]["vqa"].n,
        "prepare_seconds": timing["prepare"],
        "step_seconds": each,
        "train_seconds": each * config["train"]["steps"],
        "data_wait_share": logged[-1]["data_wait_share"],
    }


def measure(steps: str, seed: int) -> dict[str, Any]:
    """GradDiff on all weights, then VKD with so many steps each."""
    wanted = [("grad_diff", None)] + [("vkd", int(count)) for count in steps.split(",")]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for number, (words, count) in enumerate(wanted):
            rows.append(unlearn(words, Path(folder) / str(number), Path(folder) / "data", seed, count))
            print(f"{words} {rows[-1]['steps']}: forget {100 * rows[-1]['forget']:.1f} %", file=sys.stderr, flush=True)
    return {"rows": rows}


if __name__ == "__main__":
    run(__doc__, measure, tables.levels, steps=("25,50,100,300", "of the VKD runs"), seed=(0, "of all runs"))
