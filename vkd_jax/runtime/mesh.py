"""The device mesh, and the rules that shard each weight over its axes."""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from vkd_jax.types import UserError

AXES = ("data", "fsdp", "tensor")
BATCH_SPEC = P(("data", "fsdp"))  # the rows of a batch are sharded over both axes
Rules = Sequence[tuple[str, P]]  # regular expression that matches a whole path -> spec


def make_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Makes a (data, fsdp, tensor) mesh over the first data * fsdp * tensor devices.

    Args:
        data: the number of replicas of the model.
        fsdp: the number of shards of each weight, gathered where it is used; batches are sharded over data and fsdp.
        tensor: the number of shards of each weight that compute separately.
        devices: the devices to use; None for all devices of this run.

    One of the sizes may be -1: it takes the remaining devices.

    Raises:
        UserError: there are too few devices, or a size is invalid.

    Example:
        >>> mesh = make_mesh(fsdp=-1)
    """
    shape = [data, fsdp, tensor]
    devices = jax.devices() if devices is None else devices
    count = len(devices)
    if any(size < 1 and size != -1 for size in shape) or shape.count(-1) > 1:
        raise UserError(
            f"config.mesh asks for {shape}: sizes are at least 1, and one of them may be -1 for the remaining devices."
        )
    if -1 in shape:
        shape[shape.index(-1)] = max(count // -int(np.prod(shape)), 1)
    wanted = int(np.prod(shape))
    if wanted > count:
        raise UserError(f"config.mesh asks for {shape} = {wanted} devices, but there are {count}; change config.mesh.")
    if jax.process_count() > 1 and wanted < count:
        raise UserError(
            f"config.mesh asks for {shape} = {wanted} devices of {count}: with several hosts the mesh must use all; "
            "one size may be -1 for the remaining devices."
        )
    try:
        return jax.make_mesh(tuple(shape), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices[:wanted])
    except NotImplementedError as error:  # JAX splits the axes of the torus only on some kinds of chips
        raise UserError(f"config.mesh: {shape} does not fit the topology of these chips; try other sizes.") from error


def shards(mesh: Mesh) -> int:
    """Number of devices that a batch is sharded over."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch: rows over data and fsdp together."""
    return NamedSharding(mesh, BATCH_SPEC)


def shard_rows(mesh: Mesh, arrays: Any) -> Any:
    """Shards a tree of arrays [rows, ...], which is the same in every process, as a batch."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, sharding, x.__getitem__), arrays)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that is replicated on every device."""
    return NamedSharding(mesh, P())


def param_shardings(mesh: Mesh, rules: Rules) -> Callable[[str, tuple[int, ...]], NamedSharding]:
    """Returns a function (path, shape) -> sharding that applies the first rule that matches the path."""

    def sharding(path: str, shape: tuple[int, ...]) -> NamedSharding:
        spec = next(spec for pattern, spec in rules if re.fullmatch(pattern, path))
        return NamedSharding(mesh, divisible_spec(mesh.shape, spec, shape))

    return sharding


def divisible_spec(mesh_shape: Mapping[str, int], spec: P, shape: tuple[int, ...]) -> P:
    """The spec for this shape: a dimension that its mesh axes do not divide is not sharded."""

    def divides(axes: str | tuple[str, ...], size: int) -> bool:
        return size % math.prod(mesh_shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes)) == 0

    return P(*(axes if axes and divides(axes, size) else None for axes, size in zip(spec, shape, strict=False)))


def check_rules(rules: Rules, paths: Iterable[str]) -> None:
    """Checks that every path has a rule and every rule has a path.

    Raises:
        ValueError: some do not; the message lists all of them.
    """
    paths = list(paths)
    unmatched = [path for path in paths if not any(re.fullmatch(pattern, path) for pattern, _ in rules)]
    unused = [pattern for pattern, _ in rules if not any(re.fullmatch(pattern, path) for path in paths)]
    if unmatched or unused:
        raise ValueError(f"sharding rules: no rule for {unmatched}; rules that match nothing: {unused}")
