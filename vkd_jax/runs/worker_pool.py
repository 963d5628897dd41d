"""Runs of the pipeline in worker processes, each of which starts when the runs that it depends on have ended."""

import concurrent.futures
import contextlib
import dataclasses
import graphlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from absl import flags, logging

from vkd_jax.config.schema import RunConfig
from vkd_jax.runs import workdir
from vkd_jax.runtime import interrupts, log, malloc, storage, threads
from vkd_jax.types import Diverged, UserError


class Stopped(Exception):
    """SIGTERM or SIGINT arrived; the state of every run is saved.

    Args:
        number: the signal.

    Attributes:
        status: the exit status of a command that is stopped by the signal.
    """

    def __init__(self, number: int):
        super().__init__("stopped, and all states are saved: run the same command again to resume")
        self.status = 128 + number


@dataclasses.dataclass(frozen=True)
class Task:
    """A run of the pipeline, and what it depends on."""

    path: Path  # working directory
    make_config: Callable[[], RunConfig]  # called when the run starts: it may read other runs' results
    needs: frozenset[str] = frozenset()  # names of the tasks that must end first
    lender: Path | None = None  # working directory of a run whose records are reused; see `pipeline.execute`
    required: bool = False  # whether the whole sweep fails if this run fails


def execute(tasks: Mapping[str, Task], workers: int, command: str) -> dict[str, str]:
    """Runs all tasks, as many at once as there are workers, and returns the errors of those that failed by name.

    Tasks that are ready start in the order of `tasks`. `command` is how the program was started, for the results.

    Raises:
        UserError: A required task failed.
        Stopped: SIGTERM or SIGINT arrived.
        BrokenProcessPool: A worker died.
    """
    order = {name: number for number, name in enumerate(tasks)}
    sorter = graphlib.TopologicalSorter({name: task.needs for name, task in tasks.items()})
    sorter.prepare()
    ready: list[str] = []
    running: dict[concurrent.futures.Future, str] = {}
    failures: dict[str, str] = {}
    ended = 0
    with _forward_signals() as signals, _pool(workers, signals) as pool:
        while sorter.is_active():
            ready = sorted([*ready, *sorter.get_ready()], key=order.__getitem__)
            while ready and len(running) < workers:  # a run that waits in the pool's queue could not be stopped
                name = ready.pop(0)
                task = tasks[name]
                with _sigint_blocked():
                    running[pool.submit(_work, task.path, task.make_config(), task.lender, command)] = name
            done, _ = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
            for future in done:
                name, failure = running.pop(future), future.result()
                if signals:
                    raise Stopped(signals[0])
                sorter.done(name)
                ended += 1
                logging.info("%d of %d: %s%s", ended, len(tasks), name, f": {failure}" if failure else "")
                if failure and tasks[name].required:
                    raise UserError(f"{name}: {failure}")
                if failure:
                    failures[name] = failure
    return failures


def default_workers() -> int:
    """Returns one worker for each core on CPUs, and one on accelerators, which are not shared."""
    import jax

    return len(os.sched_getaffinity(0)) if jax.default_backend() == "cpu" else 1


@contextlib.contextmanager
def _pool(workers: int, signals: list[int]) -> Iterator[concurrent.futures.ProcessPoolExecutor]:
    """Context manager of a process pool that divides the cores among its workers."""
    context = multiprocessing.get_context("spawn")
    available, cores = sorted(os.sched_getaffinity(0)), context.Queue()
    for number in range(workers):
        cores.put(set(available[number::workers]) or set(available))
    pool = concurrent.futures.ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(cores,))
    try:
        yield pool
    except BrokenProcessPool:
        if signals:
            raise Stopped(signals[0]) from None
        raise
    finally:
        pool.shutdown(wait=not signals, cancel_futures=True)


@contextlib.contextmanager
def _forward_signals() -> Iterator[list[int]]:
    """Context manager that stops the workers on SIGTERM and SIGINT, and yields the list of signals that arrived.

    The workers receive SIGTERM and save their states. A second SIGINT kills them.
    """
    signals: list[int] = []

    def stop(number, _):
        again = number == signal.SIGINT and bool(signals)
        signals.append(number)
        for child in multiprocessing.active_children():
            child.kill() if again else child.terminate()
        if again:
            interrupts.stop_at_once()

    previous = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield signals
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _sigint_blocked() -> Iterator[None]:
    """Context manager that blocks SIGINT in this thread and, for good, in processes that are started in the block.

    A terminal sends it to all processes, but the workers must go on until this process stops them.
    """
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def _end_with_parent() -> None:
    """Sends this worker SIGTERM once the process that started it has ended, which may have been killed.

    A pool's worker would otherwise finish its run without anybody to stop it, and then wait for ever.
    """
    parent = multiprocessing.parent_process()
    if parent is None:  # called in the process of the pool
        return

    def wait() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


def _start_worker(cores: Any) -> None:
    _end_with_parent()
    os.sched_setaffinity(0, cores.get())
    threads.use_two()
    flags.FLAGS.mark_as_parsed()  # the threads that make batches read flags
    log.setup()
    malloc.keep_freed_memory()


def _work(path: Path, config: RunConfig, lender: Path | None, command: str) -> str:
    """Runs the pipeline with its log in log.txt, and returns "" or why it failed."""
    from vkd_jax.runs import pipeline
    from vkd_jax.training import preemption

    try:
        with storage.write_errors(), workdir.exclusive(path, command):
            with open(path / "log.txt", "a", encoding="utf-8") as log_file:
                os.dup2(log_file.fileno(), sys.stderr.fileno())
            pipeline.execute(config, path, command, lender)
    except (UserError, Diverged, preemption.Stopped) as error:
        return str(error)
    return ""
