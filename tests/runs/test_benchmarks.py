"""A run, from the vanilla model to the report, on the synthetic people in the layout of a published benchmark."""

import pytest

from vkd_jax.runs import pipeline


@pytest.mark.slow
def test_the_published_metrics_reach_the_report(get_config, tiny_folder, tmp_path):
    config = get_config("tiny.py", "benchmark=fiubench,method=grad_diff")
    config.model.update(path=str(tiny_folder), base="", retain_only="")
    config.data.update(n_people=20, rules="upstream")
    config.eval.update(max_items=4, batch_size=16, max_new_tokens=2)
    config.train.update(batch_size=dict(forget=2, retain=2), steps=1, warmup_steps=0, log_every=1, checkpoint_every=2)
    results = pipeline.run(config, tmp_path / "run")
    assert results.meta.benchmark.title == "FIUBench, forgetting 10 %, rules of its own code"
    figures = results.models["unlearned"]
    assert {"em", "truth_ratio_forget"} <= set(figures["forget"]["generation_vqa"].metrics)
    assert {"em", "probability_retain"} <= set(figures["retain"]["generation_vqa"].metrics)
    page = (tmp_path / "run" / "report.md").read_text()
    for words in ("APE (FIUBench)", "keyword EM (FIUBench)", "people to forget, paraphrased questions"):
        assert words in page


@pytest.mark.slow
def test_some_facts_are_forgotten_and_the_report_says_what_stays(get_config, tiny_folder, tmp_path):
    config = get_config("tiny.py", "facts=some,method=grad_diff,forgets=both")
    config.model.update(path=str(tiny_folder), base="")
    config.data.update(n_people=20)
    config.eval.update(max_items=4, batch_size=16, max_new_tokens=2)
    rows = dict(forget=2, retain=2, other_facts=2, forget_text=2, text=2)
    config.train.update(batch_size=rows, steps=1, warmup_steps=0, log_every=1, checkpoint_every=2)
    results = pipeline.run(config, tmp_path / "run")
    assert {"other_facts", "other_facts_test"} < set(results.models["unlearned"])
    page = (tmp_path / "run" / "report.md").read_text()
    for words in (
        "**It was asked to forget some facts (`job, pet`) about 2 of them, and to keep the other facts about the same",
        "Facts to forget: `job, pet`.",
        "other facts about the people to forget, other images or wordings",
    ):
        assert words in page
    assert ("**The other facts about the same people" in page) and ("\n\n\n" not in page)
    assert "made to forget facts about 2 people" in (tmp_path / "run" / "unlearned" / "README.md").read_text()
    assert '"other_facts_ce"' in (tmp_path / "run" / "train" / "metrics.jsonl").read_text()


@pytest.mark.slow
def test_prompt_decouple_trains_and_the_figures_of_safeeraser_reach_the_report(get_config, tiny_folder, tmp_path):
    config = get_config("tiny.py", "benchmark=safeeraser,method=idk")
    config.model.update(path=str(tiny_folder), base="", retain_only="")
    config.data.update(n_people=20)
    config.eval.update(max_items=4, batch_size=16, max_new_tokens=2)
    config.method.decouple.weight = 1.0
    rows = dict(forget=2, retain=2, decouple=2)
    config.train.update(batch_size=rows, steps=1, warmup_steps=0, log_every=1, checkpoint_every=2)
    results = pipeline.run(config, tmp_path / "run")
    figures = results.models["unlearned"]
    for set_name, name in (
        ("forget", "rr"),
        ("test", "rr"),
        ("harmless_test", "sarr"),
        ("retain", "rouge_l_precision"),
    ):
        assert name in figures[set_name]["generation_vqa"].metrics
    assert "rouge_l_precision" in figures["retain"]["generation_qa"].metrics
    page = (tmp_path / "run" / "report.md").read_text()
    for words in ("refusal rate by phrases (SafeEraser)", "SARR by phrases (SafeEraser)", "unsafe images"):
        assert words in page
    assert '"decouple_ce"' in (tmp_path / "run" / "train" / "metrics.jsonl").read_text()
