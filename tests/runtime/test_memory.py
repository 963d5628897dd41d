"""The check that arrays fit in memory."""

import resource
import sys
import types

import jax
import numpy as np
import pytest

from vkd_jax.runtime import memory
from vkd_jax.types import UserError


def device(platform, limit=None, process_index=0):
    stats = None if limit is None else {"bytes_limit": limit}
    return types.SimpleNamespace(platform=platform, process_index=process_index, memory_stats=lambda: stats)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says how much a process has mapped")
def test_a_block_that_allocates_more_than_its_limit_fails_and_the_limit_ends():
    before = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(MemoryError), memory.growth_limit(2**26):
        bytes(2**30)
    assert resource.getrlimit(resource.RLIMIT_AS) == before and len(bytes(2**27)) == 2**27


def test_memory_is_that_of_the_host_or_of_the_devices():
    assert memory.device_bytes(jax.devices()) == memory.host_bytes() > 2**28
    assert memory.device_bytes([device("tpu", 3), device("tpu", 4)]) == 7
    assert memory.device_bytes([device("tpu", 3), device("tpu")]) is None
    elsewhere = device("cpu", process_index=1)  # of another process of a run, which checks it itself
    assert memory.device_bytes([elsewhere]) is None


def test_a_container_may_have_less_memory(tmp_path, monkeypatch):
    group = tmp_path / "memory.max"
    monkeypatch.setattr(memory, "_GROUP_LIMITS", [str(group)])
    for text, limited in (("1048576\n", True), ("max\n", False)):
        group.write_text(text)
        assert (memory.host_bytes() == 2**20) == limited


EXHAUSTED = (
    MemoryError(),
    MemoryError("Unable to allocate 9 GiB"),
    jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: x"),
)


@pytest.mark.parametrize("error", [*EXHAUSTED, jax.errors.JaxRuntimeError("INTERNAL: x"), ValueError("x")], ids=repr)
def test_an_allocation_that_fails_is_one_sentence(error):
    expected = UserError if error in EXHAUSTED else type(error)
    with pytest.raises(expected, match=r"^the memory is exhausted \(.+\); decrease" if expected is UserError else "x"):
        with memory.exhausted():
            raise error


def test_a_program_is_refused_before_it_runs_and_compiled_once(monkeypatch):
    traced = []
    double = jax.jit(lambda x: traced.append(x) or x * 2)
    x = np.ones(1000, np.float32)
    options = dict(devices=jax.devices()[:1], subject="arrays", remedy="ask for fewer")
    memory.check_program(double, x, **options)
    assert double(x)[0] == 2 and len(traced) == 1
    monkeypatch.setattr(memory, "device_bytes", lambda devices: 7_999)
    with pytest.raises(UserError, match=r"^arrays need 0\.0 GiB of memory, .*; ask for fewer\.$"):
        memory.check_program(double, x, **options)


def test_arrays_that_do_not_fit_are_refused_with_the_figure():
    memory.check(2**30, 2**30, "the rows", "ask for fewer")
    memory.check(2**60, None, "the rows", "ask for fewer")
    with pytest.raises(UserError, match=r"the rows need 1\.5 GiB of memory, and there are 1\.0 GiB; ask for fewer\."):
        memory.check(3 * 2**29, 2**30, "the rows", "ask for fewer")
