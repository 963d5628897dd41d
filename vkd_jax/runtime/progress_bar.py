"""A progress bar on stderr while a model trains, if stderr is a terminal.

A bar is drawn by a thread of its own a few times a second. A step only sets its number, so that no step waits for the
terminal or for a device.
"""

import contextlib
import logging as std_logging
import sys
from collections.abc import Iterator, Mapping

from absl import logging
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

REFRESHES = 4  # a second

_stages: list[str] = []


@contextlib.contextmanager
def stage(name: str) -> Iterator[None]:
    """Context manager that names what the program does, as bars in the block show it."""
    _stages.append(name)
    try:
        yield
    finally:
        _stages.pop()


class NoBar:
    """No-op in place of a `Bar`, if stderr is no terminal."""

    shown = False

    def tick(self, step: int) -> None:
        """Does nothing."""

    def show(self, scalars: Mapping[str, float]) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""


class _Speed(ProgressColumn):
    """Steps per second of the last half minute."""

    def render(self, task: Task) -> Text:
        """The text of the column; "" before the second step."""
        return Text(f"{task.speed:.3g} steps/s" if task.speed else "")


class Bar:
    """A bar with the stage, the steps, their speed, the remaining time, and the loss. Log lines are shown above it.

    Args:
        steps: the number of steps of the whole training.
    """

    shown = True

    def __init__(self, steps: int):
        self._steps, self._task = steps, None
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            _Speed(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[loss]}", markup=False),
        )
        self._progress = Progress(*columns, console=_console(), refresh_per_second=REFRESHES, expand=True)
        self._progress.start()
        # The handler of log lines writes to the stream of stderr as it was, which would break the bar.
        self._handler = logging.get_absl_handler().python_handler
        self._stream = self._handler.stream
        self._handler.setStream(sys.stderr)
        logging.get_absl_handler().addFilter(_is_not_progress)

    def tick(self, step: int) -> None:
        """Counts a step."""
        if self._task is None:  # the steps before it were made by an earlier run, and have no speed
            name = _stages[-1] if _stages else "training"
            self._task = self._progress.add_task(name, total=self._steps, completed=step, loss="")
        else:
            self._progress.update(self._task, completed=step)

    def show(self, scalars: Mapping[str, float]) -> None:
        """Shows the loss among the metrics of a step, which are numbers of the host."""
        if self._task is not None and "loss" in scalars:
            self._progress.update(self._task, loss=f"loss {scalars['loss']:.4g}")

    def close(self) -> None:
        """Leaves the bar as it is, and gives stderr back."""
        logging.get_absl_handler().removeFilter(_is_not_progress)
        self._handler.setStream(self._stream)
        self._progress.stop()


def _is_not_progress(record: std_logging.LogRecord) -> bool:
    """Whether a log line is not CLU's line with the remaining time, which the bar shows."""
    return record.levelno > std_logging.INFO or "/clu/" not in record.pathname


def open_bar(steps: int) -> Bar | NoBar:
    """Opens a bar, or a no-op if stderr is no terminal that can draw one."""
    console = _console()
    return Bar(steps) if console.is_terminal and not console.is_dumb_terminal else NoBar()


def _console() -> Console:
    return Console(file=sys.stderr)
