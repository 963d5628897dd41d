"""Warnings of questions to forget that can be answered without knowledge."""

import types

import pytest
from benchmark_rows import write_folder

from vkd_jax.benchmarks.folder import Folder
from vkd_jax.config.evaluation import EvalConfig
from vkd_jax.evaluation.shortcuts import warn_of_shortcuts
from vkd_jax.runs import job
from vkd_jax.types import Example

LETTER, OPTIONS = ("options", "letter:strict"), ("options",)
JOBS = ("judge", "nurse", "cook")
FIRST = [(f"Job of {i}?", JOBS[i % 3], (*JOBS[i % 3 :], *JOBS[: i % 3])) for i in range(12)]


def examples(rows):
    return [Example(f"forget/{i}", "Ada", None, "", q, a, o, task="generation") for i, (q, a, o) in enumerate(rows)]


@pytest.mark.parametrize(
    ("rows", "protocols", "problem"),
    [
        ([("Is it Ada?", "Yes", ()), ("Is she a judge?", "yes.", ())], OPTIONS, "have the answer 'yes'"),
        ([("Is it Ada?", "No", ("Yes", "No"))] * 3, LETTER, "have the answer 'no'"),
        ([("Is it Ada?", "Yes", ()), ("Is it Otto?", "No", ())], OPTIONS, ""),
        ([("Is it Ada?", "Yes", ())], OPTIONS, ""),
        ([("Ada's job? It is JUDGE.", "judge", ()), ("In Lund?", "Lund.", ())], OPTIONS, "contain their answer"),
        ([("Ada's job? It is judge.", "judge", JOBS), ("In Lund?", "Lund", ())], OPTIONS, "contain their answer"),
        ([("Is Ada a judge or a nurse?", "judge", JOBS)] * 2, OPTIONS, ""),
        ([("Is Ada a judgement?", "judge", ())] * 2, OPTIONS, ""),
        ([("Is Ada a judge?", "judge", ()), ("Where?", "Lund", ())], OPTIONS, ""),
        (FIRST, LETTER, "have their right option in the place A"),
        ([(q, a, o[1:] + o[:1]) for q, a, o in FIRST], LETTER, "have their right option in the place C"),
        ([*FIRST, ("Town?", "Lund", ())], LETTER, "have their right option in the place A"),
        (FIRST, OPTIONS, ""),
        (FIRST[:9], LETTER, ""),
        ([*FIRST, ("Job?", "cook", JOBS)], LETTER, ""),
    ],
)
def test_questions_that_need_no_knowledge_are_a_warning(rows, protocols, problem, caplog):
    sets = {"forget": examples(rows), "retain": examples(rows)}
    warn_of_shortcuts(sets, Folder.EVAL_SETS, protocols)
    count = "12 questions with options" if len(rows) == 13 else f"{len(rows)} questions"
    expected = [f"All {count} of the set forget {problem}: their accuracy needs no knowledge"]
    assert [message.partition(", and says")[0] for message in caplog.messages] == (expected if problem else [])


@pytest.mark.parametrize(
    ("person", "questions", "warns"),
    [
        ("Ada", ["What does ADA do?", "Where does Ada live?"], True),
        ("Ada", ["What does Ada do?", "Where does this person live?"], False),
        ("Ada", ["What does Adana do?", "Adana?"], False),
        ("7", ["Is it 7?", "Are 7 people here?"], False),
    ],
)
def test_questions_with_an_image_that_name_the_person_are_a_warning(person, questions, warns, caplog):
    shown = [Example(f"f/{i}", person, b"", "f", text, "a judge") for i, text in enumerate(questions)]
    warn_of_shortcuts({"forget": shown, "retain": shown}, Folder.EVAL_SETS, OPTIONS)
    expected = ["All 2 questions with an image of the set forget name the person"]
    assert [message.partition(":")[0] for message in caplog.messages] == (expected if warns else [])


def test_they_are_looked_for_whenever_folders_are_read(tmp_path, caplog):
    for name in ("forget", "retain"):
        lines = [dict(question=f"Is it {name} {i}?", answer="Yes", person=name) for i in range(2)]
        write_folder(tmp_path / name, lines)
    folders = Folder(forget=str(tmp_path / "forget"), retain=str(tmp_path / "retain"))
    data, workflow = types.SimpleNamespace(benchmark=folders, cache=""), types.SimpleNamespace(finetunes=())
    config = types.SimpleNamespace(data=data, workflow=workflow, eval=EvalConfig(), request=None, active_attacks={})
    for count in (1, 2):  # the second time from the cache
        job.read_data(config, tmp_path / "run")
        assert caplog.text.count("All 2 questions of the set forget have the answer 'yes'") == count
