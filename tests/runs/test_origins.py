"""How the models of a run were made, by the provenance and the certificate in their folders."""

import json
from types import SimpleNamespace

import pytest

from vkd_jax.checkpoints import certificate
from vkd_jax.results import Origins
from vkd_jax.runs import origins
from vkd_jax.types import person_digest


def job_of(given, people=("Ada", "Bob"), facts=()):
    config = {"stage": "audit", "model": {"base": ""}, "data": {"benchmark": "folder", "forget_facts": facts}}
    return SimpleNamespace(
        config=SimpleNamespace(to_dict=lambda: config),
        workdir=SimpleNamespace(given=given),
        forget_people=list(people),
    )


def write(folder, forgotten=None, provenance=None, facts=()):
    """A model folder with these documents; a text is written as it is."""
    folder.mkdir()
    if forgotten is not None:
        content = {
            "format": certificate.FORMAT,
            "tensors": {},
            "files": {},
            "config": {"data": {"forget_facts": facts}},
        }
        content |= {"forgotten": list(map(person_digest, forgotten))}
        (folder / certificate.FILE).write_text(json.dumps(content))
    if provenance is not None:
        (folder / "provenance.json").write_text(provenance if isinstance(provenance, str) else json.dumps(provenance))
    return folder


@pytest.mark.parametrize(
    ("forgotten", "facts", "asked", "count"),
    [
        (None, [], (), None),
        ([], [], (), 0),
        (["Ada", "Eve"], [], (), 1),
        (["Ada", "Bob"], [], (), 2),
        (["Ada", "Bob"], [], ("job",), 2),
        (["Ada", "Bob"], ["Job"], ("job",), 2),
        (["Ada", "Bob"], ["job"], ("job", "hobby"), 0),
        (["Ada", "Bob"], ["job"], (), 0),
        (["Ada", "Bob"], 5, (), 2),
    ],
)
def test_people_whom_the_certificate_of_an_unlearned_model_names(tmp_path, forgotten, facts, asked, count):
    given = {"unlearned": write(tmp_path / "model", forgotten, facts=facts)}
    assert origins.read(job_of(given, facts=asked)).unlearned_forgot == count


@pytest.mark.parametrize(
    ("without", "known"),
    [
        (["Ada", "Bob"], "run"),
        (["Ada", "Bob", "Eve"], "run"),
        (["Ada"], "elsewhere"),
        ("Ada", "elsewhere"),
        ([[]], "elsewhere"),
    ],
)
def test_a_retain_only_model_is_known_if_a_run_trained_it_without_the_people(tmp_path, without, known):
    given = {"retain_only": write(tmp_path / "model", provenance={"without": without})}
    assert origins.read(job_of(given)).retain_only == known
    assert origins.read(job_of({"retain_only": tmp_path})).retain_only == "elsewhere"
    assert origins.read(job_of({})).retain_only == "run"


@pytest.mark.parametrize("provenance", [None, "", "[]", '{"model": ["unlearned"]}', '{"config": {"model": 3}}'])
def test_a_vanilla_model_of_any_provenance_is_read(tmp_path, provenance):
    folder = write(tmp_path / "model", ["Bob", "Eve"], provenance)
    assert origins.read(job_of({"path": folder})) == Origins(vanilla_forgot=1, retain_only="run")
