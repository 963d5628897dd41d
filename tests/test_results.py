"""results.json: its dataclasses read what they write, and name the field that does not follow the schema."""

import dataclasses
import inspect
import json
import re
from pathlib import Path

import pytest

from vkd_jax import benchmarks, registry
from vkd_jax import results as module
from vkd_jax.results import RunResults, main_kind
from vkd_jax.runtime.dataclass_json import FormatError
from vkd_jax.runtime.records import Records
from vkd_jax.types import EvalSet, Role, UserError

SUMMARY = {"accuracy": 0.5, "correct": 1, "n": 2, "low": 0.1, "high": 0.9, "people": 2}
RESULTS = {
    "schema_version": 2,
    "meta": {
        "command": "python -m vkd_jax.main", "config": {"seed": 0, "eval": {"shots": 0}}, "seed": 0, "commit": "c0ffee",
        "versions": {"jax": "0.10.2"}, "devices": "1 x cpu", "protocol": "options", "protocols": ["options"],
        "shots": 0, "date": "2026-01-02T03:04:05+00:00",
        "benchmark": {"title": "B", "source": "S", "sets": [
            {"name": "faces", "role": "forget", "title": "faces to forget", "short": "faces", "people": 2},
            {"name": "world", "role": "general", "title": "the world", "short": "world", "people": 0},
        ]},
    },
    "models": {"vanilla": {"faces": {"vqa": SUMMARY, "generation_qa": SUMMARY | {
        "rouge_l": {"mean": 0.5, "low": 0.25, "high": 0.75, "n": 2, "people": 2}}}}},
    "utility": {"vanilla": {"value": 0.5, "low": 0.4, "high": 0.6,
                            "components": {"world/accuracy": {"mean": 1, "n": 3}}}},
    "forget_quality": {"vanilla": {"vqa": {"ks": 1.0, "p": 0.5, "js": 1.0, "n": 2, "people": 2}}},
    "chance": {"faces": {"vqa": 0.25}},
    "confusions": {"vanilla": {"n": 4, "correct": 1, "one": 2, "several": 1, "people": {"b": 2}}},
    "similarity_groups": [{"low": 0.0, "high": 0.5, "people": 2,
                           "accuracy": {"vanilla": {"mean": 0.5, "low": 0.25, "high": 0.75, "n": 2, "people": 2}}}],
    "timing": {"data": 1.5},
    "attacks": {"relearn": {"title": "T", "about": "A", "metric": "accuracy", "variants": {}, "cells": [
        {"model": "vanilla", "set": "faces", "mean": 0.5, "n": 2, "people": 2, "variant": "", "attacker": "all",
         "share": 0.25, "unit": "questions", "steps": 3, "learning_rate": 0.1, "taught": False}]}},
    "manifest": {"changed": 1, "tensors": 2, "language_model_changed": 0},
    "origins": {"vanilla": "folder", "base": "tiny_base", "vanilla_forgot": 1, "unlearned_forgot": 2,
                "retain_only": "run"},
}  # fmt: skip


def test_results_read_what_they_write(tmp_path):
    results = RunResults.from_json(RESULTS)
    assert RunResults.read(results.write(str(tmp_path)).parent) == results
    assert json.loads((tmp_path / "results.json").read_text()) == RESULTS
    assert results.models["vanilla"]["faces"]["generation_qa"].metrics["rouge_l"].mean == 0.5
    assert [s.name for s in results.with_role(Role.GENERAL)] == ["world"] and results.kinds() == [
        "vqa",
        "generation_qa",
    ]
    assert results.summary("unlearned", "faces", "vqa") is None and results.summary("vanilla", "faces", "vqa").n == 2
    (row,) = results.attacks["relearn"].rows()
    assert row["vanilla"].share == 0.25 and results.manifest.changed == 1 and results.trainable is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.pop("models"), "lacks the field 'models'"),
        (lambda r: r.update(schema_version=0), "schema_version is 0"),
        (lambda r: r.update(other=1), "unknown field 'other'"),
        (lambda r: r["meta"].update(seed="0"), "meta.seed is '0', expected int"),
        (lambda r: r["meta"].update(seed=True), "meta.seed is True"),
        (lambda r: r["meta"]["benchmark"]["sets"][0].update(role="kept"), r"sets\[0\].role is 'kept', expected one of"),
        (lambda r: r["models"]["vanilla"]["faces"]["vqa"].update(n=[]), r"models.vanilla.faces.vqa.n is \[\]"),
        (lambda r: r["chance"].update(faces=1), "chance.faces is 1, expected an object"),
        (lambda r: r["models"]["vanilla"]["faces"]["vqa"].update(accuracy=0.75), "vqa.accuracy is 0.75, expected 0.5"),
        (lambda r: r["models"]["vanilla"]["faces"]["vqa"].update(accuracy=7.5), "vqa.accuracy is 7.5, .* at most 1"),
        (lambda r: r["models"]["vanilla"]["faces"]["vqa"].update(n=-3), "vqa.n is -3, expected at least 0"),
        (lambda r: r["models"]["vanilla"]["faces"]["vqa"].update(correct=3), "vqa.correct is 3, expected at most 2"),
        (lambda r: r["utility"]["vanilla"].update(low=0.7), "utility.vanilla.low is 0.7, expected at most 0.6"),
        (lambda r: r["attacks"]["relearn"]["cells"][0].update(n=-1), "attacks.relearn.cells.0.n is -1"),
    ],
)
def test_a_field_that_does_not_follow_the_schema_is_named(change, message, tmp_path):
    data = json.loads(json.dumps(RESULTS))
    change(data)
    with pytest.raises(FormatError, match=message):
        RunResults.from_json(data)
    (tmp_path / "results.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match=message):
        RunResults.read(tmp_path)


def test_results_with_nan_are_not_written(tmp_path):
    data = json.loads(json.dumps(RESULTS))
    data["chance"]["faces"]["vqa"] = float("nan")
    with pytest.raises(ValueError, match="JSON compliant"):
        RunResults.from_json(data).write(tmp_path)
    assert not list(tmp_path.iterdir())


def test_results_that_are_not_those_of_the_run_are_refused(tmp_path):
    data = json.loads(json.dumps(RESULTS))
    file = RunResults.from_json(data).write(tmp_path)
    Records(tmp_path).add("results.json")
    assert RunResults.read(tmp_path)
    file.write_text(file.read_text().replace('"accuracy": 0.5', '"accuracy": 0.0', 1))
    with pytest.raises(UserError, match="results.json is damaged or was changed; run that experiment again"):
        RunResults.read(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "inputs.json"])
def test_results_of_another_run_are_refused(name, tmp_path):
    """A copy of results.json and records.json, beside the files of the run that was here before."""
    RunResults.from_json(json.loads(json.dumps(RESULTS))).write(tmp_path)
    (tmp_path / name).write_text('{"of": "the other run"}')
    records = Records(tmp_path)
    records.add("results.json")
    records.add(name)
    assert RunResults.read(tmp_path)
    (tmp_path / name).write_text('{"of": "this run"}')
    with pytest.raises(UserError, match=f"{name} is damaged or was changed"):
        RunResults.read(tmp_path)


def test_results_that_the_run_has_not_recorded_are_refused(tmp_path):
    RunResults.from_json(json.loads(json.dumps(RESULTS))).write(tmp_path)
    assert RunResults.read(tmp_path)  # the file alone, as somebody sends it
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(
        UserError, match="has config.json but no records.json, by which results.json is checked; restore"
    ):
        RunResults.read(tmp_path)
    Records(tmp_path).add("config.json")
    with pytest.raises(UserError, match="is not the one that the run wrote, or that run has not finished"):
        RunResults.read(tmp_path)


@pytest.mark.parametrize("text", [None, "{"])
def test_missing_and_torn_results_are_named(tmp_path, text):
    if text:
        (tmp_path / "results.json").write_text(text)
    with pytest.raises(UserError, match="it is not JSON.*run that experiment again" if text else "has no results.json"):
        RunResults.read(tmp_path)


def test_a_file_in_the_place_of_the_run_is_named(tmp_path):
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(UserError, match=f"results.json is a file; give .* a finished run, such as {tmp_path}\\."):
        RunResults.read(tmp_path / "results.json")


def test_the_main_kind_of_a_modality():
    assert main_kind(["cloze_vqa", "generation_vqa", "qa"], "vqa") == "generation_vqa"
    assert main_kind(["vqa_letter", "vqa"], "vqa") == "vqa" and main_kind(["qa"], "vqa") is None


def test_roles_are_a_closed_set():
    with pytest.raises(ValueError, match="'kept' is not a valid Role"):
        EvalSet("a", "kept", "a", "a")
    assert [role.forgets for role in Role] == [True, True, False, False, False, False]


@pytest.mark.parametrize("name", registry.BENCHMARKS)
def test_every_benchmark_declares_its_sets(name):
    sets = benchmarks.create(name, {}).EVAL_SETS
    assert len({s.name for s in sets}) == len({s.short for s in sets}) == len(sets)
    assert [sum(s.role == role for s in sets) for role in (Role.FORGET, Role.RETAIN)] == [1, 1]


def test_the_documented_fields_are_those_of_the_dataclasses():
    text = (Path(__file__).parents[1] / "docs" / "results_format.md").read_text(encoding="utf-8")
    documented = {}
    for name, table in re.findall(
        r"<!-- fields: (\w+) -->\n\n\| field \| meaning \|\n\| --- \| --- \|\n((?:\|.*\n)+)", text
    ):
        documented[name] = [re.match(r"\| `(\w+)` \|", row)[1] for row in table.splitlines()]
    classes = {c.__name__: c for c in vars(module).values() if inspect.isclass(c) and c.__module__ == module.__name__}
    fields = {
        name: [field.name for field in dataclasses.fields(c)]
        for name, c in classes.items()
        if dataclasses.is_dataclass(c)
    }
    assert documented == fields
    documented_fields = text[text.index("## attacks/ATTACK") :]
    assert all(f"`{name}`" in documented_fields for name in module.ATTEMPT_FIELDS)
