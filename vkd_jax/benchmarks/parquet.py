"""Snapshots of published data sets: files in a folder, on the hub or in a bucket, and their checks.

A snapshot is laid out as on the hub: <config>/<split>-00000-of-0000N.parquet; the split is `train` unless it is given.
Data sets in other formats have JSON files beside images.
"""

import collections
import contextlib
import dataclasses
import functools
import itertools
import re
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence, Set
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq
from absl import logging
from pyarrow import fs

from vkd_jax.benchmarks import names
from vkd_jax.benchmarks.rows import EncodedImage, Row, read_image
from vkd_jax.benchmarks.set_checks import refuse_most
from vkd_jax.benchmarks.synthetic.people import MAX_SIZE, MIN_SIZE, SIZE, Population
from vkd_jax.config.fields import SEED, Section, setting
from vkd_jax.messages import listed
from vkd_jax.runtime import hub, json_files, storage
from vkd_jax.runtime.storage import SourceFolder
from vkd_jax.types import Missing, UserError

OURS, UPSTREAM = RULES = ("ours", "upstream")  # where the code of a benchmark has a quirk that changes a figure
MOST_ROWS_AT_ONCE = 64
MOST_BYTES_AT_ONCE = 2**31
_TYPES = (  # of values that are not nested
    *(pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_binary),
    *(pa.types.is_large_binary, pa.types.is_binary_view, pa.types.is_fixed_size_binary),
    *(pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_null),
)
MOST_ROWS = 2_000_000  # of a config; the largest published one has a tenth of that
SYMLINKS = "Whether symbolic links in the data may lead out of its folder."


class Snapshot:
    """The parquet files of some configs of a data set, and other files of it.

    Args:
        source: a folder, a URI such as gs://bucket/folder, or an id on the hub, of which only `configs` and `files` are
            fetched.
        configs: the configs that will be read: "forget_5" is the split `split` in the folder forget_5, and "data/test"
            the split `test` in the folder data.
        files: patterns of the other files that will be read, such as "split.json" and "*.png", which matches in
            subfolders, too. Only those with a "*" may match nothing.
        links: whether symbolic links in a folder may lead out of it.
        split: the split whose files are read.
        field: the field of the config that gives a source, for messages.

    Raises:
        UserError: the source does not exist, or it cannot be reached.

    Example:
        >>> snapshot = Snapshot("MLLMMU/MLLMU-Bench", ["forget_5"])
        >>> for row in snapshot.rows("forget_5", ["ID", "image"]):
        ...     print(row.location, row.text("ID"))
    """

    def __init__(
        self,
        source: str,
        configs: Sequence[str],
        *,
        files: Sequence[str] = (),
        links: bool = False,
        split: str = "train",
        field: str = "data.source=DIR",
    ):
        check_source(source)
        self.configs, self.other_files, self.split = tuple(configs), tuple(files), split
        if not ("://" in source or storage.resolve(source).is_dir()):
            required = ["{}/{}-*.parquet".format(*self._folder_and_split(config)) for config in configs]
            required += [name for name in files if "*" not in name]
            optional = [name for name in files if "*" in name]
            source = str(hub.fetch_dataset(source, required, optional, field=field))
        self.folder = SourceFolder(source, links=links)

    def has(self, config: str) -> bool:
        """Whether the snapshot has this config."""
        return bool(self._shards(config))

    def state(self) -> list[tuple]:
        """Name, size and modification time of every file; they differ if the source changed."""
        others = self._names if self.other_files else ()
        return self.folder.state([*(file for config in self.configs for file in self._files(config)), *others])

    def json(self, name: str, expected: type) -> Any:
        """The value of a JSON file, a `dict` or a `list` as expected.

        Raises:
            UserError: the file is missing, is not JSON, or has another type.
        """
        return json_files.parse_json(self.folder.read(name, json_files.MOST_BYTES), self.folder.display(name), expected)

    def json_rows(self, name: str) -> Iterator[Row]:
        """Yields every object of a JSON file, which is an array of objects or has an object on each line.

        Raises:
            UserError: the file is missing or is neither of them.
        """
        text, path = self.folder.read(name, json_files.MOST_BYTES), self.folder.display(name)
        stem = name.removesuffix(".json")
        if not text.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
            for index, (number, values) in enumerate(json_files.parse_json_lines(text, path)):
                yield Row(values, f"{path}, line {number}", name=f"{stem}/{index}")
            return
        for index, values in enumerate(json_files.parse_json(text, path, list)):
            if not isinstance(values, dict):
                problem = f"it is {json_files.describe(values)}, not an object; correct the row"
                raise UserError(f"{path}, row {index}: {problem}.")
            yield Row(values, f"{path}, row {index}", name=f"{stem}/{index}")

    def has_file(self, name: str) -> bool:
        """Whether the snapshot has this file."""
        return name in self._names

    @functools.cached_property
    def _names(self) -> frozenset[str]:
        """Names of the other files."""
        return frozenset(self.folder.matching(self.other_files))

    def image(self, row: Row, field: str, name: str) -> EncodedImage:
        """The image file `name`, which a field of the row gives.

        Raises:
            UserError: the file is missing, outside of the folder, or not an image.
        """
        return read_image(self.folder, name, row, field)

    def count(self, config: str) -> int:
        """The number of rows of a config."""
        total = 0
        for file in self._files(config):
            with self._open(file) as reader:
                total += reader.metadata.num_rows
        return total

    def rows(
        self,
        config: str,
        columns: Sequence[str],
        either: Sequence[str] = (),
        optional: Sequence[str] = (),
        only: Collection[int] | None = None,
    ) -> Iterator[Row]:
        """Yields the rows of a config.

        Args:
            config: the name of the config.
            columns: required columns.
            either: columns of which at least one is required.
            optional: columns that are read if they exist.
            only: the numbers of the rows to read, counted over all files; None for all. Row groups without any of them
                are not read.

        Raises:
            UserError: a shard or column is missing, a file is corrupt, or there are more than `MOST_ROWS` rows.
        """
        if (count := self.count(config)) > MOST_ROWS:
            problem = f"the config {config} has {count:,} rows, and at most {MOST_ROWS:,} are read"
            raise UserError(f"{self.folder.display()}: {problem}; get the data again, or pass another folder.")
        first = 0  # number of the first row of a file
        for file in self._files(config):
            path = self.folder.display(file)
            with self._open(file) as reader:
                names = reader.schema_arrow.names
                missing = [f"'{name}'" for name in columns if name not in names]
                if either and not set(either) & set(names):
                    missing.append(" or ".join(f"'{name}'" for name in either))
                if missing:
                    raise UserError(f"Column {listed(missing)} is missing in {path}, which has {listed(names)}.")
                if twice := sorted(name for name in {*columns, *either, *optional} if names.count(name) > 1):
                    raise UserError(f"Column {listed(twice)} is there twice in {path}; remove one of the columns.")
                wanted = [*columns, *(name for name in (*either, *optional) if name in names)]
                for name in wanted:
                    if other := _other_type(kind := reader.schema_arrow.field(name).type):
                        within = f" in {kind}" if other != kind else ""
                        problem = f"has the type {other}{within:.100}, which is neither text, bytes nor a number"
                        raise UserError(f"Column '{name}' in {path} {problem}; write it as text.")
                for index, values in _numbered(reader, wanted, first, only):
                    row_id = f" (ID {values['ID']!a})" if values.get("ID") is not None else ""
                    yield Row(values, f"{path}, row {index}{row_id}", name=f"{config}/{index}", lenient=True)
                first += reader.metadata.num_rows

    @contextlib.contextmanager
    def _open(self, file: str) -> Iterator[pq.ParquetFile]:
        try:
            with self.folder.open(file) as handle, pq.ParquetFile(handle) as reader:
                yield reader
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"{self.folder.display(file)} cannot be read as parquet ({storage.first_line(error)}); "
                "download or write it again."
            ) from error

    def _shards(self, config: str) -> list[str]:
        folder, split = self._folder_and_split(config)
        names = [info.base_name for info in self.folder.files(folder)]
        return [f"{folder}/{name}" for name in names if re.fullmatch(rf"{re.escape(split)}-.*\.parquet", name)]

    def _folder_and_split(self, config: str) -> tuple[str, str]:
        folder, _, split = config.partition("/")
        return folder, split or self.split

    def _files(self, config: str) -> list[str]:
        files, path = self._shards(config), self.folder.display()
        if not files:
            folders = [info.base_name for info in self.folder.files() if info.type == fs.FileType.Directory]
            folder, split = self._folder_and_split(config)
            within = f"{path}/{folder}" if folder in folders else path
            present = [info.base_name for info in self.folder.files(folder)] if folder in folders else folders
            raise UserError(
                f"The config {config} is missing: no {path}/{folder}/{split}-*.parquet. {within} has "
                f"{listed(present)}; get the data again, or pass another folder."
            )
        shards = re.search(r"-of-(\d+)", files[0])
        if shards and len(files) != int(shards[1]):
            raise UserError(
                f"The config {config} in {path} has {len(files)} of {int(shards[1])} parquet files; get it again."
            )
        return files


def _numbered(
    reader: pq.ParquetFile, columns: Sequence[str], first: int, only: Collection[int] | None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a file with their numbers, of which the first is given."""
    for group in range(reader.num_row_groups):
        metadata = reader.metadata.row_group(group)
        numbers = range(first, first + metadata.num_rows)
        first += metadata.num_rows
        if only is not None and not any(number in only for number in numbers):
            continue
        numbered = iter(numbers)
        for batch in reader.iter_batches(_rows_at_once(metadata), row_groups=[group], columns=columns):
            places = list(itertools.islice(numbered, batch.num_rows))
            if only is not None:
                chosen = [place for place, number in enumerate(places) if number in only]
                batch, places = batch.take(pa.array(chosen, pa.int64())), [places[place] for place in chosen]
            yield from zip(places, batch.to_pylist(), strict=True)


def _rows_at_once(group: pq.RowGroupMetaData) -> int:
    """How many rows of a row group are read at once: fewer if each may be a copy of one large value of a dictionary."""
    chunks = (group.column(number) for number in range(group.num_columns))
    largest = max((chunk.total_uncompressed_size for chunk in chunks if chunk.has_dictionary_page), default=0)
    return max(1, min(MOST_ROWS_AT_ONCE, MOST_BYTES_AT_ONCE // max(largest, 1)))


def _other_type(kind: pa.DataType) -> pa.DataType | None:
    """The type, or one nested in it, that no field of a benchmark has, such as a date; None if all may be."""
    if isinstance(kind, pa.BaseExtensionType):
        return _other_type(kind.storage_type)
    inner = [kind.field(number).type for number in range(kind.num_fields)]
    if pa.types.is_dictionary(kind):
        inner = [kind.value_type]
    elif not inner:
        return None if any(is_type(kind) for is_type in _TYPES) else kind
    return next(filter(None, map(_other_type, inner)), None)


def check_source(source: str) -> None:
    """Checks that a source is a folder, a URI or an id on the hub, before anything is read.

    Raises:
        UserError: it is none of them.
    """
    if not ("://" in source or storage.resolve(source).is_dir() or hub.is_id(source)):
        raise Missing(
            f"There is no data folder {source}; pass a folder as the hub lays it out, an id there (ORG/NAME), or gs://..."
        )


@dataclasses.dataclass(frozen=True)
class PublishedBenchmark(Section):
    """Base class of benchmarks that read a `Snapshot`, or write one of the synthetic people if they have no source."""

    SECTION: ClassVar[str] = "data"
    source: str = setting(
        "", "Folder in the hub's layout, an id on the Hugging Face hub (ORG/NAME), or gs://...; '' is synthetic people."
    )
    symlinks: bool = setting(False, SYMLINKS)
    people: int = setting(0, "Seed of the synthetic people.", **SEED)
    n_people: int = setting(SIZE, "Number of synthetic people.", minimum=MIN_SIZE, maximum=MAX_SIZE)

    def check(self) -> None:
        """Checks the fields.

        Raises:
            UserError: a field of the synthetic people is set together with a source, or the source does not exist.
        """
        for field in ("people", "n_people") if self.source else ():
            default, value = getattr(PublishedBenchmark, field), getattr(self, field)
            if value != default:
                raise UserError(
                    f"data.{field}: {value} is for synthetic people. Leave it at {default} with "
                    f"data.source={self.source}."
                )
        if self.source:
            check_source(self.source)

    @property
    def population(self) -> Population:
        """The synthetic people, if there is no source."""
        return Population(self.people, self.n_people)

    def state(self, part: str) -> Any:
        """Name, size and modification time of the files of the source."""
        return self._snapshot(self._configs(part)).state() if self.source else []

    @contextlib.contextmanager
    def open_snapshot(self, part: str) -> Iterator[Snapshot]:
        """Context manager that opens the snapshot of a part; without a source, a temporary one of synthetic people."""
        configs = self._configs(part)
        if self.source:
            yield self._snapshot(configs)
            return
        with tempfile.TemporaryDirectory() as folder:
            self._write_synthetic(folder, configs)
            yield Snapshot(folder, configs, files=self._files())

    def _snapshot(self, configs: Sequence[str]) -> Snapshot:
        return Snapshot(self.source, configs, files=self._files(), links=self.symlinks)

    def _configs(self, part: str) -> tuple[str, ...]:
        """The configs of the snapshot that a part reads; () for a data set without parquet files."""
        raise NotImplementedError

    @property
    def variant(self) -> str:
        """What the report adds to the title: the share that is forgotten, and whose rules judge."""
        share = f", forgetting {self.forget} %" if hasattr(self, "forget") else ""
        return share + (", rules of its own code" if getattr(self, "rules", OURS) == UPSTREAM else "")

    def _files(self) -> tuple[str, ...]:
        """Patterns of the other files of the snapshot, see `Snapshot`."""
        return ()

    def _write_synthetic(self, folder: str, configs: Sequence[str]) -> None:
        """Writes these configs of the synthetic people into a folder."""
        raise NotImplementedError


# ---- Checks of a whole snapshot ----


def check_people(
    source: str, forget: tuple[str, Set[str]], retain: tuple[str, Set[str]], everybody: Set[str] | None = None
) -> None:
    """Checks that no person is in both sets (see `names.check_apart`), and warns of people in neither.

    Args:
        source: the source of the snapshot, for messages.
        forget: the config of the forget set, and its people.
        retain: the config of the retain set, and its people.
        everybody: the people of the full set, if it is known.

    Raises:
        UserError: the forget set is empty, or a person is in both sets, or may be.
    """
    suffix = f" of {source}" if source else ""
    if not forget[1]:
        raise UserError(f"The forget set is empty: {forget[0]}{suffix} has no people.")
    names.check_apart(forget, (f"{retain[0]}{suffix}", retain[1]))
    if everybody is None:
        return
    if lost := sorted(everybody - forget[1] - retain[1]):
        logging.warning(
            "%d people of the full set%s are neither in %s nor in %s: %s.",
            *(len(lost), suffix, forget[0], retain[0], listed(lost)),
        )
    if strangers := sorted((forget[1] | retain[1]) - everybody):
        logging.warning(
            "%d people of %s and %s are not in the full set%s: %s.",
            *(len(strangers), forget[0], retain[0], suffix, listed(strangers)),
        )


def check_known(row: Row, field: str, listed_ids: Set[str], known: Set[str], place: str) -> None:
    """Checks that the data have all that a list of a split file names, each in one spelling.

    What is to be forgotten and is not found would be retained, or would not be there at all.

    Args:
        row: the split file.
        field: the list in it.
        listed_ids: the IDs of people or facts in the list.
        known: the IDs that the data have.
        place: where the data have them, for messages.

    Raises:
        UserError: one of the IDs is not in the data, or may also be there in another spelling.
    """
    if unknown := sorted(listed_ids - known):
        raise row.error(field, f"has {len(unknown)} of {len(listed_ids)} IDs not among {place}, such as {unknown[0]!a}")
    if pairs := names.similar_names(listed_ids, known - listed_ids):
        raise row.error(field, f"has {len(pairs)} IDs that may also be spelled otherwise in {place}: {listed(pairs)}")


def check_member(row: Row, field: str, name: str, known: Set[str], place: str) -> None:
    """Checks that a row is about somebody known. Others, such as misspelled people to forget, would be retained.

    Args:
        row: the row.
        field: its field that names the person or the like, for messages.
        name: the person that the row is about.
        known: the people that are known.
        place: where they are listed, for messages.

    Raises:
        UserError: the person is not known.
    """
    if name not in known:
        raise row.error(field, f"is {row.identifier(field)!a}, which is not among those of {place}")


def check_same_people(people: tuple[str, Sequence[str]], known: tuple[str, Sequence[str]]) -> None:
    """Checks that rows are about people whom another config has, too.

    Args:
        people: the config that is checked, and the person of each of its rows.
        known: the other config, and the person of each of its rows.

    Raises:
        UserError: half of the rows or more are about others.
    """
    keys = set(map(names.name_key, known[1]))
    if not (others := [name for name in people[1] if names.name_key(name) not in keys]):
        return
    count = f"{len(others)} of {len(people[1])} rows of {people[0]} are about people who are not in {known[0]}"
    message = f"{count}: {listed(dict.fromkeys(others))}"
    if 2 * len(others) >= len(people[1]):
        raise UserError(f"{message}; get the files of both configs again.")
    logging.warning("%s.", message)


def check_one_row_each(config: str, people: Sequence[str]) -> None:
    """Checks that each person has one row of a config.

    Args:
        config: the config.
        people: the person of each of its rows; "" for rows about nobody.

    Raises:
        UserError: more than half of the people have several.
    """
    counts = collections.Counter(name for name in people if name)
    several = [name for name, count in counts.items() if count > 1]
    refuse_most(several, len(counts), f"people of {config} have more than one row")


def check_row_counts(snapshot: Snapshot, source: str, published: Mapping[str, int]) -> None:
    """Warns of configs whose number of rows differs from the published one; synthetic people are not checked."""
    for config in snapshot.configs if source else ():
        if config in published and (count := snapshot.count(config)) != published[config]:
            logging.warning("%s of %s has %d rows; as published it has %d.", config, source, count, published[config])
