"""Threads of XLA on the CPU."""

import os


def use_two() -> None:
    """Lets XLA have two threads if this process may use one core only; otherwise it has one per core.

    A compilation waits for tasks that it gives to the same threads. With one thread it can wait for ever: at commit
    1595e75, two of about ten test runs that were restricted to one core did. The environment variable NPROC, which
    XLA reads when it creates the devices, takes precedence if the user has set it.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if cores == 1:
        os.environ.setdefault("NPROC", "2")
