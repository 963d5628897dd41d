"""TPUs: what is published of each kind, and the chips of a topology that need not be there."""

import dataclasses
import os
import re
from collections.abc import Sequence
from typing import Any

import jax

from vkd_jax.planner import hlo
from vkd_jax.types import UserError


@dataclasses.dataclass(frozen=True)
class Chip:
    """A chip's published figures."""

    flops: float  # bfloat16 a second
    integers: float  # operations of 8 bits a second
    clock: float  # cycles a second of its cores: what `flops` is by its count of multipliers
    hbm: float  # GiB
    usable: float  # GiB of it that a program may use: the least that libtpu 0.0.42's and 0.0.52's refusals say
    bandwidth: float  # bytes a second, of its memory
    interconnect: float  # bytes a second that it sends, all links together


# https://cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}: peak compute per chip, HBM capacity and bandwidth, and
# inter-chip interconnect bandwidth per chip (in Gbit/s there: 2400, 1600, 4800, 3584).
CHIPS = {
    "v4": Chip(275e12, 275e12, 1.05e9, 32, 30.75, 1228e9, 300e9),
    "v5e": Chip(197e12, 394e12, 1.5e9, 16, 15.75, 819e9, 200e9),
    "v5p": Chip(459e12, 918e12, 1.75e9, 95, 95.73, 2765e9, 600e9),
    "v6e": Chip(918e12, 1836e12, 1.75e9, 32, 31.24, 1640e9, 448e9),
}


def devices(topology: str) -> Sequence[jax.Device]:
    """The chips of a topology, which need not be there.

    Raises:
        UserError: there is no TPU compiler, or no such topology.
    """
    from jax.experimental import topologies

    kind, _, shape = topology.partition(":")
    if kind not in CHIPS or not re.fullmatch(r"\d+(x\d+)+", shape):
        raise UserError(f"--topology={topology}: give a chip ({', '.join(CHIPS)}) and a shape, such as v5e:2x2.")
    try:
        import libtpu  # noqa: F401
    except ImportError as error:
        raise UserError(
            "libtpu, which holds the TPU compiler, is not installed: pip install 'vkd_jax[tpu]'."
        ) from error
    # Many processes may compile at once, and none asks the network what machine this is.
    os.environ.update(ALLOW_MULTIPLE_LIBTPU_LOAD="1", TPU_SKIP_MDS_QUERY="1")
    # What it would find out from a TPU's host, lest it complains that there is none.
    os.environ.update(TPU_ACCELERATOR_TYPE="v5litepod-1", TPU_WORKER_HOSTNAMES="localhost", TPU_WORKER_ID="0")
    os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
    options: dict[str, Any] = {"chips_per_host_bounds": [1, 1, 1]} if set(shape) <= set("1x") else {}
    if kind == "v4":
        options["chip_config_name"] = "megacore"  # the two cores of a chip are one device, as in a run
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices
    except Exception as error:  # the runtime's own, which no public name has
        why = hlo.Refusal.parse(str(error)).sentence
        raise UserError(f"--topology={topology}: the TPU compiler refuses it: {why}") from error
