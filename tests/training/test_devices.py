"""Eight devices, pretended by XLA on a CPU: every mesh trains alike, and the weights really are cut up."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    run = subprocess.run(
        [sys.executable, "-W", "error", ROOT / "tests/programs/devices.py", tmp_path_factory.mktemp("devices")],
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "8", "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout)
    assert found["devices"] == 8
    return found


def assert_same_losses(a, b):
    assert [line["step"] for line in a] == [line["step"] for line in b]
    for x, y in zip(a, b, strict=True):
        np.testing.assert_allclose([x["image_loss"], x["grad_norm"]], [y["image_loss"], y["grad_norm"]], rtol=1e-5)


@pytest.mark.parametrize("mesh", ["8,1,1", "1,8,1", "1,1,8", "2,2,2"])
def test_every_mesh_gives_the_losses_of_one_device(found, mesh):
    one = found["meshes"]["1,1,1"]["metrics"]
    assert len({line["image_loss"] for line in one}) == len(one) == 3
    assert_same_losses(found["meshes"][mesh]["metrics"], one)


def test_weights_are_cut_over_fsdp_and_tensor_and_copied_over_data(found):
    share = {mesh: result["share"] for mesh, result in found["meshes"].items()}
    assert share["1,1,1"] == share["8,1,1"] == 1.0
    assert max(share["1,8,1"], share["1,1,8"], share["2,2,2"]) < 0.5  # the rest are norms and biases
    cut = found["meshes"]["2,2,2"]["cut"]
    assert {"language_model/blocks/mlp/up/kernel", "vision_tower/blocks/0/attn/q/kernel"} <= set(cut)
    assert all(path.endswith(("kernel", "embedding")) for path in cut)


def test_every_device_computes_its_own_rows_alone(found):
    """Left to itself XLA would follow the weights, cut over fsdp, and compute all rows on each device."""
    flops = {mesh: result["flops"] / found["meshes"]["1,1,1"]["flops"] for mesh, result in found["meshes"].items()}
    assert flops["8,1,1"] == pytest.approx(1 / 8, rel=0.2)
    assert flops["1,8,1"] == pytest.approx(flops["8,1,1"], rel=0.1)
    assert flops["2,2,2"] < 0.3  # a part of what is done twice, over tensor, cannot be cut


@pytest.mark.parametrize("mesh", ["8,1,1", "1,8,1", "1,1,8", "2,2,2"])
def test_trained_weights_and_moments_lie_where_the_weights_lay(found, mesh):
    assert found["meshes"][mesh]["odd"] == []


def test_a_run_on_eight_devices_goes_on_on_one(found):
    one = found["meshes"]["1,1,1"]["metrics"]
    assert_same_losses(found["moved"], one[1:])


def test_a_batch_that_does_not_divide_over_the_devices_is_refused(found):
    assert found["refused"] == "train.batch_size.image=6 does not divide over 4 devices; use a multiple of 4."
