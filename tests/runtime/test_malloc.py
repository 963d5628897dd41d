"""Memory that a process on the CPU frees is kept for its next step."""

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

# Steps with 64 MiB of temporary memory: how many of them are found anew by one, in pages of 4 KiB as huge ones are
# turned off; with an argument, after `keep_freed_memory`. The median of many: small things that live on split what a
# step has freed, so that the heap grows, at one step or another of the first dozen, until there is room beside them.
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
GLIBC = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left as they are")


def megabytes(*arguments, **more):
    given = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES" and "MALLOC" not in name}
    given |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).parents[2]), **more}
    command = [sys.executable, "-c", STEPS, *arguments]
    return int(subprocess.run(command, env=given, check=True, capture_output=True, text=True).stdout)


@GLIBC
@pytest.mark.slow
def test_a_step_finds_the_memory_of_the_one_before():
    assert megabytes() >= 60
    assert megabytes("keep") <= 4


@pytest.mark.parametrize(
    ("platforms", "plugins", "cpu"),
    [
        ("cpu", ["cuda"], True),  # what is asked for counts
        ("cuda,cpu", [], False),
        ("tpu,cpu", [], False),
        ("", [], True),
        (None, [], True),
        (None, ["cuda"], False),
    ],
)
def test_accelerators_are_left_alone(monkeypatch, platforms, plugins, cpu):
    monkeypatch.setattr(malloc, "jax", types.SimpleNamespace(config=types.SimpleNamespace(jax_platforms=platforms)))
    monkeypatch.setattr(malloc.metadata, "entry_points", lambda group: plugins)
    monkeypatch.setattr(malloc.importlib.util, "find_spec", lambda name: None)
    assert malloc._on_cpu() == cpu


@pytest.mark.parametrize(
    ("libc", "variable"),
    [("glibc", ("MALLOC_ARENA_MAX", "2")), ("glibc", ("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")), ("musl", None)],
)
def test_who_has_said_otherwise_is_left_alone(monkeypatch, libc, variable):
    def refuse(name):
        raise AssertionError("the C library was asked")

    monkeypatch.setattr(malloc, "_on_cpu", lambda: True)
    monkeypatch.setattr(malloc.platform, "libc_ver", lambda: (libc, ""))
    monkeypatch.setattr(malloc.ctypes, "CDLL", refuse)
    if variable:
        monkeypatch.setenv(*variable)
    assert not malloc.keep_freed_memory()


def test_a_run_keeps_it():
    program = "import runpy; from vkd_jax.runtime import malloc; malloc.keep_freed_memory = lambda: print('kept'); "
    program += "runpy.run_module('vkd_jax.main', run_name='__main__')"
    given = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", program], env=given, capture_output=True, text=True)
    assert done.stderr == "error: pass --config FILE and --workdir DIR.\n" and done.stdout == "kept\n"


def test_the_workers_of_a_comparison_keep_it(monkeypatch):
    shares, kept = queue.Queue(), []
    shares.put({0})
    monkeypatch.setattr(malloc, "keep_freed_memory", lambda: kept.append(True))
    monkeypatch.setattr(worker_pool.log, "setup", lambda: None)
    monkeypatch.setattr(worker_pool.os, "sched_setaffinity", lambda process, cores: None)
    worker_pool._start_worker(shares)
    assert kept == [True]
