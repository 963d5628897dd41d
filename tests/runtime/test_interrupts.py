"""Ctrl-C in a command: one sentence and status 130, also if a library drops the exception; a second one at once."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from vkd_jax.runtime import interrupts
from vkd_jax.runtime.interrupts import interruptible
from vkd_jax.types import UserError

ROOT = Path(__file__).parents[2]


class Exit(BaseException):
    """In place of the end of the process."""


@pytest.fixture(autouse=True)
def handlers_are_restored():
    """Python's own handler is set before each test: a shell starts programs in the background with Ctrl-C ignored."""
    of_pytest = signal.signal(signal.SIGINT, signal.default_int_handler)
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGALRM)]
    try:
        yield
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGALRM)] == before
        assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    finally:
        signal.signal(signal.SIGINT, of_pytest)


def interrupt():
    signal.raise_signal(signal.SIGINT)


def dropped():
    """Drops the exception, as a destructor does, and works on until it is raised again."""
    try:
        interrupt()
    except KeyboardInterrupt:
        pass
    while True:
        time.sleep(0.01)


class Destroyed:
    def __del__(self):
        interrupt()


def in_a_destructor():
    Destroyed()
    while True:
        time.sleep(0.01)


def turned(error):
    def command():
        try:
            interrupt()
        except KeyboardInterrupt:
            raise error from None

    return command


def returned():
    try:
        interrupt()
    except KeyboardInterrupt:
        return 2


@pytest.mark.parametrize(
    "command",
    [interrupt, dropped, in_a_destructor, turned(RuntimeError("in a callback")), turned(SystemExit(1)), returned],
    ids=["plain", "dropped", "in a destructor", "turned into an error", "turned into an exit", "turned into a status"],
)
def test_ctrl_c_is_one_sentence_and_status_130(capsys, monkeypatch, command):
    monkeypatch.setattr(interrupts, "REPEAT_SECONDS", 0.05)
    assert interruptible(command)() == 130
    assert capsys.readouterr() == ("", f"{interrupts.SENTENCE}\n")


def test_what_is_not_interrupted_is_unchanged(capsys):
    assert interruptible(lambda a, b: a + b)(1, b=2) == 3
    with pytest.raises(UserError, match="wrong"):
        interruptible(lambda: (_ for _ in ()).throw(UserError("wrong")))()
    assert capsys.readouterr() == ("", "")


def test_a_second_ctrl_c_ends_the_process_at_once(monkeypatch, capfd):
    def leave(status):
        raise Exit(status)

    def cleanup():
        try:
            interrupt()
        finally:
            interrupt()

    monkeypatch.setattr(os, "_exit", leave)
    statuses = []

    @interruptible
    def command():
        try:
            cleanup()
        except Exit as stop:
            statuses.extend(stop.args)
        return 0

    command()
    assert statuses == [130] and capfd.readouterr().err == "stopped at once\n"


def burn(seconds):
    """Takes CPU time."""
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


def test_a_block_ends_after_its_limit_of_cpu_time():
    with pytest.raises(TimeoutError, match=r"not finished in 0\.02 s"), interrupts.time_limit(0.02):
        burn(60)
    assert signal.getsignal(signal.SIGPROF) is signal.SIG_IGN and signal.getitimer(signal.ITIMER_PROF)[0] == 0


def test_waiting_and_other_threads_do_not_count():
    others = [threading.Thread(target=burn, args=(0.1,)) for _ in range(2)]
    with interrupts.time_limit(0.1):
        for thread in others:
            thread.start()
        for thread in others:
            thread.join()  # takes 0.2 s of CPU time of this process, and next to none of this thread
    with interrupts.time_limit(0.005):
        time.sleep(0.02)
    assert signal.getitimer(signal.ITIMER_PROF)[0] == 0


def test_without_signals_the_command_runs_alone(monkeypatch):
    results = []
    thread = threading.Thread(target=lambda: results.append(interruptible(lambda: 5)()))
    thread.start()
    thread.join()
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in the background of a shell
    try:
        results.append(interruptible(lambda: (interrupt(), 6)[1])())
    finally:
        signal.signal(signal.SIGINT, previous)
    assert results == [5, 6]


def test_ctrl_c_during_imports_prints_no_traceback():
    program = "import sys; sys.argv[0] = '-m'; import vkd_jax, signal; signal.raise_signal(signal.SIGINT)"
    completed = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (completed.returncode, completed.stdout, completed.stderr) == (130, "", "stopped at once\n")
