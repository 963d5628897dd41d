"""Tests of atomic writes of files and folders."""

import os

import pytest

from vkd_jax.runtime import files


@pytest.fixture
def flushed(monkeypatch):
    """The order in which files are flushed and renamed."""
    calls = []
    replace = os.replace
    monkeypatch.setattr(files, "_flush", lambda path: calls.append(("flush", path.suffix)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append(("rename", a.suffix)), replace(a, b)))
    return calls


def test_a_file_is_flushed_then_renamed(tmp_path, flushed):
    path = files.write_bytes(tmp_path / "new" / "a.json", b"{}")
    assert path.read_bytes() == b"{}"
    assert flushed == [("flush", ".tmp"), ("rename", ".tmp"), ("flush", "")]
    assert os.listdir(path.parent) == ["a.json"]


def test_an_error_keeps_the_old_file(tmp_path):
    path = files.write_bytes(tmp_path / "a.json", b"old")
    with pytest.raises(RuntimeError), files.atomic_file(path) as temporary:
        temporary.write_bytes(b"half")
        raise RuntimeError
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["a.json"]


def test_two_writers_of_one_file_use_separate_temporaries(tmp_path):
    path = tmp_path / "a"
    with files.atomic_file(path) as one, files.atomic_file(path) as two:
        assert one != two
        one.write_bytes(b"one")
        two.write_bytes(b"two")
    assert path.read_bytes() == b"one"  # the outer block ends last


def test_a_folder_is_replaced_as_a_whole(tmp_path, flushed):
    target = tmp_path / "model"
    for name in ("a", "b"):
        flushed.clear()
        with files.atomic_folder(target) as folder:
            (folder / f"{name}.json").write_text(name)
            assert not (target / f"{name}.json").exists()
        assert os.listdir(target) == [f"{name}.json"] and os.listdir(tmp_path) == ["model"]
        assert flushed[:2] == [("flush", ".json"), ("flush", ".tmp")] and flushed[2][0] == "rename"


def test_an_error_keeps_the_old_folder_and_removes_leftovers(tmp_path):
    target = tmp_path / "model"
    with files.atomic_folder(target) as folder:
        (folder / "a").write_text("a")
    (tmp_path / ".model.killed.tmp").mkdir()
    (tmp_path / ".other.killed.tmp").mkdir()
    with pytest.raises(RuntimeError), files.atomic_folder(target) as folder:
        (folder / "b").write_text("b")
        raise RuntimeError
    assert os.listdir(target) == ["a"] and sorted(os.listdir(tmp_path)) == [".other.killed.tmp", "model"]
