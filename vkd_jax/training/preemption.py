"""Stops training on SIGTERM, at the same step in all processes."""

import signal
import threading
from collections.abc import Callable

import jax

from vkd_jax.runtime import multihost


class Stopped(Exception):
    """Training stopped because SIGTERM arrived at this or another process.

    Args:
        step: the last step.
        saved: whether the state of this step is saved, so that the same command resumes there.
    """

    def __init__(self, step: int, saved: bool):
        state = "which is saved" if saved else "which is not saved"
        super().__init__(f"stopped at step {step}, {state}; run the same command again to resume")


class Sigterm:
    """Context manager that records SIGTERM. Outside the main thread it records nothing.

    The value of the block is a function that returns whether to stop after the current step. It must be called once per
    step, by all processes. SIGTERM may reach one process alone, and all must stop at the same step, so the processes
    exchange at each step whether it arrived. The exchange is asynchronous: each call returns the result of the exchange
    one step before, for which no process waits.

    JAX's preemption service is not used, because it takes SIGTERM from the whole program and reports it only once,
    either to Orbax or to this module.
    """

    def __enter__(self) -> Callable[..., bool]:
        self._event, self._exchange = threading.Event(), None
        self._main = threading.current_thread() is threading.main_thread()
        if self._main:
            self._previous = signal.signal(signal.SIGTERM, lambda *_: self._event.set())
        return self._should_stop

    def _should_stop(self, now: bool = False) -> bool:
        """Returns whether to stop after this step; with `now`, waits for the exchange of this step."""
        if jax.process_count() == 1:
            return self._event.is_set()
        previous, self._exchange = self._exchange, multihost.any_process(self._event.is_set())
        result = self._exchange if now else previous
        return result is not None and bool(result)

    def __exit__(self, *_) -> None:
        if self._main:
            signal.signal(signal.SIGTERM, self._previous)
