"""Results of runs with figures by hand, which tests of the reports share."""

from vkd_jax import results as schema
from vkd_jax.reporting import report, view
from vkd_jax.results import AttackCell, AttackResults, MeasuredSet, RunResults, Summary

MODELS = ("vanilla", "unlearned", "retain_only")
SETS = (
    MeasuredSet("forget", "forget", "people to forget", "forget", people=2),
    MeasuredSet("retain", "retain", "people to retain", "retain", people=3),
    MeasuredSet("test", "forget_holdout", "people to forget, other images", "test", people=2),
)
INTERVALS = {  # Wilson intervals of correct answers to 20 questions
    0: (0.0, 0.161), 1: (0.009, 0.236), 2: (0.028, 0.301), 3: (0.052, 0.360), 4: (0.081, 0.416), 5: (0.112, 0.469),
    6: (0.145, 0.519), 8: (0.219, 0.613), 9: (0.258, 0.658), 11: (0.342, 0.742), 18: (0.699, 0.972), 19: (0.764, 0.991),
    20: (0.839, 1.0),
}  # fmt: skip


def summary(correct, n=20, **more):
    return Summary(correct / n, correct, n, *INTERVALS[correct], **more)


def meta_of(sets=SETS, config=(), title="A benchmark", source="a folder", **more):
    config = {"method": {"name": "vkd"}, "model": {"path": "mine"}, "eval": {"max_new_tokens": 8}} | dict(config)
    fields = dict(
        command="python -m vkd_jax.main",
        config=config,
        seed=7,
        commit="0123",
        versions={"jax": "0.10.2"},
        devices="1 x cpu",
        protocol="options",
        protocols=("options",),
        shots=0,
        date="2026-01-02",
        benchmark=schema.BenchmarkInfo(title, source, tuple(sets)),
    )
    return schema.Meta(**fields | more)


def results_with(models=MODELS, forget=(20, 2, 3), meta=None, attacks=(), people=0, **more):
    """Results of a run with one set to forget and one to retain, 20 questions of each."""
    counts = dict(zip(MODELS, forget, strict=True))
    fields = dict(
        meta=meta or meta_of(SETS[:2]),
        models={
            model: {"forget": {"vqa": summary(counts[model], people=people)}, "retain": {"vqa": summary(19)}}
            for model in models
        },
        utility={},
        forget_quality={},
        chance={"forget": {"vqa": 0.25}},
        timing={"data": 1.25, "unlearn": 30.0},
        attacks=dict(attacks),
        manifest=schema.Manifest(changed=9, tensors=80, language_model_changed=0),
    )
    return RunResults(**fields | more)


def run_of(results=None, answers=None, **more):
    return view.Run(results or results_with(), answers or {}, **more)


def shown(name, run):
    return report.render_section(name, view.SECTIONS[name](run))


TWO = ("vanilla", "unlearned")


def attempt(correct, variant="", attacker=None, share=None, set_name="forget", **more):
    """The cells of the three models, from correct answers to 20 questions."""
    recovery = (None, 0.25, -0.1) if attacker else (None,) * 3
    return tuple(
        AttackCell(
            *(model, set_name, n / 20, 20, *INTERVALS[n]),
            **dict(variant=variant, correct=n, attacker=attacker, share=share, recovery=x) | more,
        )
        for model, n, x in zip(MODELS, correct, recovery, strict=True)
    )


RELEARN = AttackResults(
    title="Relearning: again",
    about="Some of it is taught *again*.",
    variants={"unchanged": "before"},
    cells=(
        *attempt((20, 2, 3), "unchanged"),
        *attempt((20, 8, 4), "", "visual", 0.2),
        *attempt((19, 19, 19), "", "visual", 0.2, "test"),
        *attempt((20, 20, 20), "", "visual", 0.2, "test", taught=True, unit="people"),
        *attempt((20, 5, 3), "", "all", 0.05),
        *attempt((20, 9, 6), "", "all", 0.2),
        *attempt((20, 18, 9), "", "all", 0.5),
    ),
)
MEMBERSHIP = AttackResults(
    title="Membership: who?",
    about="Scores are compared.",
    metric="auc",
    cells=(
        AttackCell("vanilla", "", 1.0, 20, 0.999, 1.0, variant="loss"),
        AttackCell("unlearned", "", 0.534, 20, 0.476, 0.58, variant="loss"),
    ),
)
PROMPTS = AttackResults(
    title="Prompts",
    about="About.",
    variants={"role": "role play"},
    cells=(
        *attempt((20, 2, 3), "unchanged"),
        *attempt((20, 4, 3), "role"),
        *attempt((20, 3, 3), "prefix"),
        *attempt((20, 20, 20), "prefix", set_name="test"),
    ),
)


def attacks_of(models=MODELS, plots=(), **attacks):
    run = run_of(results_with(meta=meta_of(), models=models, attacks=attacks), plots=frozenset(plots))
    return shown("attacks", run)
