"""View model of the first sections: what was forgotten, what was kept, what came back under attack, how we know.

Each verdict is a word, which the templates turn into a sentence: an interval is "below", "above" or "equal" to (that
is, overlaps) the one that it is compared with. That the unlearned model equals the reference shows that it forgot only
if the vanilla model was above the reference; otherwise the verdict is "open".
"""

from collections.abc import Mapping, Sequence
from typing import Any

from vkd_jax.benchmarks import partial
from vkd_jax.reporting import attack_view
from vkd_jax.reporting.attack_view import interval, percent
from vkd_jax.reporting.finished_run import KINDS, Run
from vkd_jax.reporting.names import MODALITIES, MODEL_NOTES, MODELS
from vkd_jax.results import QUESTION_TASKS, AttackCell, Summary, main_kind
from vkd_jax.types import Role

ABOUT_PEOPLE = (Role.FORGET, Role.FORGET_HOLDOUT, Role.RETAIN, Role.RETAIN_HOLDOUT)
MOST_UNLETTERED = 0.5  # share of answers without a letter above which an accuracy by letters says little


def opening(run: Run) -> dict[str, Any]:
    """What the run is about."""
    forget = run.set_of(Role.FORGET).name
    return {
        "audit": run.audit,
        "learned": not _never_learned(run, forget, main_kind(run.models["vanilla"][forget], "vqa")),
        "forget_people": run.people(Role.FORGET),
        "forgets_text": run.forgets_text,
        "facts": run.facts,
    }


def forgotten(run: Run) -> dict[str, Any]:
    """Accuracy on the people to forget, compared with the retain-only model or with chance."""
    kind = main_kind(run.models["vanilla"][run.set_of(Role.FORGET).name], "vqa")
    return {
        "changes": _changes(run, "vqa", Role.FORGET, Role.FORGET_HOLDOUT),
        "texts": _text_judgements(run),
        "has_retain_only": "retain_only" in run.models,
        "facts": run.facts,
        **_judgement(run, kind),
        **_letters(run),
    }


def kept(run: Run) -> dict[str, Any]:
    """Accuracy on everything else, each compared with the vanilla model."""
    changes = _changes(run, "vqa", Role.RETAIN, Role.RETAIN_HOLDOUT, Role.RETAIN_FACTS, Role.GENERAL)
    lost = [x for x in changes if compare(x["unlearned"], x["vanilla"].low, x["vanilla"].high) == "below"]
    return {
        "changes": changes,
        "never_learned": bool(changes) and all(_never_learned(run, x["set"], x["kind"]) for x in changes),
        "lost": [x["title"][:1].lower() + x["title"][1:] for x in lost],
        "facts": run.facts,
        "other_facts": any(x["set"] in partial.SPLIT.values() for x in changes),
        "other_facts_lost": any(x["set"] in partial.SPLIT.values() for x in lost),
    }


def text_only(run: Run) -> dict[str, Any] | None:
    """Accuracy on retained text-only questions; None if none was asked."""
    changes = [
        change
        for change in _changes(run, "qa", Role.FORGET, Role.RETAIN, Role.RETAIN_FACTS)
        if not change["role"].forgets
    ]
    unchanged = run.results.manifest.language_model_changed == 0
    return {"changes": changes, "language_model_unchanged": unchanged} if changes else None


def recovered(run: Run) -> dict[str, Any]:
    """The recovery by each attack, compared with the retain-only model or with the model before the attack."""
    relearned, attempts = attack_view.relearned(run.results), attack_view.strongest_attempts(run.results)
    compared = [(x["attack"].partition(":")[0], x["after"], *_reference(x, "without the attack")) for x in attempts]
    if relearned and (relearned["retain_only"] or relearned["before"]):
        compared.insert(0, ("Relearning", relearned["unlearned"], *_reference(relearned, "before the attack")))
    return {
        "attacked": bool(run.results.attacks),
        "relearned": relearned,
        "strongest": attempts,
        "compared": bool(compared),
        "above": [
            {"attack": attack, "reference": words}
            for attack, after, other, words in compared
            if compare(after, other.low, other.high) == "above"
        ],
    }


def _reference(attempt: Mapping[str, Any], before: str) -> tuple[AttackCell, str]:
    """The figure that an attempt is compared with, and what it is the accuracy of."""
    if attempt["retain_only"]:
        return attempt["retain_only"], "of the retain-only model under the same attack"
    return attempt["before"], before


def basis(run: Run) -> dict[str, Any]:
    """The evidence in one sentence."""
    manifest = run.results.manifest
    return {"audit": run.audit, "changed": manifest.changed, "tensors": manifest.tensors}


def words(run: Run) -> dict[str, Any]:
    """Definitions of the terms."""
    return {
        "audit": run.audit,
        "method": run.meta.config["method"]["name"],
        "has_retain_only": "retain_only" in run.models,
        "by_person": _main_summary(run, "unlearned").people > 0,
        "all_by_person": all(x["unlearned"].people for x in _changes(run, "vqa", *ABOUT_PEOPLE)),
        "forget_people": run.people(Role.FORGET),
        "retain_people": run.people(Role.RETAIN),
        "forgets_text": run.forgets_text,
        "facts": run.facts,
        "origins": _origins(run),
    }


# ---- Figures of the cards ----


def card(run: Run, name: str, values: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the card of a section draws: one mark with its interval for each model; None without figures.

    Args:
        run: the run.
        name: forgotten, kept or recovered.
        values: what that section returned.
    """
    if name != "recovered":
        first = next(iter(values["changes"]), None)
        if not first:
            return None
        summaries = {model: run.results.summary(model, first["set"], first["kind"]) for model in run.models}
        return {
            "about": f"{first['title']}, {first['modality']}",
            "questions": first,
            "chance": values.get("chance"),
            "marks": [
                _mark(model, MODEL_NOTES[model], item, item.accuracy, model == "unlearned")
                for model, item in summaries.items()
                if item
            ],
        }
    relearned, before = values["relearned"], "before the attack"
    if relearned:
        result, title = relearned["unlearned"], relearned["title"]
        figures = [("unlearned", before, relearned["before"]), ("unlearned", "after the attack", result)]
        figures.append(("retain_only", "after the same attack", relearned["retain_only"]))
    elif values["strongest"]:
        attempt = max(values["strongest"], key=lambda attempt: attempt["after"].mean)
        result, title = attempt["after"], attempt["title"]
        figures = [("unlearned", before, attempt["before"]), ("unlearned", "under attack", result)]
        figures.append(("retain_only", "under the same attack", attempt["retain_only"]))
    else:
        return None
    return {
        "about": title[:1].upper() + title[1:],
        "questions": None,
        "chance": None,
        "marks": [_mark(model, note, cell, cell.mean, cell is result) for model, note, cell in figures if cell],
    }


def _mark(model: str, note: str, figure: Summary | AttackCell, mean: float, result: bool) -> dict[str, Any]:
    """One figure of a card; `result` marks the one that the card is about."""
    return {
        "model": model,
        "title": MODELS[model],
        "note": note,
        "mean": mean,
        "figure": figure,
        "result": result,
    }


# ---- Comparisons ----


def compare(figure: Summary | AttackCell, low: float, high: float) -> str:
    """Compares an accuracy with another interval: "below", "equal" (they overlap) or "above"."""
    if figure.high < low:
        return "below"
    return "above" if figure.low > high else "equal"


def without_letter(run: Run, model: str) -> dict[str, Any] | None:
    """The number of answers to forget questions with images without an option letter; None without the protocol."""
    forget = run.set_of(Role.FORGET)
    kind = "vqa" if run.meta.protocols[0] == "letter" else "vqa_letter"
    summary = run.results.summary(model, forget.name, kind) if forget else None
    figure = summary.metrics.get("no_letter") if summary else None
    return figure and {"without": round(figure.mean * figure.n), "n": figure.n, "share": figure.mean}


def _judgement(run: Run, kind: str) -> dict[str, Any]:
    """Compares the unlearned model's accuracy on the forget set with the retain-only model's, or with chance."""
    forget = run.set_of(Role.FORGET)
    vanilla, unlearned, retain_only = (run.results.summary(model, forget.name, kind) for model in MODELS)
    chance = run.results.chance.get(forget.name, {}).get(kind)
    reference, verdict, before = None, None, None
    if retain_only:
        reference = f"the retain-only model ({percent(retain_only.accuracy)}, {interval(retain_only)})"
        verdict, before = (compare(model, retain_only.low, retain_only.high) for model in (unlearned, vanilla))
    elif chance is not None:
        reference = f"chance ({percent(chance)})"
        verdict, before = (compare(model, chance, chance) for model in (unlearned, vanilla))
    unlike = _unlike_the_vanilla_model(run, kind) if retain_only else None
    if unlike or (verdict == "equal" and before != "above"):  # too few questions, or no reference for forgetting
        verdict = "open"
    return {
        "unlike": unlike,
        "chance": chance,
        "reference": reference,
        "before": before,
        "vanilla": vanilla,
        "below_chance": chance is not None and retain_only is not None and retain_only.high < chance,
        "verdict": verdict,
        "exchanged": compare(unlearned, vanilla.low, vanilla.high) == "above",
        "never_learned": _never_learned(run, forget.name, kind),
    }


def _never_learned(run: Run, name: str, kind: str) -> bool:
    """Whether the vanilla model cannot be told apart from guessing in the questions of one kind of a set."""
    vanilla, chance = run.results.summary("vanilla", name, kind), run.results.chance.get(name, {}).get(kind)
    return vanilla is not None and chance is not None and vanilla.low <= chance


def _unlike_the_vanilla_model(run: Run, kind: str) -> dict[str, Any] | None:
    """Both models on the retain set, if the retain-only model lacks half of what training taught the vanilla model."""
    if not (retain := run.set_of(Role.RETAIN)):
        return None
    vanilla, retain_only = (run.results.summary(model, retain.name, kind) for model in ("vanilla", "retain_only"))
    if not (vanilla and retain_only) or compare(retain_only, vanilla.low, vanilla.high) != "below":
        return None
    chance = run.results.chance.get(retain.name, {}).get(kind) or 0.0
    lacks = retain_only.accuracy - chance < (vanilla.accuracy - chance) / 2
    return {"set": retain.title, "vanilla": vanilla, "retain_only": retain_only} if lacks else None


def _text_judgements(run: Run) -> list[dict[str, Any]]:
    """The same for each kind of text-only question that is to be forgotten, too."""
    forget = run.set_of(Role.FORGET)
    kinds = [kind for task in QUESTION_TASKS if forget.role_of(kind := f"{task}qa").forgets]
    return [
        {"title": KINDS[kind], "vanilla": vanilla, "unlearned": unlearned, **_judgement(run, kind)}
        for kind in kinds
        if (vanilla := run.results.summary("vanilla", forget.name, kind))
        and (unlearned := run.results.summary("unlearned", forget.name, kind))
    ]


def _letters(run: Run) -> dict[str, Any]:
    """The models that mostly wrote no option letter, and the other protocols of the run."""
    letters = {}
    if run.meta.protocols[0] == "letter":
        letters = {name: without_letter(run, name) for name in ("vanilla", "unlearned")}
    mostly = {name: count for name, count in letters.items() if count and count["share"] > MOST_UNLETTERED}
    return {
        "letters": [{"model": MODELS[name], **count} for name, count in mostly.items()],
        "other_protocols": run.meta.protocols[1:],
    }


def _changes(run: Run, modality: str, *roles: Role) -> Sequence[dict[str, Any]]:
    """The main accuracy of the vanilla and the unlearned model on each set of some roles."""
    changes = []
    for eval_set in (s for role in roles for s in run.results.with_role(role)):
        kind = main_kind(run.models["vanilla"].get(eval_set.name, {}), modality)
        vanilla, unlearned = (run.results.summary(name, eval_set.name, kind or "") for name in ("vanilla", "unlearned"))
        if vanilla and unlearned:
            change = {"vanilla": vanilla, "unlearned": unlearned, "set": eval_set.name, "kind": kind}
            change |= {"role": eval_set.role_of(kind)}
            title = eval_set.title[:1].upper() + eval_set.title[1:]
            changes.append({"title": title, "modality": MODALITIES[modality], **change})
    return changes


def _origins(run: Run) -> dict[str, Any]:
    """How the models were made, on how many people the vanilla model was trained, if that is known, and its path."""
    model, origins = run.meta.config.get("model", {}), dict(vars(run.results.origins))
    if run.meta.config.get("stage") == "all":  # results of earlier versions lack the origins
        origins |= {"vanilla": "run", "base": model.get("base") or "a new model"}
        origins |= {} if model.get("retain_only") else {"retain_only": "run"}
    return {
        **origins,
        "path": model.get("path") or "a model",
        "people": run.people(Role.FORGET) + run.people(Role.RETAIN),
    }


def _main_summary(run: Run, model: str) -> Summary:
    summaries = run.models[model][run.set_of(Role.FORGET).name]
    return summaries[main_kind(summaries, "vqa")]
