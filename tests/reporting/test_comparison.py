"""Comparisons: which trial is best, what counts as keeping, intervals, tables and plots."""

import dataclasses

import numpy as np
import pytest
from compared import found, results, row, run_results, summary

from vkd_jax import benchmarks
from vkd_jax.benchmarks.clear import Clear
from vkd_jax.benchmarks.folder import Folder
from vkd_jax.benchmarks.mllmu import Mllmu
from vkd_jax.reporting import comparison, comparison_plots, tables
from vkd_jax.results import STRONGEST, UNCHANGED, AttackCell, AttackResults
from vkd_jax.runtime.dataclass_json import encode

# ---- Which trial is best ----


def test_a_run_is_judged_by_what_is_known_and_by_the_least_that_is_kept():
    assert comparison.tuning_measures(results(8, 4)) == {"forgot": 12 / 20, "kept": 1.0}
    assert comparison.tuning_measures(results(8, 4, real=18, retain=19)) == {"forgot": 0.6, "kept": 0.9}
    less_text = comparison.tuning_measures(results(8, 4, text=4))
    assert less_text["kept"] == 0.4  # of the ten that the vanilla model got right


def test_to_be_wrong_more_often_than_guessing_is_not_to_have_forgotten_more():
    below, at_chance = (comparison.tuning_measures(run)["forgot"] for run in (results(0, 1), results(2, 3)))
    assert below == at_chance == 0.25


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
    assert comparison.tuning_measures(attacked) == {"forgot": 0.6, "kept": 1.0, "relearned": pytest.approx(0.6)}


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
    made["meta"]["benchmark"]["sets"] = [encode(s) | {"people": 2} for s in Clear.EVAL_SETS]
    assert not comparison.keeps(made["rows"][1], made["rows"][0], Clear.EVAL_SETS)
    table = tables.keeping(made)
    assert "| real faces VQA ↑ | real world VQA ↑ |" in table and "| no |" in table and "| yes |" not in table
    assert comparison_plots.pareto(made).startswith(b"\x89PNG")
    before = {s.name: {"vqa": summary(20, 20)} for s in Clear.EVAL_SETS}
    after = before | {s.name: {"vqa": summary(1, 20)} for s in Clear.EVAL_SETS[2:]}
    assert comparison.tuning_measures(run_results(before, after, Clear.EVAL_SETS))["kept"] == 0.05


def test_a_request_with_open_questions_is_judged_tabled_and_drawn():
    sets = [s for s in Folder.EVAL_SETS if s.name in ("forget", "retain")]
    before = {s.name: {"generation_vqa": summary(10, 10)} for s in sets}
    after = {"forget": {"generation_vqa": summary(3, 10)}, "retain": {"generation_vqa": summary(9, 10)}}
    assert comparison.tuning_measures(run_results(before, after, sets)) == {"forgot": 0.3, "kept": 0.9}
    cell = {"set": "forget", "attacker": "all", "share": 0.25, "unit": "questions", "variant": "", "taught": False}
    made = found(relearn=[cell | {"mean": 0.3, "n": 5, "seeds": 2}])
    for made_row in made["rows"]:
        made_row["sets"] = {f"{s.name}/generation_vqa": made_row["sets"][f"{s.name}/vqa"] for s in sets}
    made["meta"]["benchmark"]["sets"] = [encode(s) | {"people": 0} for s in sets]
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
        membership=[dict(variant=v, set="", mean=m) for v, m in (("zlib", 0.4), ("loss", 0.55), ("grad_norm", 0.9))],
    )
    lines = tables.resisting(made).splitlines()
    scores = "AUC, loss → 0.5 | AUC, gradient → 0.5"
    assert f"| KS ↓ | {scores} | all, 25 steps ↓ | visual, 25 steps ↓ | visual, 400 steps ↓ | visual, p" in lines[0]
    assert lines[-3].endswith("| 0.25 | 0.55 | 0.90 | 17.0 | 11.0 | 12.0 | 19.0 |")
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


def test_text_about_the_people_to_forget_counts_as_forgotten_if_its_role_says_so():
    kinds = {"forget": ["vqa", "qa", "generation_qa"], "retain": ["vqa", "qa"], "real": ["vqa", "qa"]}
    visual, both = (benchmarks.eval_sets(Mllmu(), forgets_text) for forgets_text in (False, True))

    def found(choose, sets):
        return [f"{s.name}/{kind}" for s, kind in choose(sets, kinds)]

    assert found(comparison.forgotten_keys, visual) == ["forget/vqa"]
    assert found(comparison.kept_text_keys, visual) == ["forget/qa", "forget/generation_qa", "retain/qa"]
    assert found(comparison.forgotten_keys, both) == ["forget/vqa", "forget/qa", "forget/generation_qa"]
    assert found(comparison.kept_text_keys, both) == ["retain/qa"]
    assert [tables.names.heading(sets[0], "qa") for sets in (visual, both)] == ["forget QA ↑", "forget QA ↓"]
