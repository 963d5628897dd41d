"""Where outputs may be written: nothing that somebody else needs is replaced or added to."""

import os

import pytest

from vkd_jax.runtime import outputs
from vkd_jax.types import UserError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a model, an adapter, a key, a page and the page of another model, in which the test stands."""
    for name in ("model/config.json", "model/model.safetensors", "adapter/adapter_config.json", "keys/one", "run/x"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("content")
    (tmp_path / "page.pdf").write_bytes(b"%PDF-1.7")
    (tmp_path / "empty").write_bytes(b"")
    os.symlink("model", tmp_path / "link")
    os.symlink("model/config.json", tmp_path / "linked.pdf")
    os.symlink("loop", tmp_path / "loop")
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.chdir(tmp_path)
    return tmp_path


IN_MODEL, IS_READ = "nothing is written into the model folder", "which is read"
REFUSED = {
    "model/model.safetensors": IN_MODEL,
    "model/new.pdf": IN_MODEL,
    "model/sub/folder/new.pdf": IN_MODEL,
    "link/new.pdf": IN_MODEL,
    "run/../model/new.pdf": IN_MODEL,
    "linked.pdf": IN_MODEL,
    "adapter/new.pdf": IN_MODEL,
    "keys/one": IS_READ,
    "hard": IS_READ,
    "run/new.pdf": IS_READ,
    "run/x": IS_READ,
    "keys/two": "a file of another kind",
    "keys": "is a folder",
    "pipe": "a named pipe",
    "loop": "cannot be",
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_would_destroy_something_is_refused(name, folder):
    (folder / "keys" / "two").write_text("-----BEGIN")
    os.link(folder / "keys" / "one", folder / "hard")
    before = sorted((path, path.lstat().st_mtime_ns) for path in folder.rglob("*"))
    with pytest.raises(UserError, match=REFUSED[name]):
        outputs.check_file(folder / name, "--pdf", outputs.PDF, [folder / "keys" / "one", folder / "run"])
    assert before == sorted((path, path.lstat().st_mtime_ns) for path in folder.rglob("*"))


@pytest.mark.parametrize("name", ["page.pdf", "new.pdf", "sub/folder/new.pdf", "empty"])
def test_other_files_are_allowed(name, folder):
    assert outputs.check_file(folder / name, "--pdf", outputs.PDF, [folder / "run"]) == folder / name


@pytest.mark.parametrize("name", ["model", "model/run", "link/run", "adapter", "run", "loop"])
def test_a_folder_with_something_else_is_refused(name, folder):
    with pytest.raises(UserError, match="--workdir="):
        outputs.check_folder(folder / name, "--workdir", ("[0-9]*",))


@pytest.mark.parametrize("name", ["new", "new/run", "used", "hidden"])
def test_other_folders_are_allowed(name, folder):
    (folder / "used" / "0001").mkdir(parents=True)
    (folder / "hidden").mkdir()
    (folder / "hidden" / ".lock").touch()
    outputs.check_folder(folder / name, "--workdir", ("[0-9]*",))
    with pytest.raises(UserError, match="other files .0001"):
        outputs.check_folder(folder / "used", "--workdir", ("x",))
    outputs.check_folder(folder / "used", "--workdir", ("x",), ("0001",))
