"""--dry_run: it describes a run, writes nothing into its folder, and refuses what the run refuses."""

import json
import os
import re
import sys
from pathlib import Path

import pytest
from absl import flags
from short_run import state_of

from vkd_jax import main
from vkd_jax.checkpoints.bundle import read_family
from vkd_jax.config import command_line
from vkd_jax.config.schema import RunConfig
from vkd_jax.runs import dry_run, inputs
from vkd_jax.runs.workdir import Workdir
from vkd_jax.runtime import locks, memory
from vkd_jax.types import Example

TINY = Path(__file__).parents[2] / "configs" / "tiny.py"
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # ml_collections' way to read one


@pytest.fixture
def run(monkeypatch, capfd, tiny_folder, few, tmp_path):
    """Runs the command in this process on a small model and three people: (exit status, stdout, stderr)."""

    def run(*args):
        argv = ["main", f"--config={TINY}:method=grad_diff", f"--workdir={tmp_path / 'run'}"]
        argv += [f"--config.data.source={few}", f"--config.model.path={tiny_folder}", "--config.model.base="]
        argv += ["--config.model.retain_only=", "--config.train.batch_size.forget=2"]
        given = {arg.partition("=")[0] for arg in args}  # a flag with two values is refused
        argv = [*(arg for arg in [*argv, "--config.train.batch_size.retain=3"] if arg.partition("=")[0] not in given)]
        argv += args
        monkeypatch.setattr(sys, "argv", argv)
        values = flags.FlagValues()
        main.define(values)
        capfd.readouterr()
        status = main.main(command_line.parse(argv, values), values)
        return status, *capfd.readouterr()

    return run


@pytest.fixture
def untrained(monkeypatch):
    """Leaves out what takes long: the compiled step."""
    monkeypatch.setattr(dry_run, "_step", lambda job, training: [f"{training.name}: {training.train.steps} steps"])


@pytest.fixture
def program(monkeypatch):
    """Sets the memory of the compiled step, which is not compiled."""
    monkeypatch.setattr(dry_run.jax.stages.Lowered, "compile", lambda lowered: None)
    return lambda gib: monkeypatch.setattr(memory, "program_bytes", lambda compiled: int(gib * memory.GIB))


def test_a_run_is_described_and_nothing_is_written(run, program, tmp_path):
    program(0.5)
    status, shown, _ = run("--dry_run", "--config.eval.max_items=3")
    assert status == 0 and list(tmp_path.iterdir()) == []
    assert "  max_items: 3" in shown.splitlines()
    assert re.search(r"^forget +\d+ +\d+ +\d+$", shown, re.MULTILINE)
    assert re.search(r"^unlearning: 100 steps, [\d,]+ trained parameters$", shown, re.MULTILINE)
    assert re.search(r"^  memory: 0\.50 of [\d.]+ GiB on each of \d x cpu", shown, re.MULTILINE)
    assert re.search(r"^  compute: [\d.]+e\+\d\d FLOPs for each step$", shown, re.MULTILINE)
    assert "  time: at least 0." in shown and "has no results of this run" in shown


def test_the_longest_row_is_named(tiny_folder):
    questions = {"line 1": "Who is it?", "line 2": "Who is the judge?", "line 3": "Who?"}
    examples = [Example(name, "Ada", None, "", text, "Ada", location=name) for name, text in questions.items()]
    training = dry_run.Training("unlearning", None, None, tiny_folder, examples)
    lengths = dry_run._lengths(training, read_family(tiny_folder)[1])
    assert lengths.row == "line 2 ('Who is the judge?'): the row"


def test_true_answers_that_are_too_long_to_write_are_said(run, untrained, caplog):
    assert run("--dry_run", "--config.eval.max_new_tokens=30")[0] == 0 and "max_new_tokens" not in caplog.text
    assert run("--dry_run", "--config.eval.max_new_tokens=1")[0] == 0
    assert "more tokens than config.eval.max_new_tokens=1" in caplog.text and "can only be 0" in caplog.text


def test_the_least_time_is_that_of_the_work_at_the_measured_speed(monkeypatch):
    text = "at the 2e+09 FLOPs per second of a matrix product here"
    assert dry_run._least_time(1e9, 100, 2e9) == f"at least 0.5 s for each step, 50 s in all, {text}"
    assert dry_run._least_time(1e9, 0, 2e9) == f"at least 0.5 s for each step, {text}"
    monkeypatch.setattr(dry_run, "CPU_ROWS", 64)
    ticks = iter(range(100))  # each product takes one second
    monkeypatch.setattr(dry_run.time, "perf_counter", lambda: float(next(ticks)))
    assert dry_run._product_speed("float32") == 2 * 64**3


def test_a_step_that_does_not_fit_is_refused(run, program):
    program(3072)
    status, shown, err = run("--dry_run")
    assert (status, shown) == (2, "") and err.splitlines()[-1].startswith("error: training steps need 3,072.0 GiB")


def make_file(folder):
    folder.write_text("")


def make_other(folder):
    folder.mkdir()
    (folder / "notes.txt").write_text("")


def make_locked(folder):
    folder.mkdir()
    lock = locks.owner("another command") | {"pid": os.getppid(), "started": locks.process_start(os.getppid())}
    (folder / "lock.json").write_text(json.dumps(lock))


@pytest.mark.parametrize(
    ("prompts", "settings", "problem"),
    [
        ({"generation": "{question}</s>"}, [], "prompts.json: generation: a text contains </s>, a special token"),
        ({"option": "{letter}: {text} <image>"}, [], "prompts.json: option: a text contains <image>, which stands"),
        ({}, ["prompts", "prompts.role=<image> {question}"], "attacks.prompts.role: a text contains <image>"),
        ({}, ["typographic", "typographic.prompt=Read it.</s>"], "attacks.typographic.prompt: a text contains </s>"),
    ],
)
def test_wordings_with_tokens_of_the_model_are_refused(run, untrained, tmp_path, prompts, settings, problem):
    args = []
    if prompts:
        (tmp_path / "prompts.json").write_text(json.dumps(prompts))
        args = [f"--config.eval.prompts={tmp_path}/prompts.json"]
    for field, value in zip(("names=", ""), settings, strict=False):
        args.append(f"--config.attacks.{field}{value}")
    status, shown, err = run(*args, "--dry_run")
    assert (status, shown) == (2, "") and problem in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("args", "make"),
    [
        (["--config.train.steps=0"], None),
        (["--config.data.forget=7"], None),
        (["--config.model.path=nowhere"], None),
        (["--config.data.source=nowhere"], None),
        ([], make_file),
        ([], make_other),
        ([], make_locked),
    ],
    ids=lambda x: x.__name__ if callable(x) else " ".join(x or []),
)
def test_bad_input_is_refused_with_the_sentence_of_the_run(run, untrained, tmp_path, args, make):
    if make:
        make(tmp_path / "run")
    before = dict(state_of(tmp_path))
    described = run(*args, "--dry_run")
    assert dict(state_of(tmp_path)) == before
    status, shown, err = run(*args)
    assert described[:2] == (2, "") == (status, shown)
    assert described[2].splitlines()[-1] == err.splitlines()[-1]


def test_the_folder_of_a_run_is_compared_and_left_alone(run, untrained, tmp_path, monkeypatch):
    seen = []
    describe = inputs.describe
    monkeypatch.setattr(inputs, "describe", lambda *args: seen.append(describe(*args)) or seen[-1])
    configs = []
    from_config_dict = RunConfig.from_config_dict
    monkeypatch.setattr(RunConfig, "from_config_dict", lambda x: configs.append(from_config_dict(x)) or configs[-1])
    assert run("--dry_run")[0] == 0
    workdir = Workdir(tmp_path / "run", configs[0])
    workdir.bind(seen[0])
    workdir.write_lines("answers/vanilla.jsonl", [])
    before = dict(state_of(tmp_path))
    status, shown, _ = run("--dry_run")
    assert status == 0 and "has results of this run: it would resume." in shown
    assert "run of another config (seed: 0 in the folder, 1 now)" in run("--dry_run", "--config.seed=1")[2]
    (tmp_path / "run" / "inputs.json").write_text('{"sets": {}, "models": {}, "prompts": ""}')
    assert "was computed from other inputs" in run("--dry_run")[2]
    (tmp_path / "run" / "inputs.json").unlink()
    assert "inputs.json is missing" in run("--dry_run")[2]
    assert {name: x for name, x in before.items() if name != "run/inputs.json"} == dict(state_of(tmp_path))


def test_several_processes_are_refused(run):
    assert "leave out --distributed" in run("--dry_run", "--distributed")[2]
