"""Threads of XLA: two on one core, and one per core otherwise."""

import os
import subprocess
import sys

import pytest

COUNT = """
import os, sys
if sys.argv[1] == "one":
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
import vkd_jax, jax
jax.devices()
names = [open(f"/proc/self/task/{task}/comm").read().strip() for task in os.listdir("/proc/self/task")]
print(names.count("tf_XLAEigen"), len(os.sched_getaffinity(0)), os.environ.get("NPROC"))
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system cannot restrict a process to one core")
@pytest.mark.parametrize(("cores", "given", "threads"), [("one", None, 2), ("one", "3", 3), ("all", None, None)])
def test_xla_has_at_least_two_threads_unless_the_user_decides(cores, given, threads):
    environment = {name: value for name, value in os.environ.items() if name != "NPROC"}
    environment |= {"NPROC": given} if given else {}
    command = [sys.executable, "-c", COUNT, cores]
    count, available, nproc = subprocess.check_output(command, env=environment, text=True).split()[-3:]
    if threads is None:
        threads, given = max(2, int(available)), given or ("2" if available == "1" else None)
    assert (int(count), nproc) == (threads, str(given or ("2" if cores == "one" else None)))
