"""report.md and its pictures for one finished run, and a table that compares runs.

python -m vkd_jax.report WORKDIR [WORKDIR ...]     prints the table, in Markdown
"""

import argparse
import itertools
import json
import os
import re
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vkd_jax import figures, metrics, page
from vkd_jax.types import UserError

COMPARED = (
    ("forget", "vqa"), ("test", "vqa"), ("retain", "vqa"), ("retain_test", "vqa"), ("real", "vqa"),
    ("forget", "qa"), ("retain", "qa"),
)  # fmt: skip
CARDS = 6  # portraits in a row of the sheet


def write(workdir: str | Path, images: Mapping[str, bytes]) -> Path:
    """Writes report.md, report/*.png and the portraits that it shows into a finished run's folder.

    Args:
        workdir: holds results.json, answers/vanilla.jsonl, answers/unlearned.jsonl and, if anything was
            trained, train/metrics.jsonl.
        images: encoded pictures by `image_id`; a picture that is not among them is drawn as an empty frame.

    Returns:
        The path of report.md. Every file is written beside its place and renamed, report.md last.

    Raises:
        UserError: a file is missing or unreadable.
    """
    workdir = Path(workdir)
    results = _results(workdir)
    answers = {name: _json_lines(workdir / "answers" / f"{name}.jsonl") for name in ("vanilla", "unlearned")}
    rows = {int(row["step"]): row for row in _json_lines(workdir / "train" / "metrics.jsonl", torn=True)}
    sheet = _cards(answers["vanilla"], answers["unlearned"], images)
    pictures = {
        "forget_retain": figures.forget_against_retain(results["models"], results["chance"].get("forget", {})),
        "portraits": figures.portrait_sheet(sheet),
    }
    if rows:  # a step that was logged again after a resume counts once, and the last time
        pictures["losses"] = figures.loss_curves([rows[step] for step in sorted(rows)])
    relearned = results.get("attacks", {}).get("relearn", {}).get("summary", {})
    if curves := figures.relearning_curves(relearned):
        pictures["relearning"] = curves
    for name, png in pictures.items():
        _write(workdir / "report" / f"{name}.png", png)
    for card in itertools.chain(*sheet.values()):
        if card.image is not None:  # as they were asked about, to ask again
            suffix = ".png" if card.image.startswith(b"\x89PNG") else ".jpg"
            name = re.sub(r"[^\w-]+", "_", card.title.removeprefix("person "))
            _write(workdir / "portraits" / (name + suffix), card.image)
    sections = (
        page.opening(results),
        page.measured(results),
        page.accuracy(results),
        page.words(results),
        page.quality(results),
        page.attacks(results, bool(curves)),
        page.portraits(),
        page.evidence(results),
        page.training(results, bool(rows)),
        page.limits(results),
        page.config(results),
    )
    return _write(workdir / "report.md", "\n".join(filter(None, sections)).encode())


def compare(workdirs: Iterable[str | Path]) -> str:
    """A Markdown table of finished runs: one row a method, its seeds averaged, and the commands that made it.

    Runs whose configs differ in more than the seed stand in rows of their own, named by what differs.

    Raises:
        UserError: a run is unfinished or given twice, or the runs were scored by different protocols.
    """
    runs = [_results(Path(workdir)) for workdir in workdirs]
    if len(protocols := {run["meta"]["protocol"] for run in runs}) > 1:
        raise UserError(f"These runs were scored by {' and '.join(sorted(protocols))}; compare one protocol at a time.")
    labels = _labels([run["meta"]["config"] for run in runs])
    rows: dict[str, dict[str, tuple[Mapping, float | None]]] = {}  # label -> seed -> summaries, seconds
    for label, run in zip(labels, runs, strict=True):
        for model, summaries in run["models"].items():
            seconds = _seconds(run, model)
            name = label if model == "unlearned" else model.replace("_", "-")
            # A model that was given is one model in all runs: told apart by what it scored, not by the run's seed.
            seed = json.dumps(summaries, sort_keys=True) if seconds is None else str(run["meta"]["seed"])
            if seconds is not None and seed in rows.get(name, {}):
                raise UserError(f"seed {seed} of {name} is given twice; name each run once.")
            rows.setdefault(name, {})[seed] = (summaries, seconds)
    order = sorted(rows, key=lambda name: {"vanilla": 0, "retain-only": 1}.get(name, 2))
    head = [
        "method",
        "seeds",
        *(f"{name.replace('_', ' ')} {kind.upper()}" for name, kind in COMPARED),
        "seconds",
    ]
    lines = [page.row(head), page.row(["---"] * 2 + ["---:"] * (len(head) - 2))]
    for name in order:
        summaries, seconds = zip(*rows[name].values(), strict=True)
        cells = [_mean([s[part][kind] for s in summaries if kind in s.get(part, {})]) for part, kind in COMPARED]
        known = [value for value in seconds if value is not None]
        lines.append(page.row([name, str(len(summaries)), *cells, _spread(known, 0) if known else "–"]))
    lines += [
        "",
        f"Right answers in per cent by the protocol `{protocols.pop()}` "
        f"(guessing about the people to forget gives {100 * runs[0]['chance']['forget']['vqa']:.0f}), "
        "± the standard deviation over seeds; in brackets right / asked, all seeds together. Seconds are "
        "those of preparing and training. Made by `python -m vkd_jax.report` from the runs of:",
        "",
    ]
    made = zip(labels, runs, strict=True)
    lines += [
        f"- {label}, seed {run['meta']['seed']}: `{run['meta']['command']}` (commit {run['meta']['commit'][:12]})"
        for label, run in made
    ]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the comparison of the given runs."""
    parser = argparse.ArgumentParser(prog="python -m vkd_jax.report", description=compare.__doc__.splitlines()[0])
    parser.add_argument("workdir", nargs="+", type=Path, help="folder of a finished run")
    try:
        print(compare(parser.parse_args(arguments).workdir), end="")
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _cards(before: Sequence[Mapping], after: Sequence[Mapping], images: Mapping[str, bytes]) -> dict[str, list]:
    """The sheet: a question each for the first people of the forget set and of the retain set."""
    later = {(item["set"], item["id"], item["protocol"]): item for item in after}
    headings = {
        "forget": "Forgotten: after, the answers should be no better than guesses",
        "retain": "Kept: after, the answers should still be right",
    }
    sheet = {}
    for part, heading in headings.items():
        asked = [item for item in before if item["set"] == part and item["modality"] == "vqa"]
        # By the first protocol if there are options to choose from, else whatever was asked.
        asked = [item for item in asked if item["task"] == "classification"] or asked
        people: dict[str, list[Mapping]] = {}
        for item in asked:
            if item["protocol"] == asked[0]["protocol"]:
                people.setdefault(item["person"] or item["image_id"], []).append(item)
        sheet[heading] = []
        for number, (name, items) in enumerate(sorted(people.items())[:CARDS]):
            item = items[number % len(items)]
            said = [(_said(it), bool(it["correct"])) for it in (item, later[part, item["id"], item["protocol"]])]
            title = f"person {name}" if item["person"] else f"{part} {number + 1}"
            card = figures.Card(images.get(item["image_id"]), title, item["question"], item["answer"], *said)
            sheet[heading].append(card)
    return sheet


def _said(item: Mapping) -> str:
    """What was answered; a letter is followed by the option that it stands for."""
    options, said = item["options"], item["prediction"]
    letter = None if said in options or not options else metrics.first_letter(said, len(options))
    if letter:
        return f"{letter}, {options[metrics.LETTERS.index(letter)]}"
    return item["prediction"] or "(nothing)"


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


def _seconds(run: Mapping, model: str) -> float | None:
    """How long it took to make the model in this run; None if it was given."""
    stages = ("prepare", "unlearn") if model == "unlearned" else (f"fine-tune {model}",)
    known = [run["timing"][stage] for stage in stages if stage in run["timing"]]
    return sum(known) if known else None


def _mean(summaries: Sequence[Mapping]) -> str:
    if not summaries:
        return "–"
    correct, n = (sum(summary[key] for summary in summaries) for key in ("correct", "n"))
    return f"{_spread([100 * summary['accuracy'] for summary in summaries], 1)} ({correct}/{n})"


def _spread(values: Sequence[float], digits: int) -> str:
    mean = f"{statistics.fmean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def _results(workdir: Path) -> dict:
    file = workdir / "results.json"
    if not file.is_file():
        raise UserError(f"{workdir} has no results.json: let that run finish, or name the folder of a finished one.")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is not JSON ({error}); run that experiment again.") from error


def _json_lines(file: Path, torn: bool = False) -> list[dict]:
    """The lines of a file; a `torn` one was written while training, if at all, and a kill may have cut it."""
    if torn and not file.exists():
        return []
    try:
        lines = file.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except FileNotFoundError:
        raise UserError(f"{file} is missing; run that experiment again.") from None
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            if not torn:
                raise UserError(f"{file}, line {number} is not JSON; run that experiment again.") from None
    return rows


def _write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


if __name__ == "__main__":
    sys.exit(main())
