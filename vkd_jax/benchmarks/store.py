"""Benchmarks as tensorflow-datasets (array_record, no TensorFlow): built once, then read without their source.

A data set holds one row of the benchmark an example:

    row        text, where it comes from, e.g. "forget_10/3"
    pictures   sequence of encoded pictures, as bytes
    questions  text, JSON: the row's `Example`s without their pictures

Its config's name ends in a digest of everything that the rows depend on, so that a changed source, field or reader
never answers from an old build.
"""

import contextlib
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import logging as standard_logging
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import tensorflow_datasets as tfds
from absl import logging

from vkd_jax.types import EvalSet, Example, UserError

Sets = Mapping[str, Iterable[list[Example]]]  # by name; a list holds what one row asks

PARTS = ("evaluation", "finetune")


class Benchmark(Protocol):
    """What a benchmark offers: a frozen dataclass of its hyperparameters, with these."""

    TITLE: str  # what it is called
    EVAL_SETS: tuple[EvalSet, ...]  # what the evaluation asks, each set with its role, in the order of the report
    UNLEARN: Mapping[str, str]  # the sets whose questions with a picture unlearning trains on, as forget and retain
    RECIPE: Mapping[str, Any]  # published hyperparameters of fine-tuning

    @property
    def label(self) -> str:
        """The benchmark and its ratio, as part of a folder's name."""

    def check(self) -> None:
        """Refuses wrong hyperparameters before anything is read."""

    def state(self, part: str) -> Any:
        """What the source of `evaluation` or `finetune` holds now, without reading it, as JSON can say it."""

    def rows(self, part: str) -> contextlib.AbstractContextManager[Sets]:
        """The sets of that part, checked as a whole; their rows are read as they are iterated over."""


def read(benchmark: Benchmark, folder: str | Path, finetune: bool = False) -> dict[str, list[Example]]:
    """The sets of a benchmark; builds what is not there.

    Args:
        benchmark: which, and of which people.
        folder: where data sets are kept; several benchmarks may share it.
        finetune: the sets for fine-tuning as well.

    Raises:
        UserError: the benchmark's fields or its source are at fault.
    """
    benchmark.check()
    sets: dict[str, list[Example]] = {}
    for part in PARTS if finetune else PARTS[:1]:
        with _silent():
            where = dict(data_dir=str(folder), file_format="array_record", config=_config(benchmark, part))
            if not (builder := Rows(**where)).data_path.exists():
                _build(builder, benchmark, part)
                builder = Rows(**where)  # reads what is there, whoever built it
            found = builder.as_data_source()
            sets |= {name: [example for row in rows for example in _unpacked(row)] for name, rows in found.items()}
    return sets


class Rows(tfds.core.GeneratorBasedBuilder):
    """The rows of one part of a benchmark."""

    name = "vkd_jax"
    VERSION = tfds.core.Version("1.0.0")
    sets: Sets = {}

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(
            {
                "row": tfds.features.Text(),
                "pictures": tfds.features.Sequence(tfds.features.Text()),  # Image() would decode with TensorFlow
                "questions": tfds.features.Text(),
            }
        )
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager) -> dict[str, Iterator]:
        return {name: self._generate_examples(rows) for name, rows in self.sets.items()}

    def _generate_examples(self, rows: Iterable[list[Example]]) -> Iterator[tuple[int, dict]]:
        for key, row in enumerate(rows):
            yield key, _packed(row)


def _config(benchmark: Benchmark, part: str) -> tfds.core.BuilderConfig:
    state = [dataclasses.asdict(benchmark), benchmark.state(part), _code()]
    digest = hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()[:12]
    return tfds.core.BuilderConfig(name=f"{benchmark.label}-{part}-{digest}", version=str(Rows.VERSION))


def _build(builder: Rows, benchmark: Benchmark, part: str) -> None:
    with benchmark.rows(part) as sets, tempfile.TemporaryDirectory() as downloads:
        rows = {name: filter(None, rows) for name, rows in sets.items()}
        first = {name: next(rows[name], None) for name in rows}
        for name in ("forget", "retain"):
            if name in first and first[name] is None:
                raise UserError(f"The {name} set of {benchmark.label} is empty: its rows hold no questions.")
        # An empty split cannot be written.
        builder.sets = {name: itertools.chain([row], rows[name]) for name, row in first.items() if row is not None}
        try:
            builder.download_and_prepare(download_dir=downloads)
        except OSError:
            if not builder.data_path.exists():  # another process may have been quicker
                raise


def _packed(row: list[Example]) -> dict[str, Any]:
    pictures = {e.image_id: e.image for e in row if e.image is not None}
    questions = [{key: value for key, value in vars(e).items() if key != "image"} for e in row]
    name = row[0].id.rpartition("/")[0]
    return {"row": name, "pictures": list(pictures.values()), "questions": json.dumps(questions)}


def _unpacked(row: Mapping[str, Any]) -> Iterator[Example]:
    questions = json.loads(row["questions"])
    shown = dict.fromkeys(q["image_id"] for q in questions if q["image_id"])  # in order, as they were packed
    pictures = dict(zip(shown, row["pictures"], strict=True))
    for q in questions:
        tuples = {key: tuple(q[key]) for key in ("options", "perturbed")}
        yield Example(**q | tuples, image=pictures.get(q["image_id"]))


@functools.cache
def _code() -> str:
    """A digest of the modules that turn a source into rows, and of those that make up people."""
    files = sorted(Path(__file__).parent.rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without the progress bars and the messages of tensorflow-datasets; warnings of our own are let through."""

    def ours(record: standard_logging.LogRecord) -> bool:
        return "/tensorflow_datasets/" not in record.pathname

    tfds.disable_progress_bar()
    logging.get_absl_logger().addFilter(ours)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.get_absl_logger().removeFilter(ours)
