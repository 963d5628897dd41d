"""Settings of the C library's allocator for processes that compute on the CPU."""

import ctypes
import importlib.util
import os
import platform
from importlib import metadata

import jax

# Arguments of glibc's mallopt: (parameter, value), as in malloc.h.
KEEP = (
    (-1, -1),  # M_TRIM_THRESHOLD: the heap never shrinks
    (-4, 0),  # M_MMAP_MAX: all allocations are on the heap
    (-8, 1),  # M_ARENA_MAX: XLA's threads share one heap
)


def keep_freed_memory() -> bool:
    """Makes the C library keep freed memory if this process will compute on the CPU.

    XLA allocates all temporary memory of a step at once and frees it after the step. glibc returns allocations of this
    size to the system, which then has to map and clear each page again: up to a quarter of the time of a step. The kept
    memory is fragmented by small allocations and unavailable to other processes: at commit c0d5377,
    `--config configs/tiny.py` had a peak resident size of 2,114 and 2,147 MiB with it, and 2,049 and 2,052 MiB without.
    Environment variables of malloc (GLIBC_TUNABLES, MALLOC_...) take precedence.

    Call it before JAX creates its devices, since threads keep the heap that they started with.

    Returns:
        Whether freed memory is kept.
    """
    is_configured = "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "") or any(
        x.startswith("MALLOC_") for x in os.environ
    )
    if is_configured or platform.libc_ver()[0] != "glibc" or not _on_cpu():
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all([mallopt(parameter, value) for parameter, value in KEEP])


def _on_cpu() -> bool:
    """Whether JAX will compute on the CPU, without creating its devices."""
    if jax.config.jax_platforms:  # JAX sets it itself on a TPU
        return jax.config.jax_platforms == "cpu"
    return importlib.util.find_spec("jax_plugins") is None and not metadata.entry_points(group="jax_plugins")
