"""The mesh, and the rules that say where each weight lies."""

import jax
import pytest
from jax.sharding import PartitionSpec as P

from vkd_jax.runtime.mesh import AXES, check_rules, divisible_spec, make_mesh
from vkd_jax.types import UserError


def test_more_devices_than_there_are_is_one_sentence():
    with pytest.raises(UserError, match="config.mesh"):
        make_mesh(data=jax.device_count() + 1)
    assert make_mesh(fsdp=-1).shape["fsdp"] == jax.device_count()


@pytest.mark.parametrize("sizes", [dict(data=0, fsdp=-1), dict(tensor=-2), dict(data=-1, fsdp=-1)])
def test_sizes_that_are_none_are_one_sentence(sizes):
    with pytest.raises(UserError, match="config.mesh asks for .*: sizes are at least 1"):
        make_mesh(**sizes)


def test_a_path_without_a_rule_and_a_rule_without_a_path_are_named():
    with pytest.raises(ValueError, match=r"'b/bias'.*'c'"):
        check_rules([("a/.*", P()), ("c", P())], ["a/kernel", "b/bias"])


def test_an_axis_that_does_not_divide_stays_whole():
    mesh = jax.sharding.AbstractMesh((1, 4, 2), AXES)
    assert divisible_spec(mesh.shape, P("fsdp", "tensor"), (8, 6)) == P("fsdp", "tensor")
    assert divisible_spec(mesh.shape, P("fsdp", "tensor"), (6, 8)) == P(None, "tensor")
