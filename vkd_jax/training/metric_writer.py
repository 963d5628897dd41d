"""Metrics and progress through CLU; the only module that imports TensorFlow (for TensorBoard's event files)."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

from absl import logging

os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # it computes nothing here, and need not say how it would

from clu import metric_writers, parameter_overview, periodic_actions

from vkd_jax.types import Params


class JsonLinesWriter(metric_writers.MetricWriter):
    """Appends {"step": .., name: value, ..} lines; after a resume a step may appear again, and the last one counts."""

    def __init__(self, file: Path):
        self._file = file

    def write_scalars(self, step: int, scalars: Mapping[str, float]):
        """One line; in a bucket, whose objects do not grow, TensorFlow writes the file anew."""
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step} | {k: float(v) for k, v in scalars.items()}) + "\n")

    def write_summaries(self, step, values, metadata=None):
        """Not kept."""

    def write_images(self, step, images):
        """Not kept."""

    def write_videos(self, step, videos):
        """Not kept."""

    def write_audios(self, step, audios, *, sample_rate):
        """Not kept."""

    def write_texts(self, step, texts):
        """Not kept."""

    def write_histograms(self, step, arrays, num_buckets=None):
        """Not kept."""

    def write_pointcloud(self, step, point_clouds, *, point_colors=None, configs=None):
        """Not kept."""

    def write_hparams(self, hparams):
        """Not kept."""

    def flush(self):
        """Lines are flushed as they are written."""

    def close(self):
        """Nothing is open."""


class Progress:
    """One stage's metrics: TensorBoard and metrics.jsonl in `folder`, steps/s and time left in the log."""

    def __init__(self, folder: Path, *, steps: int, log_seconds: float = 15.0):
        folder.mkdir(parents=True, exist_ok=True)
        self._writer = metric_writers.AsyncMultiWriter(  # training does not wait for a bucket
            [metric_writers.SummaryWriter(str(folder)), JsonLinesWriter(folder / "metrics.jsonl")]
        )
        self._report = periodic_actions.ReportProgress(
            num_train_steps=steps, writer=self._writer, every_steps=None, every_secs=log_seconds
        )

    def overview(self, trainable: Params) -> None:
        """Logs a table of what trains."""
        logging.info(
            "trainable weights:\n%s",
            parameter_overview.get_parameter_overview(trainable, include_stats=False),
        )

    def tick(self, step: int) -> None:
        """Called after each step."""
        self._report(step)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes metrics, and one line of them to the log."""
        self._writer.write_scalars(step, scalars)
        logging.info("step %d  %s", step, "  ".join(f"{k} {v:.4g}" for k, v in sorted(scalars.items())))

    def close(self) -> None:
        """Flushes and closes all writers."""
        self._writer.flush()
        self._writer.close()
