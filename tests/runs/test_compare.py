"""Comparisons: how a trial is judged, what is tuned on whom, intervals, tables, and a whole small one."""

import copy
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from absl import flags
from recorded import add_records

from vkd_jax import compare, main, registry
from vkd_jax.benchmarks.clear import Clear
from vkd_jax.benchmarks.folder import Folder
from vkd_jax.benchmarks.mllmu import Mllmu
from vkd_jax.config import command_line, defaults, schema
from vkd_jax.config.schema import RunConfig
from vkd_jax.reporting import comparison, comparison_plots, tables
from vkd_jax.results import (
    STRONGEST,
    UNCHANGED,
    AttackCell,
    AttackResults,
    BenchmarkInfo,
    MeasuredSet,
    Meta,
    RunResults,
    Summary,
    Utility,
    to_json,
)
from vkd_jax.runs import sweep
from vkd_jax.runs.workdir import SHARED_MODELS
from vkd_jax.types import UserError

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # ml_collections' way to read one


def summary(correct, n):
    return Summary(correct / n, correct, n, 0.0, 1.0)


def run_results(before, after, sets=Mllmu.EVAL_SETS, chance=0.25):
    """Results of one run with these summaries."""
    measured = tuple(MeasuredSet(s.name, s.role, s.title, s.short, people=2) for s in sets)
    config = {"method": {"name": "manu", "train": "visual"}, "train": {"steps": 3}, "seed": 0}
    meta = Meta(
        command="python -m x", config=config, seed=0, commit="c0ffee", versions={}, devices="1 x cpu",
        protocol="options", protocols=("options",), shots=0, date="2026-01-02T03:04:05+00:00",
        benchmark=BenchmarkInfo("B", "S", measured),
    )  # fmt: skip
    models = {"vanilla": before, "unlearned": after}
    utility = dict.fromkeys(models, Utility(0.5, 0.4, 0.6))
    return RunResults(meta, models, utility, {}, {"forget": {"vqa": chance}}, {"data": 1.0})


def results(forget, test, **kept):
    """What a run found: right answers of ten about the people to forget, and of twenty about all else."""
    before = {"forget": {"vqa": summary(10, 10)}, "test": {"vqa": summary(10, 10)}}
    after = {"forget": {"vqa": summary(forget, 10)}, "test": {"vqa": summary(test, 10)}}
    for name in ("retain", "retain_test", "real"):
        before[name], after[name] = {"vqa": summary(20, 20)}, {"vqa": summary(kept.get(name, 20), 20)}
    before["forget"]["generation_qa"] = summary(10, 20)
    after["forget"]["generation_qa"] = summary(kept.get("text", 10), 20)
    return run_results(before, after)


def row(name, forget, kept, text=0.5, **more):
    def cell(mean):
        return {"mean": mean, "low": mean - 0.1, "high": mean + 0.1, "n": 20, "people": 2, "seeds": 2}

    sets = {"forget/vqa": cell(forget), "retain/vqa": cell(kept), "real/vqa": cell(kept), "forget/qa": cell(text)}
    run = {"seed": 0, "commit": "c0ffee", "ks": 0.25, "utility": 0.5, "seconds": 12.4, "bytes": 2**20}
    run["recovery"] = []
    return {"name": name, "label": name, "sets": sets, "attacks": {}, "runs": [run], **more}


def found(**attacks):
    rows = [row("vanilla", 1.0, 1.0), row("vkd", 0.1, 0.96, method="vkd", train="visual", attacks=attacks)]
    rows[1]["trials"] = [
        {"settings": "train.steps=1", "forgot": 0.5, "kept": 0.99},
        {"settings": "train.steps=2", "forgot": 0.25, "kept": 0.97},
        {"settings": "train.steps=3"},
    ]
    meta = dict(command="python -m x", commits=["c0ffee"], protocol="options", chance={"forget": {"vqa": 0.25}})
    sets = [to_json(s) | {"people": 2} for s in Mllmu.EVAL_SETS]
    meta |= {"benchmark": {"title": "B", "source": "S", "sets": sets}}
    meta |= {"attacks": {name: {"title": name, "metric": "accuracy", "variants": {}} for name in attacks}}
    return {"meta": meta, "failures": {}, "rows": rows}


# ---- Which trial is best ----


def test_a_run_is_judged_by_what_is_known_and_by_the_least_that_is_kept():
    assert comparison.judged(results(8, 4)) == {"forgot": 12 / 20, "kept": 1.0}
    assert comparison.judged(results(8, 4, real=18, retain=19)) == {"forgot": 0.6, "kept": 0.9}
    assert comparison.judged(results(8, 4, text=4))["kept"] == 0.4  # of the ten that the vanilla model got right


def test_to_be_wrong_more_often_than_guessing_is_not_to_have_forgotten_more():
    assert comparison.judged(results(0, 1))["forgot"] == comparison.judged(results(2, 3))["forgot"] == 0.25


def test_the_best_trial_forgets_most_of_those_that_keep():
    trials = [
        {"settings": "a", "forgot": 0.3, "kept": 0.96},
        {"settings": "b", "forgot": 0.25, "kept": 0.94},
        {"settings": "c", "forgot": 0.3, "kept": 0.99},
        {"settings": "failed"},
    ]
    assert comparison.best(trials)["settings"] == "c"
    assert comparison.best(trials[1:2] + trials[3:])["settings"] == "b"
    assert comparison.best([{"settings": "x", "forgot": 0.25, "kept": 0.5}, *trials[1:2]])["settings"] == "b"
    assert comparison.best([{"settings": "failed"}]) == {"settings": "failed"}
    assert comparison.best([]) is None


def test_the_best_attacked_trial_is_the_one_that_resists_most_of_those_that_keep():
    trials = [
        {"settings": "a", "forgot": 0.25, "kept": 0.99, "relearned": 0.6},
        {"settings": "b", "forgot": 0.30, "kept": 0.96, "relearned": 0.4},
        {"settings": "c", "forgot": 0.25, "kept": 0.90, "relearned": 0.3},
    ]
    assert comparison.best(trials)["settings"] == "b"
    assert comparison.best([trials[0] | {"kept": 0.9}, trials[2]])["settings"] == "c"


def test_an_attacked_run_is_judged_by_the_strongest_budgets_on_people_whom_the_attacker_was_not_taught():
    def cell(mean, steps, model="unlearned", **more):
        return AttackCell(model=model, set="forget", mean=mean, n=10, steps=steps, **more)

    cells = [
        *(cell(mean, 25 * (i + 1), attacker="visual", share=0.2) for i, mean in enumerate((0.3, 0.7))),
        cell(0.7, None, attacker="visual", share=0.2, variant=STRONGEST),
        cell(0.5, None, attacker="all", share=0.2, variant=STRONGEST),
        cell(0.9, None, attacker="all", share=0.5, variant=STRONGEST, taught=True),
        cell(1.0, None, model="vanilla", attacker="all", share=0.2, variant=STRONGEST),
        cell(0.1, None, variant=UNCHANGED),
    ]
    attacked = dataclasses.replace(results(8, 4), attacks={"relearn": AttackResults("", "", cells=tuple(cells))})
    assert comparison.judged(attacked) == {"forgot": 0.6, "kept": 1.0, "relearned": pytest.approx(0.6)}


def test_a_method_keeps_if_pictures_and_text_are_kept():
    before, sets = row("vanilla", 1.0, 1.0), Mllmu.EVAL_SETS
    assert comparison.keeps(row("m", 0.1, 0.95), before, sets)
    assert not comparison.keeps(row("m", 0.1, 0.94), before, sets)
    assert comparison.keeps(row("m", 0.1, 1.0, text=0.41), before, sets)  # within the interval of the vanilla model
    assert not comparison.keeps(row("m", 0.1, 1.0, text=0.39), before, sets)


def test_on_clear_a_method_that_destroys_other_people_and_the_world_does_not_keep():
    def clear(name, forget, others, **more):
        made = row(name, forget, 1.0, **more)
        cells = {
            f"{s.name}/vqa": made["sets"]["retain/vqa"] | dict.fromkeys(("mean", "low", "high"), others)
            for s in Clear.EVAL_SETS[2:]
        }
        made["sets"] = {k: v for k, v in made["sets"].items() if k != "real/vqa"} | cells
        return made

    made = found()
    made["rows"] = [clear("vanilla", 1.0, 1.0), clear("m", 0.1, 0.0, method="m", train="all")]
    made["meta"]["benchmark"]["sets"] = [to_json(s) | {"people": 2} for s in Clear.EVAL_SETS]
    assert not comparison.keeps(made["rows"][1], made["rows"][0], Clear.EVAL_SETS)
    table = tables.keeping(made)
    assert "| real faces VQA ↑ | real world VQA ↑ |" in table and "| no |" in table and "| yes |" not in table
    assert comparison_plots.pareto(made).startswith(b"\x89PNG")
    before = {s.name: {"vqa": summary(20, 20)} for s in Clear.EVAL_SETS}
    after = before | {s.name: {"vqa": summary(1, 20)} for s in Clear.EVAL_SETS[2:]}
    assert comparison.judged(run_results(before, after, Clear.EVAL_SETS))["kept"] == 0.05


def test_a_request_with_open_questions_is_judged_tabled_and_drawn():
    sets = [s for s in Folder.EVAL_SETS if s.name in ("forget", "retain")]
    before = {s.name: {"generation_vqa": summary(10, 10)} for s in sets}
    after = {"forget": {"generation_vqa": summary(3, 10)}, "retain": {"generation_vqa": summary(9, 10)}}
    assert comparison.judged(run_results(before, after, sets)) == {"forgot": 0.3, "kept": 0.9}
    cell = {"set": "forget", "attacker": "all", "share": 0.25, "unit": "questions", "variant": "", "taught": False}
    made = found(relearn=[cell | {"mean": 0.3, "n": 5, "seeds": 2}])
    for made_row in made["rows"]:
        made_row["sets"] = {f"{s.name}/generation_vqa": made_row["sets"][f"{s.name}/vqa"] for s in sets}
    made["meta"]["benchmark"]["sets"] = [to_json(s) | {"people": 0} for s in sets]
    assert "| forget VQA, open ↓ | retain VQA, open ↑ |" in tables.document(made)
    assert comparison_plots.pareto(made).startswith(b"\x89PNG")
    assert comparison_plots.relearning(made).startswith(b"\x89PNG")


@pytest.mark.parametrize(("shares", "shown"), [((0.25,), 0.25), ((0.05, 0.2, 0.5), 0.2)])
def test_recovery_is_shown_whatever_shares_were_taught(shares, shown):
    made = found()
    recovered = [{"attack": "relearn", "attacker": "all", "share": x, "recovery": x / 2} for x in shares]
    made["rows"][1]["runs"][0]["recovery"] = recovered
    table = tables.keeping(made)
    assert "| recovery, all ↓ | keeps |" in table and f"| {shown / 2:.2f} | yes |" in table
    assert (
        f"comes back when an attacker relearns {100 * shown:g} % of the forget questions, training all weights (all)."
        in table
    )


# ---- Intervals ----


def test_intervals_hold_what_questions_and_seeds_leave_open():
    nobody = [""] * 200
    sure = comparison.interval(np.ones((3, 50), bool), nobody[:50])
    assert sure == {"mean": 1.0, "low": 1.0, "high": 1.0, "n": 50, "people": 0, "seeds": 3}
    coin = np.arange(200)[None] % 2 == 0
    one = comparison.interval(coin, nobody)
    assert one["mean"] == 0.5 and abs(one["high"] - one["low"] - 2 * 1.96 * (0.25 / 200) ** 0.5) < 0.02
    same = comparison.interval(np.repeat(coin, 3, axis=0), nobody)  # seeds that agree say nothing of other questions
    assert abs(same["low"] - one["low"]) < 0.02
    seeds = comparison.interval(np.array([[True] * 200, [False] * 200]), nobody)  # and questions nothing of other seeds
    assert (seeds["low"], seeds["high"]) == (0.0, 1.0)
    two = comparison.interval([[True] * 100 + [False] * 100], ["a"] * 100 + ["b"] * 100)
    assert (two["low"], two["high"], two["people"]) == (0.0, 1.0, 2)  # of two people, one is known


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
    with pytest.raises(UserError, match="does not fit the config"):
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


def test_a_final_run_has_the_settings_of_the_best_trial(tiny, tmp_path):
    for number, (forget, real) in enumerate([(9, 20), (3, 20), (2, 10)]):
        folder = tmp_path / "tuning" / "npo" / str(number)
        folder.mkdir(parents=True)
        results(forget, forget, real=real).write(folder)
        add_records(folder)
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
        results(forget, forget).write(folder)
        add_records(folder)
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


# ---- Tables and pictures ----


def test_tables_by_hand():
    attack = [
        {"variant": "int4", "set": "test", "mean": 0.2, "low": 0.1, "high": 0.3, "n": 20, "seeds": 2},
        {"variant": "auc", "set": "forget", "mean": 0.5, "n": 20, "seeds": 2},
    ]
    made = found(quantize=attack)
    lines = tables.keeping(made).splitlines()
    assert (
        lines[3]
        == "| vkd | visual | 10.0 (0–20) | 96.0 (86–106) | 96.0 (86–106) | 50.0 (40–60) | 0.25 | yes | 12 | 1.0 |"
    )
    recovered = {"attack": "relearn", "attacker": "visual", "share": 0.2, "recovery": 0.125}
    made["rows"][1]["runs"][0]["recovery"].append(recovered)
    assert "| KS ↓ | recovery, visual ↓ | keeps |" in tables.keeping(made)
    assert "| 0.25 | 0.12 | yes |" in tables.keeping(made)
    assert "| quantize: int4; people to forget, other images or wordings | 20.0 (10–30) |" in tables.attacks(made)
    assert "| quantize: auc | 50.0 |" in tables.attacks(made)
    assert tables.tuning(made).splitlines()[2:] == [
        "| vkd | `train.steps=1` | 50.0 | 99.0 |  |",
        "| vkd | `train.steps=2` | 25.0 | 97.0 | chosen |",
        "| vkd | `train.steps=3` | failed | failed |  |",
    ]
    assert "c0ffee" in lines[-1] and "python -m x" in lines[-1]


def test_the_table_of_resistance_has_the_strongest_budgets_of_the_share_nearest_to_a_fifth():
    def cell(unit, steps, mean, share=0.2, attacker="visual", variant="strongest", **fields):
        known = {"steps": steps} if steps else {}
        return (
            dict(variant=variant, attacker=attacker, unit=unit, share=share, set="forget", mean=mean) | known | fields
        )

    made = found(
        relearn=[
            cell("questions", 25, 0.11),
            cell("questions", 400, 0.12),
            cell("questions", None, 0.13),
            cell("questions", 25, 0.14, share=0.5),
            cell("questions", 25, 0.15, set="test"),
            cell("questions", 25, 0.16, variant=""),
            cell("questions", 25, 0.17, attacker="all"),
            cell("people", 25, 0.18, share=0.5),
            cell("people", None, 0.19, share=0.5),
            cell("people", None, 0.21, share=0.5, taught=True),
        ],
        membership=[{"variant": "loss", "set": "", "mean": 0.55}, {"variant": "zlib", "set": "", "mean": 0.4}],
    )
    lines = tables.resisting(made).splitlines()
    assert lines[0].endswith(
        "| KS ↓ | AUC → 0.5 | all, 25 steps ↓ | visual, 25 steps ↓ | visual, 400 steps ↓ | visual, people ↓ |"
    )
    assert lines[-3].endswith("| 0.25 | 0.55 | 17.0 | 11.0 | 12.0 | 19.0 |")
    assert "relearned 20 % of the questions or 50 % of the people, at" in lines[-1]


def test_the_headline_leaves_out_text_and_the_retain_holdout():
    made = found()
    recovered = [{"attack": "relearn", "attacker": name, "share": 0.2, "recovery": 0.5} for name in ("visual", "all")]
    for made_row in made["rows"]:
        made_row["sets"]["test/vqa"] = made_row["sets"]["retain_test/vqa"] = made_row["sets"]["forget/vqa"]
        made_row["runs"][0]["recovery"] = recovered
    lines = tables.headline(made).splitlines()
    assert lines[0] == (
        "| method | trains | forget VQA ↓ | test VQA ↓ | retain VQA ↑ | real VQA ↑ "
        "| recovery, visual ↓ | recovery, all ↓ | keeps |"
    )
    assert lines[3] == "| vkd | visual | 10.0 (0–20) | 10.0 (0–20) | 96.0 (86–106) | 96.0 (86–106) | 0.50 | 0.50 | no |"
    for words in (
        *("(1 seed)", "forget VQA 20 about 2 people", "Chance is 25", "c0ffee", "`python -m x`"),
        "each of retain VQA; retain test VQA; real VQA, and",
    ):
        assert words in lines[-1], words


def test_pictures_are_drawn():
    cell = {"mean": 0.3, "attacker": "visual", "share": 0.2, "unit": "questions", "set": "forget", "seeds": 2}
    relearned = [cell | {"variant": ""}]
    assert comparison_plots.pareto(found()).startswith(b"\x89PNG")
    assert comparison_plots.relearning(found()) == b""
    assert comparison_plots.relearning(found(relearn=relearned)).startswith(b"\x89PNG")


# ---- A whole one ----


@pytest.fixture(scope="module")
def small(get_config, request_folders, tiny_folder):
    """Pruning with two trials on four people; only the vanilla model of tuning is trained."""
    config = get_config("tiny.py", "compare")
    config.data = defaults.benchmark("folder", forget=f"{request_folders}/forget", retain=f"{request_folders}/retain")
    config.model.update(path=str(tiny_folder), base=str(tiny_folder), retain_only="")
    config.finetune.train.update(steps=2, warmup_steps=1, batch_size=dict(image=4, text=2))
    manu = config.compare.entrants.manu
    manu.search = manu.search[:2]
    config.compare.entrants = {"manu": manu}
    config.compare.tuning = "model.path= eval.max_items=4"
    config.compare.seeds = (3,)
    config.attacks.names = "leak"
    return config


def test_a_whole_comparison_resumes(small, tmp_path, monkeypatch):
    out = sweep.run(small, tmp_path, workers=1)
    assert out["failures"] == {} and json.loads((tmp_path / "comparison.json").read_text()) == out
    assert out["meta"]["command"] == "called from Python: vkd_jax.runs.sweep.run"
    assert [r["name"] for r in out["rows"]] == ["vanilla", "manu"]
    assert len(out["rows"][1]["trials"]) == 2 and out["rows"][1]["runs"][0]["seed"] == 3
    assert "leak" in out["rows"][1]["attacks"]
    assert (tmp_path / "comparison.md").read_text().startswith("# Methods compared")
    assert (tmp_path / "pareto.png").exists() and "stages.py" in (tmp_path / "controls" / "log.txt").read_text()
    # The shared models were evaluated once; the run copied their answers.
    assert "evaluate vanilla" not in json.loads((tmp_path / "runs/manu/3/timing.json").read_text())
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("answers/*.jsonl")}
    assert sweep.run(small, tmp_path, workers=1) == out
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_failed_trial_is_reported_and_not_chosen(small, tmp_path):
    config = copy.deepcopy(small)
    config.compare.entrants.manu.search = ("model.unlearned=nowhere", "method.share=0.1")
    config.compare.entrants.manu.settings = "train.batch_size.forget=3"
    out = sweep.run(config, tmp_path, workers=1)
    assert list(out["failures"]) == ["tuning/manu/0"] and "model.unlearned" in out["failures"]["tuning/manu/0"]
    assert [("kept" in trial) for trial in out["rows"][1]["trials"]] == [False, True]


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
        ({"seeds": (1, 1)}, "Give each seed once"),
        ({"seeds": ()}, "compare.seeds: .* Give a nonempty tuple"),
        ({"tuning": "data.nosuch=1"}, "'data.nosuch=1' does not fit the config"),
        ({"entrants.vkd.settings": "method.nosuch=1"}, "'method.nosuch=1' does not fit the config"),
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


def test_a_workdir_that_is_a_file_is_refused(get_config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file; pass a folder"):
        sweep.run(get_config("tiny.py", "compare"), tmp_path / "file")
