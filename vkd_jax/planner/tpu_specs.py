"""Published figures of TPUs, and the devices of topologies that need not exist."""

import dataclasses
import os
import re
from collections.abc import Sequence
from typing import Any

import jax

from vkd_jax import messages
from vkd_jax.planner import hlo
from vkd_jax.types import UserError


@dataclasses.dataclass(frozen=True)
class Tpu:
    """Published figures of a chip."""

    flops: float  # bfloat16 operations per second
    integers: float  # operations of 8-bit integers per second
    clock: float  # cycles per second of its cores, from `flops` and the number of multipliers
    hbm: float  # GiB
    usable: float  # GiB of it that a program may use: the smallest number in refusals of libtpu 0.0.42 and 0.0.52
    interconnect: float  # bytes per second that it sends over all links together


# https://cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}: peak compute per chip, HBM capacity, and inter-chip
# interconnect bandwidth per chip (in Gbit/s there: 2400, 1600, 4800, 3584).
TPUS = {
    "v4": Tpu(275e12, 275e12, 1.05e9, 32, 30.75, 300e9),
    "v5e": Tpu(197e12, 394e12, 1.5e9, 16, 15.75, 200e9),
    "v5p": Tpu(459e12, 918e12, 1.75e9, 95, 95.73, 600e9),
    "v6e": Tpu(918e12, 1836e12, 1.75e9, 32, 31.24, 448e9),
}


def topology_devices(topology: str) -> Sequence[jax.Device]:
    """Returns the devices of a topology, which need not exist.

    Raises:
        UserError: The TPU compiler is not installed, or there is no such topology.
    """
    from jax.experimental import topologies

    kind, _, shape = topology.partition(":")
    if kind not in TPUS or not re.fullmatch(r"\d+(x\d+)+", shape):
        raise UserError(f"--topology={topology}: give a chip ({messages.choices(TPUS)}) and a shape, such as v5e:2x2.")
    try:
        import libtpu  # noqa: F401
    except ImportError as error:
        raise UserError("libtpu, which holds the TPU compiler, is not installed: pip install '.[tpu]'.") from error
    # Many processes may compile at once, and none should ask the network what machine this is.
    os.environ.update(ALLOW_MULTIPLE_LIBTPU_LOAD="1", TPU_SKIP_MDS_QUERY="1")
    # What libtpu would ask a TPU host for; it logs warnings without them.
    os.environ.update(TPU_ACCELERATOR_TYPE="v5litepod-1", TPU_WORKER_HOSTNAMES="localhost", TPU_WORKER_ID="0")
    os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
    options: dict[str, Any] = {"chips_per_host_bounds": [1, 1, 1]} if set(shape) <= set("1x") else {}
    if kind == "v4":
        options["chip_config_name"] = "megacore"  # the two cores of a chip are one device, as in a run
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices
    except Exception as error:  # the runtime's own class has no public name
        why = hlo.Refusal.parse(str(error)).sentence
        raise UserError(f"--topology={topology}: the TPU compiler refuses it: {why}") from error
