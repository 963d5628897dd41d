"""Benchmarks as tensorflow-datasets (array_record, no TensorFlow): built once, then read without their source.

An example of a data set is one row of the benchmark:

    row        text, the name of the row, e.g. "forget_10/3"
    images     sequence of encoded images, as bytes
    questions  text, JSON: the row's `Example`s without their images

The metadata of a data set have the SHA-256 of the rows of each set, which are compared whenever they are read.

The name of its config ends in a digest of everything that the rows depend on, so that a changed source, field or reader
builds a new data set.
"""

import contextlib
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import logging as standard_logging
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import tensorflow_datasets as tfds
from absl import logging

from vkd_jax.benchmarks.set_checks import SetChecks, check_names
from vkd_jax.runtime import files, outputs, storage
from vkd_jax.types import EvalSet, Example, SuiteQuestion, UserError

Sets = Mapping[str, Iterable[list[Example]]]  # by name; a list has the questions of one row

PARTS = ("evaluation", "finetune")


class Benchmark(Protocol):
    """The contract of a benchmark: a frozen dataclass of its hyperparameters with these attributes and methods."""

    TITLE: str  # the name for reports
    EVAL_SETS: tuple[EvalSet, ...]  # what the evaluation asks, each set with its role, in the order of the report
    UNLEARN: Mapping[str, str]  # the sets whose questions with an image unlearning trains on, as forget and retain
    RECIPE: Mapping[str, Any]  # published hyperparameters of fine-tuning

    @property
    def label(self) -> str:
        """The name of the benchmark with its ratio, as part of a folder's name."""

    def check(self) -> None:
        """Checks the hyperparameters before anything is read."""

    def state(self, part: str) -> Any:
        """A JSON value that changes whenever the source of the part (`evaluation` or `finetune`) changes."""

    def rows(self, part: str) -> contextlib.AbstractContextManager[Sets]:
        """Opens the checked sets of a part, none of which may be empty; rows are read lazily."""


def read(benchmark: Benchmark, folder: str | Path, finetune: bool = False) -> dict[str, list[Example]]:
    """Reads the sets of a benchmark; builds those that are not cached.

    Args:
        benchmark: the benchmark.
        folder: the folder of cached data sets; several benchmarks may share it.
        finetune: whether to read the sets for fine-tuning as well.

    Raises:
        UserError: the fields of the benchmark or its source are invalid, one of its sets is empty, or sets have in
            common what they must not, see `set_checks`.
    """
    benchmark.check()
    folder = storage.resolve(folder)
    outputs.check_folder(folder, "data.cache")
    sets: dict[str, list[Example]] = {}
    for part in PARTS if finetune else PARTS[:1]:
        with _silent():
            builder_args = dict(data_dir=str(folder), file_format="array_record", config=_config(benchmark, part))
            path = folder / Rows.name / builder_args["config"].name / str(Rows.VERSION)
            if path.exists():
                try:
                    sets |= _examples(Rows(**builder_args))
                    continue
                except Exception as error:  # whatever the library raises about a damaged file
                    logging.warning("%s is damaged (%s); it is built again", path, storage.first_line(error))
                    files.remove(path)
            _build(Rows(**builder_args), benchmark, part)
            sets |= _examples(Rows(**builder_args))  # reads the files, whichever process built them
    divided = getattr(benchmark, "shares_people", False) or bool(getattr(benchmark, "forget_facts", ()))
    check_names(sets, benchmark.EVAL_SETS, shares_people=divided)
    return sets


class Rows(tfds.core.GeneratorBasedBuilder):
    """The tensorflow-datasets builder of one part of a benchmark."""

    name = "vkd_jax"
    VERSION = tfds.core.Version("1.0.0")
    sets: Sets = {}

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(
            {
                "row": tfds.features.Text(),
                "images": tfds.features.Sequence(tfds.features.Text()),  # Image() would decode with TensorFlow
                "questions": tfds.features.Text(),
            }
        )
        return tfds.core.DatasetInfo(
            builder=self, features=features, disable_shuffling=True, metadata=tfds.core.MetadataDict()
        )

    def _split_generators(self, dl_manager) -> dict[str, Iterator]:
        return {name: self._generate_examples(name, rows) for name, rows in self.sets.items()}

    def _generate_examples(self, name: str, rows: Iterable[list[Example]]) -> Iterator[tuple[int, dict]]:
        digest = hashlib.sha256()
        for key, row in enumerate(rows):
            packed = _packed(row)
            _update(digest, packed)
            yield key, packed
        self.info.metadata[name] = digest.hexdigest()


def _config(benchmark: Benchmark, part: str) -> tfds.core.BuilderConfig:
    state = [dataclasses.asdict(benchmark), benchmark.state(part), _source_digest()]
    digest = hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()[:12]
    return tfds.core.BuilderConfig(name=f"{benchmark.label}-{part}-{digest}", version=str(Rows.VERSION))


def _build(builder: Rows, benchmark: Benchmark, part: str) -> None:
    with benchmark.rows(part) as sets, tempfile.TemporaryDirectory() as downloads:
        checks = SetChecks(benchmark.EVAL_SETS)
        rows = {name: checks.checked(name, filter(None, rows)) for name, rows in sets.items()}
        first = {name: next(rows[name], None) for name in rows}
        if empty := [name for name, row in first.items() if row is None]:  # the report would lack it without a word
            of_source = f" of {source}" if (source := getattr(benchmark, "source", "")) else ""
            raise UserError(
                f"The {empty[0]} set of {benchmark.label} is empty: the data{of_source} have no questions for it; get "
                "them again, or add some."
            )
        builder.sets = {name: itertools.chain([row], rows[name]) for name, row in first.items()}
        try:
            builder.download_and_prepare(download_dir=downloads)
        except Exception:  # of any kind, where another process removed the unfinished files
            if not builder.data_path.exists():  # another process may have built it
                raise
    for unfinished in Path(builder.data_path).parent.glob(f"{tfds.core.constants.INCOMPLETE_PREFIX}*"):
        shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed, or that builds the same set


def _examples(builder: Rows) -> dict[str, list[Example]]:
    """Reads the examples of each set from the files of a data set.

    Raises:
        ValueError: the sets are not those that were built.
    """
    sources, digests = builder.as_data_source(), {}
    examples: dict[str, list[Example]] = {}
    for name, rows in sources.items():
        digest, examples[name] = hashlib.sha256(), []
        for row in rows:
            _update(digest, row)
            examples[name] += _unpacked(row)
        digests[name] = digest.hexdigest()
    if not digests or digests != dict(builder.info.metadata):
        raise ValueError("its sets are not those that were built")
    return examples


def _update(digest: Any, row: Mapping[str, Any]) -> None:
    """Adds a row as `_packed` returns it to the digest of its set, each part with its length."""
    for part in (row["row"], row["questions"], *row["images"]):
        data = part.encode() if isinstance(part, str) else bytes(part)
        digest.update(b"%d," % len(data) + data)


def _packed(row: list[Example]) -> dict[str, Any]:
    images = {e.image_id: bytes(e.image) for e in row if e.image is not None}
    questions = [{key: value for key, value in vars(e).items() if key != "image"} for e in row]
    name = row[0].id.rpartition("/")[0]
    return {"row": name, "images": list(images.values()), "questions": json.dumps(questions)}


def _unpacked(row: Mapping[str, Any]) -> Iterator[Example]:
    questions = json.loads(row["questions"])
    shown = dict.fromkeys(q["image_id"] for q in questions if q["image_id"])  # in order, as they were packed
    images = dict(zip(shown, row["images"], strict=True))
    for q in questions:
        lists = ("options", "perturbed", "keywords", "references")
        tuples = {key: tuple(q[key]) for key in lists if key in q}
        cls = SuiteQuestion if "suite" in q else Example
        yield cls(**q | tuples, image=images.get(q["image_id"]))


@functools.cache
def _source_digest() -> str:
    """A digest of the source code of this package."""
    files = sorted(Path(__file__).parent.rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Hides the progress bars and messages of tensorflow-datasets, but not this package's warnings."""

    def is_own(record: standard_logging.LogRecord) -> bool:
        return "/tensorflow_datasets/" not in record.pathname

    tfds.disable_progress_bar()
    logging.get_absl_logger().addFilter(is_own)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.get_absl_logger().removeFilter(is_own)
