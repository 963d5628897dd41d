"""A new benchmark, attack or metric is one class and one registry line; no other code has to change."""

import dataclasses
import json
import math
import re
import sys
import types
from typing import ClassVar

import pytest
from recorded import add_records

from vkd_jax import attacks, benchmarks, registry
from vkd_jax.attacks import base
from vkd_jax.evaluation import metrics
from vkd_jax.evaluation.metrics.base import Metric
from vkd_jax.evaluation.metrics.forget_quality import forget_quality
from vkd_jax.evaluation.metrics.summary import summaries
from vkd_jax.evaluation.metrics.utility import model_utility
from vkd_jax.reporting import comparison, comparison_plots, report, tables
from vkd_jax.results import AttackCell, AttackResults, BenchmarkInfo, Manifest, MeasuredSet, Meta, RunResults
from vkd_jax.runs import results_writer
from vkd_jax.types import EvalSet, Role, UserError

PEOPLE = {"erased": ("ann", "bob"), "erased_elsewhere": ("ann", "bob"), "others": ("cleo", "dan"), "zoo": ("",)}
MODELS = ("vanilla", "unlearned", "retain_only")


@dataclasses.dataclass(frozen=True)
class Zoo:
    TITLE: ClassVar[str] = "Zoo"
    EVAL_SETS: ClassVar[tuple[EvalSet, ...]] = (
        EvalSet("erased", Role.FORGET, "keepers to forget", "erased"),
        EvalSet("erased_elsewhere", Role.FORGET_HOLDOUT, "keepers to forget, elsewhere", "elsewhere"),
        EvalSet("others", Role.RETAIN, "keepers to retain", "others"),
        EvalSet("zoo", Role.GENERAL, "animals", "zoo"),
    )


@dataclasses.dataclass(frozen=True)
class Whisper:
    TITLE: ClassVar[str] = "Whispering"
    ABOUT: ClassVar[str] = "The question is whispered."
    METRIC: ClassVar[str] = "accuracy"
    VARIANTS: ClassVar[dict[str, str]] = {"low": "whispered in a low voice"}

    def check(self, config):
        pass

    def run(self, subject):
        return [base.attack_record("low", record) for record in subject.answers if record["set"] in ("erased", "zoo")]

    def summarize(self, records):
        return base.accuracy(records)


SHORTNESS = Metric("shortness", "shortness of the answer", "up", item=lambda r: 1 / (1 + len(r["prediction"].split())))


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    module = types.ModuleType("throwaway")
    module.Zoo, module.Whisper, module.SHORTNESS = Zoo, Whisper, SHORTNESS
    monkeypatch.setitem(sys.modules, "throwaway", module)
    monkeypatch.setitem(registry.BENCHMARKS, "zoo", "throwaway:Zoo")
    monkeypatch.setitem(registry.ATTACKS, "whisper", "throwaway:Whisper")
    monkeypatch.setitem(metrics.METRICS, "shortness", "throwaway:SHORTNESS")


def answers(model):
    """Two questions of each kind about each person; the unlearned model fails on the people to forget."""
    records = []
    for name, people in PEOPLE.items():
        for person in people:
            for number in range(2):
                for task, modality in (("classification", "vqa"), ("generation", "vqa"), ("generation", "qa")):
                    knows = model == "vanilla" or not name.startswith("erased") or (modality == "qa" and number)
                    prediction = "a keeper" if knows else "a wild guess"
                    ratio = {"truth_ratio": 4.0 if knows else 0.5} if task == "classification" else {}
                    records.append({
                        "set": name, "id": f"{person}/{task}/{modality}/{number}", "person": person, "task": task,
                        "modality": modality, "question": "Who?", "answer": "a keeper",
                        "options": ["a keeper", "a wild guess"] if task == "classification" else [],
                        "image_id": f"{person}/{number}" if modality == "vqa" else "",
                        "protocol": "options" if task == "classification" else task, "prediction": prediction,
                        "correct": bool(knows), "probability": 0.9 if knows else 0.1, **ratio,
                    })  # fmt: skip
    return records


def make_run(folder):
    benchmark = benchmarks.create("zoo", {})
    attack = attacks.create("whisper", {})
    sets = benchmark.EVAL_SETS
    records = {model: answers(model) for model in MODELS}
    attacked = {m: attack.run(types.SimpleNamespace(answers=rows)) for m, rows in records.items()}
    for path, by_model in (("answers", records), ("attacks/whisper", attacked)):
        (folder / path).mkdir(parents=True)
        for model, rows in by_model.items():
            (folder / path / f"{model}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    measured = tuple(MeasuredSet(s.name, s.role, s.title, s.short, len(set(PEOPLE[s.name]) - {""})) for s in sets)
    config = {
        "seed": 0, "stage": "unlearn", "method": {"name": "vkd", "train": "visual"}, "train": {"steps": 3},
        "eval": {"max_new_tokens": 8},
    }  # fmt: skip
    meta = Meta(
        "python -m vkd_jax.main", config, 0, "c0ffee", {"jax": "0"}, "1 x cpu", "options", ("options",), 0,
        "2026-01-02T03:04:05+00:00", BenchmarkInfo(benchmark.TITLE, "nowhere", measured),
    )  # fmt: skip
    tried = AttackResults(attack.TITLE, attack.ABOUT, attack.METRIC, attack.VARIANTS, tuple(attack.summarize(attacked)))
    RunResults(
        meta=meta,
        models={model: summaries(rows) for model, rows in records.items()},
        utility={model: model_utility(rows, sets) for model, rows in records.items()},
        forget_quality={m: forget_quality(records[m], records["retain_only"], sets) for m in MODELS[:2]},
        chance={"erased": {"vqa": 0.5}},
        timing={"unlearn": 1.0},
        attacks={"whisper": tried},
        manifest=Manifest(1, 2, 0),
        text_logits_identical=True,
    ).write(folder)
    return RunResults.read(folder)


def test_new_components_appear_in_report_tables_plots_and_comparison(tmp_path):
    results = make_run(tmp_path)
    assert results.models["vanilla"]["erased"]["generation_vqa"].metrics["shortness"].people == 2
    assert results.models["vanilla"]["zoo"]["vqa"].people == 0
    assert comparison.tuning_measures(results) == {"forgot": 0.5, "kept": 0.5}  # half of the text about them is lost
    page = report.write(tmp_path, {}).read_text()
    for words in ("Zoo", "keepers to forget, elsewhere", "animals", "Whispering", "shortness of the answer"):
        assert words in page
    assert "whispered in a low voice" in page
    add_records(tmp_path)
    made = comparison.collect({"controls": [tmp_path], "mine": [tmp_path]}, {}, {})
    document = tables.document(made)
    heads = (
        "| erased VQA ↓ | elsewhere VQA ↓ | others VQA ↑ | zoo VQA ↑ | erased QA, open ↑ | others QA, open ↑ | KS ↓ |"
    )
    assert heads in document
    assert "| whisper: whispered in a low voice | " in document
    assert "| whisper: whispered in a low voice; animals | " in document
    assert comparison_plots.pareto(made).startswith(b"\x89PNG") and comparison_plots.relearning(made) == b""


CELL = AttackCell("unlearned", "erased", mean=0.5, n=4)


@pytest.mark.parametrize(
    ("metric", "cell", "problem"),
    [
        ("accuracy", dataclasses.replace(CELL, mean=math.nan), "cells[0].mean is nan, expected a finite number"),
        ("accuracy", dataclasses.replace(CELL, high=math.inf), "cells[0].high is inf, expected a finite number"),
        ("accuracy", dataclasses.replace(CELL, mean=7.0), "cells[0].mean is 7.0, expected a share from 0 to 1"),
        ("auc", dataclasses.replace(CELL, mean=-0.5), "cells[0].mean is -0.5, expected a share from 0 to 1"),
        ("accuracy", dataclasses.replace(CELL, mean=0.75, correct=2), "cells[0].mean is 0.75, expected 0.5"),
        ("accuracy", dataclasses.replace(CELL, mean="high"), "cells[0].mean is 'high', expected float"),
        ("accuracy", dataclasses.replace(CELL, n=0, correct=2), "cells[0].correct is 2, expected at most 0"),
        (
            "accuracy",
            dataclasses.replace(CELL, model="other"),
            "cells[0].model is 'other', expected one of vanilla, un",
        ),
        ("accuracy", 0.5, "cells[0] is 0.5, expected an object"),
        ("shortness", dataclasses.replace(CELL, mean=7.0), ""),
    ],
)
def test_impossible_figures_of_an_attack_name_its_class(metric, cell, problem):
    attack = types.SimpleNamespace(METRIC=metric)
    if not problem:
        return results_writer.check_cells("whisper", attack, [cell], MODELS)
    with pytest.raises(UserError, match=re.escape(f".summarize returned cannot be used: {problem}")) as error:
        results_writer.check_cells("whisper", attack, [cell], MODELS)
    assert str(error.value).startswith("attacks.names=whisper: what types.SimpleNamespace.summarize returned")


def test_impossible_figures_of_an_attack_are_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(Whisper, "summarize", lambda *_: [dataclasses.replace(CELL, mean=math.nan)])
    workdir = types.SimpleNamespace(read_lines=lambda _: [], path=tmp_path, timing={})
    job = types.SimpleNamespace(workdir=workdir, attacks={"whisper": Whisper()}, eval_sets=(), questions={})
    monkeypatch.setattr(results_writer, "_meta", lambda _: None)
    monkeypatch.setattr(results_writer, "summaries", lambda *_: {})
    monkeypatch.setattr(results_writer, "model_utility", lambda *_: None)
    with pytest.raises(UserError, match="what .*test_extensions.Whisper.summarize returned cannot be used: .*nan"):
        results_writer.write(job, {"vanilla": [], "unlearned": []})
    assert not list(tmp_path.iterdir())
