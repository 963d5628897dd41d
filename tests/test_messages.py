"""Lists in error messages."""

import tempfile
from pathlib import Path

from vkd_jax.messages import listed


def test_a_long_list_is_counted_and_written_to_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert listed(["a", "b", "c"]) == "a, b, c"
    assert not list(tmp_path.iterdir())
    items = [f"tensor {i}" for i in range(700)]
    text = listed(items, "; ")
    (file,) = tmp_path.iterdir()
    assert text == f"tensor 0; tensor 1; tensor 2 and 697 more (all 700 are listed in {file})"
    assert Path(file).read_text().splitlines() == items


def test_long_items_and_full_disks_leave_a_message(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    text = listed(["a" * 10_000, "b", "c", "\ud800"])
    assert text == f"{'a' * 116} ..., b, c and 1 more"
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert "all 4 are listed" in listed(["a", "b", "c", "\ud800"])
