"""Stops training on SIGTERM and on Ctrl-C (SIGINT), at the same step in all processes."""

import signal
import threading
from collections.abc import Callable

import jax

from vkd_jax.runtime import interrupts, multihost


class Stopped(Exception):
    """Training stopped because SIGTERM or SIGINT arrived at this or another process.

    Args:
        step: the last step.
        saved: whether the state of this step is saved, so that the same command resumes there.
        number: the signal.

    Attributes:
        status: the exit status of a command that is stopped by the signal.
    """

    def __init__(self, step: int, saved: bool, number: int = signal.SIGTERM):
        state = "which is saved" if saved else "which is not saved"
        super().__init__(f"stopped at step {step}, {state}; run the same command again to resume")
        self.status = 128 + number


class StopSignals:
    """Context manager that records SIGTERM and SIGINT. Outside the main thread it records nothing.

    The value of the block is a function that returns whether to stop after the current step. It must be called once per
    step, by all processes. A signal may reach one process alone, and all must stop at the same step, so the processes
    exchange at each step whether one arrived. The exchange is asynchronous: each call returns the result of the
    exchange one step before, for which no process waits. A second SIGINT ends the process at once.

    JAX's preemption service is not used, because it takes SIGTERM from the whole program and reports it only once,
    either to Orbax or to this module.
    """

    number = signal.SIGTERM  # the signal that arrived first; another process may have received another one

    def __enter__(self) -> Callable[..., bool]:
        self._event, self._exchange = threading.Event(), None
        self._previous = {}
        if threading.current_thread() is threading.main_thread():
            numbers = [x for x in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(x) is not signal.SIG_IGN]
            self._previous = {number: signal.signal(number, self._record) for number in numbers}
        return self._should_stop

    def _record(self, number: int, _: object) -> None:
        if number == signal.SIGINT and self._event.is_set():
            interrupts.stop_at_once()
        if not self._event.is_set():
            self.number = number
        self._event.set()

    def _should_stop(self, now: bool = False) -> bool:
        """Returns whether to stop after this step; with `now`, waits for the exchange of this step."""
        if jax.process_count() == 1:
            return self._event.is_set()
        previous, self._exchange = self._exchange, multihost.any_process(self._event.is_set())
        result = self._exchange if now else previous
        return result is not None and bool(result)

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler or signal.SIG_DFL)
