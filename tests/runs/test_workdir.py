"""A run's folder: one config, whole files, times that add up, and errors of the disk in one sentence."""

import errno
import inspect
import json
import os
import pathlib
import re
import subprocess

import pytest

from vkd_jax.config import command_line
from vkd_jax.config.schema import RunConfig
from vkd_jax.runs import pipeline, sweep
from vkd_jax.runs.workdir import Workdir
from vkd_jax.runtime import provenance
from vkd_jax.runtime.storage import write_errors
from vkd_jax.types import UserError


def config(settings=""):
    return RunConfig().override(f"train.steps=3 {settings}")


def begun(path):
    workdir = Workdir(path, config())
    workdir.write_text("answers/vanilla.jsonl", "")
    return workdir


def test_the_same_config_continues(tmp_path):
    begun(tmp_path / "run")
    Workdir(tmp_path / "run", config())  # JSON has lists for tuples
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["train"]["steps"] == 3 and saved["attacks"]["relearn"]["attackers"] == ["visual", "all"]


def test_another_config_is_refused_by_field(tmp_path):
    begun(tmp_path)
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(
        UserError, match=r"another config \(train.steps: 3 in the folder, 4 now\); pass another --workdir"
    ):
        Workdir(tmp_path, config("train.steps=4"))
    assert (tmp_path / "config.json").read_bytes() == before


def test_a_field_that_the_folders_config_lacks_is_named(tmp_path):
    begun(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    del saved["train"]["b2"]
    (tmp_path / "config.json").write_text(json.dumps(saved))
    with pytest.raises(UserError, match=r"\(train.b2: None in the folder, 0.999 now\)"):
        Workdir(tmp_path, config())


def test_a_run_goes_on_on_other_devices(tmp_path):
    Workdir(tmp_path, config("mesh.fsdp=4")).write_text("answers/vanilla.jsonl", "")
    Workdir(tmp_path, config("mesh.fsdp=1"))
    with pytest.raises(UserError, match="train.steps"):
        Workdir(tmp_path, config("mesh.fsdp=1 train.steps=4"))


def test_a_folder_is_known_by_its_whole_path(tmp_path, monkeypatch):
    """Orbax takes no other."""
    monkeypatch.chdir(tmp_path)
    assert Workdir("run", config()).path == tmp_path / "run"


def test_other_kinds_of_places_are_refused_and_no_folder_of_their_name_is_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="s3://mine/run is not supported"):
        Workdir("s3://mine/run", config())
    assert not list(tmp_path.iterdir())


def test_a_run_that_made_nothing_yet_may_change_its_config(tmp_path):
    """Bad input is found after config.json is there; the corrected command must not be refused for that."""
    with pytest.raises(UserError), Workdir(tmp_path, config()).stage("data"):
        raise UserError("a mistake in the config")
    (tmp_path / "data").mkdir()
    workdir = Workdir(tmp_path, config("seed=1"))
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == 1
    assert workdir.timing == {} and not (tmp_path / "timing.json").exists()


def test_other_peoples_folders_and_files_are_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty and has no run"):
        Workdir(tmp_path, config())
    with pytest.raises(UserError, match="thesis.txt is a file; pass a folder"):
        Workdir(tmp_path / "thesis.txt", config())
    with pytest.raises(UserError, match="Not a directory"):
        Workdir(tmp_path / "thesis.txt" / "run", config())
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_files_are_whole_or_absent(tmp_path, monkeypatch):
    workdir = begun(tmp_path)
    workdir.write("results.json", {"name": "Zoë"})
    assert json.loads((tmp_path / "results.json").read_text(encoding="utf-8")) == {"name": "Zoë"}
    assert not list(tmp_path.rglob("*.tmp"))

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        workdir.write("results.json", {"name": "other"})
    assert json.loads((tmp_path / "results.json").read_text(encoding="utf-8")) == {"name": "Zoë"}


def test_a_run_killed_while_it_wrote_its_config_begins_again(tmp_path):
    (tmp_path / ".config.json.1.tmp").write_text('{"seed"')
    Workdir(tmp_path, config())
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == 0


def test_times_of_interrupted_runs_add_up(tmp_path):
    for _ in range(2):
        workdir = begun(tmp_path)
        with workdir.stage("data"):
            pass
        with pytest.raises(RuntimeError), workdir.stage("unlearn"):
            workdir.timing["unlearn"] = workdir.timing.get("unlearn", 0.0) + 10
            raise RuntimeError
    timing = json.loads((tmp_path / "timing.json").read_text())
    assert list(timing) == ["data", "unlearn"] and 20 <= timing["unlearn"] < 21


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS])
def test_a_disk_that_takes_no_more_is_told_in_one_sentence(code):
    with pytest.raises(UserError, match=f"cannot write at /there: {os.strerror(code)}"), write_errors():
        raise OSError(code, os.strerror(code), "/there")


def test_other_errors_are_not_dressed_up():
    with pytest.raises(OSError, match="Input/output error"), write_errors():
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_a_full_disk_in_a_stage(tmp_path, monkeypatch):
    workdir = begun(tmp_path)

    def full(self, *_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))

    monkeypatch.setattr(pathlib.Path, "write_bytes", full)
    with pytest.raises(UserError, match="No space left on device; free some space"), workdir.stage("data"):
        workdir.write("results.json", {})
    assert not (tmp_path / "results.json").exists()


def test_meta_says_how_to_do_it_again(tmp_path, monkeypatch):
    """And never names the command line of a program that called the pipeline, such as that of this test."""
    monkeypatch.setattr("sys.argv", ["pytest", "--config", "a b.py"])
    assert command_line.started_as("vkd_jax.main") == "python -m vkd_jax.main --config 'a b.py'"
    meta = Workdir(tmp_path, config(), "called from Python: f").meta()
    assert meta["command"] == "called from Python: f"
    for function in (pipeline.run, sweep.run):
        default = inspect.signature(function).parameters["command"].default
        assert default == f"called from Python: {function.__module__}.run"
    assert meta["config"]["train"]["steps"] == 3 and meta["seed"] == 0 and meta["protocol"] == "options"
    assert {"python", "jax", "flax", "transformers"} <= set(meta["versions"])
    assert meta["commit"] and meta["devices"] and meta["date"]


def test_a_commit_is_of_the_tree_but_for_what_is_being_written(tmp_path, monkeypatch):
    def git(*words):
        subprocess.run(["git", "-C", tmp_path, "-c", "user.name=x", "-c", "user.email=x@y", *words], check=True)

    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "workdir.py"))
    for name in ("workdir.py", "rows.json"):
        (tmp_path / name).write_text("")
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "-m", "x")
    head = provenance.commit()
    assert re.fullmatch("[0-9a-f]{40}", head)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.json").write_text("[]")
    assert provenance.commit(but=pathlib.Path("rows.json")) == head and provenance.commit() == head + "+changes"
    (tmp_path / "workdir.py").write_text("x = 1")
    assert provenance.commit(but=pathlib.Path("rows.json")) == head + "+changes"
