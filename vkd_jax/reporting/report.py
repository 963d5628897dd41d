"""report.md and its pictures for one finished run."""

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from vkd_jax.evaluation import metrics
from vkd_jax.reporting import page, plots
from vkd_jax.runtime import files, storage
from vkd_jax.types import UserError

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
    workdir = storage.resolve(workdir)
    results = results_of(workdir)
    answers = {name: json_lines(workdir / "answers" / f"{name}.jsonl") for name in ("vanilla", "unlearned")}
    rows: dict[int, dict] = {}  # a step's speed may stand in a line of its own, behind that of its losses
    for row in json_lines(workdir / "train" / "metrics.jsonl", torn=True):
        rows.setdefault(int(row["step"]), {}).update(row)
    sheet = _cards(answers["vanilla"], answers["unlearned"], images)
    pictures = {
        "forget_retain": plots.forget_against_retain(results["models"], results["chance"].get("forget", {})),
        "portraits": plots.portrait_sheet(sheet),
    }
    if rows:  # a step that was logged again after a resume counts once, and the last time
        pictures["losses"] = plots.loss_curves([rows[step] for step in sorted(rows)])
    relearned = results.get("attacks", {}).get("relearn", {}).get("summary", {})
    if curves := plots.relearning_curves(relearned):
        pictures["relearning"] = curves
    for name, png in pictures.items():
        files.write_bytes(workdir / "report" / f"{name}.png", png)
    for card in itertools.chain(*sheet.values()):
        if card.image is not None:  # as they were asked about, to ask again
            suffix = ".png" if card.image.startswith(b"\x89PNG") else ".jpg"
            name = re.sub(r"[^\w-]+", "_", card.title.removeprefix("person "))
            files.write_bytes(workdir / "portraits" / (name + suffix), card.image)
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
    return files.write_bytes(workdir / "report.md", "\n".join(filter(None, sections)).encode())


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
            card = plots.Card(images.get(item["image_id"]), title, item["question"], item["answer"], *said)
            sheet[heading].append(card)
    return sheet


def _said(item: Mapping) -> str:
    """What was answered; a letter is followed by the option that it stands for."""
    options, said = item["options"], item["prediction"]
    letter = None if said in options or not options else metrics.first_letter(said, len(options))
    if letter:
        return f"{letter}, {options[metrics.LETTERS.index(letter)]}"
    return item["prediction"] or "(nothing)"


def results_of(workdir: Path) -> dict:
    """What stands in results.json.

    Raises:
        UserError: it is missing or torn.
    """
    file = workdir / "results.json"
    if not file.is_file():
        raise UserError(f"{workdir} has no results.json: let that run finish, or name the folder of a finished one.")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is not JSON ({error}); run that experiment again.") from error


def json_lines(file: Path, torn: bool = False) -> list[dict]:
    """The lines of a file; a `torn` one was written while training, if at all, and a kill may have cut it.

    Raises:
        UserError: it is missing, or torn and should not be.
    """
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
