"""The check that arrays fit in memory, before they are allocated.

The limits are what the hardware has, not what is free at the moment: a check gives the same result every time.
"""

import contextlib
import os
import resource
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vkd_jax.types import UserError

Allocate = Callable[[tuple[int, ...], Any], np.ndarray]  # (shape, dtype) -> an array whose values are arbitrary

GIB = 2**30
CACHE_BYTES = (
    4 * GIB
)  # budget of the host's memory for each of a set's caches; larger ones go to files, see `allocator`
# Limits of the control group that a container runs in, of version 2 and 1.
_GROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def host_bytes() -> int:
    """Bytes of memory that this process may use: those of the machine, or of its container."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for path in map(Path, _GROUP_LIMITS):
        text = path.read_text().strip() if path.is_file() else ""
        limits += [int(text)] if text.isdigit() and int(text) else []
    return min(limits)


@contextlib.contextmanager
def growth_limit(size: int) -> Iterator[None]:
    """Context manager in which the process can map at most `size` further bytes, for short blocks of the main thread.

    Raises:
        MemoryError: the block needs more.
    """
    pages = Path("/proc/self/statm")  # of Linux; elsewhere there is no limit
    if not pages.is_file() or threading.current_thread() is not threading.main_thread():
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = int(pages.read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE") + size
    resource.setrlimit(resource.RLIMIT_AS, (most if soft == resource.RLIM_INFINITY else min(most, soft), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


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


def allocator(needed: int, budget: int, subject: str, remedy: str) -> Allocate:
    """Chooses where cached arrays are held: in memory up to a budget, and in memory-mapped files past it.

    The files are in the folder of temporary files (TMPDIR), and have no name: they end with the process, however it
    ends. The values, and all that is computed from them, are the same bits either way.

    Args:
        needed: bytes of all arrays that will be allocated.
        budget: the largest number of bytes in memory.
        subject: as of `check`.
        remedy: as of `check`.

    Returns:
        A function that allocates an array.

    Raises:
        UserError: the arrays fit neither in memory nor on the disk.

    Example:
        >>> allocate = allocator(4000, CACHE_BYTES, "cached values", "use fewer images")
        >>> allocate((1000,), np.float32).nbytes
        4000
    """
    if needed <= budget:
        check(needed, host_bytes(), subject, remedy)
        return np.empty
    folder = tempfile.gettempdir()
    if needed > (free := shutil.disk_usage(folder).free):
        raise UserError(
            f"{subject} need {needed / GIB:,.1f} GiB, more than the {budget / GIB:,.1f} GiB that are held in memory, "
            f"and the folder of temporary files {folder} has {free / GIB:,.1f} GiB free; {remedy}, or set TMPDIR to a "
            "folder with more space."
        )
    return _mapped


def _mapped(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Allocates an array in a file without a name."""
    if 0 in shape:  # nothing can be mapped
        return np.empty(shape, dtype)
    with tempfile.TemporaryFile(prefix="vkd-") as file:
        return np.asarray(np.memmap(file, dtype, "w+", shape=shape))


def program_bytes(program: jax.stages.Compiled) -> int:
    """Returns the memory of a program on one device, in bytes: arguments, outputs and temporary buffers."""
    memory = program.memory_analysis()
    arguments_and_outputs = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return arguments_and_outputs + memory.temp_size_in_bytes


def check_program(function: Callable, *args: Any, devices: Iterable[jax.Device], subject: str, remedy: str) -> None:
    """Checks that a call of a jitted function fits in memory, by the compiler's account of all its arrays.

    Data decides the shapes: the length of a question, the pixels of an image. The compiled program is the one that the
    call runs, so nothing is compiled twice.

    Args:
        function: the jitted function.
        *args: its arguments.
        devices: the devices that it runs on.
        subject: as of `check`.
        remedy: as of `check`.

    Raises:
        UserError: the call needs more memory than there is.

    Example:
        >>> check_program(step, state, batch, devices=mesh.devices.flat, subject="training steps", remedy="...")
    """
    devices = list(devices)
    with exhausted():
        program = function.lower(*args).compile()
    local = sum(device.process_index == jax.process_index() for device in devices)
    check(program_bytes(program) * local, device_bytes(devices), subject, remedy)


@contextlib.contextmanager
def exhausted() -> Iterator[None]:
    """Turns an allocation that failed, on the host, on a device or in the compiler, into a `UserError`."""
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = " ".join(str(error).split())[:200] or "an allocation failed"
        raise UserError(
            f"the memory is exhausted ({reason}); decrease the batch sizes (train.batch_size, eval.batch_size), or use "
            "shorter texts and smaller images."
        ) from error
