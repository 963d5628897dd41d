"""The memory of a process that computes on the CPU."""

import ctypes
import importlib.util
import os
import platform
from importlib import metadata

import jax

# Of glibc's mallopt: (parameter, value), in the order of malloc.h.
KEEP = (
    (-1, -1),  # M_TRIM_THRESHOLD: the heap never shrinks
    (-4, 0),  # M_MMAP_MAX: and everything lies in it
    (-8, 1),  # M_ARENA_MAX: in the one heap, also what XLA's own threads ask for
)


def keep_freed_memory() -> bool:
    """Lets the C library keep what is freed, where this process will compute on the CPU; whether it does.

    XLA asks for all temporary memory of a step at once, at each step, and frees it afterwards. glibc gives what is that
    large back to the system, which then finds and clears each page anew: as much as a fourth of a step's time.
    What is kept can be used again by this process alone, and small things that live on split it: at commit c0d5377
    `--config configs/tiny.py` took at most 2,114 and 2,147 MiB of resident memory, and 2,049 and 2,052 without.
    Who has set up malloc by its environment variables (GLIBC_TUNABLES, MALLOC_...) gets what they say.

    To be called before anything asks JAX for a device, since threads keep the heap that they began with.
    """
    told = "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "") or any(x.startswith("MALLOC_") for x in os.environ)
    if told or platform.libc_ver()[0] != "glibc" or not _on_cpu():
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all([mallopt(parameter, value) for parameter, value in KEEP])


def _on_cpu() -> bool:
    """Whether JAX is told to compute on the CPU, or can do nothing else; no device is asked for."""
    if jax.config.jax_platforms:  # which JAX itself sets, where there is a TPU
        return jax.config.jax_platforms == "cpu"
    return importlib.util.find_spec("jax_plugins") is None and not metadata.entry_points(group="jax_plugins")
