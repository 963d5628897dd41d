"""Training on eight simulated CPU devices: all meshes give the same losses, and weights are sharded."""

import numpy as np
import pytest


@pytest.fixture
def training(eight_devices):
    return eight_devices["training"]


def assert_same_losses(a, b):
    assert [line["step"] for line in a] == [line["step"] for line in b]
    for x, y in zip(a, b, strict=True):
        np.testing.assert_allclose([x["image_loss"], x["grad_norm"]], [y["image_loss"], y["grad_norm"]], rtol=1e-5)


@pytest.mark.parametrize("mesh", ["1,8,1", "2,2,2"])
def test_every_mesh_gives_the_losses_of_one_device(training, mesh):
    one = training["meshes"]["1,1,1"]["metrics"]
    assert len({line["image_loss"] for line in one}) == len(one) == 3
    assert_same_losses(training["meshes"][mesh]["metrics"], one)


def test_each_simulated_device_is_used(training):
    assert training["devices"] == 8


def test_weights_are_sharded_over_fsdp_and_tensor_and_replicated_over_data(training):
    share = {mesh: result["share"] for mesh, result in training["meshes"].items()}
    assert share["1,1,1"] == 1.0
    assert share["1,8,1"] < 0.4 and 0.25 < share["2,2,2"] < 0.5  # the rest are norms and biases
    sharded = training["meshes"]["2,2,2"]["cut"]
    assert {"language_model/blocks/mlp/up/kernel", "vision_tower/blocks/0/attn/q/kernel"} <= set(sharded)
    assert all(path.endswith(("kernel", "embedding")) for path in sharded)


def test_every_device_computes_only_its_rows(training):
    """Without sharding constraints XLA follows the weights, sharded over fsdp, and computes all rows on each device."""
    flops = {mesh: result["flops"] for mesh, result in training["meshes"].items()}
    assert flops["1,8,1"] / flops["1,1,1"] == pytest.approx(1 / 8, rel=0.2)
    assert flops["2,2,2"] / flops["1,1,1"] < 0.3  # some computations are replicated over tensor


@pytest.mark.parametrize("mesh", ["1,8,1", "2,2,2"])
def test_trained_weights_and_moments_keep_the_sharding_of_the_weights(training, mesh):
    assert training["meshes"][mesh]["odd"] == []


def test_the_share_of_a_mask_is_found_on_the_devices_where_the_values_are(training):
    """No value leaves its device, and the mask is sharded as the weights are."""
    selection = training["selection"]
    assert selection["found"] == selection["sorted"] and len(set(selection["found"])) > 2
    assert not selection["gathered"] and selection["mask_shard"] == [4, 8] and selection["mask_is_right"]


def test_a_run_on_eight_devices_resumes_on_one(training):
    one = training["meshes"]["1,1,1"]["metrics"]
    assert_same_losses(training["moved"], one[1:])


def test_a_batch_that_does_not_divide_over_the_devices_is_refused(training):
    problem = "6 examples do not divide over 4 devices. Give a multiple of 4."
    assert training["refused"] == f"train.batch_size.image: {problem}"


def test_two_processes_stop_at_the_same_step_and_resume_with_the_losses_of_one_device(training, two_processes):
    """Only process 0 receives the signal and logs; each weight is sharded over both processes."""
    first, second = (results["training"] for results in two_processes)
    assert first["saved"] == second["saved"] and first["resumed"] and not second["resumed"]
    (saved,) = first["saved"]
    assert saved + len(first["resumed"]) == 3
    assert_same_losses(first["resumed"], training["meshes"]["1,1,1"]["metrics"][saved:])
