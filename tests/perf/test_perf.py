"""Tests of the timing scripts: their tables, their options, and (slow) short runs against PyTorch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from perf import tables

ROOT = Path(__file__).parents[2]
SOURCE = {
    "device": "cpu",
    "cores": 2,
    "processor": "Fast, AVX2",
    "versions": {"jax": "1"},
    "commit": "0123456789",
    "command": "python x.py",
}
SOURCE_TEXT = "On 2 cores (Fast, AVX2), jax 1; commit 0123456; `python x.py`"


# ---- Tables ----


def test_table_of_steps():
    results = SOURCE | {
        "seconds": {"vkd": [3.0, 1.0, 2.0], "torch": [5.0, 4.0, 3.0], "all": [4.0, 4.0, 9.0]},
        "median": {"vkd": 2.0, "torch": 4.0, "all": 4.0},
        "bytes": {"vkd": 2**20, "all": 4 * 2**20},
        "parameters": 49_000_000,
        "trainable": 13_000_000,
        "dtype": "float32",
        "rows": {"forget": 4, "retain": 5},
        "tokens": 97,
    }
    *rows, empty, caption = tables.steps(results).splitlines()
    assert rows[2:] == [
        "| vkd | 2.000 | 1.000 | 3.000 | 1 |  |",
        "| torch | 4.000 | 3.000 | 5.000 | – | 0.50 |",
        "| all | 4.000 | 4.000 | 9.000 | 4 | 0.50, 0.25 of the memory |",
    ]
    assert caption.startswith(
        "A LLaVA with 49 M parameters, of which VKD trains 13 M, in float32; batches of 4 forget + 5 retain examples"
    )
    assert "Medians of 3 steps" in caption and caption.endswith(SOURCE_TEXT) and empty == ""
    with_changes = tables.steps(results | {"commit": "0123456789+changes", "device": "NVIDIA H200"})
    assert "On NVIDIA H200, jax 1; commit 0123456 with changes; `python x.py`" in with_changes
    del results["processor"]  # older files lack it
    assert "On 2 cores, jax 1;" in tables.steps(results)


def test_table_of_answers():
    results = SOURCE | {
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
    *rows, _, caption = tables.answers(results).splitlines()
    assert rows[2:] == [
        "| writing | 2.000 | 2.000 | 2.000 | 16.0 | 100 | 0.50 |",
        "| writing in PyTorch | 4.000 | 4.000 | 4.000 | 8.0 | 50 |  |",
        "| choosing | 1.000 | 1.000 | 1.000 | 32.0 | – | 0.12 |",
        "| choosing in PyTorch | 8.000 | 8.000 | 8.000 | 4.0 | – |  |",
    ]
    assert "32 questions about 8 images of 64 tokens, in batches of 16; 1024 tokens generated, 4 options" in caption


def test_table_of_host_memory():
    peaks = {"model": 2**30, "trained": 3 * 2**29}
    results = SOURCE | {"images": 2048, "image_bytes": 2**29, "values": 2**20, "peaks": peaks, "weights": 2**28}
    *rows, _, caption = tables.host_memory(results).splitlines()
    assert rows[2:] == ["| model | 1.00 |", "| trained | 1.50 |"]
    assert caption.startswith("2,048 retain images, whose files have 0.50 GiB, with one question each; weights of 0.25")
    assert "would need 4 GiB in bfloat16 and 8 GiB in float32" in caption


def level(method, steps, forget, step, prepare):
    row = {"method": method, "steps": steps, "forget": forget, "retain": 1.0, "questions": 144}
    return row | {"prepare_seconds": prepare, "step_seconds": step, "train_seconds": step * steps}


def test_table_of_forget_levels_names_the_shortest_sufficient_run():
    grad_diff, insufficient = level("grad_diff", 100, 0.5, 0.2, 5.0), level("vkd", 25, 0.6, 0.1, 10.0)
    sufficient, longer = level("vkd", 50, 0.5, 0.1, 10.0), level("vkd", 300, 0.1, 0.1, 10.0)
    lines = tables.levels(SOURCE | {"rows": [grad_diff, longer, sufficient, insufficient]}).splitlines()
    assert lines[2] == "| grad_diff | 100 | 50.0 | 100.0 | 5.0 | 0.200 | 20.0 |"
    assert lines[-1].startswith(
        "VKD forgets as much as GradDiff on all weights after 50 steps, in 0.25 of its training time, or 0.60 with prep"
    )
    *_, verdict = tables.levels(SOURCE | {"rows": [grad_diff, insufficient]}).splitlines()
    assert verdict.startswith("None of these VKD runs")


def test_tables_of_readme_and_docs_are_fresh():
    pages = [str(path) for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]]
    assert tables.main([*pages, "--check"]) == 0


# ---- Scripts ----


SCRIPTS = ("answers.py", "forget_level.py", "host_memory.py", "quantization.py", "step_time.py")


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_print_their_options(fork_server, tmp_path, script):
    """Covers the imports and the command line; the slow tests measure."""
    pytest.importorskip("torch", reason="two of the scripts measure PyTorch as well")
    outcome = fork_server.run(str(ROOT / "perf" / script), ["--help"], tmp_path)
    assert outcome.status == 0, outcome.stderr[-3000:]
    assert "--json" in outcome.stdout


def measure(tmp_path, script, *options):
    """Runs a script and returns its stdout and the results that it wrote."""
    pytest.importorskip("torch", reason="the scripts compare with PyTorch")
    file = tmp_path / "results.json"
    command = [sys.executable, ROOT / "perf" / script, *options, "--json", file]
    stdout = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    return stdout, json.loads(file.read_text())


@pytest.mark.slow
def test_step_agrees_with_pytorch(tmp_path):
    stdout, results = measure(tmp_path, "step_time.py", "--size=tiny", "--rounds=2")
    assert isinstance(results["processor"], str)
    names = ["vkd", "grad_diff, all weights", "vkd in PyTorch", "vkd in PyTorch, teacher asked"]
    assert list(results["seconds"]) == names and {len(times) for times in results["seconds"].values()} == {2}
    for name in names[2:]:
        assert results["losses"][name] == pytest.approx(results["losses"]["vkd"], rel=1e-3)
    assert results["losses"]["vkd"][0] > results["losses"]["vkd"][2]  # the loss decreases
    assert stdout == tables.steps(results) + "\n" and "`python perf/step_time.py --size=tiny --rounds=2`" in stdout


@pytest.mark.slow
def test_answers_agree_with_pytorch(tmp_path, monkeypatch):
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")  # changes the timings
    stdout, results = measure(tmp_path, "answers.py", "--size=tiny", "--rounds=1")
    assert set(results["ratio_to_pytorch"]) == {"writing", "choosing"} and results["new_tokens"] > 100
    assert stdout == tables.answers(results) + "\n"
    assert results["command"].startswith("GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python perf/answers.py ")


@pytest.mark.slow
def test_quantization_errors_are_within_bounds(tmp_path):
    stdout, results = measure(tmp_path, "quantization.py", "--questions=32")
    assert results["questions"] == 32 and stdout == tables.quantization(results) + "\n"
    float32, int8, int8_64, int4, int4_64, w8a8 = results["rows"]
    assert float32["bytes"] == 4 * 951424  # parameters
    for row in (int8, int8_64, w8a8):
        assert row["cosine"] > 0.998 and row["kl"] < 1e-4 and row["top1"] == 1 and row["share"] < 0.27
    for row in (int4, int4_64):
        assert row["cosine"] > 0.8 and row["kl"] < 1e-2 and row["top1"] > 0.98 and row["share"] < 0.18
