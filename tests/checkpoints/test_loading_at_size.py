"""Loading a model of 4.5 GB onto eight devices, simulated by XLA on a CPU: values, memory and bytes read."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GB, GIB = 10**9, 2**30

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="memory is measured through Linux' /proc"),
]


def available() -> int:
    return 1024 * int(re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())[1])


def load(folder, data, fsdp):
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"}
    run = subprocess.run(
        [sys.executable, "-W", "error", ROOT / "tests/programs/load_at_size.py", folder, str(data), str(fsdp)],
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    print(run.stdout)  # pytest -s shows the numbers
    return json.loads(run.stdout)


def test_a_large_model_is_read_once_and_without_a_second_copy(tmp_path):
    if shutil.disk_usage(tmp_path).free < 6 * GB:
        pytest.skip(f"less than 6 GB are free on the disk of {tmp_path}")
    if available() < 8 * GB:
        pytest.skip("less than 8 GB of memory are free")
    folder = tmp_path / "model"
    folder.mkdir()
    try:
        sharded, replicated = load(folder, 1, 8), load(folder, 2, 4)
        assert len(list(folder.glob("*.safetensors"))) == 4
    finally:
        shutil.rmtree(folder)
    assert sharded["devices"] == replicated["devices"] == 8
    assert sharded["parameters"] == replicated["parameters"] > 4 * GIB
    assert sharded["target"] < 1.01 * sharded["parameters"]
    assert replicated["target"] > 1.99 * replicated["parameters"]
    for loaded in (sharded, replicated):
        assert loaded["checked"] == 7 * 8 * 500
        # Replicas on CPU devices share memory: twice the devices do not need twice the peak.
        assert loaded["peak"] <= loaded["parameters"] + GIB
        assert loaded["read"] < 1.01 * loaded["files"]
