"""Compares the figures of several runs: the best trial of a method, and which methods preserve retained knowledge."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vkd_jax import messages
from vkd_jax.evaluation.metrics import intervals
from vkd_jax.evaluation.metrics.summary import by_kind
from vkd_jax.results import ATTEMPT_FIELDS, FILE, AttackCell, MeasuredSet, RunResults, main_kind
from vkd_jax.runtime import records
from vkd_jax.runtime.dataclass_json import encode
from vkd_jax.types import EvalSet, Role, UserError

KEEP = 0.95  # share of the vanilla model's accuracy that a method keeps; for text-only questions see `keeps`

Kinds = Mapping[str, Iterable[str]]  # the kinds of question of each set
Keys = list[tuple[EvalSet, str]]  # sets and kinds of question


def forgotten_keys(sets: Iterable[EvalSet], kinds: Kinds) -> Keys:
    """Measures of forgetting: questions with an image about the people to forget; text-only if a set has no image.

    Text-only questions that are to be forgotten, too, follow.
    """
    sets = [s for s in sets if s.role.forgets]
    keys = [(s, _kind(kinds, s, "vqa") or _kind(kinds, s, "qa")) for s in sets]
    keys += [(s, kind) for s in sets if s.role_of("qa").forgets for kind in _text_kinds(kinds, s)]
    return [(s, kind) for s, kind in dict.fromkeys(keys) if kind]


def kept_image_keys(sets: Iterable[EvalSet], kinds: Kinds) -> Keys:
    """What a method must keep: questions with an image of all other sets; text-only if a set has no image."""
    keys = [(s, _kind(kinds, s, "vqa") or _kind(kinds, s, "qa")) for s in sets if not s.role.forgets]
    return [(s, kind) for s, kind in keys if kind]


def kept_text_keys(sets: Iterable[EvalSet], kinds: Kinds) -> Keys:
    """Text-only knowledge that a method must keep: of the people to forget, by name, and of those to retain."""
    roles = Role.FORGET, Role.RETAIN, Role.RETAIN_FACTS
    asked = [s for s in sets if s.role in roles and not s.role_of("qa").forgets]
    return [(s, kind) for s in asked for kind in _text_kinds(kinds, s)]


def _text_kinds(kinds: Kinds, eval_set: EvalSet) -> list[str]:
    """The main text-only kind of question of a set and, of a forget set, open questions, which are more sensitive."""
    main, several = _kind(kinds, eval_set, "qa"), eval_set.role is Role.FORGET
    found = [main, *(["generation_qa"] if several and "generation_qa" in kinds.get(eval_set.name, ()) else [])]
    return list(dict.fromkeys(kind for kind in found if kind))


def _kind(kinds: Kinds, eval_set: EvalSet, modality: str) -> str | None:
    return main_kind(kinds.get(eval_set.name, ()), modality)


def tuning_measures(results: RunResults) -> dict[str, float]:
    """How much a run forgets and keeps, for tuning.

    Returns:
        forgot: accuracy on the people to forget (see `forgotten_keys`; all their sets together), at least chance: an
            accuracy below chance does not count as more forgetting.
        kept: the smallest ratio to the vanilla model's accuracy over `kept_image_keys` and `kept_text_keys`.
        relearned: the mean accuracy on the people to forget after each relearning attempt, of which the strongest
            budgets count, at least chance; missing if the run was not attacked.

    Raises:
        UserError: no question about the people to forget was asked.
    """
    before, after = results.models["vanilla"], results.models["unlearned"]
    keys = forgotten_keys(results.sets, after)
    if not keys:
        raise UserError("the forget set has no questions.")
    summaries = [after[s.name][kind] for s, kind in keys]
    chance = results.chance.get(keys[0][0].name, {}).get(keys[0][1], 0.0)
    kept_keys = [*kept_image_keys(results.sets, before), *kept_text_keys(results.sets, before)]
    kept = [
        after[s.name][kind].accuracy / before[s.name][kind].accuracy
        for s, kind in kept_keys
        if before[s.name][kind].correct
    ]
    forgot = sum(summary.correct for summary in summaries) / sum(summary.n for summary in summaries)
    measures = {"forgot": max(forgot, chance), "kept": min(kept, default=0.0)}
    if attack := results.attacks.get("relearn"):
        forget = keys[0][0].name
        cells = [c for c in attack.strongest().cells if c.attacker and (c.model, c.set) == ("unlearned", forget)]
        measures["relearned"] = max(float(np.mean([cell.mean for cell in cells if not cell.taught])), chance)
    return measures


def best(trials: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The trial with the lowest forget accuracy among those that retain 95 %; without any, the largest kept - forgot.

    If the trials were attacked, what counts is the accuracy on the people to forget after the attack. None without
    trials; the first trial if all failed.
    """

    def known(trial: Mapping[str, Any]) -> float:
        return trial.get("relearned", trial.get("forgot", 0))

    finished = [trial for trial in trials if "kept" in trial]
    candidates = [trial for trial in finished if trial["kept"] >= KEEP]
    if candidates:
        return min(candidates, key=lambda trial: (known(trial), trial["forgot"], -trial["kept"]))
    return max(finished or trials[:1], key=lambda trial: trial.get("kept", 0) - known(trial), default=None)


def keeps(row: Mapping[str, Any], before: Mapping[str, Any], sets: Iterable[EvalSet]) -> bool:
    """Whether a method preserves retained knowledge, compared with the vanilla model.

    Its accuracy is at least 95 % of the vanilla model's for each of `kept_image_keys`, and at least the lower end of
    the vanilla model's interval for each of `kept_text_keys`.

    Args:
        row: the row of the method, from `collect`.
        before: the row of the vanilla model.
        sets: the evaluation sets.
    """
    ours, theirs, sets = row["sets"], before["sets"], list(sets)
    images, texts = (
        [f"{s.name}/{kind}" for s, kind in keys(sets, kinds_in(before))] for keys in (kept_image_keys, kept_text_keys)
    )
    images_kept = all(ours[key]["mean"] >= KEEP * theirs[key]["mean"] for key in images)
    return images_kept and all(ours[key]["mean"] >= theirs[key]["low"] for key in texts)


def kinds_in(row: Mapping[str, Any]) -> dict[str, list[str]]:
    """The kinds of question of each set for which a row of `collect` has figures."""
    kinds: dict[str, list[str]] = {}
    for key in row["sets"]:
        name, _, kind = key.rpartition("/")
        kinds.setdefault(name, []).append(kind)
    return kinds


def sets_of(comparison: Mapping[str, Any]) -> list[MeasuredSet]:
    """The evaluation sets of a comparison, in the benchmark's order."""
    return [MeasuredSet(**fields) for fields in comparison["meta"]["benchmark"]["sets"]]


def collect(
    folders: Mapping[str, Sequence[Path]],
    trials: Mapping[str, Sequence[Mapping]],
    failures: Mapping[str, str],
    labels: Mapping[str, str] = {},  # noqa: B006 (never written to)
) -> dict[str, Any]:
    """Collects all figures of finished runs.

    Args:
        folders: the runs of each entrant; "controls" is one folder, with the models that all runs share.
        trials: the trials of each tuned entrant.
        failures: the reason of each failed run, by its name.
        labels: titles of entrants in tables, if they differ from their names.

    Returns:
        {"meta", "failures", "rows": [{"name", "label", "method", "train", "trials", "runs", "sets", "attacks"}]}.
        "sets" holds for each set and kind of question ("forget/vqa") {"mean", "low", "high", "n", "people", "seeds"}:
        the mean over the seeds, and its 95 % interval (see `interval`). "attacks" holds the cells of each attack, with
        the fields of `AttackCell` and "seeds". "runs" holds the figures of single runs: seed, commit, command, seconds,
        ks, utility and recovery.

    Raises:
        UserError: the runs were scored by different protocols.
    """
    (control,) = folders["controls"]
    references = [model for model in ("vanilla", "retain_only") if (control / _answers(model)).exists()]
    rows = [_row(model, [control], model) for model in references]
    for name, paths in folders.items():
        if name != "controls" and paths:
            rows.append(_row(name, paths) | {"label": labels.get(name, name), "trials": list(trials.get(name, ()))})
    results = [read_results(path) for paths in folders.values() for path in paths]
    if len(protocols := {run.meta.protocol for run in results}) > 1:
        raise UserError(
            f"These runs were scored by {messages.listed(sorted(protocols), ' and ')}; compare one protocol at a time."
        )
    return {
        "meta": {
            "command": results[0].meta.command,
            "commits": sorted({run.meta.commit for run in results}),
            "devices": results[0].meta.devices,
            "versions": encode(results[0].meta.versions),
            "benchmark": encode(results[0].meta.benchmark),
            "protocol": protocols.pop(),
            "chance": encode(results[0].chance),
            "attacks": {
                name: {"title": attack.title, "metric": attack.metric, "variants": encode(attack.variants)}
                for run in results
                for name, attack in run.attacks.items()
            },
        },
        "failures": dict(failures),
        "rows": rows,
    }


def check(collected: Mapping[str, Any]) -> None:
    """Checks the figures of a comparison that was read from a file, which may have been edited.

    Raises:
        UserError: a row is there twice, an accuracy is not between 0 and 1, or a mean is not within its interval.
    """
    rows = [row["name"] for row in collected["rows"]]
    if twice := [name for name in rows if rows.count(name) > 1]:
        raise UserError(f"a comparison has the row {twice[0]!r} twice; make its file again.")
    for row in collected["rows"]:
        cells = [(f"{attack}, {cell['variant']}", cell) for attack in row["attacks"] for cell in row["attacks"][attack]]
        for name, figure in [*row["sets"].items(), *cells]:
            mean, low, high = (figure.get(key, figure["mean"]) for key in ("mean", "low", "high"))
            if not (low - 1e-9 <= mean <= high + 1e-9 and (name not in row["sets"] or 0 <= low <= high <= 1)):
                raise UserError(
                    f"a comparison has a mean of {mean} from {low} to {high} for {row['name']!r} ({name}), which is "
                    "impossible; make its file again."
                )


def interval(correct: Sequence[Sequence[bool]], people: Sequence[intervals.Cluster]) -> dict[str, float | int]:
    """The mean over seeds and questions, with its 95 % percentile bootstrap interval over seeds and people.

    Each resample draws seeds and people with replacement, each person with all questions; see `intervals`.

    Args:
        correct: [seeds, questions], the same questions for all seeds.
        people: the cluster of each question, a person or a group of a suite.
    """
    correct = np.asarray(correct, float)
    seeds, questions = correct.shape
    codes, count, named = intervals.clusters(people)
    sums = np.stack([np.bincount(codes, row, count) for row in correct])
    times = intervals.draws(count)
    chosen = np.random.default_rng([0, seeds, count]).integers(0, seeds, (intervals.RESAMPLES, seeds))
    totals = np.einsum("rp,rp->r", times, sums[chosen].sum(1))
    low, high = intervals.percentiles(totals / (seeds * (times @ np.bincount(codes, minlength=count))))
    return {
        **{"mean": float(correct.mean()), "low": low, "high": high},
        **{"n": questions, "people": named, "seeds": seeds},
    }


def _row(name: str, paths: Sequence[Path], model: str = "unlearned") -> dict[str, Any]:
    """The row of one model, or of the models of one method over its runs."""
    results = [read_results(path) for path in paths]
    kinds = [by_kind(records.read_lines(path, _answers(model))) for path in paths]
    sets = {
        f"{name}/{kind}": interval(
            [[item["correct"] for item in run_kinds[name, kind]] for run_kinds in kinds],
            [intervals.cluster_of(item) for item in kinds[0][name, kind]],
        )
        for name, kind in kinds[0]
    }
    config = results[0].meta.config
    row = {"name": name, "label": name.replace("_", "-"), "sets": sets}
    if model == "unlearned":
        row |= {
            "method": config["method"]["name"],
            "train": config["method"]["train"],
            "steps": config["train"]["steps"],
        }
    row["runs"] = [_run(run, model) for run in results]
    row["attacks"] = {attack: _attacked(paths, results, attack, model) for attack in results[0].attacks}
    return row


def _run(results: RunResults, model: str) -> dict[str, Any]:
    """The figures of a single run."""
    forget_set = results.with_role(Role.FORGET)[0].name
    qualities = results.forget_quality.get(model, {})
    quality = qualities.get(main_kind(qualities, "vqa"))
    run = {"seed": results.meta.seed, "commit": results.meta.commit, "command": results.meta.command}
    run |= {"utility": results.utility[model].value, "ks": quality and quality.ks}
    if model == "unlearned":
        run["seconds"] = sum(results.timing.get(stage, 0.0) for stage in ("prepare", "unlearn"))
        run["bytes"] = results.step_bytes
    run["recovery"] = [
        {"attack": name, **{field: getattr(cell, field) for field in ("attacker", "share", "recovery")}}
        for name, attack in results.attacks.items()
        for cell in attack.strongest().cells
        if cell.model == model and cell.set == forget_set and cell.unit == "questions"
    ]
    return run


def _attacked(paths: Sequence[Path], results: Sequence[RunResults], attack: str, model: str) -> list[dict]:
    """The cells of an attack over the runs: accuracies, or the means of another metric."""
    attempts = [records.read_lines(path, f"attacks/{attack}/{model}.jsonl") for path in paths]
    cells = []
    for cell in (cell for cell in results[0].attacks[attack].strongest(each_steps=True).cells if cell.model == model):
        items = [[record for record in run if _belongs(record, cell)] for run in attempts]
        fields = {name: getattr(cell, name) for name in ("set", *ATTEMPT_FIELDS)}
        if cell.correct is not None and len(set(map(len, items))) == 1:
            figure = interval([[r["correct"] for r in run] for run in items], [r["person"] for r in items[0]])
        else:
            same = [c for run in results for c in run.attacks[attack].cells if (c.model, c.key) == (model, cell.key)]
            figure = {"mean": float(np.mean([c.mean for c in same])), "n": cell.n, "seeds": len(same)}
        cells.append({name: value for name, value in fields.items() if value is not None} | figure)
    return cells


def _belongs(record: Mapping, cell: AttackCell) -> bool:
    """Whether a record of an attack belongs to a cell."""
    tried = all(record.get(name, False if name == "taught" else None) == getattr(cell, name) for name in ATTEMPT_FIELDS)
    return tried and cell.set in ("", record["set"]) and not record.get("trained_on")


def _answers(model: str) -> str:
    return f"answers/{model}.jsonl"


def read_results(path: Path) -> RunResults:
    """Reads the results of a finished run, and checks that they are what it wrote.

    Raises:
        UserError: they are missing or damaged, or were changed.
    """
    results = RunResults.read(path)
    records.check(path, FILE)
    return results


def by_label(paths: Iterable[Path]) -> dict[str, list[Path]]:
    """Groups finished runs by config, without the seed, under labels of what differs.

    Raises:
        UserError: a run is unfinished, has no unlearned model, or is given twice.
    """
    paths = list(paths)
    results = [read_results(path) for path in paths]
    groups: dict[str, list[Path]] = {}
    if without := [str(path) for path, run in zip(paths, results, strict=True) if "unlearned" not in run.models]:
        raise UserError(f"{messages.listed(without)}: these runs have no unlearned model. Give runs that unlearn.")
    for path, label, run in zip(paths, _labels([r.meta.config for r in results]), results, strict=True):
        group = groups.setdefault(label, [])
        if run.meta.seed in [read_results(other).meta.seed for other in group]:
            raise UserError(f"seed {run.meta.seed} of {label} is given twice. Give each run once.")
        group.append(path)
    return groups


def _labels(configs: Sequence[Mapping]) -> list[str]:
    """A label for each config: method, trained weights, and the fields that differ between configs of the method."""
    flat = [dict(_flatten(config)) for config in configs]
    labels = []
    for fields in flat:
        peers = [other for other in flat if other["method.name"] == fields["method.name"]]
        keys = sorted({key for other in peers for key in other} - {"seed", "method.train"})
        varying = [key for key in keys if len({json.dumps(other.get(key)) for other in peers}) > 1]
        shown = (["method.train"] if "method.train" in fields else []) + varying
        settings = [f"{key.removeprefix('method.')}={fields.get(key)}" for key in shown]
        labels.append(", ".join([fields["method.name"], *settings]))
    return labels


def _flatten(value: Any, path: str = "") -> Iterable[tuple[str, Any]]:
    if not isinstance(value, Mapping):
        yield path, value
        return
    for key, item in value.items():
        yield from _flatten(item, f"{path}.{key}" if path else key)
