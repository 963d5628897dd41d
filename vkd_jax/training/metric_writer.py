"""Writes metrics and progress through CLU; the only module that imports TensorFlow (for TensorBoard's event files)."""

import collections
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from absl import logging

os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # silences a message about computations that never run here

from clu import metric_writers, periodic_actions

from vkd_jax.messages import listed
from vkd_jax.runtime import files, json_files, progress_bar
from vkd_jax.training.trackers import Tracker, open_tracker
from vkd_jax.types import Params, UserError

SECONDS_BETWEEN_WARNINGS = 60
SPEED = {"steps_per_sec", "uptime"}  # which CLU writes at steps of its own, on lines of their own


class ScalarsWriter(metric_writers.MetricWriter):
    """Base class of writers of scalars; everything else is written to TensorBoard alone."""

    def write_summaries(self, step, values, metadata=None):
        """Does nothing; these are written to TensorBoard alone."""

    def write_images(self, step, images):
        """Does nothing; these are written to TensorBoard alone."""

    def write_videos(self, step, videos):
        """Does nothing; these are written to TensorBoard alone."""

    def write_audios(self, step, audios, *, sample_rate):
        """Does nothing; these are written to TensorBoard alone."""

    def write_texts(self, step, texts):
        """Does nothing; these are written to TensorBoard alone."""

    def write_histograms(self, step, arrays, num_buckets=None):
        """Does nothing; these are written to TensorBoard alone."""

    def write_pointcloud(self, step, point_clouds, *, point_colors=None, configs=None):
        """Does nothing; these are written to TensorBoard alone."""

    def write_hparams(self, hparams):
        """Does nothing; these are written to TensorBoard alone."""

    def flush(self):
        """Does nothing, because all scalars are written at once."""

    def close(self):
        """Does nothing, because nothing stays open."""


class TrackerWriter(ScalarsWriter):
    """Sends scalars to an experiment tracker. A failure, such as that of the network, is logged and stops nothing."""

    def __init__(self, name: str, tracker: Tracker):
        self._name, self._tracker = name, tracker

    def write_scalars(self, step: int, scalars: Mapping[str, float]):
        """Sends the metrics of a step."""
        self._try(lambda: self._tracker.log(step, {name: float(value) for name, value in scalars.items()}))

    def close(self):
        """Ends the record."""
        self._try(self._tracker.close)

    def _try(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:
            message = "metrics could not be sent to %s: %s"
            logging.log_every_n_seconds(logging.WARNING, message, SECONDS_BETWEEN_WARNINGS, self._name, error)


class JsonLinesWriter(ScalarsWriter):
    """Appends lines {"step": ..., name: value, ...} to a file.

    A training that resumes logs the steps after its checkpoint again, so their lines are removed first, as are damaged
    ones. Nothing computes those again, so a warning names the steps whose metrics are lost.

    A line that cannot be written raises in `check`, since CLU prints the traceback of an error in its thread.

    Args:
        file: the file.
        resumed: the number of steps that have run; lines of later steps are removed.
        every: the file has a line for each multiple of this number of steps.
    """

    def __init__(self, file: Path, resumed: int = 0, every: int = 1):
        self._file, self._is_cut = file, False  # whether a full disk cut the last line
        self._error: OSError | None = None
        lines = files.read_bytes(file, json_files.MOST_BYTES).splitlines(keepends=True) if file.exists() else []
        rows = list(map(_row, lines))
        logged = {row["step"] for row in rows if row and not row.keys() & SPEED}
        if lost := sorted({*range(every, resumed + 1, every)} - logged):
            logging.warning(
                "%s is damaged: the metrics of step %s are lost, which no figure needs.", file, listed(lost)
            )
        kept = [line for line, row in zip(lines, rows, strict=True) if row and row["step"] <= resumed]
        if kept != lines:
            files.write_bytes(file, b"".join(kept))

    def write_scalars(self, step: int, scalars: Mapping[str, float]):
        """Appends one line. In a bucket, whose objects cannot grow, TensorFlow rewrites the file."""
        line = json.dumps({"step": step} | {k: float(v) for k, v in scalars.items()}) + "\n"
        try:
            with self._file.open("a", encoding="utf-8") as file:
                beginning, self._is_cut = "\n" * self._is_cut, True  # unless this line is written to its end
                file.write(beginning + line)
            self._is_cut = False
        except OSError as error:
            self._error = error

    def check(self) -> None:
        """Raises the last error of a line that was not written, if there is one."""
        error, self._error = self._error, None
        if error is not None:
            raise error


def _row(line: bytes) -> dict[str, float] | None:
    """The metrics in a line; None if it is damaged."""
    try:
        row = json_files.parse_json(line, "", dict) if line.endswith(b"\n") else {}
    except UserError:
        return None
    is_whole = isinstance(row.get("step"), int) and all(type(value) in (int, float) for value in row.values())
    return row if is_whole else None


class Progress:
    """Writes one stage's metrics to TensorBoard and metrics.jsonl in `folder`, and its progress to stderr.

    Progress is a bar on a terminal, and otherwise log lines with steps/s and the remaining time.

    Args:
        folder: the folder of the training.
        steps: the number of steps of the whole training.
        resumed: the number of steps that have run.
        every: metrics are written at each multiple of this number of steps.
        log_seconds: seconds between two log lines.
        trackers: keys of `registry.TRACKERS`.
    """

    def __init__(
        self,
        folder: Path,
        *,
        steps: int,
        resumed: int = 0,
        every: int = 1,
        log_seconds: float = 15.0,
        trackers: Sequence[str] = (),
    ):
        folder.mkdir(parents=True, exist_ok=True)
        self._lines = JsonLinesWriter(folder / "metrics.jsonl", resumed, every)
        writers = [metric_writers.SummaryWriter(str(folder)), self._lines]
        writers += [TrackerWriter(name, open_tracker(name, folder)) for name in trackers]
        self._writer = metric_writers.AsyncMultiWriter(writers)  # training does not wait for a bucket or a network
        self._report = periodic_actions.ReportProgress(
            num_train_steps=steps, writer=self._writer, every_steps=None, every_secs=log_seconds
        )

        self._bar = progress_bar.open_bar(steps)

    def overview(self, trainable: Params) -> None:
        """Logs how many weights are trained, by module."""
        sizes: collections.defaultdict[str, list[int]] = collections.defaultdict(list)
        for path, weight in trainable.items():
            sizes[path.partition("/")[0]].append(weight.size)
        rows = [f"{name} {len(arrays):,} tensors, {sum(arrays):,} parameters" for name, arrays in sizes.items()]
        logging.info("trainable weights: %s", "; ".join(rows))

    def tick(self, step: int) -> None:
        """Counts a step; called after each step."""
        self._report(step)
        self._bar.tick(step)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes metrics to the files and, beside the bar or on one line, to stderr."""
        self._lines.check()
        self._writer.write_scalars(step, scalars)
        self._bar.show(scalars)
        if not self._bar.shown:
            logging.info("step %d  %s", step, "  ".join(f"{k} {v:.4g}" for k, v in sorted(scalars.items())))

    def close(self) -> None:
        """Flushes and closes all writers."""
        self._bar.close()
        self._writer.flush()
        self._writer.close()
        self._lines.check()
