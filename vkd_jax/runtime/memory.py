"""The check that arrays fit in memory, before they are allocated.

The limits are what the hardware has, not what is free at the moment: a check gives the same result every time.
"""

import os
from collections.abc import Iterable
from pathlib import Path

import jax

from vkd_jax.types import UserError

GIB = 2**30
# Limits of the control group that a container runs in, of version 2 and 1.
_GROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def host_bytes() -> int:
    """Bytes of memory that this process may use: those of the machine, or of its container."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for path in map(Path, _GROUP_LIMITS):
        text = path.read_text().strip() if path.is_file() else ""
        limits += [int(text)] if text.isdigit() and int(text) else []
    return min(limits)


def device_bytes(devices: Iterable[jax.Device]) -> int | None:
    """Bytes of memory of this process's devices in total; None if they do not say, or if it has none of the devices.

    CPU devices share the memory of the host.
    """
    local = [device for device in devices if device.process_index == jax.process_index()]
    if any(device.platform == "cpu" for device in local):
        return host_bytes()
    limits = [(device.memory_stats() or {}).get("bytes_limit") for device in local]
    return sum(limits) if limits and None not in limits else None


def check(needed: int, limit: int | None, subject: str, remedy: str) -> None:
    """Checks that arrays fit in memory.

    Args:
        needed: bytes of the arrays.
        limit: bytes of memory, from `host_bytes` or `device_bytes`; None to check nothing.
        subject: the arrays in words, as the subject of a sentence in the plural.
        remedy: what to do if they do not fit.

    Raises:
        UserError: the arrays need more memory than there is.

    Example:
        >>> check(rows.nbytes, host_bytes(), "the rows of a batch", "lower train.batch_size")
    """
    if limit is not None and needed > limit:
        raise UserError(
            f"{subject} need {needed / GIB:,.1f} GiB of memory, and there are {limit / GIB:,.1f} GiB; {remedy}."
        )
