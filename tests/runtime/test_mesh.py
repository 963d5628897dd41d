"""Tests of the device mesh and of the sharding rules."""

import jax
import pytest
from jax.sharding import PartitionSpec as P

from vkd_jax.runtime.mesh import AXES, check_rules, divisible_spec, make_mesh
from vkd_jax.types import UserError


def test_mesh_larger_than_the_devices_is_an_error():
    with pytest.raises(UserError, match="config.mesh"):
        make_mesh(data=jax.device_count() + 1)
    assert make_mesh(fsdp=-1).shape["fsdp"] == jax.device_count()


@pytest.mark.parametrize("sizes", [dict(data=0, fsdp=-1), dict(tensor=-2), dict(data=-1, fsdp=-1)])
def test_invalid_mesh_sizes_are_an_error(sizes):
    with pytest.raises(UserError, match="config.mesh asks for .*: sizes are at least 1"):
        make_mesh(**sizes)


def test_paths_without_rules_and_rules_without_paths_are_named():
    with pytest.raises(ValueError, match=r"'b/bias'.*'c'"):
        check_rules([("a/.*", P()), ("c", P())], ["a/kernel", "b/bias"])


def test_axis_that_does_not_divide_is_not_sharded():
    mesh = jax.sharding.AbstractMesh((1, 4, 2), AXES)
    assert divisible_spec(mesh.shape, P("fsdp", "tensor"), (8, 6)) == P("fsdp", "tensor")
    assert divisible_spec(mesh.shape, P("fsdp", "tensor"), (6, 8)) == P(None, "tensor")
    both = P(None, ("fsdp", "tensor"))
    assert divisible_spec(mesh.shape, both, (3, 24)) == both
    assert divisible_spec(mesh.shape, both, (3, 12)) == P(None, None)
