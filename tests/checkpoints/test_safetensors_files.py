"""Safetensors files: headers, reading in pieces, writing, progress, and errors for invalid files."""

import hashlib
import json
import shutil

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from vkd_jax.checkpoints import safetensors_files
from vkd_jax.types import UserError

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def save(folder, tensors, name="model.safetensors"):
    folder.mkdir(exist_ok=True)
    safetensors.numpy.save_file(tensors, folder / name, metadata={"format": "pt"})
    return folder


@pytest.fixture
def folder(tmp_path):
    return save(tmp_path / "model", {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, np.float16)})


@pytest.fixture
def sharded(tmp_path):
    folder = tmp_path / "sharded"
    save(folder, {"a": np.zeros(2, np.float32)}, FIRST)
    save(folder, {"b": np.ones(3, np.float32)}, SECOND)
    (folder / safetensors_files.INDEX).write_text(json.dumps({"weight_map": {"a": FIRST, "b": SECOND}}))
    return folder


@pytest.fixture
def reads(monkeypatch):
    """Numbers of bytes of all reads."""
    reads, fill = [], safetensors_files.Tensor._fill

    def count(self, rows, stream):
        reads.append(rows.nbytes)
        fill(self, rows, stream)

    monkeypatch.setattr(safetensors_files.Tensor, "_fill", count)
    return reads


def tensor(tmp_path, content):
    return safetensors_files.read_header(save(tmp_path, {"x": content}) / safetensors_files.WEIGHTS)["x"]


def cut(*ends):
    return tuple(slice(*end) for end in ends)


# Reading.


def test_a_header_by_hand(tmp_path):
    file = tmp_path / "x.safetensors"
    header = b'{"x":{"dtype":"BF16","shape":[2,1],"data_offsets":[0,4]},"__metadata__":{"format":"pt"}}'
    file.write_bytes(len(header).to_bytes(8, "little") + header + b"\x80\x3f\x00\xc0")
    (x,) = safetensors_files.read_header(file).values()
    assert (x.file, x.dtype, x.shape) == (file, np.dtype(ml_dtypes.bfloat16), (2, 1))
    assert (x.start, x.stop) == (8 + len(header), 12 + len(header))
    values = np.empty((2, 1), np.float32)
    x.copy_to([(cut((0, 2), (0, 1)), values)])
    np.testing.assert_array_equal(values, [[1], [-2]])
    assert x.sha256() == hashlib.sha256(b"\x80\x3f\x00\xc0").hexdigest()


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("chunk, rows", [(1, 1), (1, 3), (100, 1), (1 << 20, 1)])
def test_parts_are_copied_to_their_arrays(tmp_path, monkeypatch, reads, chunk, rows, dtype):
    monkeypatch.setattr(safetensors_files, "CHUNK", chunk)
    monkeypatch.setattr(safetensors_files, "ROWS", rows)
    content = np.arange(7 * 5 * 4, dtype=np.float32).reshape(7, 5, 4)
    x = tensor(tmp_path, content)
    plain, transposed, counts = np.full((7, 5, 4), -1, dtype), np.full((4, 2, 3), -1, dtype), []
    part = cut((2, 5), (1, 3), (0, 4))
    x.copy_to([(cut((0, 7), (0, 5), (0, 4)), plain), (part, transposed.transpose(2, 1, 0))], counts.append)
    np.testing.assert_array_equal(plain, content.astype(dtype))
    np.testing.assert_array_equal(transposed, content[2:5, 1:3].transpose(2, 1, 0).astype(dtype))
    assert sum(reads) == sum(counts) == content.nbytes  # rows of both parts are read once
    assert max(reads) <= max(chunk, rows * content[0].nbytes)


def test_rows_outside_all_parts_are_not_read(tmp_path, monkeypatch, reads):
    monkeypatch.setattr(safetensors_files, "CHUNK", 1)
    monkeypatch.setattr(safetensors_files, "ROWS", 2)
    content = np.arange(24, dtype=np.int32).reshape(8, 3)
    x = tensor(tmp_path, content)
    a, b, counts = np.empty((1, 3), np.int32), np.empty((2, 1), np.int32), []
    x.copy_to([(cut((3, 4), (0, 3)), a), (cut((6, 8), (1, 2)), b)], counts.append)
    np.testing.assert_array_equal(a, content[3:4])
    np.testing.assert_array_equal(b, content[6:8, 1:2])
    assert reads == [24, 24]
    assert sum(counts) == content.nbytes
    x.copy_to([], counts.append)
    assert (reads, sum(counts)) == ([24, 24], 2 * content.nbytes)


def test_scalars_and_empty_tensors(tmp_path):
    value, counts = np.zeros((), np.float32), []
    tensor(tmp_path, np.array(3, np.int64)).copy_to([((), value)], counts.append)
    assert (value, counts) == (3, [8])
    tensor(tmp_path, np.zeros((0, 4), np.float32)).copy_to([(cut((0, 0), (0, 4)), np.zeros((0, 4)))], counts.append)
    assert counts == [8]


def test_a_file_that_shrinks_during_reading_is_reported(tmp_path):
    x = tensor(tmp_path, np.arange(100))
    x.file.write_bytes(x.file.read_bytes()[:-1])
    with pytest.raises(UserError, match="became shorter"):
        x.copy_to([(cut((0, 100)), np.zeros(100))])


def test_sharded_files_form_one_checkpoint(sharded):
    checkpoint = safetensors_files.Checkpoint(sharded)
    assert [file.name for file in checkpoint.files] == [FIRST, SECOND]
    assert {name: x.file.name for name, x in checkpoint.tensors.items()} == {"a": FIRST, "b": SECOND}


# Writing.


@pytest.mark.parametrize("dtype", safetensors_files.DTYPES.values(), ids=list(safetensors_files.DTYPES))
def test_written_files_can_be_read(tmp_path, dtype):
    tensors = {"b": np.arange(6).reshape(2, 3).T.astype(dtype), "a": np.array(1, dtype)}
    requests = []
    safetensors_files.write(
        tmp_path / safetensors_files.WEIGHTS, tensors, lambda name: (requests.append(name), tensors[name])[1]
    )
    assert requests == ["a", "b"]
    with safetensors.safe_open(tmp_path / safetensors_files.WEIGHTS, "np") as file:
        assert file.metadata() == {"format": "pt"}
        for name, want in tensors.items():
            got = file.get_tensor(name)
            assert got.dtype == want.dtype
            np.testing.assert_array_equal(got, want)
    back = np.empty((3, 2), dtype)
    safetensors_files.read_header(tmp_path / safetensors_files.WEIGHTS)["b"].copy_to([(cut((0, 3), (0, 2)), back)])
    np.testing.assert_array_equal(back, tensors["b"])


# Progress.


class Clock:
    now = 100.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(safetensors_files, "time", clock)
    return clock


@pytest.fixture
def lines(monkeypatch):
    lines = []
    monkeypatch.setattr(safetensors_files.logging, "info", lambda text, *values: lines.append(text % values))
    return lines


def test_long_loading_logs_progress(clock, lines):
    progress = safetensors_files.ProgressLog("some/folder", 4_300_000_000)
    for _ in range(43):  # 13 seconds
        clock.now += 0.3
        progress(100_000_000)
    assert lines == [
        "read 1.7 of 4.3 GB of some/folder (39 %)",
        "read 3.4 of 4.3 GB of some/folder (79 %)",
        "read 4.3 of 4.3 GB of some/folder (100 %)",
    ]


def test_short_loading_logs_nothing(clock, lines):
    progress = safetensors_files.ProgressLog("some/folder", 1000)
    for _ in range(10):
        clock.now += 0.49
        progress(100)
    assert lines == []


def test_one_long_read_is_logged_once(clock, lines):
    progress = safetensors_files.ProgressLog("some/folder", 2_000_000_000)
    clock.now += 60
    progress(2_000_000_000)
    assert lines == ["read 2.0 of 2.0 GB of some/folder (100 %)"]


# Invalid folders.


def fails(folder, *messages):
    with pytest.raises(UserError) as error:
        safetensors_files.Checkpoint(folder)
    text = str(error.value)
    assert text.endswith(".") and "\n" not in text
    for message in messages:
        assert message in text, text


def test_missing_folders_and_weights_are_reported(folder, tmp_path):
    fails(tmp_path / "nowhere", "There is no model folder")
    (folder / "model.safetensors").unlink()
    fails(folder, "has no weights")
    (folder / "pytorch_model.bin").write_bytes(b"")
    fails(folder, "only pickled weights (pytorch_model.bin)", "safetensors")


def test_invalid_indexes_are_reported(sharded):
    index = sharded / safetensors_files.INDEX
    good = json.loads(index.read_text())
    index.write_text(json.dumps({"weight_map": good["weight_map"] | {"no.such.tensor": FIRST}}))
    fails(sharded, f"lists tensors that {FIRST} does not contain", "no.such.tensor")
    for bad in ("{", "[]"):
        index.write_text(bad)
        fails(sharded, f"{safetensors_files.INDEX}: ", "download it again")
    for bad in ("{}", '{"weight_map": {}}'):
        index.write_text(bad)
        fails(sharded, "is not a safetensors index")
    index.write_text('{"weight_map": {"a": "../a.safetensors"}}')
    fails(sharded, "weight_map names no file of its folder for the tensor 'a': '../a.safetensors' leads out of")
    index.write_text(json.dumps(good))
    shutil.copy(sharded / FIRST, tmp := sharded / "spare")
    safetensors.numpy.save_file({"a": np.zeros(2), "b": np.zeros(2)}, sharded / FIRST)
    fails(sharded, "contains tensors twice: b")
    tmp.rename(sharded / FIRST)
    (sharded / SECOND).unlink()
    fails(sharded, f"files that are missing: {SECOND}")


def test_a_pointer_of_git_lfs_is_named(folder):
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    fails(folder, "is a Git LFS pointer, not the file itself; run `git lfs pull`")


def test_truncated_and_corrupt_files_are_reported(folder):
    file = folder / "model.safetensors"
    data = file.read_bytes()
    for bad in (data[:-1], data[:-20], data[:100], data[:4], b"", data + b"x"):
        file.write_bytes(bad)
        fails(folder, "truncated")
    file.write_bytes(data[:8] + b"}" + data[9:])
    fails(folder, "header cannot be read")
    file.write_bytes(data.replace(b'"F32"', b'"Q77"', 1))
    fails(folder, "Q77")
    file.write_bytes(data.replace(b'"F32"', b'"F16"', 1))
    fails(folder, "corrupt")
