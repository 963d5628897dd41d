"""Comparisons: settings, what is tuned on whom, and a whole small one."""

import dataclasses
import json
from pathlib import Path

import pytest
from absl import flags
from compared import results
from recorded import add_records

from vkd_jax import compare, main, registry
from vkd_jax.config import command_line, defaults, schema
from vkd_jax.config.schema import RunConfig
from vkd_jax.runs import sweep
from vkd_jax.runs.workdir import SHARED_MODELS
from vkd_jax.runtime.records import answers_of
from vkd_jax.types import UserError

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # ml_collections' way to read one


# ---- Settings ----


def test_settings_are_set_as_on_a_command_line():
    config = defaults.base()
    schema.override(config, "train.steps=7 train.learning_rate=1e-4 method.target=anchor method.taps=('features',)")
    assert (config.train.steps, config.train.learning_rate) == (7, 1e-4)
    assert (config.method.target, config.method.taps) == ("anchor", ("features",))
    schema.override(config, "model.path= method.mask_keep=None")
    assert config.model.path == "" and config.method.mask_keep is None


@pytest.mark.parametrize("settings", ["train.stepz=7", "train.steps=many", "nothing=1"])
def test_settings_that_do_not_fit_are_refused(settings):
    with pytest.raises(UserError, match="unknown field|train.steps: 'many' is of type str"):
        schema.override(defaults.base(), settings)


# ---- The shipped comparisons ----


@pytest.fixture(scope="module")
def tiny(get_config):
    return get_config("tiny.py", "compare")


def test_every_method_has_equally_many_trials(tiny, tmp_path):
    entrants = tiny.compare.entrants
    assert {e.method.name for e in entrants.values()} == {n for n in registry.METHODS if n != "finetune"}
    assert {len(entrant.search) for entrant in entrants.values()} == {4}
    plan = sweep.Sweep(RunConfig.from_config_dict(tiny), tmp_path)
    for name, task in plan.tasks().items():
        if name.startswith("tuning/"):
            task.make_config()  # its settings fit the method


def test_tuning_uses_people_who_are_not_reported(tiny, tmp_path):
    tasks = sweep.Sweep(RunConfig.from_config_dict(tiny), tmp_path).tasks()
    trial, control = tasks["tuning/vkd/0"].make_config(), tasks["controls"].make_config()
    trial_people, control_people = trial.data.benchmark.people, control.data.benchmark.people
    assert trial_people != control_people and trial_people != 1  # tiny_base was trained on the people of seed 1
    assert trial.model.path == str(tmp_path / "tuning" / "vanilla" / "vanilla") and control.model.path == "tiny_llava"
    assert tasks["tuning/vkd/0"].needs == {"tuning/vanilla"}
    assert tasks["runs/vkd/2"].needs == {"controls", *(f"tuning/vkd/{i}" for i in range(4))}
    assert (control.stage, control.attacks.names, trial.attacks.names) == ("audit", "all", "")


def write_run(folder, figures):
    """Writes the files of a finished run: its results, and answers, which nothing reads."""
    figures.write(folder)
    for name in answers_of(figures.to_json()):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("")
    add_records(folder)


def test_a_final_run_has_the_settings_of_the_best_trial(tiny, tmp_path):
    for number, (forget, real) in enumerate([(9, 20), (3, 20), (2, 10)]):
        folder = tmp_path / "tuning" / "npo" / str(number)
        folder.mkdir(parents=True)
        write_run(folder, results(forget, forget, real=real))
    plan = sweep.Sweep(RunConfig.from_config_dict(tiny), tmp_path)
    config = plan.tasks()["runs/npo/1"].make_config()
    chosen = defaults.base()
    chosen.method = defaults.method("npo")
    schema.override(chosen, tiny.compare.entrants.npo.search[1])
    assert config.train.learning_rate == chosen.train.learning_rate
    assert config.method.weight_retain == chosen.method.weight_retain
    assert (config.seed, config.data.benchmark.people) == (1, 0) and config.compare is None


def test_a_variant_has_the_best_settings_of_its_original_but_for_its_own(get_config, tmp_path):
    config = get_config("tiny.py", "robust_methods")
    original = config.compare.entrants["vkd robust"]
    for number, forget in enumerate((9, 3)):
        folder = tmp_path / "tuning" / "vkd_robust" / str(number)
        folder.mkdir(parents=True)
        write_run(folder, results(forget, forget))
    tasks = sweep.Sweep(RunConfig.from_config_dict(config), tmp_path).tasks()
    trials = [name for name in tasks if name.startswith("tuning/vkd_robust/")]
    assert len(trials) == len(original.search) == 8 and not any("no_worst_case" in name for name in trials)
    run, variant = (tasks[f"runs/{name}/1"] for name in ("vkd_robust", "vkd_robust_no_worst_case"))
    assert run.needs == variant.needs == {"controls", *trials}
    run, variant = run.make_config(), variant.make_config()
    chosen = RunConfig.from_config_dict(config).override(original.search[1])
    assert run.train.learning_rate == chosen.train.learning_rate
    assert run.method.worst_case.radius > 0 == variant.method.worst_case.radius
    unchanged = dataclasses.replace(variant.method.worst_case, radius=run.method.worst_case.radius)
    assert dataclasses.replace(variant.method, worst_case=unchanged) == run.method and variant.train == run.train


def test_trials_are_attacked_if_the_settings_of_tuning_name_an_attack(get_config, tmp_path):
    config = RunConfig.from_config_dict(get_config("tiny.py", "robust_methods"))
    tasks = sweep.Sweep(config, tmp_path).tasks()
    trial, run = tasks["tuning/npo_robust/7"].make_config(), tasks["runs/npo_robust/0"].make_config()
    assert (trial.attacks.names, run.attacks.names) == ("relearn", "relearn,membership")
    assert trial.attacks.settings["relearn"].steps == (25,) and len(run.attacks.settings["relearn"].steps) == 3


def test_the_parts_of_the_robust_setting_are_compared_on_people_on_whom_nothing_was_tuned(get_config, tmp_path):
    tasks = sweep.Sweep(RunConfig.from_config_dict(get_config("tiny.py", "robustness")), tmp_path).tasks()
    assert not [name for name in tasks if name.startswith("tuning/")] and "models/retain_only" in tasks
    runs = [name for name in tasks if name.startswith("runs/")]  # in order: seed by seed
    assert len(runs) == 30 and runs == sorted(runs, key=lambda run: run[-1])
    whole, without = (tasks[f"runs/vkd_robust{part}/2"].make_config() for part in ("", "_no_text"))
    assert whole.data.benchmark.people == 3 and whole.method.text.weight > 0 == without.method.text.weight
    assert (whole.seed, whole.method.worst_case) == (2, without.method.worst_case)


def test_models_that_the_config_does_not_give_are_fine_tuned_first(get_config, tmp_path):
    tasks = sweep.Sweep(RunConfig.from_config_dict(get_config("tiny.py", "ablations")), tmp_path).tasks()
    assert [tasks[f"models/{name}"].make_config().stage for name in SHARED_MODELS] == ["finetune", "retain_only"]
    assert tasks["controls"].needs == {"models/vanilla", "models/retain_only"}
    config = tasks["runs/mask_10/0"].make_config()
    assert config.model.path == str(tmp_path / "models" / "vanilla" / "vanilla") and config.method.mask_keep == 0.1
    assert config.data.benchmark.people == 2


# ---- A whole one ----


@pytest.fixture(scope="module")
def small(get_config, request_folders, tiny_folder):
    """Pruning with two trials on four people, of which one fails; only the vanilla model of tuning is trained."""
    config = get_config("tiny.py", "compare")
    config.data = defaults.benchmark("folder", forget=f"{request_folders}/forget", retain=f"{request_folders}/retain")
    config.model.update(path=str(tiny_folder), base=str(tiny_folder), retain_only="")
    config.finetune.train.update(steps=2, warmup_steps=1, batch_size=dict(image=4, text=2))
    manu = config.compare.entrants.manu
    manu.search = ("model.unlearned=nowhere", manu.search[0])
    manu.settings = "train.batch_size.forget=3"
    config.compare.entrants = {"manu": manu}
    config.compare.tuning = "model.path= eval.max_items=4"
    config.compare.seeds = (3,)
    config.attacks.names = "leak"
    return config


@pytest.fixture(scope="module")
def finished(small, tmp_path_factory):
    """The folder of that comparison, and what it found."""
    folder = tmp_path_factory.mktemp("compared")
    return folder, sweep.run(small, folder, workers=1)


def test_a_comparison_reports_its_runs(finished):
    folder, out = finished
    assert json.loads((folder / "comparison.json").read_text()) == out
    assert out["meta"]["command"] == "called from Python: vkd_jax.runs.sweep.run"
    assert [r["name"] for r in out["rows"]] == ["vanilla", "manu"]
    assert out["rows"][1]["runs"][0]["seed"] == 3 and "leak" in out["rows"][1]["attacks"]
    assert (folder / "comparison.md").read_text().startswith("# Methods compared")
    assert (folder / "pareto.png").exists() and "stages.py" in (folder / "controls" / "log.txt").read_text()


def test_a_failed_trial_is_reported_and_not_chosen(finished):
    out = finished[1]
    assert list(out["failures"]) == ["tuning/manu/0"] and "model.unlearned" in out["failures"]["tuning/manu/0"]
    assert [("kept" in trial) for trial in out["rows"][1]["trials"]] == [False, True]


def test_shared_models_are_evaluated_once(finished):
    timing = json.loads((finished[0] / "runs/manu/3/timing.json").read_text())
    assert "evaluate vanilla" not in timing and "evaluate unlearned" in timing


def test_finished_runs_are_not_repeated(small, finished):
    folder, out = finished
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("answers/*.jsonl")}
    assert sweep.run(small, folder, workers=1) == out
    assert before and {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.parametrize(
    ("module", "words", "message"),
    [
        (compare, "vkd", "this config has no section `compare`"),
        (main, "compare", "use python -m vkd_jax.compare"),
    ],
)
def test_the_wrong_program_for_a_config_is_refused(module, words, message, tmp_path, capsys, get_config):
    values = flags.FlagValues()
    command_line.define(values)
    flags.DEFINE_integer("workers", 0, "", flag_values=values)
    values(["x", f"--config={ROOT}/configs/tiny.py:{words}", f"--workdir={tmp_path / 'x'}"])
    call = module.command if module is compare else module.main
    assert call(["x"], values) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": ("x",)}, r"compare.seeds: \('x',\) is not allowed"),
        ({"seeds": (1, 1)}, "compare.seeds: .* Give a nonempty tuple of different items"),
        ({"seeds": ()}, "compare.seeds: .* Give a nonempty tuple"),
        ({"tuning": "data.nosuch=1"}, "data.nosuch: unknown field 'nosuch'. Available: "),
        ({"entrants.vkd.settings": "method.train_=1"}, "method.train_: unknown field 'train_'. Did you mean 'train'"),
        ({"entrants.vkd.variant_of": "npo"}, "compare.entrants.vkd.variant_of: 'npo' gives method and search"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_written(get_config, tmp_path, changes, message):
    config = get_config("tiny.py", "compare")
    with config.ignore_type():
        config.update_from_flattened_dict({f"compare.{name}": value for name, value in changes.items()})
    with pytest.raises(UserError, match=message):
        sweep.run(config, tmp_path / "made")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("name", ["data/metadata.jsonl", "models/thesis.tex", "a.png", "results.json"])
def test_a_folder_with_other_files_is_refused(get_config, tmp_path, name, monkeypatch):
    monkeypatch.setattr(sweep, "_run", lambda *_: pytest.fail("it was run"))
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=f"--workdir=.*: it has other files .{name.partition('/')[0]}"):
        sweep.run(get_config("tiny.py", "compare"), tmp_path)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["lock.json", "controls", "tuning/vanilla", "models/vanilla", ".git"])
def test_a_comparison_resumes_in_the_folder_that_it_began(get_config, tmp_path, name, monkeypatch):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("{}") if name.endswith(".json") else (tmp_path / name).mkdir()
    monkeypatch.setattr(sweep, "_run", lambda *_: "resumed")
    assert sweep.run(get_config("tiny.py", "compare"), tmp_path) == "resumed"


def test_a_workdir_that_is_a_file_is_refused(get_config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file; pass a folder"):
        sweep.run(get_config("tiny.py", "compare"), tmp_path / "file")
