"""Evaluation on eight devices, pretended by XLA on a CPU, and by two processes: the records of one device."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
NUMBERS = ("scores", "answer_nll", "probability", "paraphrase_nll", "perturbed_nll", "truth_ratio")


def start(*args, devices=1):
    return subprocess.Popen(
        [sys.executable, "-W", "error", ROOT / "tests/programs/evaluate_devices.py", *map(str, args)],
        env=os.environ | {"JAX_NUM_CPU_DEVICES": str(devices), "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def outcome(process):
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err[-3000:]
    return json.loads(out.splitlines()[-1])


@pytest.fixture(scope="module")
def alone():
    return outcome(start(devices=8))


@pytest.fixture(scope="module")
def together():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = [start(number, port) for number in range(2)]
    try:
        return [outcome(process) for process in processes]
    finally:
        for process in processes:
            process.kill()


def assert_same(records, expected):
    assert [list(record) for record in records] == [list(record) for record in expected]
    for record, other in zip(records, expected, strict=True):
        for key in record:
            if key in NUMBERS:
                np.testing.assert_allclose(record[key], other[key], atol=1e-4, rtol=1e-4)
            else:
                assert record[key] == other[key]


def test_the_records_are_worth_comparing(alone):
    records = alone["1,1,1"]["records"]
    assert alone["1,1,1"]["batch"] == 3 and len(records) == 23 + 11  # 23 questions, 11 of them by two protocols
    for kind in ("letter", "generation"):
        assert len({r["prediction"] for r in records if r["protocol"] == kind}) > 3
    assert len({r["prediction"] for r in records if r["protocol"] == "options"}) > 1
    assert len({round(r["answer_nll"], 3) for r in records if "answer_nll" in r}) > 15


def test_eight_devices_give_the_records_of_one(alone):
    assert (alone["2,2,2"]["batch"], alone["2,2,2"]["held"]) == (4, 1)  # three rows, rounded up to the shards
    assert_same(alone["2,2,2"]["records"], alone["1,1,1"]["records"])


def test_each_of_two_processes_has_all_records(alone, together):
    for found in together:
        assert (found["devices"], found["mine"], found["batch"], found["held"]) == (4, 2, 4, 1)
        assert_same(found["records"], alone["1,1,1"]["records"])
