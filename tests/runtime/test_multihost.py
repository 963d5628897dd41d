"""Two real processes on a CPU: one writes and decides, all learn of it; a run of theirs is that of one process."""

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
SLURM_PORTS = 61440  # JAX takes a port above it, by the job's number
SHORT = dict(steps=2, epochs=0.0, warmup_steps=0, log_every=1, learning_rate=1e-2, buckets=1, checkpoint_every=100)
STEPS, HOLD = 6, 2  # of unlearning, and where it is stopped


def start(*args, **more):
    return subprocess.Popen(
        [sys.executable, ROOT / "tests/programs/multihost.py", *map(str, args)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"} | more,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def outcome(process, status=0, seconds=240):
    """The lines of JSON that a process wrote."""
    try:
        out, err = process.communicate(timeout=seconds)
    finally:
        process.kill()
    assert process.returncode == status, err[-3000:]
    return [json.loads(line) for line in out.splitlines() if line.startswith("{")]


def free_port():
    """One of those that JAX may take under Slurm."""
    for port in range(SLURM_PORTS + os.getpid() % 4000, 65536):
        with socket.socket() as there:
            if there.connect_ex(("localhost", port)):
                return port
    raise OSError("no free port")


# ---- What is agreed upon ----


@pytest.fixture
def said(two_processes):
    return [results["agreement"] for results in two_processes]


def both(said, key):
    first, second = (found[key] for found in said)
    assert first == second
    return first


def test_one_process_is_the_first(said):
    assert [found["first"] for found in said] == [True, False]


def test_what_the_first_says_all_hear(said):
    assert both(said, "agreed") == {"process": 0, "long": "x" * 3000}


def test_an_error_of_the_first_is_one_of_all(said):
    assert both(said, "refused") == ["UserError", "no."]
    assert both(said, "broke")[0] == "OSError"
    assert [found["odd"][0] for found in said] == ["Odd", "RuntimeError"]
    assert said[1]["odd"][1] == "process 0 failed: Odd: 12"


def test_what_all_make_together_is_used_up_when_work_breaks_off(said):
    assert both(said, "meanwhile") == [[0, 1, 2, 3, 4], "after one."]


def test_turns(said):
    assert [found["turn"] for found in said] == [0, 1]


def test_a_flag_of_one_is_heard_by_all(said):
    assert both(said, "anywhere") == [False, True, True]


def test_arrays_on_both_hosts_are_whole_in_numpy(said):
    assert both(said, "held") == [1, 4] and both(said, "whole") == [True, True, True]


def test_a_mesh_must_take_the_devices_of_all_hosts(said):
    assert "[2, 1, 1] = 2 devices of 4: with several hosts it must take all" in both(said, "mesh")


def test_the_workdir_is_looked_at_and_written_by_the_first(said):
    assert both(said, "written") == {"by": 0} and both(said, "has") == [True, False]
    assert "has a run of another config (seed: 0 in the folder, 1 now)" in both(said, "other")


# ---- A whole run ----


def flags(root, base, workdir):
    """All stages in a few steps, in float32: adapters are fine-tuned, and the vision tower unlearns behind a mask."""
    yield from (f"--config={ROOT}/configs/llava.py:folder,all", f"--workdir={workdir}")
    fields = {"model.base": base, "model.dtype": "float32", "eval.protocol": "options", "eval.max_new_tokens": 4}
    fields |= {f"data.{part}": root / part for part in ("forget", "retain")}
    fields |= {f"{section}.{name}": value for section in ("train", "finetune.train") for name, value in SHORT.items()}
    fields |= {"train.batch_size.forget": 2, "train.batch_size.retain": 4, "train.steps": STEPS}
    fields |= {"finetune.train.batch_size.image": 4, "finetune.train.batch_size.text": 2}
    fields |= {"method.fisher_samples": 4, "method.fisher_chunk": 2, "method.augment_forget": 1}
    fields |= {"method.mask_keep": 0.5}  # where the ratios at its border are .1 % apart; by default .01 %, as rounding
    yield from (f"--config.{name}={value}" for name, value in fields.items())


def together(*args, **more):
    """Two processes, as Slurm would start them."""
    found = {"SLURM_JOB_ID": str(free_port() - SLURM_PORTS), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    return [start(*args, "--distributed", **found, SLURM_PROCID=str(i), SLURM_LOCALID=str(i), **more) for i in range(2)]


@pytest.fixture(scope="module")
def run(tiny_folder, request_folders, tmp_path_factory):
    """The metrics of one process alone, and of two that were stopped with what one made of the rest; their folders."""
    root = tmp_path_factory.mktemp("hosts")
    where = {name: list(flags(request_folders, tiny_folder, root / name)) for name in ("alone", "shared")}
    alone = start(*where["alone"])
    mesh = ("--config.mesh.data=1", "--config.mesh.fsdp=1", "--config.mesh.tensor=4")  # weights cut over both hosts
    first, second = together(*where["shared"], *mesh, HOLD=str(HOLD), JAX_NUM_CPU_DEVICES="2")
    try:
        lines = read_until(first, lambda line: line == {"stage": "train"}, HOLD)
        second.send_signal(signal.SIGTERM)  # one host hears it, both must stop
        heard = time.perf_counter()
        lines += outcome(first, 143)
        assert outcome(second, 143) == []
        stopping = time.perf_counter() - heard
    finally:
        first.kill()
        second.kill()
    (saved,) = [path.name for path in (root / "shared/train/checkpoints").iterdir()]
    resumed = outcome(start(*where["shared"]))
    return dict(alone=outcome(alone), before=lines, saved=int(saved), after=resumed, root=root, stopping=stopping)


def read_until(process, begins, count):
    """Lines up to `count` of them after the one that `begins`."""
    lines, left = [], None
    for text in process.stdout:
        if text.startswith("{"):
            lines.append(json.loads(text))
            left = count if begins(lines[-1]) else None if left is None else left - 1
            if left == 0:
                return lines
    raise AssertionError(process.stderr.read()[-3000:])


@pytest.mark.slow
def test_two_processes_stop_at_one_step_and_one_goes_on(run):
    assert HOLD < run["saved"] < STEPS
    assert run["before"][-1]["step"] == run["saved"] and run["after"][1]["step"] == run["saved"] + 1


@pytest.mark.slow
def test_between_the_signal_and_the_end_of_both_are_less_than_twenty_seconds(run):
    """A preempted TPU goes half a minute after the signal; the state is committed by then, and the processes gone."""
    assert run["stopping"] < 20


@pytest.mark.slow
def test_losses_are_those_of_one_process(run):
    lines = [line for line in run["before"] + run["after"][1:]]
    assert [line.get("step") for line in lines] == [line.get("step") for line in run["alone"]]
    for line, other in zip(lines, run["alone"], strict=True):
        kept = [name for name in other if name.endswith("loss") or name == "grad_norm"]
        np.testing.assert_allclose([line[n] for n in kept], [other[n] for n in kept], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_results_are_those_of_one_process(run):
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
def test_weights_are_those_of_one_process(run):
    from safetensors.numpy import load_file

    for name in ("vanilla", "retain_only", "unlearned"):
        ours, theirs = (load_file(run["root"] / where / name / "model.safetensors") for where in ("shared", "alone"))
        for tensor in theirs:
            apart, size = (np.linalg.norm(x) for x in (ours[tensor] - theirs[tensor], theirs[tensor]))
            assert apart <= 2e-4 * size, f"{name}: {tensor}"  # Adam's first steps are as long for a gradient of 1e-9
