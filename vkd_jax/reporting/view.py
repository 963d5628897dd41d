"""View model of the reports: one function per section, from a finished run to the values that its template shows.

Texts are in `templates/`. Figures come from results.json, and titles of sets from the benchmark that declares them. The
first sections are in `brief_view`.
"""

import json
from typing import Any

from vkd_jax import messages
from vkd_jax.evaluation import metrics
from vkd_jax.evaluation.metrics.base import Metric
from vkd_jax.evaluation.metrics.judge import is_graded
from vkd_jax.evaluation.metrics.suites import SuiteMetric
from vkd_jax.reporting import attack_view
from vkd_jax.reporting.attack_view import interval, percent
from vkd_jax.reporting.brief_view import basis, forgotten, kept, opening, recovered, text_only, without_letter, words
from vkd_jax.reporting.finished_run import KINDS, Run
from vkd_jax.reporting.names import MODELS
from vkd_jax.results import Figure, Summary
from vkd_jax.types import Role

ASSUMPTIONS = {  # what the abstract of the paper leaves open
    "A1": "the distance between features",
    "A2": "how the output is made to forget",
    "A3": "the target of the features of a forgotten image",
    "A4": "the teacher of the retain set",
    "A5": "which features are compared",
    "A6": "what the saliency mask covers",
    "A7": "which visual weights train",
    "A8": "whether augmented copies of the images are trained on",
}
MOST_NAMED = 5  # people in the table of those who are named most often


# ---- Sections ----


def measured(run: Run) -> dict[str, Any]:
    """Benchmark, evaluation sets, numbers of people and questions, protocols."""
    kinds = run.kinds
    rows = []
    for eval_set in run.results.sets:
        summaries = run.models["vanilla"].get(eval_set.name, {})
        counts = [summaries[kind].n if kind in summaries else "–" for kind in kinds]
        rows.append([eval_set.title, eval_set.people or "–", *counts])
    chosen = any(kind.startswith(("vqa", "qa")) for kind in kinds)
    letters = {model: without_letter(run, model) for model in run.models}
    return {
        **_data(run),
        "heads": ["questions about", "people", *(_kind_title(kind) for kind in kinds)],
        "rows": rows,
        "protocols": run.meta.protocols if chosen else [],
        "tasks": {kind.rpartition("_")[0] for kind in kinds},
        "shots": run.meta.shots,
        "max_new_tokens": run.meta.config["eval"]["max_new_tokens"],
        **_judge(run),
        "letters": [{"model": MODELS[model], **item} for model, item in letters.items() if item and item["without"]],
    }


def _judge(run: Run) -> dict[str, Any]:
    """The name of the judge, "" without one, and how many answers it was asked to grade and graded."""
    options = run.meta.config["eval"]
    replies = [record for records in run.answers.values() for record in records if "judge_reply" in record]
    return {
        "judge": options.get("judge_model") or options.get("judge") or "",
        "judge_prompts": options.get("judge_prompts"),
        "asked": len(replies),
        "graded": sum(map(is_graded, replies)),
    }


def accuracy(run: Run) -> dict[str, Any]:
    """One table for each kind of question."""
    kinds = []
    for kind in run.kinds:
        rows = []
        for eval_set in run.sets_with(kind):
            cells = {name: run.results.summary(name, eval_set.name, kind) for name in run.models}
            change = _change_in_points(cells["vanilla"], cells["unlearned"])
            rows.append([eval_set.title, *(_accuracy_cell(cell) for cell in cells.values()), change])
        heads = ["questions about", *_model_titles(run), "change (points)"]
        kinds.append({"title": KINDS.get(kind, kind), "heads": heads, "rows": rows})
    chance = any(run.results.chance.get(s.name) for s in run.results.with_role(Role.FORGET))
    return {"kinds": kinds, "has_chance": chance, "has_retain_only": "retain_only" in run.models}


def text_metrics(run: Run) -> dict[str, Any] | None:
    """Metrics of open answers, and those of a task beside its accuracy; None without any."""
    tables = []
    reported = [metric for metric in map(metrics.get, metrics.METRICS) if metric.item and metric.in_report]
    for kind in run.kinds:
        task = next((name for name in ("generation", "cloze") if kind.startswith(name)), "classification")
        for metric in (metric for metric in reported if task == "generation" or task in metric.tasks):
            rows = []
            for eval_set in run.sets_with(kind):
                summaries = [run.results.summary(name, eval_set.name, kind) for name in run.models]
                if metric.name in summaries[0].metrics:
                    figures = [summary.metrics.get(metric.name) if summary else None for summary in summaries]
                    cells = [_mean_cell(figure, metric.unit) for figure in figures]
                    rows.append([eval_set.title, summaries[0].n, *cells])
            if rows:
                heads = ["questions about", "questions", *_model_titles(run)]
                tables.append({"metric": metric.title, "kind": _kind_title(kind), "heads": heads, "rows": rows})
    if not tables:
        return None
    return {"metrics": list(dict.fromkeys(table["metric"] for table in tables)), "tables": tables}


def general(run: Run) -> dict[str, Any] | None:
    """The published metrics of the standard suites of general ability; None if none was asked."""
    rows: list[list[Any]] = []
    notes: dict[tuple[str, str, str], dict[str, None]] = {}  # titles of metrics by suites, rule and note
    for eval_set in run.sets_with("suite_vqa"):
        summaries = [run.results.summary(name, eval_set.name, "suite_vqa") for name in run.models]
        for metric in (metric for metric in map(metrics.get, summaries[0].metrics) if isinstance(metric, SuiteMetric)):
            figures = [summary.metrics.get(metric.name) if summary else None for summary in summaries]
            rule, count = "upstream" if metric.upstream else "ours", figures[0].n
            title = f"{metric.title} {metric.arrow()}"
            rows.append([eval_set.title, title, rule, count, *(_suite_cell(metric, figure) for figure in figures)])
            notes.setdefault((", ".join(metric.suites), rule, metric.note), {})[metric.title] = None
    if not rows:
        return None
    return {
        "heads": ["suite", "metric", "rule", "n", *_model_titles(run)],
        "rows": rows,
        "notes": [(suites, ", ".join(titles), rule, note) for (suites, rule, note), titles in notes.items()],
        "source": run.meta.config["eval"].get("general_source", ""),
    }


def quality(run: Run) -> dict[str, Any]:
    """Forget quality and model utility."""
    quality_rows = [
        [
            *(MODELS[name], _kind_title(kind), test.n, test.people or "–"),
            f"{test.ks:.3f}" + ("" if test.low is None else f" ({test.low:.3f} to {test.high:.3f})"),
            f"{test.p:.2g}",
            "–" if test.p_questions is None else f"{test.p_questions:.2g}",
            f"{test.js:.3f}",
        ]
        for name in run.models
        for kind, test in run.results.forget_quality.get(name, {}).items()
    ]
    utility_rows = [
        [MODELS[name], f"{value.value:.3f} ({value.low:.3f} to {value.high:.3f})", len(value.components)]
        for name in run.models
        if (value := run.results.utility.get(name))
    ]
    return {
        "has_retain_only": "retain_only" in run.models,
        "quality_heads": [
            *("model", "questions", "n", "people", "KS statistic"),
            *("p-value, people", "p-value, questions", "JS divergence"),
        ],
        "quality": quality_rows,
        "utility_heads": ["model", "utility", "components"],
        "utility": utility_rows,
    }


def confusions(run: Run) -> dict[str, Any] | None:
    """Confusions of forgotten with retained people, and retained people by similarity; None if the data names none."""
    counts = {name: count for name in run.models if (count := run.results.confusions.get(name))}
    if not counts:
        return None
    titles = [MODELS[name] for name in counts]
    unlearned = counts.get("unlearned", next(iter(counts.values())))
    people = list(unlearned.people)[:MOST_NAMED]
    lines = {
        "correct": [c.correct for c in counts.values()],
        "true of one retained person": [c.one for c in counts.values()],
        "true of several retained people": [c.several for c in counts.values()],
        "other": [c.n - c.correct - c.one - c.several for c in counts.values()],
        "all": [c.n for c in counts.values()],
    }
    groups = run.results.similarity_groups
    return {
        "heads": ["answers", *titles],
        "rows": [[name, *values] for name, values in lines.items()],
        "n": unlearned.n,
        "most": {"person": people[0], "count": unlearned.people[people[0]]} if people else None,
        "people_heads": ["retained person", *titles],
        "people": [[person, *(c.people.get(person, 0) for c in counts.values())] for person in people],
        "group_heads": ["similarity", "people", *_model_titles(run)],
        "groups": [
            [
                f"{group.low:.2f} to {group.high:.2f}",
                group.people,
                *(_share_cell(group.accuracy.get(name)) for name in run.models),
            ]
            for group in groups
        ],
    }


def attacks(run: Run) -> dict[str, Any] | None:
    """One table for each attack; None without any."""
    tables = attack_view.tables(run.results, run.models, run.plots)
    return {"attacks": tables, "has_retain_only": "retain_only" in run.models} if tables else None


def portraits(run: Run) -> dict[str, Any] | None:
    """The sheet of portraits; None without one."""
    return {} if "portraits" in run.plots else None


def evidence(run: Run) -> dict[str, Any]:
    """Command, commit, data, versions, and the tensors that changed on disk."""
    meta, manifest, trainable = run.meta, run.results.manifest, run.results.trainable
    summaries = run.models["vanilla"].values()
    return {
        **_data(run),
        "command": meta.command,
        "commit": meta.commit,
        "seed": meta.seed,
        "date": meta.date,
        "devices": meta.devices,
        "versions": meta.versions,
        "protocol": meta.protocol,
        "forget_people": run.people(Role.FORGET),
        "retain_people": run.people(Role.RETAIN),
        "questions": sum(summary.n for kinds in summaries for summary in kinds.values()),
        "trainable": trainable
        and {
            "parameters": f"{trainable.parameters:,}",
            "of": f"{trainable.of:,}",
            "share": trainable.parameters / trainable.of,
        },
        "changed": manifest.changed,
        "tensors": manifest.tensors,
        "language_model_changed": manifest.language_model_changed,
        "text_logits_identical": run.results.text_logits_identical,
    }


def training(run: Run) -> dict[str, Any]:
    """Losses and the seconds of each stage."""
    timing = run.results.timing
    rows = [[stage, f"{seconds:.1f}"] for stage, seconds in timing.items()]
    return {"losses": "losses" in run.plots, "rows": [*rows, ["all stages", f"{sum(timing.values()):.1f}"]]}


def limits(run: Run) -> dict[str, Any]:
    """Limits of the results."""
    reconstruction = run.meta.config["method"]["name"] == "vkd" and not run.audit
    return {"reconstruction": reconstruction, "assumptions": ASSUMPTIONS}


def config(run: Run) -> dict[str, Any]:
    """The resolved config."""
    text = json.dumps(run.meta.config, indent=2, ensure_ascii=False)
    return {"config": messages.escaped(text, keep="\n")}


SECTIONS = {  # templates/<name>.md.j2
    section.__name__: section
    for section in (
        opening,
        words,
        forgotten,
        kept,
        text_only,
        recovered,
        basis,
        measured,
        accuracy,
        text_metrics,
        general,
        quality,
        confusions,
        attacks,
        portraits,
        evidence,
        training,
        limits,
        config,
    )
}


# ---- Shared by sections ----


def _data(run: Run) -> dict[str, Any]:
    return {"benchmark": run.meta.benchmark.title, "source": run.meta.benchmark.source}


def _model_titles(run: Run) -> list[str]:
    return [MODELS[name] for name in run.models]


def _kind_title(kind: str) -> str:
    title = KINDS.get(kind, kind)
    return title[:1].lower() + title[1:]


def _accuracy_cell(summary: Summary | None) -> str:
    if not summary:
        return "–"
    return f"{percent(summary.accuracy)} ({summary.correct}/{summary.n}), {interval(summary)}"


def _change_in_points(vanilla: Summary, unlearned: Summary | None) -> str:
    return f"{100 * (unlearned.accuracy - vanilla.accuracy):+.1f}" if unlearned else "–"


def _share_cell(figure: Figure | None) -> str:
    return f"{percent(figure.mean)}, {interval(figure)}" if figure else "–"


def _mean_cell(figure: Figure | None, unit: str = "") -> str:
    if figure is None:
        return "–"
    if unit == "%":
        return f"{100 * figure.mean:.1f} % ({100 * figure.low:.1f} to {100 * figure.high:.1f})"
    return f"{figure.mean:.3f} ({figure.low:.3f} to {figure.high:.3f})"


def _suite_cell(metric: Metric, figure: Figure | None) -> str:
    """A figure of a suite, in percent if the metric is a share."""
    if not figure:
        return "–"
    if metric.unit == "%":
        return _share_cell(figure)
    return f"{figure.mean:.1f} ({figure.low:.1f} to {figure.high:.1f})"
