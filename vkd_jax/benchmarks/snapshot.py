"""Where a benchmark's rows come from, a folder, a data set on the hub or a bucket, and what is wrong with them.

A snapshot is laid out as on the hub: <config>/train-00000-of-0000N.parquet.
"""

import ast
import contextlib
import io
import json
import posixpath
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from absl import logging
from PIL import Image
from pyarrow import fs

from vkd_jax.runtime import hub
from vkd_jax.types import UserError

GCS_PATIENCE = 60  # seconds until a bucket that does not answer is given up; pyarrow's own is a quarter of an hour


class Where:
    """A row's place, for ids and for error messages."""

    def __init__(self, config: str, file: str, index: int, row_id: Any = None):
        self.config, self.file, self.row_id = config, file, row_id
        self.row = f"{config}/{index}"

    def __str__(self) -> str:
        row_id = "" if self.row_id is None else f" (ID {self.row_id})"
        return f"row {self.row.rpartition('/')[2]}{row_id} of {self.file}"


class Place:
    """A folder of this machine or of a bucket.

    Args:
        uri: a path, or what pyarrow takes, as gs://bucket/folder.

    Raises:
        UserError: there is no such kind of place.
    """

    def __init__(self, uri: str):
        scheme, separator, folder = uri.rpartition("://")
        self._scheme = scheme + separator
        if not separator:
            self._system, self.path = fs.LocalFileSystem(), uri.rstrip("/") or "/"
            return
        if scheme in ("gs", "gcs") and "retry_limit_seconds" not in uri:
            uri += f"{'&' if '?' in uri else '?'}retry_limit_seconds={GCS_PATIENCE}"
        try:
            if not folder.strip("/"):
                raise ValueError("it names no folder")
            self._system, self.path = fs.FileSystem.from_uri(uri)
        except (pa.ArrowException, OSError, ValueError) as error:
            uri = self._scheme + folder
            raise UserError(f"{uri} cannot be read ({_first_line(error)}); pass a folder or gs://...") from error
        self.path = self.path.rstrip("/")

    def shown(self, path: str) -> str:
        """A path of this place as a user would write it."""
        return self._scheme + path

    def files(self, folder: str = "", recursive: bool = False) -> list[fs.FileInfo]:
        """What lies in a folder of this place, by name; nothing where there is no folder.

        Raises:
            UserError: the place does not answer.
        """
        where = posixpath.join(self.path, folder) if folder else self.path
        try:
            infos = self._system.get_file_info(fs.FileSelector(where, allow_not_found=True, recursive=recursive))
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{self.shown(where)} cannot be read ({_first_line(error)}); check its name.") from error
        return sorted(infos, key=lambda info: info.path)

    def state(self, infos: Sequence[fs.FileInfo]) -> list[tuple]:
        """What tells files from changed ones: name, size and time."""
        return [(info.path.removeprefix(self.path), info.size, info.mtime_ns) for info in infos]

    def open(self, path: str) -> pa.NativeFile:
        """A file of this place, at random access."""
        return self._system.open_input_file(path)


class Snapshot:
    """The parquet files of some configs.

    Args:
        source: a folder, a URI as gs://bucket/folder, or an id on the hub, of which only these configs are fetched.
        configs: those that will be read.

    Raises:
        UserError: there is no such place, or it cannot be reached.
    """

    def __init__(self, source: str, configs: Sequence[str]):
        check_source(source)
        here = "://" in source or Path(source).is_dir()
        self.place = Place(source if here else str(hub.fetch_dataset(source, configs)))
        self.configs = tuple(configs)

    def has(self, config: str) -> bool:
        """Whether there is such a config."""
        return bool(self._shards(config))

    def state(self) -> list[tuple]:
        """Name, size and time of every file of the configs; another source has another state."""
        return [entry for config in self.configs for entry in self.place.state(self._files(config))]

    def count(self, config: str) -> int:
        """The rows of a config."""
        total = 0
        for file in self._files(config):
            with self._opened(file) as parquet:
                total += parquet.metadata.num_rows
        return total

    def rows(
        self, config: str, columns: Sequence[str], either: Sequence[str] = (), optional: Sequence[str] = ()
    ) -> Iterator[tuple[Where, dict]]:
        """Every row of a config.

        Args:
            config: its name.
            columns: columns that must be there.
            either: columns of which at least one must be there.
            optional: columns that may be there.

        Raises:
            UserError: a shard or column is missing, or a file is corrupt.
        """
        index = 0
        for file in self._files(config):
            shown = self.place.shown(file.path)
            with self._opened(file) as parquet:
                names = parquet.schema_arrow.names
                missing = [f"'{name}'" for name in columns if name not in names]
                if either and not set(either) & set(names):
                    missing.append(" or ".join(f"'{name}'" for name in either))
                if missing:
                    raise UserError(f"Column {', '.join(missing)} is missing in {shown}, which has {some(names)}.")
                wanted = [*columns, *(name for name in (*either, *optional) if name in names)]
                for batch in parquet.iter_batches(batch_size=64, columns=wanted):
                    for row in batch.to_pylist():
                        yield Where(config, shown, index, row.get("ID")), row
                        index += 1

    @contextlib.contextmanager
    def _opened(self, file: fs.FileInfo) -> Iterator[pq.ParquetFile]:
        try:
            with self.place.open(file.path) as handle, pq.ParquetFile(handle) as parquet:
                yield parquet
        except (pa.ArrowException, OSError) as error:
            raise UserError(
                f"{self.place.shown(file.path)} is not a whole parquet file ({_first_line(error)}); "
                "fetch or write it again."
            ) from error

    def _shards(self, config: str) -> list[fs.FileInfo]:
        return [info for info in self.place.files(config) if re.fullmatch(r"train-.*\.parquet", info.base_name)]

    def _files(self, config: str) -> list[fs.FileInfo]:
        files, place = self._shards(config), self.place.shown(self.place.path)
        if not files:
            there = [info.base_name for info in self.place.files() if info.type == fs.FileType.Directory]
            raise UserError(
                f"The config {config} is missing: no {place}/{config}/train-*.parquet; the folder has {some(there)}."
            )
        shards = re.search(r"-of-(\d+)", files[0].base_name)
        if shards and len(files) != int(shards[1]):
            raise UserError(f"The config {config} in {place} has {len(files)} of {int(shards[1])} parquet files.")
        return files


def check_source(source: str) -> None:
    """Refuses what is neither a folder, nor a URI, nor an id on the hub, before anything is read.

    Raises:
        UserError: as it says.
    """
    if not ("://" in source or Path(source).is_dir() or hub.is_id(source)):
        raise UserError(
            f"There is no data folder {source}; pass one as the hub lays it out, an id there (ORG/NAME), or gs://..."
        )


def check_fields(source: str, people: int) -> None:
    """Checks the fields of a published benchmark.

    Args:
        source: as of `Snapshot`, or "" for synthetic people.
        people: seed of the synthetic people.

    Raises:
        UserError: the seed is given for a source, or the source cannot be one.
    """
    if source and people:
        raise UserError(
            f"data.people: {people} is a seed of synthetic people. Leave it at 0 with data.source={source}."
        )
    if source:
        check_source(source)


@contextlib.contextmanager
def opened(source: str, configs: Sequence[str], made_up: Callable[[str, Sequence[str]], None]) -> Iterator[Snapshot]:
    """The snapshot of a source; without one, that of the made-up people, which stays only as long as it is read.

    Args:
        source: as of `Snapshot`, or "".
        configs: those that will be read.
        made_up: writes such configs into a folder.
    """
    if source:
        yield Snapshot(source, configs)
        return
    with tempfile.TemporaryDirectory() as folder:
        made_up(folder, configs)
        yield Snapshot(folder, configs)


# ---- What a snapshot as a whole must hold ----


def check_people(
    source: str, forget: tuple[str, Set[str]], retain: tuple[str, Set[str]], everybody: Set[str] | None = None
) -> None:
    """Refuses people in both sets, and warns of people in neither.

    Args:
        source: whose people they are.
        forget: the config of the forget set, and its people.
        retain: the same of the retain set.
        everybody: the people of the full set, where it is known.

    Raises:
        UserError: the forget set is empty, or somebody is in both sets.
    """
    place = f" of {source}" if source else ""
    if not forget[1]:
        raise UserError(f"The forget set is empty: {forget[0]}{place} holds nobody.")
    if both := sorted(forget[1] & retain[1]):
        raise UserError(
            f"{len(both)} people stand in both {forget[0]} and {retain[0]}{place}: {some(both)}; "
            "nobody can be forgotten and retained at once."
        )
    if everybody is None:
        return
    if lost := sorted(everybody - forget[1] - retain[1]):
        logging.warning(
            "%d people of the full set%s stand neither in %s nor in %s: %s.",
            *(len(lost), place, forget[0], retain[0], some(lost)),
        )
    if strangers := sorted((forget[1] | retain[1]) - everybody):
        logging.warning(
            "%d people of %s and %s are not in the full set%s: %s.",
            *(len(strangers), forget[0], retain[0], place, some(strangers)),
        )


def check_counts(snapshot: Snapshot, source: str, published: Mapping[str, int]) -> None:
    """Warns of configs with another number of rows than the published one's; the made-up people have their own."""
    for config in snapshot.configs if source else ():
        if config in published and (found := snapshot.count(config)) != published[config]:
            logging.warning("%s of %s has %d rows; as published it has %d.", config, source, found, published[config])


# ---- What a row may hold ----


def picture(value: Any, where: Where) -> bytes | None:
    """The encoded bytes of a picture, decoded once to see that it can be; None where there is none.

    Raises:
        UserError: it does not decode.
    """
    data = value.get("bytes") if isinstance(value, dict) else value
    if data is None:
        return None
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
    except Exception as error:  # whatever the decoder of that format raises
        raise UserError(f"The picture does not decode ({error}) in {where}.") from error
    return data


def text(item: dict, key: str, where: Where) -> str:
    """The text under a key.

    Raises:
        UserError: there is none.
    """
    value = item.get(key)
    if value is None or not str(value).strip():
        raise UserError(f"A question without {key} in {where}.")
    return str(value)


def nested(value: Any, name: str, where: Where) -> Any:
    """A nested value as lists and dicts, parsed when it was stored as JSON or as a Python literal; [] for none.

    Raises:
        UserError: it is neither.
    """
    if value is None:
        return []
    if not isinstance(value, str):
        return value
    for parse in (json.loads, ast.literal_eval):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # literal_eval warns of odd escapes in texts
                return parse(value)
        except (ValueError, SyntaxError):
            pass
    raise UserError(f"{name} is neither JSON nor a Python literal in {where}.")


def some(names: Sequence[Any], most: int = 10) -> str:
    """The first names, and how many more there are."""
    names = [str(name) for name in names]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more if names else "nothing"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
