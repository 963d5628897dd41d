"""Memory that a process on the CPU frees is kept for its next step."""

import os
import platform
import subprocess
import sys
import types

import pytest

from vkd_jax import memory

# How many pages a step finds anew whose temporary memory is 256 MB; with an argument, after `keep_freed`.
STEPS = """
import resource, sys
from vkd_jax import memory
assert not sys.argv[1:] or memory.keep_freed()
import jax, jax.numpy as jnp
step = jax.jit(lambda x: (jnp.outer(x, x) @ jnp.outer(x, x)).sum())
x = jnp.ones(4096)
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step(x).block_until_ready()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left as they are")
def test_a_step_finds_the_memory_of_the_one_before():
    def faults(*arguments):
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.getcwd()}
        environment.pop("GLIBC_TUNABLES", None)
        command = [sys.executable, "-c", STEPS, *arguments]
        return int(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)

    assert faults() > 20_000  # pages of 4 KiB
    assert faults("keep") < 500


@pytest.mark.parametrize(
    ("platforms", "plugins", "tpu", "cpu"),
    [
        ("cpu", ["cuda"], True, True),  # what is asked for counts
        ("cuda,cpu", [], False, False),
        ("", [], False, True),
        (None, [], False, True),
        (None, ["cuda"], False, False),
        (None, [], True, False),
    ],
)
def test_accelerators_are_left_alone(monkeypatch, platforms, plugins, tpu, cpu):
    monkeypatch.setattr(memory, "jax", types.SimpleNamespace(config=types.SimpleNamespace(jax_platforms=platforms)))
    monkeypatch.setattr(memory.metadata, "entry_points", lambda group: plugins)
    monkeypatch.setattr(memory.importlib.util, "find_spec", lambda name: object() if tpu else None)
    assert memory._on_cpu() == cpu


def test_a_c_library_without_the_call_is_left_as_it_is(monkeypatch):
    monkeypatch.setattr(memory, "_on_cpu", lambda: True)
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: object())
    assert not memory.keep_freed()
