"""Tests with two processes on the CPU: process 0 decides and writes, and a shared run equals that of one process."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
SLURM_PORTS = 61440  # JAX adds the id of the Slurm job
SHORT = dict(steps=2, epochs=0.0, warmup_steps=0, log_every=1, learning_rate=1e-2, buckets=1, checkpoint_every=100)
STEPS, HOLD = 6, 2  # steps of unlearning, and the step at which it is stopped


def start(*args, **variables):
    return subprocess.Popen(
        [sys.executable, ROOT / "tests/programs/multihost.py", *map(str, args)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"} | variables,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def outcome(process, status=0, seconds=240):
    """Waits for a process, checks its exit status and returns the JSON lines of its stdout."""
    try:
        out, err = process.communicate(timeout=seconds)
    finally:
        process.kill()
    assert process.returncode == status, err[-3000:]
    return [json.loads(line) for line in out.splitlines() if line.startswith("{")]


def free_port():
    """Returns a free port that JAX may use under Slurm."""
    for port in range(SLURM_PORTS + os.getpid() % 4000, 65536):
        with socket.socket() as probe:
            if probe.connect_ex(("localhost", port)):
                return port
    raise OSError("no free port")


# ---- Agreement of two processes ----


@pytest.fixture
def results(two_processes):
    """The results of each process."""
    return [outputs["agreement"] for outputs in two_processes]


def both(results, key):
    """Returns a result that is equal in both processes."""
    first, second = (result[key] for result in results)
    assert first == second
    return first


def test_process_0_is_one_of_two(results):
    assert [result["first"] for result in results] == [True, False]


def test_result_of_process_0_is_shared(results):
    assert both(results, "agreed") == {"process": 0, "long": "x" * 3000}


def test_errors_of_process_0_are_raised_everywhere(results):
    assert both(results, "refused") == ["UserError", "no."]
    assert both(results, "broke")[0] == "OSError"
    assert [result["odd"][0] for result in results] == ["Odd", "RuntimeError"]
    assert results[1]["odd"][1] == "process 0 failed: Odd: 12"


def test_shared_work_is_finished_when_process_0_fails(results):
    assert both(results, "meanwhile") == [[0, 1, 2, 3, 4], "after one."]


def test_process_0_runs_first(results):
    assert [result["turn"] for result in results] == [0, 1]


def test_any_process_may_set_a_flag(results):
    assert both(results, "anywhere") == [False, True, True]


def test_sharded_arrays_are_gathered_to_numpy(results):
    assert both(results, "held") == [1, 4] and both(results, "whole") == [True, True, True]


def test_mesh_must_have_the_devices_of_all_hosts(results):
    assert "[2, 1, 1] = 2 devices of 4: with several hosts the mesh must use all" in both(results, "mesh")


def test_workdir_is_read_and_written_by_process_0(results):
    assert both(results, "written") == {"by": 0} and both(results, "has") == [True, False]
    assert "has a run of another config (seed: 0 in the folder, 1 now)" in both(results, "other")


# ---- A whole run ----


def flags(root, base, workdir):
    """Yields the flags of a short run of all stages in float32, with LoRA fine-tuning and a saliency mask."""
    yield from (f"--config={ROOT}/configs/llava.py:folder,all", f"--workdir={workdir}")
    fields = {"model.base": base, "model.dtype": "float32", "eval.protocol": "options", "eval.max_new_tokens": 4}
    fields |= {f"data.{part}": root / part for part in ("forget", "retain")}
    fields |= {f"{section}.{name}": value for section in ("train", "finetune.train") for name, value in SHORT.items()}
    fields |= {"train.batch_size.forget": 2, "train.batch_size.retain": 4, "train.steps": STEPS}
    fields |= {"finetune.train.batch_size.image": 4, "finetune.train.batch_size.text": 2}
    fields |= {"method.fisher_samples": 4, "method.fisher_chunk": 2, "method.augment_forget": 1}
    # Ratios at the threshold of the mask then differ by 0.1 %; by default they differ by 0.01 %, like rounding errors.
    fields["method.mask_keep"] = 0.5
    yield from (f"--config.{name}={value}" for name, value in fields.items())


def start_two(*args, **variables):
    """Starts two processes with the environment of Slurm."""
    slurm = {"SLURM_JOB_ID": str(free_port() - SLURM_PORTS), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    return [
        start(*args, "--distributed", **slurm, SLURM_PROCID=str(i), SLURM_LOCALID=str(i), **variables) for i in range(2)
    ]


@pytest.fixture(scope="module")
def run(tiny_folder, request_folders, tmp_path_factory):
    """Metrics of a run in one process, and of a run in two processes that is stopped and resumed in one; its folder."""
    root = tmp_path_factory.mktemp("hosts")
    arguments = {name: list(flags(request_folders, tiny_folder, root / name)) for name in ("alone", "shared")}
    alone = start(*arguments["alone"])
    mesh = [f"--config.mesh.{name}={size}" for name, size in (("data", 1), ("fsdp", 1), ("tensor", 4))]
    first, second = start_two(*arguments["shared"], *mesh, HOLD=str(HOLD), JAX_NUM_CPU_DEVICES="2")
    try:
        lines = read_until(first, lambda line: line == {"stage": "train"}, HOLD)
        second.send_signal(signal.SIGTERM)  # only one host receives it; both must stop
        signaled = time.perf_counter()
        lines += outcome(first, 143)
        assert outcome(second, 143) == []
        stopping = time.perf_counter() - signaled
    finally:
        first.kill()
        second.kill()
    (saved,) = [path.name for path in (root / "shared/train/checkpoints").iterdir()]
    resumed = outcome(start(*arguments["shared"]))
    return dict(alone=outcome(alone), before=lines, saved=int(saved), after=resumed, root=root, stopping=stopping)


def read_until(process, begins, count):
    """Reads JSON lines until `count` lines after the first one that satisfies `begins`."""
    lines, left = [], None
    for text in process.stdout:
        if text.startswith("{"):
            lines.append(json.loads(text))
            left = count if begins(lines[-1]) else None if left is None else left - 1
            if left == 0:
                return lines
    raise AssertionError(process.stderr.read()[-3000:])


@pytest.mark.slow
def test_two_processes_stop_at_the_same_step_and_one_resumes(run):
    assert HOLD < run["saved"] < STEPS
    assert run["before"][-1]["step"] == run["saved"] and run["after"][1]["step"] == run["saved"] + 1


@pytest.mark.slow
def test_both_processes_end_within_20_seconds_of_the_signal(run):
    """A preempted TPU is removed half a minute after the signal."""
    assert run["stopping"] < 20


@pytest.mark.slow
def test_losses_equal_those_of_one_process(run):
    lines = [line for line in run["before"] + run["after"][1:]]
    assert [line.get("step") for line in lines] == [line.get("step") for line in run["alone"]]
    for line, other in zip(lines, run["alone"], strict=True):
        names = [name for name in other if name.endswith("loss") or name == "grad_norm"]
        np.testing.assert_allclose([line[n] for n in names], [other[n] for n in names], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_results_equal_those_of_one_process(run):
    found, expected = (json.loads((run["root"] / name / "results.json").read_text()) for name in ("shared", "alone"))
    assert found["text_logits_identical"] and found["manifest"] == expected["manifest"]
    for name, parts in expected["models"].items():
        for part, kinds in parts.items():
            for kind, figures in kinds.items():
                ours = found["models"][name][part][kind]
                assert ours["n"] == figures["n"] and ours["accuracy"] == figures["accuracy"], (name, part, kind)
                if "probability" in figures:
                    np.testing.assert_allclose(ours["probability"]["mean"], figures["probability"]["mean"], rtol=1e-3)
    assert (run["root"] / "shared" / "report.md").is_file()


@pytest.mark.slow
def test_weights_equal_those_of_one_process(run):
    from safetensors.numpy import load_file

    for name in ("vanilla", "retain_only", "unlearned"):
        ours, theirs = (load_file(run["root"] / folder / name / "model.safetensors") for folder in ("shared", "alone"))
        for tensor in theirs:
            difference, size = (np.linalg.norm(x) for x in (ours[tensor] - theirs[tensor], theirs[tensor]))
            # Adam's first steps have the same length for gradients of rounding errors.
            assert difference <= 2e-4 * size, f"{name}: {tensor}"
