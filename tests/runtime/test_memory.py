"""The check that arrays fit in memory."""

import types

import jax
import pytest

from vkd_jax.runtime import memory
from vkd_jax.types import UserError


def device(platform, limit=None, process_index=0):
    stats = None if limit is None else {"bytes_limit": limit}
    return types.SimpleNamespace(platform=platform, process_index=process_index, memory_stats=lambda: stats)


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


def test_arrays_that_do_not_fit_are_refused_with_the_figure():
    memory.check(2**30, 2**30, "the rows", "ask for fewer")
    memory.check(2**60, None, "the rows", "ask for fewer")
    with pytest.raises(UserError, match=r"the rows need 1\.5 GiB of memory, and there are 1\.0 GiB; ask for fewer\."):
        memory.check(3 * 2**29, 2**30, "the rows", "ask for fewer")
