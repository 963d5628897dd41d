"""The schedule of a comparison's runs, and what one run reuses of another."""

import concurrent.futures
import contextlib
import os
import signal
import subprocess
import sys
import threading

import pytest

from vkd_jax.config.schema import RunConfig
from vkd_jax.runs import pipeline, worker_pool
from vkd_jax.runs.workdir import Workdir
from vkd_jax.runs.worker_pool import Stopped, Task, execute
from vkd_jax.types import UserError


@pytest.fixture
def schedule(tmp_path, monkeypatch):
    """Executes tasks given as name=(needs, failure), and returns their failures and the order in which they started."""

    def run(workers=1, required=(), **tasks):
        started = []

        class Pool:
            def submit(self, call, path, config, lender, command):
                future = concurrent.futures.Future()
                started.append(path.name)
                future.set_result(config())
                return future

        monkeypatch.setattr(worker_pool, "_pool", lambda count, signals: contextlib.nullcontext(Pool()))
        scheduled = {
            name: Task(tmp_path / name, lambda result=result: lambda: result, frozenset(needs), None, name in required)
            for name, (needs, result) in tasks.items()
        }
        try:
            return execute(scheduled, workers, "a test"), started
        except (UserError, Stopped) as error:
            return error, started

    return run


@pytest.mark.parametrize("workers", [1, 2])
def test_tasks_start_in_order_once_their_needs_have_ended(schedule, workers):
    failures, started = schedule(workers, last=(["b", "a"], ""), a=([], ""), b=(["a"], ""), c=([], ""))
    assert failures == {}
    assert started == (["a", "b", "last", "c"] if workers == 1 else ["a", "c", "b", "last"])


def test_a_failed_task_is_reported_and_others_run(schedule):
    assert schedule(trial=([], "share is 7"), final=(["trial"], "")) == ({"trial": "share is 7"}, ["trial", "final"])


def test_nothing_starts_after_a_required_task_failed(schedule):
    error, started = schedule(required=["controls"], controls=([], "no such model"), final=(["controls"], ""))
    assert isinstance(error, UserError) and str(error) == "controls: no such model" and started == ["controls"]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_nothing_starts_after_a_signal(schedule, monkeypatch, number, status):
    """It arrives once the first task has ended, so only the second one had started."""
    before = signal.getsignal(number)
    monkeypatch.setattr(worker_pool.logging, "info", lambda *values: os.kill(os.getpid(), number))
    error, started = schedule(a=([], ""), b=(["a"], ""), c=(["b"], ""))
    assert isinstance(error, Stopped) and error.status == status
    assert started == ["a", "b"] and signal.getsignal(number) is before


def test_workers_do_not_receive_ctrl_c_of_the_terminal():
    """They inherit the mask of blocked signals, and the pool stops them by SIGTERM."""
    program = "import signal; print(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []))"
    with worker_pool._sigint_blocked():
        output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert output == "True\n" and signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_a_worker_is_stopped_when_its_parent_has_ended(monkeypatch):
    """It would otherwise wait for ever."""
    parent, stopped = threading.Event(), threading.Event()
    signals = []
    monkeypatch.setattr(parent, "join", parent.wait, raising=False)
    monkeypatch.setattr(worker_pool.multiprocessing, "parent_process", lambda: parent)
    monkeypatch.setattr(worker_pool.os, "kill", lambda *values: (signals.append(values), stopped.set()))
    worker_pool._end_with_parent()
    assert not signals
    parent.set()
    assert stopped.wait(60) and signals == [(os.getpid(), signal.SIGTERM)]


def test_records_of_shared_models_are_lent_once(tmp_path):
    """Only whole ones are."""
    lender, borrower = (Workdir(tmp_path / name, RunConfig()) for name in ("lender", "borrower"))
    names = ["answers/vanilla.jsonl", "answers/unlearned.jsonl", "attacks/leak/retain_only.jsonl"]
    names += ["attacks/leak/vanilla.jsonl"]
    for workdir in (lender, borrower):
        workdir.bind({"sets": {}, "models": {}, "prompts": ""})
    for name in names:
        lender.write_text(name, "lent")
    (lender.path / names[3]).write_text("half")
    shared = pipeline._shared_records(lender.path)
    borrower.borrow(lender.path, shared)
    assert {str(x.relative_to(borrower.path)) for x in borrower.path.rglob("*.jsonl")} == {names[0], names[2]}
    borrower.write_text(names[0], "own")
    borrower.borrow(lender.path, shared)
    assert (borrower.path / names[0]).read_text() == "own" and borrower.has(names[2])
