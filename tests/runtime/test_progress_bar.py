"""Progress bars: what a terminal shows, what a file gets, and that stderr and its log lines are given back."""

import io
import logging as std_logging
import os
import re
import sys

import pytest
from absl import logging

from vkd_jax.runtime import interrupts, progress_bar


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def stderr(monkeypatch):
    """Replaces stderr."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.delenv("NO_COLOR", raising=False)

    def replace(stream):  # called by the test, since pytest sets sys.stderr between a fixture and its test
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setattr(logging.get_absl_handler().python_handler, "stream", stream)  # as after log.setup
        return stream

    return replace


def plain(text):
    """What a terminal shows, one line for each time that it is drawn."""
    return re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", text).replace("\r", "\n")


def test_a_bar_shows_stage_steps_and_loss_of_a_resumed_training(stderr):
    terminal = stderr(Terminal())
    with progress_bar.stage("unlearn"):
        bar = progress_bar.open_bar(300)
        bar.show({"loss": 9.0})  # before the first step
        for step in range(101, 121):
            bar.tick(step)
        bar.show({"loss": 0.12345, "grad_norm": 3.0})
        bar.show({"examples_per_second": 12.0})
        bar.close()
    last = plain(terminal.getvalue()).strip().splitlines()[-1]
    assert bar.shown and re.match(r"unlearn .* 120/300 +[\d.e+]+ steps/s +\d:\d\d:\d\d +loss 0.1235", last)
    assert terminal.getvalue().rstrip().endswith("\x1b[?25h")  # the cursor is shown again


def test_log_lines_are_shown_above_a_bar_but_not_the_remaining_time_of_another_library(stderr):
    terminal = stderr(Terminal())
    handler = logging.get_absl_handler()
    before, filters = handler.python_handler.stream, list(handler.filters)
    bar = progress_bar.open_bar(3)
    bar.tick(1)
    for path, text in (("/vkd_jax/runs/stages.py", "a line of ours"), ("/lib/clu/periodic_actions.py", "ETA: 3m")):
        handler.handle(std_logging.LogRecord("absl", std_logging.INFO, path, 1, text, (), None))
    bar.close()
    assert "a line of ours" in plain(terminal.getvalue()) and "ETA" not in terminal.getvalue()
    assert handler.python_handler.stream is before and handler.filters == filters and sys.stderr is terminal


@pytest.mark.parametrize("kind", ["file", "dumb terminal"])
def test_without_a_terminal_nothing_is_drawn(stderr, monkeypatch, kind):
    monkeypatch.setenv("TERM", "dumb" if kind == "dumb terminal" else "xterm")
    stream = stderr(Terminal() if kind == "dumb terminal" else io.StringIO())
    bar = progress_bar.open_bar(300)
    bar.tick(1)
    bar.show({"loss": 1.0})
    bar.close()
    assert not bar.shown and stream.getvalue() == ""


@pytest.mark.parametrize(("is_terminal", "begins"), [(True, b"\x1b[?25h"), (False, b"stopped")])
def test_the_second_ctrl_c_shows_the_cursor_that_a_bar_hides(monkeypatch, is_terminal, begins):
    written = []
    monkeypatch.setattr(os, "isatty", lambda number: is_terminal)
    monkeypatch.setattr(os, "write", lambda number, data: written.append(data))
    monkeypatch.setattr(os, "_exit", lambda status: written.append(status))
    interrupts.stop_at_once()
    assert written[0].startswith(begins) and written[0].endswith(b"stopped at once\n") and written[1] == 130
