"""What a comparison finds, made up by hand: results of runs and rows of tables."""

from vkd_jax.benchmarks.mllmu import Mllmu
from vkd_jax.results import BenchmarkInfo, MeasuredSet, Meta, RunResults, Summary, Utility
from vkd_jax.runtime.dataclass_json import encode


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
    sets = [encode(s) | {"people": 2} for s in Mllmu.EVAL_SETS]
    meta |= {"benchmark": {"title": "B", "source": "S", "sets": sets}}
    meta |= {"attacks": {name: {"title": name, "metric": "accuracy", "variants": {}} for name in attacks}}
    return {"meta": meta, "failures": {}, "rows": rows}
