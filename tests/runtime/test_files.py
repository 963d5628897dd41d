"""Tests of atomic writes, and of reads of files that others wrote."""

import errno
import os
import socket
import unicodedata

import pytest

from vkd_jax.runtime import files, storage
from vkd_jax.types import UserError


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


@pytest.mark.parametrize("recursive", [True, False])
def test_only_what_killed_writers_left_is_removed(tmp_path, recursive):
    names = ["a.json", ".hidden", "x.tmp", ".notes.tmp", f".{'a' * 32}.tmp.json"]
    leftovers = [files._temporary(folder / name) for folder in (tmp_path, tmp_path / "sub") for name in ("a.json", "b")]
    (tmp_path / "sub").mkdir()
    for path in (*(tmp_path / name for name in names), *leftovers[::2]):
        path.write_text("")
    for folder in leftovers[1::2]:
        (folder / "inner").mkdir(parents=True)
    files.remove_unfinished(tmp_path, recursive=recursive)
    assert sorted(os.listdir(tmp_path)) == sorted([*names, "sub"])
    assert len(os.listdir(tmp_path / "sub")) == (0 if recursive else 2)


def test_a_folder_that_cannot_be_removed_is_named_and_not_its_entry(tmp_path, monkeypatch):
    def refuse(name, *, dir_fd=None):
        raise PermissionError(errno.EPERM, "Operation not permitted", name)

    (tmp_path / "4").mkdir()
    (tmp_path / "4" / "entry").touch()
    monkeypatch.setattr(os, "unlink", refuse)
    with pytest.raises(PermissionError) as error:
        files.remove(tmp_path / "4")
    assert error.value.filename == str(tmp_path / "4")


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


OUTSIDE = {
    "a parent": "../secret",
    "a parent, later": "sub/../../secret",
    "an absolute path": "{folder}/../secret",
    "a link": "link",
    "a link to a folder": "linked_folder/secret",
    "a link to a link": "link_to_link",
    "a dangling link": "dangling",
}


@pytest.fixture
def folder(tmp_path):
    """A folder with files, links out of it, and a link in it."""
    folder = tmp_path / "data"
    (folder / "sub").mkdir(parents=True)
    (tmp_path / "secret").write_text("secret")
    (folder / "sub" / "a").write_text("a")
    (folder / "link").symlink_to(tmp_path / "secret")
    (folder / "linked_folder").symlink_to(tmp_path)
    (folder / "link_to_link").symlink_to(folder / "link")
    (folder / "dangling").symlink_to(tmp_path / "nothing")
    (folder / "inner").symlink_to("sub/a")
    (folder / "loop").symlink_to("loop")
    return folder


@pytest.mark.parametrize("name", OUTSIDE.values(), ids=OUTSIDE)
def test_a_file_outside_of_the_folder_is_refused_by_name(folder, name):
    name = name.format(folder=folder)
    with pytest.raises(UserError) as raised:
        files.inside(folder, name)
    assert repr(name) in str(raised.value) and " out of " in str(raised.value)


@pytest.mark.parametrize("name", ["", " ", "a\0b", "\ud800"])
def test_a_text_that_names_no_file_is_refused(folder, name):
    with pytest.raises(UserError, match="is not a file name"):
        files.inside(folder, name)


def test_a_loop_of_links_is_refused(folder):
    with pytest.raises(UserError, match="loop|levels of symbolic links"), files.reading(folder / "loop"):
        files.inside(folder, "loop").read_bytes()


def test_files_and_links_within_the_folder_are_found_also_through_a_link_to_the_folder(folder, tmp_path):
    (tmp_path / "alias").symlink_to(folder)
    for root in (folder, tmp_path / "alias"):
        for name in ("sub/a", "./sub/a", "inner"):
            assert files.inside(root, name).read_text() == "a"
    assert files.inside(folder, "missing") == folder / "missing"


def test_links_out_of_the_folder_can_be_allowed_but_not_names(folder):
    assert files.inside(folder, "link", links=True).read_text() == "secret"
    with pytest.raises(UserError, match="leads out of"):
        files.inside(folder, "../secret", links=True)


@pytest.mark.parametrize(
    "name", ["link", "linked_folder", "link_to_link", "dangling", "inner", "loop", "sub/deep/link"]
)
def test_links_at_any_depth_are_found_but_not_the_folder_itself(folder, tmp_path, name):
    for link in [path for path in folder.rglob("*") if path.is_symlink()]:
        if link.name != name:
            link.unlink()
    if name.startswith("sub"):
        (folder / name).parent.mkdir()
        (folder / name).symlink_to(tmp_path / "secret")
    (tmp_path / "alias").symlink_to(folder)
    for root in (folder, tmp_path / "alias"):
        with pytest.raises(
            UserError, match=f"{root}/{name} is a link to .*, where nothing may be written or deleted; move"
        ):
            files.check_no_links(root, "move it")
    (folder / name).unlink()
    files.check_no_links(tmp_path / "alias", "move it")


def test_a_snapshot_in_the_cache_of_the_hub_links_to_its_blobs(tmp_path):
    repository = tmp_path / "datasets--a--b"
    snapshot = repository / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "blobs" / "x").write_text("x")
    (snapshot / "train").symlink_to("../../blobs/x")
    (snapshot / "out").symlink_to("../../../secret")
    assert files.inside(snapshot, "train").read_text() == "x"
    with pytest.raises(UserError, match="out of"):
        files.inside(snapshot, "out")


SPECIAL = {
    "a folder": lambda path: path.mkdir(),
    "a named pipe": lambda path: os.mkfifo(path),
    "a socket": lambda path: _bind(path),
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "2.0 MiB": lambda path: path.write_bytes(bytes(2**21)),
    "There is no file": lambda path: None,
    r"is a link to \.\./gone, which is gone: get what it belongs to again": lambda path: path.symlink_to("../gone"),
    "cannot be read": lambda path: path.symlink_to(path.name),
}


def _bind(path):
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(path.name)


@pytest.mark.parametrize(("problem", "create"), SPECIAL.items(), ids=SPECIAL)
def test_only_regular_files_of_a_limited_size_are_opened(tmp_path, monkeypatch, problem, create):
    monkeypatch.chdir(tmp_path)  # the path of a socket is short
    create(tmp_path / "a.png")
    with pytest.raises(UserError, match=problem) as raised:
        files.read_bytes(tmp_path / "a.png", 2**20)
    assert str(tmp_path / "a.png") in str(raised.value)


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_a_file_whose_name_only_looks_the_same_is_named(tmp_path, forms):
    """As after unpacking an archive that was made on macOS."""
    asked, there = (unicodedata.normalize(form, "Zoë.png") for form in forms)
    (tmp_path / there).write_bytes(b"x")
    with pytest.raises(UserError, match="There is no file .*but one of the same letters in another Unicode form, .*Zo"):
        files.read_bytes(tmp_path / asked, 2**20)


def test_a_file_without_permission_is_named(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    path.write_text("{}")

    def refuse(self):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(type(path), "read_bytes", refuse)  # root may read everything
    with pytest.raises(UserError, match=r"a\.json may not be read"):
        files.read_bytes(path, 10)


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("~/runs/a", "~"):
        expected = tmp_path / name.removeprefix("~").strip("/")
        assert storage.resolve(name) == expected and storage.SourceFolder(name).path == str(expected)
    assert str(storage.resolve("a/~")) == "a/~" and storage.SourceFolder("a~b/").path == "a~b"
