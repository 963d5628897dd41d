"""What several runs found: which trial of a method is best, every figure with its interval, and pictures of them."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vkd_jax.evaluation import metrics
from vkd_jax.reporting import report
from vkd_jax.types import UserError

KEEP = 0.95  # of what the vanilla model gets right, a method must keep this share to count as one that keeps
KEPT = (("retain", "vqa"), ("retain_test", "vqa"), ("real", "vqa"))
TEXT = (("forget", "qa"), ("retain", "qa"), ("forget", "generation_qa"))
FORGOTTEN = (("forget", "vqa"), ("test", "vqa"))
RESAMPLES = 2000


def judged(results: Mapping[str, Any]) -> dict[str, float]:
    """How much a run forgot and kept, for tuning.

    Returns:
        forgot: right answers about the people to forget, shown pictures (both sets together), but never less than
            guessing gives: to be wrong more often than that is not to have forgotten more.
        kept: the least share of what the vanilla model gets right that is left: pictures of others, general ability,
            and questions in text alone.
    """
    before, after = results["models"]["vanilla"], results["models"]["unlearned"]
    counts = [
        (after[part][kind]["correct"], after[part][kind]["n"]) for part, kind in FORGOTTEN if _has(after, part, kind)
    ]
    guessing = results["chance"].get("forget", {}).get("vqa", 0.0)
    forgot = max(sum(right for right, _ in counts) / sum(n for _, n in counts), guessing)
    kept = [
        after[part][kind]["accuracy"] / before[part][kind]["accuracy"]
        for part, kind in (*KEPT, *TEXT)
        if _has(before, part, kind) and before[part][kind]["correct"]
    ]
    return {"forgot": forgot, "kept": min(kept, default=0.0)}


def best(trials: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The trial that forgets most of those that keep 95 %, or else the one that keeps most beyond what it knows.

    None without trials; the first if none could be finished.
    """
    finished = [trial for trial in trials if "kept" in trial]
    keeping = [trial for trial in finished if trial["kept"] >= KEEP]
    if keeping:
        return min(keeping, key=lambda trial: (trial["forgot"], -trial["kept"]))
    return max(finished or trials[:1], key=lambda trial: trial.get("kept", 0) - trial.get("forgot", 0), default=None)


def keeps(row: Mapping[str, Any], before: Mapping[str, Any]) -> bool:
    """Whether a method keeps 95 % of retain and real VQA, and loses no text QA that chance would not explain.

    Args:
        row: of the method, with `before`, that of the vanilla model, both from `collect`.
    """
    ours, theirs = row["sets"], before["sets"]
    seen = all(ours[f"{part}/{kind}"]["mean"] >= KEEP * theirs[f"{part}/{kind}"]["mean"] for part, kind in KEPT
               if f"{part}/{kind}" in theirs)  # fmt: skip
    said = all(ours[f"{part}/{kind}"]["mean"] >= theirs[f"{part}/{kind}"]["low"] for part, kind in TEXT
               if f"{part}/{kind}" in theirs)  # fmt: skip
    return seen and said


def _has(summaries: Mapping, part: str, kind: str) -> bool:
    return kind in summaries.get(part, {})


def collect(
    folders: Mapping[str, Sequence[Path]],
    trials: Mapping[str, Sequence[Mapping]],
    failures: Mapping[str, str],
    labels: Mapping[str, str] = {},  # noqa: B006 (never written to)
) -> dict[str, Any]:
    """All figures of finished runs.

    Args:
        folders: the runs of each entrant; "controls" is one folder, with the models that all runs were given.
        trials: of each entrant that was tuned.
        failures: by the name of a run, why it failed.
        labels: what an entrant is called in tables, where that is not its name.

    Returns:
        {"meta", "failures", "rows": [{"name", "label", "method", "train", "trials", "runs", "sets", "attacks"}]}.
        "sets" holds for each set and kind of question ("forget/vqa"), "attacks" for each attack and variant, {"mean",
        "low", "high", "n", "seeds"}: the mean over the seeds, and its 95 % interval (see `interval`). "runs" holds what
        there is one of in each run: seed, commit, command, seconds, ks, utility and recovery.

    Raises:
        UserError: the runs were scored by different protocols.
    """
    (control,) = folders["controls"]
    rows = [_row(model, [control], model) for model in ("vanilla", "retain_only") if _answers(control, model).exists()]
    for name, paths in folders.items():
        if name != "controls" and paths:
            rows.append(_row(name, paths) | {"label": labels.get(name, name), "trials": list(trials.get(name, ()))})
    results = [report.results_of(path) for paths in folders.values() for path in paths]
    if len(protocols := {found["meta"]["protocol"] for found in results}) > 1:
        raise UserError(f"These runs were scored by {' and '.join(sorted(protocols))}; compare one protocol at a time.")
    return {
        "meta": {
            "command": results[0]["meta"]["command"],
            "commits": sorted({found["meta"]["commit"] for found in results}),
            "devices": results[0]["meta"]["devices"],
            "versions": results[0]["meta"]["versions"],
            "benchmark": results[0]["meta"]["benchmark"],
            "protocol": protocols.pop(),
            "chance": results[0]["chance"],
        },
        "failures": dict(failures),
        "rows": rows,
    }


def interval(correct: np.ndarray) -> dict[str, float | int]:
    """The mean of seeds x questions, with its 95 % percentile bootstrap interval: both are drawn with replacement.

    Args:
        correct: bool [seeds, questions]; all seeds were asked the same.
    """
    correct = np.asarray(correct, float)
    seeds, items = correct.shape
    draws = np.random.default_rng([0, seeds, items])
    chosen = draws.integers(0, seeds, (RESAMPLES, seeds))
    times = draws.multinomial(items, np.full(items, 1 / items), RESAMPLES)  # that each question is in each resample
    means = np.einsum("ri,ri->r", times, correct[chosen].sum(1)) / (items * seeds)
    low, high = np.percentile(means, [2.5, 97.5])
    return {"mean": float(correct.mean()), "low": float(low), "high": float(high), "n": items, "seeds": seeds}


def _row(name: str, paths: Sequence[Path], model: str = "unlearned") -> dict[str, Any]:
    """One model, or the models of one method, over its runs."""
    results = [report.results_of(path) for path in paths]
    kinds = [metrics.by_kind(report.json_lines(_answers(path, model))) for path in paths]
    sets = {
        f"{part}/{kind}": interval([[item["correct"] for item in found[part, kind]] for found in kinds])
        for part, kind in kinds[0]
    }
    config = results[0]["meta"]["config"]
    row = {"name": name, "label": name.replace("_", "-"), "sets": sets, "runs": []}
    if model == "unlearned":
        row |= {
            "method": config["method"]["name"],
            "train": config["method"]["train"],
            "steps": config["train"]["steps"],
        }
    row["attacks"] = {attack: _attacked(paths, attack, model) for attack in results[0].get("attacks", {})}
    for found in results:
        quality = found["forget_quality"].get(model, {}).get("vqa", {})
        seconds = sum(found["timing"].get(stage, 0.0) for stage in ("prepare", "unlearn"))
        run = {"seed": found["meta"]["seed"], "commit": found["meta"]["commit"], "command": found["meta"]["command"]}
        run |= {"utility": found["utility"][model]["value"], "ks": quality.get("ks")}
        if model == "unlearned":
            run |= {"seconds": seconds, "bytes": found.get("step_bytes")}
        recovery = found.get("attacks", {}).get("relearn", {}).get("summary", {})
        run["recovery"] = {variant: cells.get(model, {}).get("recovery") for variant, cells in recovery.items()}
        row["runs"].append(run)
    return row


def _attacked(paths: Sequence[Path], attack: str, model: str) -> dict[str, dict]:
    """Of each variant of an attack, the share of right answers; of one that is measured otherwise, its mean figure."""
    found: dict[str, dict] = {}
    for variant, cells in report.results_of(paths[0])["attacks"][attack]["summary"].items():
        if model not in cells:
            continue
        records = [
            [
                r["correct"]
                for r in report.json_lines(path / "attacks" / attack / f"{model}.jsonl")
                if r["variant"] == variant
            ]
            for path in paths
            if "correct" in cells[model]
        ]
        if records and len(set(map(len, records))) == 1:
            found[variant] = interval(records)
        else:
            figures_ = [report.results_of(path)["attacks"][attack]["summary"][variant][model]["mean"] for path in paths]
            found[variant] = {"mean": float(np.mean(figures_)), "seeds": len(paths)}
        found[variant] |= {
            key: cells[model][key] for key in ("attacker", "share", "people", "set") if key in cells[model]
        }
    return found


def _answers(path: Path, model: str) -> Path:
    return path / "answers" / f"{model}.jsonl"


def by_label(paths: Iterable[Path]) -> dict[str, list[Path]]:
    """Finished runs by what their configs differ in, seeds of one config together.

    Raises:
        UserError: a run is unfinished, unlearned nothing, or is given twice.
    """
    paths = list(paths)
    results = [report.results_of(path) for path in paths]
    groups: dict[str, list[Path]] = {}
    if without := [str(path) for path, found in zip(paths, results, strict=True) if "unlearned" not in found["models"]]:
        raise UserError(f"{', '.join(without)}: no model was unlearned there; name runs in which one was.")
    for path, label, found in zip(paths, _labels([r["meta"]["config"] for r in results]), results, strict=True):
        group = groups.setdefault(label, [])
        if found["meta"]["seed"] in [report.results_of(other)["meta"]["seed"] for other in group]:
            raise UserError(f"seed {found['meta']['seed']} of {label} is given twice; name each run once.")
        group.append(path)
    return groups


def _labels(configs: Sequence[Mapping]) -> list[str]:
    """A name for each config: its method, what it trains, and what differs from others of that method."""
    flat = [dict(_flatten(config)) for config in configs]
    labels = []
    for own in flat:
        peers = [other for other in flat if other["method.name"] == own["method.name"]]
        keys = sorted({key for other in peers for key in other} - {"seed", "method.train"})
        varying = [key for key in keys if len({json.dumps(other.get(key)) for other in peers}) > 1]
        named = (["method.train"] if "method.train" in own else []) + varying
        fields = [f"{key.removeprefix('method.')}={own.get(key)}" for key in named]
        labels.append(", ".join([own["method.name"], *fields]))
    return labels


def _flatten(value: Any, path: str = "") -> Iterable[tuple[str, Any]]:
    if not isinstance(value, Mapping):
        yield path, value
        return
    for key, part in value.items():
        yield from _flatten(part, f"{path}.{key}" if path else key)
