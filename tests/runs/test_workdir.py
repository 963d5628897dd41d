"""The folder of a run: one config, atomic files, added times, and errors of the disk in one sentence."""

import errno
import inspect
import json
import os
import pathlib
import re
import shutil
import subprocess
import types

import pytest

from vkd_jax.checkpoints.bundle import ModelBundle
from vkd_jax.checkpoints.manifest import compare_tensors
from vkd_jax.config import command_line
from vkd_jax.config.schema import RunConfig
from vkd_jax.runs import inputs, pipeline, stages, sweep
from vkd_jax.runs import workdir as workdir_module
from vkd_jax.runs.job import Job
from vkd_jax.runs.workdir import Workdir
from vkd_jax.runtime import provenance
from vkd_jax.runtime.storage import write_errors
from vkd_jax.types import UserError


def config(settings=""):
    return RunConfig().override(f"train.steps=3 {settings}")


def started(path):
    workdir = Workdir(path, config())
    workdir.write_text("answers/vanilla.jsonl", "")
    return workdir


def test_the_same_config_resumes(tmp_path):
    started(tmp_path / "run")
    Workdir(tmp_path / "run", config())  # JSON has lists for tuples
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["train"]["steps"] == 3 and saved["attacks"]["relearn"]["attackers"] == ["visual", "all"]


def test_another_config_is_refused_by_field(tmp_path):
    started(tmp_path)
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(
        UserError, match=r"another config \(train.steps: 3 in the folder, 4 now\); pass another --workdir"
    ):
        Workdir(tmp_path, config("train.steps=4"))
    assert (tmp_path / "config.json").read_bytes() == before


def test_a_field_that_the_folders_config_lacks_is_named(tmp_path):
    started(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    del saved["train"]["b2"]
    (tmp_path / "config.json").write_text(json.dumps(saved))
    with pytest.raises(UserError, match=r"\(train.b2: None in the folder, 0.999 now\)"):
        Workdir(tmp_path, config())


def test_an_edited_config_is_refused_with_the_settings_that_it_names(tmp_path):
    workdir = started(tmp_path)
    file, saved = tmp_path / "config.json", json.loads((tmp_path / "config.json").read_text())
    saved["train"]["steps"] = 4
    file.write_text(json.dumps(saved, indent=1, ensure_ascii=False) + "\n")
    for check in (Workdir, workdir_module.check):
        with pytest.raises(UserError, match=r"config.json is damaged or was changed; restore that file from a copy"):
            check(tmp_path, config("train.steps=4"))
    saved["train"]["steps"] = 3
    file.write_text(json.dumps(saved, indent=1, ensure_ascii=False) + "\n")
    assert Workdir(tmp_path, config()).is_complete("answers/vanilla.jsonl", "config.json") and workdir.path == tmp_path


def test_a_config_without_an_entry_gets_one(tmp_path):
    started(tmp_path)
    (tmp_path / "records.json").unlink()
    assert Workdir(tmp_path, config()).has("config.json")


def replaced(folder):
    """Another model of the same architecture."""
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "new").write_bytes(data)
    (folder / "new").replace(folder / "model.safetensors")


CHANGES = {
    "weights": replaced,
    "settings": lambda folder: (folder / "config.json").write_text("{}"),
    "a file more": lambda folder: (folder / "tokens.json").write_text("{}"),
    "a file less": lambda folder: (folder / "generation_config.json").unlink(),
}


@pytest.fixture
def given(tiny_folder, tmp_path):
    """A run that began with a model."""
    source = shutil.copytree(tiny_folder, tmp_path / "model")
    run = Workdir(tmp_path / "run", config())
    run.bind(inputs.describe({}, {"path": source}), {"path": source})
    return types.SimpleNamespace(run=run, source=source)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_model_that_changes_during_the_run_is_neither_exported_nor_loaded(given, tiny_model, change, monkeypatch):
    run, source = given.run, given.source
    run.check_source(source)
    job = Job(run, None, {}, {}, [], None)
    monkeypatch.setattr(stages.results_writer, "provenance", lambda *_: {})
    assert not compare_tensors(source, stages._export(job, "vanilla", tiny_model, {}, source, []))["changed"]
    monkeypatch.setattr(ModelBundle, "load_for", lambda *_, **__: change(source))
    problem = r"model, the model of config.model.path, changed during the run, in .*; copy the model elsewhere"
    with pytest.raises(UserError, match=problem):
        job.load(source)
    if source.joinpath("config.json").read_text() != "{}":
        with pytest.raises(UserError, match=problem):
            stages._export(job, "unlearned", tiny_model, {}, source, [])
    assert not [path.name for path in run.path.iterdir() if path.name.startswith("unlearned")]


def test_a_model_that_the_run_wrote_is_checked_too(given, tiny_model, monkeypatch):
    monkeypatch.setattr(stages.results_writer, "provenance", lambda *_: {"provenance.json": "{}"})
    folder = stages._export(Job(given.run, None, {}, {}, [], None), "vanilla", tiny_model, {}, given.source, [])
    (folder / "README.md").write_text("a card")
    given.run.check_source(folder)
    replaced(folder)
    with pytest.raises(UserError, match=r"the model vanilla of this run, changed during the run, in model.safetensors"):
        given.run.check_source(folder)


def test_a_folder_that_is_moved_during_the_run_is_not_begun_anew(tmp_path):
    run = started(tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "moved")
    with pytest.raises(UserError, match="run was moved or deleted while the run wrote it; pass its new name"):
        with run.stage("evaluate"):
            run.write_lines("answers/unlearned.jsonl", [])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("seconds", ["-5", "1" + "0" * 400])
def test_an_impossible_time_of_a_stage_is_not_known(tmp_path, seconds):
    started(tmp_path)
    (tmp_path / "timing.json").write_text(f'{{"data": {seconds}, "load": 2}}')
    assert Workdir(tmp_path, config()).timing == {"load": 2}


@pytest.mark.parametrize(
    ("damage", "problem"),
    [(lambda text: text[:-5], "it is not JSON"), (lambda text: text.replace("001", "002"), "is not the one that the")],
)
def test_a_provenance_that_is_damaged_or_edited_is_refused(tmp_path, damage, problem):
    run, text = started(tmp_path / "run"), '{"config": {"data": {}}, "without": ["001"]}'

    def make(folder):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        (folder / "provenance.json").write_text(text)

    folder = run.model("retain_only", make)
    assert inputs.read_provenance(folder)["without"] == ["001"] and inputs.read_provenance(tmp_path) == {}
    (folder / "provenance.json").write_text(damage(text))
    with pytest.raises(UserError, match=f"provenance.json:? {problem}.*; restore it from a copy"):
        inputs.read_provenance(folder)


def test_a_run_resumes_with_other_trackers(tmp_path):
    Workdir(tmp_path, config("train.trackers=wandb")).write_text("answers/vanilla.jsonl", "")
    Workdir(tmp_path, config("finetune.train.trackers=mlflow"))


def test_a_run_resumes_on_other_devices(tmp_path):
    Workdir(tmp_path, config("mesh.fsdp=4")).write_text("answers/vanilla.jsonl", "")
    Workdir(tmp_path, config("mesh.fsdp=1"))
    with pytest.raises(UserError, match="train.steps"):
        Workdir(tmp_path, config("mesh.fsdp=1 train.steps=4"))


def test_the_identity_of_a_run_is_that_of_its_config_and_inputs(tmp_path):
    def identity(name, settings="", data="a"):
        workdir = Workdir(tmp_path / name, config(settings))
        workdir.bind({"sets": {"forget": data}, "models": {}, "prompts": "", "judge_prompts": ""})
        return workdir.identity

    first = identity("1")
    assert first == identity("2") == identity("3", "mesh.fsdp=4 train.trackers=wandb")
    others = [identity("4", "train.learning_rate=0.05"), identity("5", "train.b2=0.9"), identity("6", data="b")]
    assert len({first, *others}) == 4


def test_a_relative_path_becomes_absolute(tmp_path, monkeypatch):
    """Orbax requires it."""
    monkeypatch.chdir(tmp_path)
    assert Workdir("run", config()).path == tmp_path / "run"


def test_unsupported_urls_are_refused_and_create_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="s3://mine/run is not supported"):
        Workdir("s3://mine/run", config())
    assert not list(tmp_path.iterdir())


def test_a_run_without_results_may_change_its_config(tmp_path):
    """Bad data is found after config.json is written, and the corrected command must not be refused."""
    with pytest.raises(UserError), Workdir(tmp_path, config()).stage("data"):
        raise UserError("a mistake in the config")
    (tmp_path / "data").mkdir()
    workdir = Workdir(tmp_path, config("seed=1"))
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == 1
    assert workdir.timing == {} and not (tmp_path / "timing.json").exists()


def test_folders_and_files_of_other_programs_are_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty and has no run"):
        Workdir(tmp_path, config())
    with pytest.raises(UserError, match="thesis.txt is a file; pass a folder"):
        Workdir(tmp_path / "thesis.txt", config())
    with pytest.raises(UserError, match="Not a directory"):
        Workdir(tmp_path / "thesis.txt" / "run", config())
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    (tmp_path / "bin").symlink_to("usr/bin")  # as in /, where no link may be replaced
    with pytest.raises(UserError, match="not empty and has no run"):
        Workdir(tmp_path, config())


def test_hidden_files_as_of_a_file_browser_do_not_count(tmp_path):
    for folder in (tmp_path, tmp_path / "train", tmp_path / "attacks"):
        folder.mkdir(exist_ok=True)
        (folder / ".DS_Store").write_text("x")
        Workdir(tmp_path, config())


def test_a_backslash_in_the_path_is_refused(tmp_path):
    """TensorStore takes it for a slash: checkpoints would be beside the folder, where no run finds them."""
    for path in (tmp_path / "a\\b", tmp_path / "a\\b" / "run"):
        with pytest.raises(UserError, match="checkpoints cannot have a backslash in their path; pass another folder"):
            Workdir(path, config())
    assert not list(tmp_path.iterdir())


def test_files_are_complete_or_absent(tmp_path, monkeypatch):
    workdir = started(tmp_path)
    workdir.write("results.json", {"name": "Zoë"})
    assert json.loads((tmp_path / "results.json").read_text(encoding="utf-8")) == {"name": "Zoë"}
    assert not list(tmp_path.rglob("*.tmp"))

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        workdir.write("results.json", {"name": "other"})
    assert json.loads((tmp_path / "results.json").read_text(encoding="utf-8")) == {"name": "Zoë"}


def test_a_run_killed_while_it_wrote_its_config_starts_over(tmp_path):
    (tmp_path / ".config.json.1.tmp").write_text('{"seed"')
    Workdir(tmp_path, config())
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == 0


def test_times_of_interrupted_runs_add_up(tmp_path):
    for _ in range(2):
        workdir = started(tmp_path)
        with workdir.stage("data"):
            pass
        with pytest.raises(RuntimeError), workdir.stage("unlearn"):
            workdir.timing["unlearn"] = workdir.timing.get("unlearn", 0.0) + 10
            raise RuntimeError
    timing = json.loads((tmp_path / "timing.json").read_text())
    assert list(timing) == ["data", "unlearn"] and 20 <= timing["unlearn"] < 21


@pytest.mark.parametrize(
    "code", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EISDIR, errno.EEXIST, errno.EPERM]
)
def test_errors_of_a_full_or_protected_disk_are_one_sentence(code):
    with pytest.raises(UserError, match=f"cannot write at /there: {os.strerror(code)}"), write_errors():
        raise OSError(code, os.strerror(code), "/there")


def test_other_errors_are_raised_as_they_are():
    with pytest.raises(OSError, match="Input/output error"), write_errors():
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_a_full_disk_in_a_stage_is_one_sentence(tmp_path, monkeypatch):
    workdir = started(tmp_path)

    def full(self, *_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))

    monkeypatch.setattr(pathlib.Path, "write_bytes", full)
    with pytest.raises(UserError, match="No space left on device; free some space"), workdir.stage("data"):
        workdir.write("results.json", {})
    assert not (tmp_path / "results.json").exists()


def test_meta_names_command_config_and_versions(tmp_path, monkeypatch):
    """The command is not that of a program which calls the pipeline from Python, such as this test."""
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


@pytest.mark.parametrize("program", ["exit 1", "exec sleep 60", r"printf '\377'", r"printf '\33[31m<script>'", "true"])
def test_the_commit_is_unknown_if_git_does_not_work(program, tmp_path, monkeypatch):
    (tmp_path / "git").write_text(f"#!/bin/sh\n{program}\n")
    (tmp_path / "git").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(provenance, "SECONDS", 0.5)
    assert provenance.commit() == "unknown"


def test_the_commit_of_another_projects_repository_is_not_that_of_this_one(tmp_path, monkeypatch):
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    package = tmp_path / ".venv" / "vkd_jax"
    package.mkdir(parents=True)
    (package / "provenance.py").write_text("")
    (tmp_path / "README").write_text("")
    git = ["git", "-C", tmp_path, "-c", "user.name=x", "-c", "user.email=x@y"]
    subprocess.run([*git, "add", "README"], check=True)
    subprocess.run([*git, "commit", "--quiet", "-m", "x"], check=True)
    monkeypatch.setattr(provenance, "__file__", str(package / "provenance.py"))
    assert provenance.commit() == "unknown"


def test_the_commit_marks_changes_except_in_the_file_being_written(tmp_path, monkeypatch):
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
