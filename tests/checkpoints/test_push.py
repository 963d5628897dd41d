"""vkd push: what is uploaded and what is refused, at the boundary to huggingface_hub's API."""

import json
import re
import shutil
import sys
import types
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import errors

from vkd_jax.checkpoints import certificate, push

CARD = "---\ntags: [unlearning]\n---\n"


class Api:
    """Stand-in of `huggingface_hub.HfApi`: one hub, whose models are {id: (private, {file: bytes})}."""

    models = {}
    error = None

    def create_repo(self, repo, *, private, exist_ok):
        assert exist_ok
        if self.error:
            raise self.error
        self.models.setdefault(repo, (private, {}))

    def model_info(self, repo):
        return types.SimpleNamespace(private=self.models[repo][0])

    def upload_folder(self, *, repo_id, folder_path, allow_patterns, commit_message):
        assert commit_message
        self.models[repo_id][1].update({name: (Path(folder_path) / name).read_bytes() for name in allow_patterns})
        return types.SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")


@pytest.fixture
def models(monkeypatch):
    monkeypatch.setattr(Api, "models", {})
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    return Api.models


@pytest.fixture
def workdir(tiny_folder, tmp_path):
    """The folder of a run with its exported model."""
    folder = shutil.copytree(tiny_folder, tmp_path / "run" / "unlearned")
    (folder / "README.md").write_text(CARD)
    (folder / "provenance.json").write_text("{}")
    (folder / certificate.FILE).write_bytes(certificate.describe(folder, {"forgotten": []}))
    (tmp_path / "run" / "portrait.png").write_bytes(b"somebody")
    (folder / ".gitattributes").write_text("")
    return tmp_path / "run"


def run(monkeypatch, capsys, *args):
    monkeypatch.setattr(sys, "argv", ["vkd push", *map(str, args)])
    status = push.main()
    return status, *capsys.readouterr()


@pytest.mark.parametrize("part", ["", "unlearned"])
def test_a_model_is_uploaded_with_its_card_and_certificate_and_nothing_else(models, workdir, monkeypatch, capsys, part):
    status, shown, err = run(monkeypatch, capsys, workdir / part, "org/name")
    assert (status, err) == (0, "")
    assert shown.startswith(
        "The certified model was uploaded: https://hub/org/name/commit/1\nIts certificate is not sign"
    )
    private, files = models["org/name"]
    expected = {path.name for path in (workdir / "unlearned").iterdir()} - {".gitattributes"}
    assert (
        not private and set(files) == expected and {"README.md", "certificate.json", "model.safetensors"} <= set(files)
    )
    assert files["README.md"].decode() == CARD and json.loads(files["certificate.json"])["tensors"]


def test_a_private_model_is_private(models, workdir):
    push.push(workdir, "org/name", private=True)
    assert models["org/name"][0] is True


def test_a_public_model_is_not_taken_for_a_private_one(models, workdir, monkeypatch, capsys):
    models["org/name"] = (False, {})
    status, _, err = run(monkeypatch, capsys, workdir, "org/name", "--private")
    assert status == 2 and "org/name exists and is public, and --private was asked for" in err
    assert models["org/name"][1] == {}


@pytest.mark.parametrize("missing", ["config.json", "README.md", "certificate.json"])
def test_an_unfinished_export_is_refused(models, workdir, monkeypatch, capsys, missing):
    (workdir / "unlearned" / missing).unlink()
    status, _, err = run(monkeypatch, capsys, workdir, "org/name")
    assert status == 2 and f"unlearned is no finished export: it has no {missing}. Let its run finish" in err
    assert models == {}


def test_a_model_that_is_not_the_certified_one_is_refused(models, workdir, monkeypatch, capsys):
    config = workdir / "unlearned" / "config.json"
    config.write_text(config.read_text() + "\n")
    status, _, err = run(monkeypatch, capsys, workdir, "org/name")
    assert status == 2 and "is not the certified model: 1 file differs from the certificate: config.json" in err
    config.write_text(config.read_text()[:-1])
    (workdir / "unlearned" / "portrait.png").write_bytes(b"somebody")
    assert "1 file is not in the certificate: portrait.png" in run(monkeypatch, capsys, workdir, "org/name")[2]
    (workdir / "unlearned" / "portrait.png").unlink()
    (workdir / "unlearned" / "README.md").write_text("all forgotten")
    assert "1 file differs from the certificate: README.md" in run(monkeypatch, capsys, workdir, "org/name")[2]
    (workdir / "unlearned" / certificate.FILE).write_bytes(certificate.describe(workdir / "unlearned", {}))
    (workdir / "unlearned" / certificate.SIGNATURE).write_text("{}")
    assert "is not a valid signature" in run(monkeypatch, capsys, workdir, "org/name")[2]
    assert models == {}


def edited(**fields):
    """Changes fields of the certificate."""

    def change(folder):
        content = json.loads((folder / certificate.FILE).read_text())
        (folder / certificate.FILE).write_text(json.dumps(content | fields))

    return change


def of_the_run(name):
    """An entry of another file of a name in the list of the run."""

    def change(folder):
        (folder.parent / name).touch()
        entry = {"lines": 1, "bytes": 1, "sha256": "0" * 64}
        (folder.parent / "records.json").write_text(json.dumps({name: entry}))

    return change


CONFIG = {"method": {"name": "vkd"}, "model": {"path": "base"}, "data": {"forget": 5}, "seed": 0, "stage": "unlearn"}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (edited(forgotten=[]), "names 0 people as forgotten, and README.md 1 person or others"),
        (edited(forgotten=["1" * 64]), "names 1 person as forgotten, and README.md 1 person or others"),
        (edited(model={"method": "npo"}), "names method 'npo', and its config another one"),
        (edited(model={"base": "other"}), "names base 'other', and its config another one"),
        (edited(config=CONFIG | {"seed": 1}), "has another config than provenance.json, in seed"),
        (edited(config=CONFIG | {"data": {}}), "has another config than provenance.json, in data"),
        (
            of_the_run("unlearned/certificate.json"),
            "unlearned/certificate.json is not the one that the run of the folder",
        ),
        (of_the_run("config.json"), " config.json is not the one that the run of the folder above wrote"),
        (of_the_run("inputs.json"), "inputs.json is not the one that the run of the folder above wrote"),
        (of_the_run("results.json"), "results.json is not the one that the run of the folder above wrote"),
    ],
)
def test_an_edited_certificate_is_refused(models, workdir, monkeypatch, capsys, change, problem):
    folder = workdir / "unlearned"
    (folder / "README.md").write_text(f"{CARD}\n## Who was forgotten\n\n- `{'0' * 64}`\n")
    (folder / "provenance.json").write_text(json.dumps({"config": CONFIG}))
    facts = {"forgotten": ["0" * 64], "config": CONFIG, "model": {"method": "vkd", "base": "base"}}
    (folder / certificate.FILE).write_bytes(certificate.describe(folder, facts))
    assert not list(certificate.differences(folder))
    change(folder)
    status, _, err = run(monkeypatch, capsys, workdir, "org/name")
    assert (status, models) == (2, {}) and re.search(problem, err)


@pytest.mark.parametrize("repo", ["name", "org/name@main", "org/na/me", "./name"])
def test_what_is_no_id_is_refused(models, workdir, monkeypatch, capsys, repo):
    status, _, err = run(monkeypatch, capsys, workdir, repo)
    assert (status, models) == (2, {}) and f"{repo!r} is no id on the Hugging Face Hub; give ORG/NAME." in err


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (errors.LocalTokenNotFoundError("no token"), "uploads need a login: run `hf auth login`, or set HF_TOKEN."),
        (ConnectionError("no route\nto host"), "org/name could not be uploaded (ConnectionError: no route). Check"),
    ],
    ids=["token", "network"],
)
def test_a_hub_that_refuses_is_one_sentence(models, workdir, monkeypatch, capsys, error, sentence):
    monkeypatch.setattr(Api, "error", error)
    status, shown, err = run(monkeypatch, capsys, workdir, "org/name")
    assert (status, shown) == (2, "") and err.startswith(f"error: {sentence}") and err.count("\n") == 1
