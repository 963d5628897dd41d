"""Requests one after another: two real runs, from a folder and by ID, and what happens around them."""

import json
import shutil
import types
from pathlib import Path

import pytest

from vkd_jax import requests as command
from vkd_jax.checkpoints.bundle import ModelBundle
from vkd_jax.checkpoints.certificate import differences
from vkd_jax.checkpoints.manifest import compare_tensors
from vkd_jax.config import defaults
from vkd_jax.config.schema import RunConfig
from vkd_jax.reporting import requests_page
from vkd_jax.runs import features, requests, stages
from vkd_jax.runs.ledger import Ledger
from vkd_jax.runtime import locks
from vkd_jax.runtime.mesh import make_mesh
from vkd_jax.types import UserError, person_digest


@pytest.fixture(scope="module")
def base(get_config, tiny_folder, request_folders):
    """The config of each run."""
    config = get_config("tiny.py", "")
    folders = {name: str(request_folders / name) for name in ("forget", "retain")}
    config.data = defaults.benchmark("folder", **folders)
    config.model.update(path=str(tiny_folder), base="", retain_only="")
    config.eval.update(max_items=4, batch_size=8)
    config.train.update(batch_size=dict(forget=2, retain=2), steps=2, warmup_steps=1, log_every=1, checkpoint_every=2)
    config.method.update(fisher_samples=4, augment_forget=1, augment_retain=0, blocks=0)
    config.method.replay.copies = 1
    return RunConfig.from_config_dict(config)


@pytest.fixture(scope="module")
def two(base, request_folders, tmp_path_factory):
    """Two finished requests, the first one by folder, and what was on the disk while the second one was run.

    The second run is stopped after its last stage and before the ledger knows of it, and is resumed.
    """
    root = tmp_path_factory.mktemp("requests")
    ledger, workdir, gone = root / "requests.jsonl", root / "runs", root / "gone"
    shutil.copytree(request_folders / "forget", gone)
    requests.add(ledger, str(gone))
    requests.run(ledger, base, workdir)
    shutil.rmtree(gone)  # the images of the first request are no longer needed
    (other,) = sorted({e["person"] for e in _lines(request_folders / "retain" / "metadata.jsonl")})[:1]
    requests.add(ledger, other)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(requests, "describe", _stop)
        with pytest.raises(KeyboardInterrupt):
            requests.run(ledger, base, workdir)
    written = {path: path.stat().st_mtime_ns for path in (workdir / "0002").rglob("*.safetensors")}
    (pending,) = Ledger.read(ledger).pending
    assert not (workdir / "data").exists() and pending.folders == [workdir / "0002"]
    requests.run(ledger, base, workdir)
    assert sum(line["kind"] == "begin" for line in _lines(ledger)) == 2
    assert written == {path: path.stat().st_mtime_ns for path in written}  # nothing was computed again
    return ledger, workdir, other


def _stop(*_):
    raise KeyboardInterrupt


def _lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_request_starts_from_the_model_that_the_last_one_left(two, base):
    ledger, workdir, other = two
    first, second = (request.done for request in Ledger.read(ledger).finished)
    assert second["model_before"] == first["model_after"] != first["model_before"]
    tensors = compare_tensors(Path(base.model.path), workdir / "0001" / "unlearned")["tensors"]
    assert first["model_before"] == requests.model_digest({name: x["before"] for name, x in tensors.items()})
    assert second["config"]["model"]["path"] == str(workdir / "0001" / "unlearned")
    assert not list(differences(workdir / "0002" / "unlearned"))
    certificate = json.loads((workdir / "0002" / "unlearned" / "certificate.json").read_text())
    everyone = [p for request in Ledger.read(ledger).finished for p in request.people]
    assert certificate["forgotten"] == sorted(everyone) and person_digest(other) in everyone
    assert first["figures"]["text_identical"] and second["figures"]["text_identical"]


def test_every_request_has_the_first_model_as_its_teacher(two, base):
    ledger, workdir, _ = two
    first, second = (request.done["config"]["request"]["first"] for request in Ledger.read(ledger).finished)
    assert (first, second) == ("", base.model.path)
    before, after = (json.loads((workdir / run / "inputs.json").read_text())["models"] for run in ("0001", "0002"))
    assert after["request.first"] == before["path"] != after["path"] and "request.first" not in before

    def load(folder):
        return ModelBundle.load_for(base.method, folder, seed=0, mesh=make_mesh())

    start, model = load(base.model.path), load(workdir / "0001" / "unlearned")
    request = types.SimpleNamespace(first=base.model.path)
    job = types.SimpleNamespace(config=types.SimpleNamespace(request=request), method=base.method, load=load)
    teacher = stages._first_model(job, model)
    assert teacher.keys() == start.params.keys()
    assert all((teacher[path] == x).all() for path, x in start.params.items())
    assert any((model.params[path] != x).any() for path, x in teacher.items())
    request.first = ""
    assert stages._first_model(job, model) is None


def test_earlier_people_are_trained_on_and_judged_without_their_images(two):
    _, workdir, _ = two
    results = json.loads((workdir / "0002" / "results.json").read_text())
    assert {"forget", "retain", "earlier"} == set(results["models"]["unlearned"])
    assert results["models"]["vanilla"]["earlier"]["vqa"]["n"] == 2
    rows = _lines(workdir / "0002" / "train" / "metrics.jsonl")
    assert any("earlier_loss" in row for row in rows)
    assert not any("earlier_loss" in row for row in _lines(workdir / "0001" / "train" / "metrics.jsonl"))
    # What the last model says about the people of the first request is what it says of their images.
    nll = []
    for run, model, name in (("0001", "unlearned", "forget"), ("0002", "vanilla", "earlier")):
        answers = _lines(workdir / run / "answers" / f"{model}.jsonl")
        nll.append([a["answer_nll"] for a in answers if a["set"] == name and a["image_id"]])
    assert nll[1] == pytest.approx(nll[0], rel=1e-4) and len(nll[0]) == 4


def test_no_image_and_no_name_of_a_person_is_held(two, request_folders):
    ledger, workdir, other = two
    images = {path.read_bytes() for path in request_folders.glob("*/*.png")}
    for path in (path for path in workdir.rglob("*") if path.is_file()):
        data = path.read_bytes()
        assert not any(image in data for image in images), path
    questions = _lines(workdir / "0002" / "features" / "questions.jsonl")
    assert {row["example"]["person"] for row in questions} == {person_digest(other)}
    assert all(name not in row["example"] for row in questions for name in ("image", "image_id"))
    assert other not in ledger.read_text()


def test_the_page_has_every_request(two):
    _, workdir, _ = two
    page = (workdir / requests_page.PAGE).read_text()
    assert "| request 1 | 1 |" in page and "| request 2 | 2 |" in page and "Everyone forgotten so far" in page
    assert (workdir / requests_page.PLOT).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ("train.steps=3", "--config.train.steps: 3 is not the value that request 2 was run with, 2, and no request is"),
        ("model.path=tiny_llava", "--config.model.path: 'tiny_llava' is not the value that request 2 was run with"),
        ("", ""),
    ],
)
def test_the_page_is_not_written_under_other_settings(two, base, settings, problem, tmp_path):
    """Without a pending request, in a workdir of its own."""
    ledger, _, _ = two
    if problem:
        with pytest.raises(UserError, match=problem):
            requests.run(ledger, base.override(settings), tmp_path / "other")
        assert not (tmp_path / "other").exists()
    else:
        requests.run(ledger, base, tmp_path / "other")
        assert (tmp_path / "other" / requests_page.PAGE).exists()


def test_requests_are_not_run_while_another_process_uses_the_ledger(two, base, tmp_path):
    ledger = tmp_path / "ledger"
    ledger.write_bytes(two[0].read_bytes())
    (tmp_path / ".ledger.lock").write_text(json.dumps(locks.owner("vkd requests run") | {"host": "elsewhere"}))
    with pytest.raises(UserError, match="ledger is used by process"):
        requests.run(ledger, base, tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_a_model_that_changed_is_not_started_from(two, base, tmp_path):
    ledger, workdir, _ = two
    copy, other = tmp_path / "copy.jsonl", tmp_path / "model"
    copy.write_bytes(ledger.read_bytes())
    requests.add(copy, "Nobody")
    shutil.copytree(workdir / "0002" / "unlearned", other)
    current = Ledger.read(copy)
    runs = requests.RequestRuns(Ledger.read(copy), base, workdir, "")
    config = runs._config(current, current.pending[0])
    runs._check_start(current, config)
    with pytest.raises(UserError, match="is not the model that request 2 left"):
        runs._check_start(current, config.override(f"model.path={base.model.path}"))
    with pytest.raises(UserError, match="is not the model that request 1 started from"):
        runs._check_start(current, config.override(f"request.first={other}"))
    with pytest.raises(UserError, match="method.blocks: all vision blocks train"):
        runs._check_start(current, config.override("method.blocks=-1"))
    with pytest.raises(UserError, match="request 3: 1 of the 1 people of this request are not in the data"):
        requests.run(copy, base, workdir)
    assert Ledger.read(copy).pending[0].folders == [workdir / "0003"] and (workdir / "0003").is_dir()  # of purge


@pytest.mark.parametrize(
    ("settings", "batch_settings", "problem"),
    [
        ("stage=audit", "", "stage=audit does not start from a model"),
        (
            "model.path=",
            "",
            "model.path: the config names no model to start from. Give one that knows the people of ml",
        ),
        ("attacks.names=leak", "", "requests are not attacked"),
        ("", "train.stepz=3", "--batch_settings: train.stepz: unknown field 'stepz'. Did you mean 'steps'"),
        ("", "train.steps=3 train.steps=4", "--batch_settings: train.steps: two values are given"),
        ("", "data.cache", "--batch_settings: data.cache: has no value"),
        ("", "train.steps=" + "-" * 90_000 + "1", "--batch_settings: train.steps: .* is of type str"),
        ("", "train.steps=-1", "--batch_settings: train.steps: -1 is not allowed"),
        ("", "stage=audit", "--batch_settings: .*stage=audit does not start from a model"),
    ],
)
def test_a_config_that_requests_cannot_have_is_refused(tmp_path, get_config, settings, batch_settings, problem):
    """Before a request is run, also the settings of a baseline that follows all of them."""
    requests.add(tmp_path / "requests.jsonl", "Nobody")
    config = RunConfig.from_config_dict(get_config("tiny.py", "")).override(settings)
    with pytest.raises(UserError, match=problem):
        requests.run(tmp_path / "requests.jsonl", config, tmp_path / "runs", ("batch",), batch_settings)
    assert not (tmp_path / "runs").exists()


def test_a_folder_of_images_needs_the_benchmark_of_folders(base, request_folders, get_config, tmp_path):
    requests.add(tmp_path / "ledger", str(request_folders / "forget"))
    config = RunConfig.from_config_dict(get_config("tiny.py", ""))
    with pytest.raises(UserError, match="need benchmark=folder"):
        requests.run(tmp_path / "ledger", config, tmp_path / "runs")
    with pytest.raises(UserError, match="--batch_settings: they are those of --baselines=batch"):
        requests.run(tmp_path / "ledger", config, tmp_path / "runs", ("naive",), "train.steps=3")
    for name in ("2025", "data"):  # of the user, who passes a folder that has no runs of requests
        (tmp_path / "own" / name).mkdir(parents=True)
    with pytest.raises(UserError, match="has the runs of another ledger"):
        requests.run(tmp_path / "ledger", config, tmp_path / "own")
    assert (tmp_path / "own" / "data").exists()
    with pytest.raises(UserError, match="--baselines: unknown x"):
        requests.run(tmp_path / "ledger", base, tmp_path / "runs", ["x"])


def test_purging_deletes_what_is_held_and_later_requests_go_without(two, base, capsys):
    ledger, workdir, _ = two  # the last test of `two`
    assert command.main(["show", str(ledger)]) == 0
    assert str(workdir / "0001" / "features") in capsys.readouterr().out
    assert command.main(["purge", str(ledger), "1"]) == 0
    assert str(workdir / "0001" / "features") in capsys.readouterr().out
    assert not (workdir / "0001" / "features").exists() and (workdir / "0002" / "features").exists()
    assert not list(workdir.glob("*/answers")) and not list(workdir.glob("*/report*"))
    assert (workdir / "0001" / "unlearned" / "certificate.json").exists()
    assert [request.purged for request in Ledger.read(ledger).finished] == [True, False]
    requests.add(ledger, "Somebody")
    config = requests.RequestRuns(Ledger.read(ledger), base, workdir, "")._config(
        Ledger.read(ledger), Ledger.read(ledger).pending[0]
    )
    assert config.request.features == (str(workdir / "0002" / features.FOLDER),) and len(config.request.earlier) == 2
