"""Writes metrics and progress through CLU; the only module that imports TensorFlow (for TensorBoard's event files)."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

from absl import logging

os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # silences a message about computations that never run here

from clu import metric_writers, parameter_overview, periodic_actions

from vkd_jax.types import Params


class JsonLinesWriter(metric_writers.MetricWriter):
    """Appends lines {"step": ..., name: value, ...} to a file.

    After a resume the file may contain a step twice, and its last line counts. A line that a full disk or a kill cut
    is ended first, so that it does not spoil the next one.
    """

    def __init__(self, file: Path):
        self._file = file
        self._is_cut = file.exists() and file.read_bytes()[-1:] not in (b"", b"\n")

    def write_scalars(self, step: int, scalars: Mapping[str, float]):
        """Appends one line. In a bucket, whose objects cannot grow, TensorFlow rewrites the file."""
        line = json.dumps({"step": step} | {k: float(v) for k, v in scalars.items()}) + "\n"
        with self._file.open("a", encoding="utf-8") as file:
            beginning, self._is_cut = "\n" * self._is_cut, True  # unless this line is written to its end
            file.write(beginning + line)
        self._is_cut = False

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
        """Does nothing, because each line is written at once."""

    def close(self):
        """Does nothing, because no file stays open."""


class Progress:
    """Writes one stage's metrics to TensorBoard and metrics.jsonl in `folder`, and steps/s and time left to the log."""

    def __init__(self, folder: Path, *, steps: int, log_seconds: float = 15.0):
        folder.mkdir(parents=True, exist_ok=True)
        self._writer = metric_writers.AsyncMultiWriter(  # training does not wait for a bucket
            [metric_writers.SummaryWriter(str(folder)), JsonLinesWriter(folder / "metrics.jsonl")]
        )
        self._report = periodic_actions.ReportProgress(
            num_train_steps=steps, writer=self._writer, every_steps=None, every_secs=log_seconds
        )

    def overview(self, trainable: Params) -> None:
        """Logs a table of the trainable weights."""
        logging.info(
            "trainable weights:\n%s",
            parameter_overview.get_parameter_overview(trainable, include_stats=False),
        )

    def tick(self, step: int) -> None:
        """Counts a step; called after each step."""
        self._report(step)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes metrics to the files and, on one line, to the log."""
        self._writer.write_scalars(step, scalars)
        logging.info("step %d  %s", step, "  ".join(f"{k} {v:.4g}" for k, v in sorted(scalars.items())))

    def close(self) -> None:
        """Flushes and closes all writers."""
        self._writer.flush()
        self._writer.close()
