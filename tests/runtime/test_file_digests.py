"""Digests of model files are kept until a file changes, in whatever way."""

import hashlib
import os
import shutil

import pytest

from vkd_jax.runtime import storage


@pytest.fixture
def reads(tmp_path, monkeypatch):
    """A model folder, the files of which digests were computed, and a clock that says that all files are old."""
    folder, names = tmp_path / "model", []
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes(b"12345678")
    compute = hashlib.file_digest
    monkeypatch.setattr(
        hashlib, "file_digest", lambda stream, kind: (names.append(stream.name), compute(stream, kind))[1]
    )
    monkeypatch.setattr(storage.time, "time_ns", lambda: 2**62)
    monkeypatch.setattr(storage, "_digests", {})
    storage.model_digests(folder)
    assert len(names) == 2
    names.clear()
    return folder, names


def rewritten(path):
    path.write_bytes(b"87654321")


def same_size_and_time(path):
    times = path.stat()
    path.write_bytes(b"87654321")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def replaced(path):
    other = path.with_name("other")
    other.write_bytes(b"87654321")
    shutil.copystat(path, other)
    os.replace(other, path)


def linked(path):
    rewritten(path.with_name("blob"))
    path.unlink()
    path.symlink_to("blob")


def in_place(path):
    with path.open("r+b") as stream:
        stream.write(b"8")


@pytest.mark.parametrize("change", [rewritten, same_size_and_time, replaced, linked, in_place])
def test_a_file_that_changed_is_read_again_and_the_others_are_not(change, reads):
    folder, names = reads
    before = storage.model_digests(folder)
    assert not names and before == storage.model_digests(folder)
    change(folder / "model.safetensors")
    after = storage.model_digests(folder)
    data = (folder / "model.safetensors").read_bytes()
    assert after == before | {"model.safetensors": hashlib.sha256(data).hexdigest()} != before
    assert names == [str(folder / "model.safetensors")]


def test_the_digest_of_a_file_that_was_just_written_is_not_kept(reads, monkeypatch):
    folder, names = reads
    monkeypatch.undo()
    (folder / "model.safetensors").write_bytes(b"87654321")
    first = storage.model_digests(folder)
    (folder / "model.safetensors").write_bytes(b"12345678")  # perhaps within the resolution of the clock
    assert storage.model_digests(folder) != first
