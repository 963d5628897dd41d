"""Ctrl-C in all commands: the first one stops cleanly with one sentence and status 130, a second one immediately.

Python raises `KeyboardInterrupt` wherever the program is. In a destructor or a callback of a library it is dropped, so
it is raised again every few seconds until the command ends. A training loop and a pool of workers handle the signal
themselves while they run: see `training.preemption` and `runs.worker_pool`.
"""

import contextlib
import functools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import NoReturn, ParamSpec

STATUS = 128 + signal.SIGINT
REPEAT_SECONDS = 3.0  # between two exceptions; cleanup takes less
SENTENCE = "stopped by Ctrl-C; run the same command again, and what is complete is not computed again"

P = ParamSpec("P")


def stop_at_once(*_: object) -> NoReturn:
    """Ends the process without cleanup, as a power cut would: files are written atomically."""
    cursor = b"\x1b[?25h" if os.isatty(2) else b""  # a progress bar hides the cursor of a terminal
    os.write(2, cursor + b"stopped at once\n")  # not through sys.stderr, whose buffer the signal may have interrupted
    os._exit(STATUS)


def stop_imports() -> None:
    """Lets Ctrl-C end a command at once while its modules are imported, when there is nothing to clean up."""
    if _takes_signals():
        signal.signal(signal.SIGINT, stop_at_once)


def interruptible(command: Callable[P, int]) -> Callable[P, int]:
    """Decorates the function of a command that returns its exit status: Ctrl-C ends it with one sentence and 130."""

    @functools.wraps(command)
    def run(*args: P.args, **options: P.kwargs) -> int:
        if not _takes_signals():
            return command(*args, **options)
        interrupted = threading.Event()

        def interrupt(number: int, _: object) -> NoReturn:
            if number == signal.SIGINT and interrupted.is_set():
                stop_at_once()
            interrupted.set()
            signal.setitimer(signal.ITIMER_REAL, REPEAT_SECONDS)
            raise KeyboardInterrupt

        def dropped(error: "sys.UnraisableHookArgs") -> None:
            """Says nothing of an interrupt that Python drops in a destructor or a callback: it is raised again."""
            if not (interrupted.is_set() and issubclass(error.exc_type, KeyboardInterrupt)):
                shown(error)

        previous = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGALRM)}
        shown, sys.unraisablehook = sys.unraisablehook, dropped
        try:
            status = command(*args, **options)
        except BaseException as error:  # a library may have turned the exception into one of its own
            if not interrupted.is_set() and not isinstance(error, KeyboardInterrupt):
                raise
            status = STATUS
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            for number, handler in previous.items():
                signal.signal(number, handler or signal.SIG_DFL)
            sys.unraisablehook = shown
        if interrupted.is_set() and status:
            print(SENTENCE, file=sys.stderr)
            return STATUS
        return status

    return run


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Context manager that ends its block after so many seconds of its own CPU time; only in the main thread.

    The time that other threads and other processes take does not count, however busy the machine is. A block that
    waits, such as for a file, does not end.

    Raises:
        TimeoutError: the block took longer.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    end = time.thread_time() + seconds

    def stop(*_: object) -> None:
        if (remaining := end - time.thread_time()) <= 0:
            raise TimeoutError(f"not finished in {seconds:g} s")
        # Other threads have run, whose time the timer counts as well; less than a microsecond would stop it.
        signal.setitimer(signal.ITIMER_PROF, max(remaining, 0.001))

    previous = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        # Not the default action, which would end the process if the signal was already on its way.
        signal.signal(signal.SIGPROF, signal.SIG_IGN if previous in (None, signal.SIG_DFL) else previous)


def _takes_signals() -> bool:
    """Whether this thread receives signals, and Ctrl-C is not ignored, as it is in the background of a shell."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    return in_main_thread and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN
