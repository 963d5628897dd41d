"""Where rows come from: a folder, a URI, a data set on the hub; the rest is tested with the benchmarks."""

import os
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import constants
from pyarrow import fs

from vkd_jax import benchmarks
from vkd_jax.benchmarks import parquet
from vkd_jax.benchmarks.parquet import Snapshot
from vkd_jax.runtime import storage
from vkd_jax.types import UserError

SHA = "0123456789abcdef0123456789abcdef01234567"
CONFIGS = ("forget_10", "retain_90", "Test_Set", "Retain_Set")


def read(source, folder):
    return benchmarks.read(benchmarks.create("mllmu", dict(source=source)), folder)


def test_a_uri_is_read_like_the_folder(few, tmp_path):
    expected = read(str(few), tmp_path)
    assert read(few.as_uri(), tmp_path) == expected
    assert read(str(few) + "/", tmp_path) == expected
    relative = os.path.relpath(few)
    assert read(relative, tmp_path) == expected


def test_a_bucket_is_read_like_the_folder(few, tmp_path, monkeypatch):
    """Through the same calls as gs://, on a file system in memory."""
    bucket = fs.FileSystem.from_uri("mock:///")[0]
    for config in CONFIGS:
        [file] = (few / config).iterdir()
        bucket.create_dir(f"people/{config}")
        with bucket.open_output_stream(f"people/{config}/{file.name}") as out:
            out.write(file.read_bytes())
    asked = []

    class FileSystem:
        @staticmethod
        def from_uri(uri):
            asked.append(uri)
            return bucket, "people"

    monkeypatch.setattr(storage.fs, "FileSystem", FileSystem)
    assert read("gs://people", tmp_path) == read(str(few), tmp_path)
    assert set(asked) == {f"gs://people?retry_limit_seconds={storage.GCS_TIMEOUT}"}
    bucket.delete_dir("people/Test_Set")
    with pytest.raises(UserError, match=r"Test_Set is missing: no gs://people/Test_Set/train-\*.parquet"):
        read("gs://people", tmp_path)


@pytest.mark.parametrize("uri", ["nope://bucket/folder", "gs://", "://"])
def test_a_uri_of_no_place(uri, tmp_path):
    with pytest.raises(UserError) as error:
        read(uri, tmp_path)
    assert str(error.value).endswith(".") and "\n" not in str(error.value) and uri in str(error.value)


def test_a_place_that_does_not_answer(tmp_path, monkeypatch):
    class Silent:
        def get_file_info(self, *_):
            raise OSError("google::cloud::Status(UNAVAILABLE: Retry policy exhausted\nand more")

    class FileSystem:
        @staticmethod
        def from_uri(uri):
            return Silent(), "bucket"

    monkeypatch.setattr(storage.fs, "FileSystem", FileSystem)
    with pytest.raises(
        UserError, match=r"^gs://bucket/forget_10 cannot be read \(google.* exhausted\); check its name\.$"
    ):
        read("gs://bucket", tmp_path)


@pytest.fixture
def cached(few, tmp_path, monkeypatch):
    """A data set in the hub's cache, as a download leaves it."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    root = tmp_path / "cache" / "datasets--org--people"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(SHA)
    (root / "blobs").mkdir()
    for config in CONFIGS:
        [file] = (few / config).iterdir()
        (root / "blobs" / config).write_bytes(file.read_bytes())
        (root / "snapshots" / SHA / config).mkdir(parents=True)
        (root / "snapshots" / SHA / config / file.name).symlink_to(root / "blobs" / config)
    return root


def test_a_data_set_of_the_hub_is_read_like_the_folder(few, cached, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expected = read(str(few), tmp_path)
    assert read("org/people", tmp_path) == read(f"org/people@{SHA}", tmp_path) == expected
    with pytest.raises(UserError, match="no data folder org/people here, and .* lacks ft_Data/"):
        benchmarks.read(benchmarks.create("mllmu", dict(source="org/people")), tmp_path, finetune=True)
    with pytest.raises(UserError, match="no data folder org/nobody here, and the hub's cache does not hold all of"):
        read("org/nobody", tmp_path)
    Path("org/people").mkdir(parents=True)  # a folder goes before the hub
    with pytest.raises(UserError, match="config forget_10 is missing: no org/people/forget_10"):
        read("org/people", tmp_path)


def test_what_is_neither(tmp_path):
    for source in ("nowhere", "/nowhere/at/all", "a/b/c"):
        with pytest.raises(UserError, match=f"no data folder {source}; pass a folder as the hub lays it out"):
            benchmarks.create("mllmu", dict(source=source)).check()


def test_a_shard_outside_of_the_folder_is_refused_unless_links_are_allowed(few, tmp_path):
    source = tmp_path / "source"
    for config in CONFIGS:
        [file] = (few / config).iterdir()
        (source / config).mkdir(parents=True)
        (source / config / file.name).symlink_to(file)
    with pytest.raises(UserError, match=rf"'forget_10/{file.name}' is a symbolic link out of {source}"):
        read(str(source), tmp_path)
    allowed = benchmarks.create("mllmu", dict(source=str(source), symlinks=True))
    assert benchmarks.read(allowed, tmp_path) == read(str(few), tmp_path)


@pytest.mark.parametrize(
    ("create", "problem"),
    [
        (os.mkfifo, "is a named pipe; pass a regular file"),
        (os.mkdir, "is a folder; pass a regular file"),
        (lambda path: os.symlink("/dev/zero", path), "is a symbolic link out of"),
    ],
    ids=["pipe", "folder", "device"],
)
def test_a_shard_that_is_no_file_is_never_opened(tmp_path, create, problem):
    (tmp_path / "forget_10").mkdir()
    create(tmp_path / "forget_10" / "train-00000-of-00001.parquet")
    with pytest.raises(UserError, match=problem):
        list(Snapshot(str(tmp_path), ["forget_10"]).rows("forget_10", ["ID"]))


def test_text_that_is_not_utf8_is_one_sentence(few, tmp_path):
    shutil.copytree(few, tmp_path / "source")
    values = pa.array([b"\xff"]).cast(pa.binary()).view(pa.string())
    pq.write_table(pa.table({"ID": values}), tmp_path / "source" / "forget_10" / "train-00000-of-00001.parquet")
    with pytest.raises(UserError, match="forget_10/.* cannot be read as parquet"):
        read(str(tmp_path / "source"), tmp_path)


@pytest.mark.parametrize("only", [set(), {0}, {3, 4}, {6}, {1, 5}, set(range(7))])
def test_chosen_rows_of_a_split_have_the_same_numbers_as_in_the_whole(only, tmp_path):
    """Two shards of several row groups each; files of other splits are not read."""
    (tmp_path / "data").mkdir()
    for number, values in enumerate(([0, 1, 2, 3, 4], [5, 6])):
        table = pa.table({"question": [f"number {value}" for value in values]})
        pq.write_table(table, tmp_path / f"data/test-0000{number}-of-00002-0a1b.parquet", row_group_size=2)
    (tmp_path / "data/train-00000-of-00001.parquet").write_bytes(b"no parquet")
    snapshot = Snapshot(str(tmp_path), ["data"], split="test")
    rows = {row.name: (row.text("question"), row.location) for row in snapshot.rows("data", ["question"])}
    assert [text for text, _ in rows.values()] == [f"number {value}" for value in range(7)]
    chosen = {row.name: (row.text("question"), row.location) for row in snapshot.rows("data", ["question"], only=only)}
    assert chosen == {f"data/{number}": rows[f"data/{number}"] for number in sorted(only)}


def test_large_values_that_are_stored_once_are_not_all_in_memory_at_once(few, tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    table = pa.table({"question": ["x" * 5000] * 30, "number": range(30)})
    pq.write_table(table, tmp_path / "data/train-00000-of-00001.parquet", row_group_size=20)
    snapshot, sizes = Snapshot(str(tmp_path), ["data"]), []
    batches = pq.ParquetFile.iter_batches
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", lambda x, n, **more: sizes.append(n) or batches(x, n, **more))
    for most, expected in ((parquet.MOST_BYTES_AT_ONCE, [64, 64]), (3 * 5100, [3, 3]), (1, [1, 1])):
        monkeypatch.setattr(parquet, "MOST_BYTES_AT_ONCE", most)
        for only in (None, {2, 19, 20}):
            rows = snapshot.rows("data", ["question", "number"], only=only)
            assert [row.identifier("number") for row in rows] == [str(n) for n in sorted(only or range(30))]
            assert [sizes.pop(0), sizes.pop(0)] == expected


@pytest.mark.parametrize("only", [None, {0}])
def test_more_rows_than_any_data_set_has_are_refused_before_one_is_read(few, only, tmp_path, monkeypatch):
    snapshot = Snapshot(str(few), ["retain_90"])
    count = snapshot.count("retain_90")
    monkeypatch.setattr(parquet, "MOST_ROWS", count)
    assert next(snapshot.rows("retain_90", ["ID"], only=only))
    monkeypatch.setattr(parquet, "MOST_ROWS", count - 1)
    monkeypatch.setattr(parquet, "_numbered", lambda *_: pytest.fail("a row was read"))
    with pytest.raises(
        UserError, match=f"the config retain_90 has {count} rows, and at most {count - 1} are read; get"
    ):
        next(snapshot.rows("retain_90", ["ID"], only=only))
