"""How long VKD takes to forget as much as GradDiff on all weights ends up forgetting: on the tiny demo, start to end.

python benchmarks/forget_level.py [--steps 25,50,100,300] [--seed N] [--json FILE]      a quarter of an hour

Each row is a run of `python -m vkd_jax.main` of its own, with the settings that `configs/tiny.py` has for the method:
GradDiff once, VKD with several lengths of the whole schedule. Printed are the right answers to questions about the
pictures of the people to forget and of the others, the seconds of preparing (teacher features, the mask) and of
training without those of compiling (the median time of a step times the steps), and the shortest VKD run that forgets
at least as much.
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def run(words: str, folder: Path, cache: Path, seed: int, steps: int | None) -> dict[str, Any]:
    """A run, and what came of it."""
    command = [sys.executable, "-m", "vkd_jax.main", f"--config=configs/tiny.py:{words}", f"--workdir={folder}"]
    command += [f"--config.data.cache={cache}", f"--config.seed={seed}", "--config.train.log_every=5"]
    command += [f"--config.train.steps={steps}"] * (steps is not None)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{shlex.join(command)}\n{done.stderr[-2000:]}")
    results = json.loads((folder / "results.json").read_text())
    timing = json.loads((folder / "timing.json").read_text())
    config = json.loads((folder / "config.json").read_text())
    logged = [json.loads(line) for line in (folder / "train" / "metrics.jsonl").read_text().splitlines()]
    # Examples a second are those since the start: from them the time at each logged step, and of each step in between.
    rows = sum(config["train"]["batch_size"].values())
    at = [(x["step"], x["step"] * rows / x["examples_per_second"]) for x in logged if "examples_per_second" in x]
    each = statistics.median((b - a) / (n - m) for (m, a), (n, b) in zip(at, at[1:], strict=False))
    unlearned = results["models"]["unlearned"]
    return {
        "steps": config["train"]["steps"],
        "forget": unlearned["forget"]["vqa"]["accuracy"],
        "retain": unlearned["retain"]["vqa"]["accuracy"],
        "questions": unlearned["forget"]["vqa"]["n"],
        "prepare_seconds": timing["prepare"],
        "step_seconds": each,
        "train_seconds": each * config["train"]["steps"],
        "data_wait_share": logged[-1]["data_wait_share"],
    }


def main() -> None:
    """Prints the table, and writes it if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", default="25,50,100,300", help="of the VKD runs (default: 25,50,100,300)")
    parser.add_argument("--seed", type=int, default=0, help="of all runs (default: 0)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    args = parser.parse_args()
    rows = {}
    print(f"{'':14}{'steps':>7}{'forget VQA':>12}{'retain VQA':>12}{'prepare, s':>12}{'step, s':>10}{'steps, s':>10}")
    with tempfile.TemporaryDirectory() as folder:
        wanted = [("grad_diff", None)] + [("vkd", int(steps)) for steps in args.steps.split(",")]
        for number, (name, steps) in enumerate(wanted):
            row = rows[f"{name} {steps or ''}".strip()] = run(
                name, Path(folder) / str(number), Path(folder) / "data", args.seed, steps
            )
            print(
                f"{name:14}{row['steps']:>7}{100 * row['forget']:>11.1f}%{100 * row['retain']:>11.1f}%"
                f"{row['prepare_seconds']:>12.1f}{row['step_seconds']:>10.3f}{row['train_seconds']:>10.1f}",
                flush=True,
            )
    usual, *ours = rows.values()
    enough = [row for row in ours if row["forget"] <= usual["forget"]]
    if enough:
        first = min(enough, key=lambda row: row["steps"])
        whole = [row["train_seconds"] + row["prepare_seconds"] for row in (first, usual)]
        print(
            f"vkd forgets as much as grad_diff on all weights after {first['steps']} steps: "
            f"{first['train_seconds'] / usual['train_seconds']:.2f} of its time in steps, "
            f"{whole[0] / whole[1]:.2f} with preparing"
        )
    else:
        print("none of these vkd runs forgets as much as grad_diff on all weights")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
