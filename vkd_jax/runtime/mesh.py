"""The device mesh, and which axis of each weight lies on which axis of the mesh."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from vkd_jax.types import UserError

AXES = ("data", "fsdp", "tensor")
BATCH_SPEC = P(("data", "fsdp"))  # the axes of the mesh that rows of a batch lie over
Rules = Sequence[tuple[str, P]]  # anchored pattern over paths -> spec


def make_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A (data, fsdp, tensor) mesh over the first data * fsdp * tensor devices; one of them may be -1, "the rest".

    Args:
        data: copies of the model.
        fsdp: parts of each weight, which are gathered where it is used; rows of a batch lie over both.
        tensor: parts of each weight that compute apart.
        devices: None for those of this run.

    Raises:
        UserError: there are not so many devices.
    """
    shape = [data, fsdp, tensor]
    devices = jax.devices() if devices is None else devices
    count = len(devices)
    if any(size < 1 and size != -1 for size in shape) or shape.count(-1) > 1:
        raise UserError(f"config.mesh asks for {shape}: give numbers from 1, or once -1, which takes the rest.")
    if -1 in shape:
        shape[shape.index(-1)] = max(count // -int(np.prod(shape)), 1)
    wanted = int(np.prod(shape))
    if wanted > count:
        raise UserError(f"config.mesh asks for {shape} = {wanted} devices, but there are {count}; change config.mesh.")
    if jax.process_count() > 1 and wanted < count:
        raise UserError(
            f"config.mesh asks for {shape} = {wanted} devices of {count}: with several hosts it must take all; one of "
            "its fields may be -1, for the rest."
        )
    try:
        return jax.make_mesh(tuple(shape), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices[:wanted])
    except NotImplementedError as error:  # JAX cuts the axes of the chips' torus apart on some kinds of chips alone
        raise UserError(f"config.mesh: {shape} cannot be laid over these chips; try other sizes.") from error


def shards(mesh: Mesh) -> int:
    """Number of devices that a batch is sharded over."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch lie over data and fsdp together."""
    return NamedSharding(mesh, BATCH_SPEC)


def shard_rows(mesh: Mesh, arrays: Any) -> Any:
    """A tree of arrays with a row each, the same in every process, spread over the mesh as a batch is."""
    lying = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, lying, x.__getitem__), arrays)


def replicated(mesh: Mesh) -> NamedSharding:
    """A copy on every device."""
    return NamedSharding(mesh, P())


def param_shardings(mesh: Mesh, rules: Rules) -> Callable[[str, tuple[int, ...]], NamedSharding]:
    """path, shape -> sharding, by the first rule that matches the path."""

    def sharding(path: str, shape: tuple[int, ...]) -> NamedSharding:
        spec = next(spec for pattern, spec in rules if re.fullmatch(pattern, path))
        return NamedSharding(mesh, divisible_spec(mesh.shape, spec, shape))

    return sharding


def divisible_spec(mesh_shape: Mapping[str, int], spec: P, shape: tuple[int, ...]) -> P:
    """The spec for this shape: a dimension that its mesh axis does not divide stays whole."""
    return P(
        *(axis if axis and size % mesh_shape[axis] == 0 else None for axis, size in zip(spec, shape, strict=False))
    )


def check_rules(rules: Rules, paths: Iterable[str]) -> None:
    """Raises ValueError, naming all, if a path has no rule or a rule no path."""
    paths = list(paths)
    unmatched = [path for path in paths if not any(re.fullmatch(pattern, path) for pattern, _ in rules)]
    unused = [pattern for pattern, _ in rules if not any(re.fullmatch(pattern, path) for path in paths)]
    if unmatched or unused:
        raise ValueError(f"sharding rules: no rule for {unmatched}; rules that match nothing: {unused}")
