"""The programs of perf/: they run, agree with PyTorch before they measure, and render their tables."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from perf import tables

ROOT = Path(__file__).parents[2]
WHERE = {
    "device": "cpu",
    "cores": 2,
    "processor": "Fast, AVX2",
    "versions": {"jax": "1"},
    "commit": "0123456789",
    "command": "python x.py",
}
SAID = "On 2 cores (Fast, AVX2), jax 1; commit 0123456; `python x.py`"


# ---- Tables ----


def test_steps_by_hand():
    found = WHERE | {
        "seconds": {"vkd": [3.0, 1.0, 2.0], "torch": [5.0, 4.0, 3.0], "all": [4.0, 4.0, 9.0]},
        "median": {"vkd": 2.0, "torch": 4.0, "all": 4.0},
        "bytes": {"vkd": 2**20, "all": 4 * 2**20},
        "parameters": 49_000_000,
        "trainable": 13_000_000,
        "dtype": "float32",
        "rows": {"forget": 4, "retain": 5},
        "tokens": 97,
    }
    *rows, empty, caption = tables.steps(found).splitlines()
    assert rows[2:] == [
        "| vkd | 2.000 | 1.000 | 3.000 | 1 |  |",
        "| torch | 4.000 | 3.000 | 5.000 | – | 0.50 |",
        "| all | 4.000 | 4.000 | 9.000 | 4 | 0.50, 0.25 of the memory |",
    ]
    assert caption.startswith(
        "A LLaVA of 49 M parameters, of which VKD trains 13 M, in float32; 4 forget + 5 retain rows"
    )
    assert "Medians of 3 steps" in caption and caption.endswith(SAID) and empty == ""
    with_changes = tables.steps(found | {"commit": "0123456789+changes", "device": "NVIDIA H200"})
    assert "On NVIDIA H200, jax 1; commit 0123456 with changes; `python x.py`" in with_changes
    del found["processor"]  # older files do not say
    assert "On 2 cores, jax 1;" in tables.steps(found)


def test_answers_by_hand():
    found = WHERE | {
        "seconds": {"writing": [2.0], "writing in PyTorch": [4.0], "choosing": [1.0], "choosing in PyTorch": [8.0]},
        "new_tokens_a_second": {"writing": 100.4, "writing in PyTorch": 50.2},
        "questions_a_second": {"writing": 16, "writing in PyTorch": 8, "choosing": 32, "choosing in PyTorch": 4},
        "ratio_to_pytorch": {"writing": 0.5, "choosing": 0.125},
        "parameters": 49e6,
        "questions": 32,
        "pictures": 8,
        "image_tokens": 64,
        "batch": 16,
        "new_tokens": 1024,
        "options": 4,
    }
    *rows, _, caption = tables.answers(found).splitlines()
    assert rows[2:] == [
        "| writing | 2.000 | 2.000 | 2.000 | 16.0 | 100 | 0.50 |",
        "| writing in PyTorch | 4.000 | 4.000 | 4.000 | 8.0 | 50 |  |",
        "| choosing | 1.000 | 1.000 | 1.000 | 32.0 | – | 0.12 |",
        "| choosing in PyTorch | 8.000 | 8.000 | 8.000 | 4.0 | – |  |",
    ]
    assert "32 questions about 8 pictures of 64 tokens, 16 at a time; 1024 tokens written, 4 options" in caption


def level(method, steps, forget, each, prepare):
    row = {"method": method, "steps": steps, "forget": forget, "retain": 1.0, "questions": 144}
    return row | {"prepare_seconds": prepare, "step_seconds": each, "train_seconds": each * steps}


def test_the_same_forget_level_by_hand():
    usual, slow = level("grad_diff", 100, 0.5, 0.2, 5.0), level("vkd", 25, 0.6, 0.1, 10.0)
    enough, more = level("vkd", 50, 0.5, 0.1, 10.0), level("vkd", 300, 0.1, 0.1, 10.0)
    lines = tables.levels(WHERE | {"rows": [usual, more, enough, slow]}).splitlines()
    assert lines[2] == "| grad_diff | 100 | 50.0 | 100.0 | 5.0 | 0.200 | 20.0 |"
    assert lines[-1].startswith(
        "VKD forgets as much as GradDiff on all weights after 50 steps: 0.25 of its time in steps, 0.60 with preparing."
    )
    assert tables.levels(WHERE | {"rows": [usual, slow]}).splitlines()[-1].startswith("None of these runs of VKD")


def test_the_timing_tables_of_readme_and_docs_are_fresh():
    pages = [str(path) for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]]
    assert tables.main([*pages, "--check"]) == 0


# ---- Programs ----


@pytest.mark.parametrize("program", ["answers.py", "forget_level.py", "quantization.py", "step_time.py"])
def test_a_program_explains_its_options(program):
    """What it imports exists, and its parser is whole; measuring is left to the slow tests."""
    pytest.importorskip("torch", reason="two of the programs measure PyTorch as well")
    done = subprocess.run([sys.executable, ROOT / "perf" / program, "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "--json" in done.stdout


def ran(tmp_path, program, *options):
    """What a program printed and wrote."""
    pytest.importorskip("torch", reason="the programs compare with PyTorch")
    file = tmp_path / "found.json"
    command = [sys.executable, ROOT / "perf" / program, *options, "--json", file]
    shown = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    return shown, json.loads(file.read_text())


@pytest.mark.slow
def test_a_step_here_and_in_pytorch(tmp_path):
    shown, found = ran(tmp_path, "step_time.py", "--size=tiny", "--rounds=2")
    assert isinstance(found["processor"], str)
    names = ["vkd", "grad_diff, all weights", "vkd in PyTorch", "vkd in PyTorch, teacher asked"]
    assert list(found["seconds"]) == names and {len(times) for times in found["seconds"].values()} == {2}
    for name in names[2:]:
        assert found["losses"][name] == pytest.approx(found["losses"]["vkd"], rel=1e-3)
    assert found["losses"]["vkd"][0] > found["losses"]["vkd"][2]  # it trains
    assert shown == tables.steps(found) + "\n" and "`python perf/step_time.py --size=tiny --rounds=2`" in shown


@pytest.mark.slow
def test_answers_here_and_in_pytorch(tmp_path, monkeypatch):
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")  # which changes what is measured
    shown, found = ran(tmp_path, "answers.py", "--size=tiny", "--rounds=1")
    assert set(found["ratio_to_pytorch"]) == {"writing", "choosing"} and found["new_tokens"] > 100
    assert shown == tables.answers(found) + "\n"
    assert found["command"].startswith("GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python perf/answers.py ")


@pytest.mark.slow
def test_what_quantisation_costs_is_within_bounds(tmp_path):
    shown, found = ran(tmp_path, "quantization.py", "--questions=32")
    assert found["questions"] == 32 and shown == tables.quantization(found) + "\n"
    full, int8, int8_64, int4, int4_64, w8a8 = found["rows"]
    assert full["bytes"] == 4 * 951424  # parameters
    for row in (int8, int8_64, w8a8):
        assert row["cosine"] > 0.998 and row["kl"] < 1e-4 and row["top1"] == 1 and row["share"] < 0.27
    for row in (int4, int4_64):
        assert row["cosine"] > 0.8 and row["kl"] < 1e-2 and row["top1"] > 0.98 and row["share"] < 0.18
