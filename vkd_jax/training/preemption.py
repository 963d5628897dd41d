"""Stopping on SIGTERM at a step on which all processes agree."""

import signal
import threading
from collections.abc import Callable

import jax

from vkd_jax.runtime import multihost


class Stopped(Exception):
    """SIGTERM arrived, here or at another host.

    The state of `step` is on disk if it is `saved`, and the same command goes on from there.
    """

    def __init__(self, step: int, saved: bool):
        where = "which is saved" if saved else "where nothing is saved"
        super().__init__(f"stopped at step {step}, {where}; run the same command again to go on")


class Sigterm:
    """Hears SIGTERM while the block runs; outside the main thread there are no signals to hear.

    Of several processes one may hear it alone, and all must stop at one step. So each says at each step whether it did,
    and what all said is looked at a step later, when it has long arrived: nobody waits. (JAX's own preemption service
    would take SIGTERM from the rest of the program, too, and answers only once, be it Orbax or us who asked.)
    """

    def __enter__(self) -> Callable[..., bool]:
        self._event, self._asked = threading.Event(), None
        self._main = threading.current_thread() is threading.main_thread()
        if self._main:
            self._previous = signal.signal(signal.SIGTERM, lambda *_: self._event.set())
        return self._heard

    def _heard(self, now: bool = False) -> bool:
        """Whether to stop after this step; `now` waits for what the others say, at the end."""
        if jax.process_count() == 1:
            return self._event.is_set()
        before, self._asked = self._asked, multihost.any_process(self._event.is_set())
        asked = self._asked if now else before
        return asked is not None and bool(asked)

    def __exit__(self, *_) -> None:
        if self._main:
            signal.signal(signal.SIGTERM, self._previous)
