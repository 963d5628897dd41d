"""View model of report.md: one function a section, from a finished run to the values that its template shows.

Words are in `templates/`, figures come from results.json, and the titles of sets from the benchmark that declared them.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vkd_jax.evaluation import metrics
from vkd_jax.reporting.plots import ATTACKERS, MODELS

KINDS = {
    "vqa": "Multiple choice, with image",
    "qa": "Multiple choice, text only",
    "vqa_letter": "Multiple choice by letter, with image",
    "qa_letter": "Multiple choice by letter, text only",
    "vqa_options": "Multiple choice by probability, with image",
    "qa_options": "Multiple choice by probability, text only",
    "cloze_vqa": "Fill in the blank, with image",
    "cloze_qa": "Fill in the blank, text only",
    "generation_vqa": "Open answer, with image",
    "generation_qa": "Open answer, text only",
}
TEXT_METRICS = {
    "rouge_l": "ROUGE-L (F)",
    "rouge_l_recall": "ROUGE-L (recall)",
    "bleu": "BLEU",
    "probability": "probability of the answer, per token",
}
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
MODALITIES = {"vqa": "with image", "qa": "text only"}
FORGET, RETAIN = ("forget", "forget_holdout"), ("retain", "retain_holdout")
FOLDED_ABOVE = 8  # rows of an attack's table
RELEARN_SHARE = 0.2  # of the forget set; the attack nearest to it is in the brief


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run, as the sections read it.

    Args:
        results: what is in results.json.
        sets: the evaluation sets in the order of the report, each with `name`, `role`, `title` and `short`.
        answers: the records of each evaluated model.
        plots: names of the plots that were drawn, e.g. "losses".
        provenance: of the vanilla model, where its folder has it.
    """

    results: Mapping[str, Any]
    sets: Sequence[Any]
    answers: Mapping[str, Sequence[Mapping]]
    plots: frozenset[str] = frozenset()
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def meta(self) -> Mapping[str, Any]:
        """Provenance of the run, with its config."""
        return self.results["meta"]

    @property
    def audit(self) -> bool:
        """Whether the unlearned model was made elsewhere."""
        return self.meta["config"].get("stage") == "audit"

    @property
    def models(self) -> dict[str, Mapping]:
        """Summaries of the evaluated models, vanilla first."""
        return {name: self.results["models"][name] for name in MODELS if name in self.results["models"]}

    @property
    def kinds(self) -> list[str]:
        """Kinds of question that were asked, in the order of the report."""
        asked = {kind for summaries in self.models["vanilla"].values() for kind in summaries}
        return [*(kind for kind in KINDS if kind in asked), *sorted(asked - KINDS.keys())]

    def sets_with(self, kind: str) -> list[Any]:
        """Sets with questions of a kind."""
        return [s for s in self.sets if kind in self.models["vanilla"].get(s.name, {})]

    def set_of(self, role: str) -> Any | None:
        """The first set of a role; None without one."""
        return next((s for s in self.sets if s.role == role), None)

    def people(self, role: str) -> int:
        """Number of people of the set of a role; 0 if the data names none."""
        eval_set = self.set_of(role)
        return (eval_set and self.meta["benchmark"]["people"].get(eval_set.name)) or 0


# ---- Sections ----


def opening(run: Run) -> dict[str, Any]:
    """Terms, and the results in brief."""
    config, manifest = run.meta["config"], run.results["manifest"]
    return {
        "audit": run.audit,
        "method": config["method"]["name"],
        "has_retain_only": "retain_only" in run.models,
        "by_person": "people" in _main_summary(run, "unlearned"),
        "forget_people": run.people("forget"),
        "retain_people": run.people("retain"),
        "vanilla": _vanilla(run),
        "forgotten": _changes(run, "vqa", FORGET),
        "kept": _changes(run, "vqa", (*RETAIN, "general")),
        "told": _changes(run, "qa", ("forget", "retain")),
        **_judgement(run),
        "language_model_unchanged": manifest["language_model_changed"] == 0,
        "attacked": bool(run.results.get("attacks")),
        "relearned": relearned(run),
        "changed": manifest["changed"],
        "tensors": manifest["tensors"],
    }


def measured(run: Run) -> dict[str, Any]:
    """Benchmark, sets, numbers of people and questions, protocols."""
    kinds, people = run.kinds, run.meta["benchmark"]["people"]
    rows = []
    for eval_set in run.sets:
        summaries = run.models["vanilla"].get(eval_set.name, {})
        counts = [summaries[kind]["n"] if kind in summaries else "–" for kind in kinds]
        rows.append([eval_set.title, people.get(eval_set.name) or "–", *counts])
    chosen = any(kind.startswith(("vqa", "qa")) for kind in kinds)
    letters = {model: without_letter(run, model) for model in run.models}
    return {
        **_data(run),
        "heads": ["questions about", "people", *(_kind_title(kind) for kind in kinds)],
        "rows": rows,
        "protocols": run.meta["protocols"] if chosen else [],
        "tasks": {kind.rpartition("_")[0] for kind in kinds},
        "shots": run.meta["shots"],
        "max_new_tokens": run.meta["config"]["eval"]["max_new_tokens"],
        "letters": [{"model": MODELS[model], **item} for model, item in letters.items() if item and item["without"]],
    }


def accuracy(run: Run) -> dict[str, Any]:
    """One table for each kind of question."""
    kinds = []
    for kind in run.kinds:
        rows = []
        for eval_set in run.sets_with(kind):
            cells = {name: summaries.get(eval_set.name, {}).get(kind) for name, summaries in run.models.items()}
            change = _change_in_points(cells["vanilla"], cells["unlearned"])
            rows.append([eval_set.title, *(_accuracy_cell(cell) for cell in cells.values()), change])
        heads = ["questions about", *_model_titles(run), "change (points)"]
        kinds.append({"title": KINDS.get(kind, kind), "heads": heads, "rows": rows})
    return {"kinds": kinds, "has_retain_only": "retain_only" in run.models}


def text_metrics(run: Run) -> dict[str, Any] | None:
    """How close written answers come to the true ones; None if nothing was written."""
    tables = []
    for kind in (kind for kind in run.kinds if kind.startswith("generation")):
        for metric, title in TEXT_METRICS.items():
            rows = []
            for eval_set in run.sets_with(kind):
                summaries = [run.models[name].get(eval_set.name, {}).get(kind, {}) for name in run.models]
                if metric in summaries[0]:
                    cells = [_mean_cell(summary.get(metric)) for summary in summaries]
                    rows.append([eval_set.title, summaries[0]["n"], *cells])
            if rows:
                heads = ["questions about", "questions", *_model_titles(run)]
                tables.append({"metric": title, "kind": _kind_title(kind), "heads": heads, "rows": rows})
    if not tables:
        return None
    return {"metrics": list(dict.fromkeys(table["metric"] for table in tables)), "tables": tables}


def quality(run: Run) -> dict[str, Any]:
    """Forget quality and model utility."""
    quality_rows = [
        [MODELS[name], _kind_title(kind), test["n"], f"{test['ks']:.3f}", f"{test['p']:.2g}", f"{test['js']:.3f}"]
        for name in run.models
        for kind, test in run.results.get("forget_quality", {}).get(name, {}).items()
    ]
    utility = {name: run.results.get("utility", {}).get(name) for name in run.models}
    utility_rows = [
        [MODELS[name], _mean_cell({"mean": value["value"], **value}), len(value["components"])]
        for name, value in utility.items()
        if value
    ]
    return {
        "has_retain_only": "retain_only" in run.models,
        "quality_heads": ["model", "questions", "n", "KS statistic", "p-value", "JS divergence"],
        "quality": quality_rows,
        "utility_heads": ["model", "utility", "components"],
        "utility": utility_rows,
    }


def attacks(run: Run) -> dict[str, Any] | None:
    """One table for each attack; None without any."""
    tables = []
    for name, attack in (run.results.get("attacks") or {}).items():
        rows = [
            [variant, *(_attack_cell(cells.get(model), attack["unit"]) for model in run.models)]
            for variant, cells in attack["summary"].items()
        ]
        plot = {"relearn": "relearning"}.get(name)
        tables.append(
            {
                "name": name,
                "title": attack["title"],
                "about": attack["about"],
                "plot": plot if plot in run.plots else None,
                "heads": ["variant", *_model_titles(run)],
                "rows": rows,
                "folded": len(rows) > FOLDED_ABOVE,
            }
        )
    return {"attacks": tables, "has_retain_only": "retain_only" in run.models} if tables else None


def portraits(run: Run) -> dict[str, Any] | None:
    """The sheet of portraits, which is drawn for every run."""
    return {} if "portraits" in run.plots else None


def evidence(run: Run) -> dict[str, Any]:
    """Command, commit, data, versions, and what changed on disk."""
    meta, manifest, trainable = run.meta, run.results["manifest"], run.results.get("trainable")
    if trainable:
        count, total = trainable["parameters"], trainable["of"]
        trainable = {"parameters": f"{count:,}", "of": f"{total:,}", "share": count / total}
    summaries = run.models["vanilla"].values()
    return {
        **_data(run),
        "command": meta["command"],
        "commit": meta["commit"],
        "seed": meta["seed"],
        "date": meta.get("date"),
        "devices": meta.get("devices", "unknown"),
        "versions": meta["versions"],
        "protocol": meta["protocol"],
        "forget_people": run.people("forget"),
        "retain_people": run.people("retain"),
        "questions": sum(summary["n"] for kinds in summaries for summary in kinds.values()),
        "trainable": trainable,
        "changed": manifest["changed"],
        "tensors": manifest["tensors"],
        "language_model_changed": manifest["language_model_changed"],
        "text_logits_identical": run.results.get("text_logits_identical"),
    }


def training(run: Run) -> dict[str, Any]:
    """Losses and the seconds of each stage."""
    timing = run.results["timing"]
    rows = [[stage, f"{seconds:.1f}"] for stage, seconds in timing.items()]
    return {"losses": "losses" in run.plots, "rows": [*rows, ["all stages", f"{sum(timing.values()):.1f}"]]}


def limits(run: Run) -> dict[str, Any]:
    """What the report does not show."""
    reconstruction = run.meta["config"]["method"]["name"] == "vkd" and not run.audit
    return {"reconstruction": reconstruction, "assumptions": ASSUMPTIONS}


def config(run: Run) -> dict[str, Any]:
    """The resolved config."""
    return {"config": json.dumps(run.meta["config"], indent=2, ensure_ascii=False)}


SECTIONS = {  # templates/<name>.md.j2
    section.__name__: section
    for section in (
        opening,
        measured,
        accuracy,
        text_metrics,
        quality,
        attacks,
        portraits,
        evidence,
        training,
        limits,
        config,
    )
}


# ---- What sections share ----


def main_kind(summaries: Mapping, modality: str) -> str | None:
    """The kind of question that tells most: multiple choice, or else what was asked; None if nothing was."""
    return next((kind for kind in (modality, f"generation_{modality}", f"cloze_{modality}") if kind in summaries), None)


def compare(unlearned: Mapping, low: float, high: float) -> str:
    """ "below", "equal" (the intervals overlap) or "above" another interval."""
    if unlearned["high"] < low:
        return "below"
    return "above" if unlearned["low"] > high else "equal"


def without_letter(run: Run, model: str) -> dict[str, Any] | None:
    """How many answers of a model to forget questions with images name no option letter; None without the protocol."""
    forget = run.set_of("forget")
    texts = [
        record
        for record in run.answers.get(model, ())
        if forget and (record["set"], record["modality"], record.get("protocol")) == (forget.name, "vqa", "letter")
    ]
    if not texts:
        return None
    count = sum(metrics.first_letter(record["prediction"], len(record["options"])) is None for record in texts)
    return {"without": count, "n": len(texts), "share": count / len(texts)}


def relearned(run: Run) -> dict[str, Any] | None:
    """The strongest attacker with a fifth of the forget set, or the nearest share; None if nothing was relearned."""
    forget = run.set_of("forget")
    summary = run.results.get("attacks", {}).get("relearn", {}).get("summary", {})
    cells = [row for row in summary.values() if forget and row.get("unlearned", {}).get("set") == forget.name]
    cells = [row for row in cells if "share" in row["unlearned"]]
    if not cells:
        return None
    row = min(cells, key=lambda row: (abs(row["unlearned"]["share"] - RELEARN_SHARE), -row["unlearned"]["mean"]))
    attacker, share = (row["unlearned"][key] for key in ("attacker", "share"))
    return {
        "trained": ATTACKERS.get(attacker, attacker),
        "share": f"{100 * share:g}",
        "unlearned": row["unlearned"],
        "retain_only": row.get("retain_only"),
    }


def _judgement(run: Run) -> dict[str, Any]:
    """How the unlearned model's accuracy on the forget set compares with the retain-only model's, or with chance."""
    forget = run.set_of("forget")
    kind = main_kind(run.models["vanilla"][forget.name], "vqa")
    vanilla, unlearned = (run.models[name][forget.name][kind] for name in ("vanilla", "unlearned"))
    retain_only = run.models.get("retain_only", {}).get(forget.name, {}).get(kind)
    chance = run.results["chance"].get(forget.name, {}).get(kind)
    reference, verdict = None, None
    if retain_only:
        reference = f"the retain-only model ({percent(retain_only['accuracy'])}, {interval(retain_only)})"
        verdict = compare(unlearned, retain_only["low"], retain_only["high"])
    elif chance is not None:
        reference, verdict = "chance", compare(unlearned, chance, chance)
    letters = without_letter(run, "vanilla") if run.meta["protocols"][0] == "letter" else None
    return {
        "chance": chance,
        "reference": reference,
        "below_chance": chance is not None and bool(retain_only) and retain_only["high"] < chance,
        "verdict": verdict,
        "never_learned": chance is not None and vanilla["low"] <= chance,
        "letters": letters if letters and letters["share"] > 0.5 else None,
    }


def _vanilla(run: Run) -> dict[str, Any]:
    """What the vanilla model was trained on, as far as the run knows."""
    model, stage = run.meta["config"].get("model", {}), run.meta["config"].get("stage")
    people = run.people("forget") + run.people("retain")
    if stage == "all":
        return {"known": True, "base": model.get("base") or "a new model", "path": "", "people": people}
    base, path = run.provenance.get("config", {}).get("model", {}).get("base"), model.get("path", "a model")
    known = bool(base) and not run.provenance.get("without")
    return {"known": known, "base": base, "path": path, "people": people}


def _changes(run: Run, modality: str, roles: Iterable[str]) -> list[dict[str, Any]]:
    """The main accuracy of the vanilla and the unlearned model on each set of some roles."""
    changes = []
    for eval_set in (s for role in roles for s in run.sets if s.role == role):
        summaries = [run.models[name].get(eval_set.name, {}) for name in ("vanilla", "unlearned")]
        kind = main_kind(summaries[0], modality)
        if kind and kind in summaries[1]:
            title = eval_set.title[:1].upper() + eval_set.title[1:]
            changes.append(
                {
                    "title": title,
                    "modality": MODALITIES[modality],
                    "vanilla": summaries[0][kind],
                    "unlearned": summaries[1][kind],
                }
            )
    return changes


def _main_summary(run: Run, model: str) -> Mapping:
    summaries = run.models[model][run.set_of("forget").name]
    return summaries[main_kind(summaries, "vqa")]


def _data(run: Run) -> dict[str, Any]:
    benchmark = run.meta["benchmark"]
    return {"benchmark": benchmark["title"], "source": benchmark["source"]}


def _model_titles(run: Run) -> list[str]:
    return [MODELS[name] for name in run.models]


def _kind_title(kind: str) -> str:
    title = KINDS.get(kind, kind)
    return title[:1].lower() + title[1:]


def _accuracy_cell(summary: Mapping | None) -> str:
    if not summary:
        return "–"
    return f"{percent(summary['accuracy'])} ({summary['correct']}/{summary['n']}), {interval(summary)}"


def _change_in_points(vanilla: Mapping, unlearned: Mapping | None) -> str:
    return f"{100 * (unlearned['accuracy'] - vanilla['accuracy']):+.1f}" if unlearned else "–"


def _mean_cell(summary: Mapping | None) -> str:
    return f"{summary['mean']:.3f} ({summary['low']:.3f} to {summary['high']:.3f})" if summary else "–"


def _attack_cell(cell: Mapping | None, unit: str) -> str:
    if not cell:
        return "–"
    if unit == "AUC":
        return f"{cell['mean']:.2f} ({cell['low']:.2f} to {cell['high']:.2f})"
    count = f" ({cell['correct']}/{cell['n']})" if "correct" in cell else ""
    recovery = "" if cell.get("recovery") is None else f"; recovery {cell['recovery']:.2f}"
    return f"{percent(cell['mean'])}{count}, {interval(cell)}{recovery}"


def percent(share: float) -> str:
    """ "12.3 %"."""
    return f"{100 * share:.1f} %"


def interval(summary: Mapping) -> str:
    """ "1.9 to 8.8", in per cent."""
    return f"{100 * summary['low']:.1f} to {100 * summary['high']:.1f}"
