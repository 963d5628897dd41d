"""Tests of the allocator settings: freed memory is kept for the next step on the CPU."""

import os
import platform
import queue
import subprocess
import sys
import types
from pathlib import Path

import pytest

from vkd_jax.runs import worker_pool
from vkd_jax.runtime import malloc

# Prints the MiB of page faults of a step with 64 MiB of temporary memory; with an argument, after `keep_freed_memory`.
# Huge pages are disabled. The median of many steps is used, because small allocations fragment the freed memory and the
# heap grows during some of the first steps.
STEPS = """
import ctypes, resource, statistics, sys
from vkd_jax.runtime import malloc
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)
assert not sys.argv[1:] or malloc.keep_freed_memory()
import jax, jax.numpy as jnp
step = jax.jit(lambda x: jnp.outer(x, x) @ (jnp.outer(x, x) @ x[:, None]))
x = jnp.ones(4096)
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step(x).block_until_ready()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(int(statistics.median(faults() for _ in range(40))) * resource.getpagesize() >> 20)
"""
GLIBC = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is configured")


def page_faults(*arguments, **variables):
    environment = {
        name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES" and "MALLOC" not in name
    }
    environment |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).parents[2]), **variables}
    command = [sys.executable, "-c", STEPS, *arguments]
    return int(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)


@GLIBC
@pytest.mark.slow
def test_steps_reuse_the_memory_of_the_previous_step():
    assert page_faults() >= 60
    assert page_faults("keep") <= 4


@pytest.mark.parametrize(
    ("platforms", "plugins", "cpu"),
    [
        ("cpu", ["cuda"], True),  # the configured platform takes precedence
        ("cuda,cpu", [], False),
        ("tpu,cpu", [], False),
        ("", [], True),
        (None, [], True),
        (None, ["cuda"], False),
    ],
)
def test_only_cpu_processes_are_configured(monkeypatch, platforms, plugins, cpu):
    monkeypatch.setattr(malloc, "jax", types.SimpleNamespace(config=types.SimpleNamespace(jax_platforms=platforms)))
    monkeypatch.setattr(malloc.metadata, "entry_points", lambda group: plugins)
    monkeypatch.setattr(malloc.importlib.util, "find_spec", lambda name: None)
    assert malloc._on_cpu() == cpu


@pytest.mark.parametrize(
    ("libc", "variable"),
    [("glibc", ("MALLOC_ARENA_MAX", "2")), ("glibc", ("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")), ("musl", None)],
)
def test_other_libraries_and_user_settings_take_precedence(monkeypatch, libc, variable):
    def refuse(name):
        raise AssertionError("the C library was called")

    monkeypatch.setattr(malloc, "_on_cpu", lambda: True)
    monkeypatch.setattr(malloc.platform, "libc_ver", lambda: (libc, ""))
    monkeypatch.setattr(malloc.ctypes, "CDLL", refuse)
    if variable:
        monkeypatch.setenv(*variable)
    assert not malloc.keep_freed_memory()


def test_main_keeps_freed_memory():
    program = "import runpy; from vkd_jax.runtime import malloc; malloc.keep_freed_memory = lambda: print('kept'); "
    program += "runpy.run_module('vkd_jax.main', run_name='__main__')"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert process.stderr == "error: pass --config FILE and --workdir DIR.\n" and process.stdout == "kept\n"


def test_comparison_workers_keep_freed_memory(monkeypatch):
    shares, calls = queue.Queue(), []
    shares.put({0})
    monkeypatch.setattr(malloc, "keep_freed_memory", lambda: calls.append(True))
    monkeypatch.setattr(worker_pool.log, "setup", lambda: None)
    monkeypatch.setattr(worker_pool.os, "sched_setaffinity", lambda process, cores: None)
    worker_pool._start_worker(shares)
    assert calls == [True]
