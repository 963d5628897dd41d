"""Writes report.md with its plots, and report.html, for one finished run."""

import contextlib
import dataclasses
import functools
import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from vkd_jax.reporting import attack_view, html_report, markdown, plots, view
from vkd_jax.reporting.examples import cards
from vkd_jax.results import RunResults
from vkd_jax.runtime import files, json_files, storage
from vkd_jax.types import Role, UserError

FILES = ("report.html", "report.md")  # in the order in which they are written
FOLDERS = ("report", "portraits")  # of its images
PREFIXES = (*FILES, *(f"{folder}/" for folder in FOLDERS))  # of the names of all files of a report
MOST_NAME = 60  # characters of a file name, which may be 255 bytes long


def write(workdir: str | Path, images: Mapping[str, bytes]) -> Path:
    """Writes report.md, its plots in report/, report.html, and the portraits, into the folder of a finished run.

    Args:
        workdir: holds results.json, the records of each model in answers/ and attacks/ and, if anything was trained,
            train/metrics.jsonl.
        images: encoded images by `image_id`; a missing image is drawn as an empty frame.

    Returns:
        The path of report.md, which is written last. Every file is written atomically.

    Raises:
        UserError: a file is missing or unreadable.
    """
    workdir = storage.resolve(workdir)
    results = RunResults.read(workdir)
    answers = {name: json_lines(workdir / "answers" / f"{name}.jsonl") for name in results.models}
    run = view.Run(results, answers)
    sheet, losses = cards(run, images), _loss_rows(workdir)
    pngs = _plots(run, sheet, losses)
    for name, png in pngs.items():
        files.write_bytes(workdir / "report" / f"{name}.png", png)
    for card in itertools.chain(*sheet.values()):
        if card.image is not None:  # encoded as it was asked about, so that one can ask again
            suffix = ".png" if card.image.startswith(b"\x89PNG") else ".jpg"
            name = re.sub(r"[^\w-]+", "_", card.title.removeprefix("person "))[:MOST_NAME]
            files.write_bytes(workdir / "portraits" / (name + suffix), card.image)
    run = dataclasses.replace(run, plots=frozenset(pngs))
    values = section_values(run)
    pages = {name: render_section(name, section) for name, section in values.items()}
    html = html_report.render(run, pages, values, sheet, losses, _attack_records(workdir, results), images)
    files.write_bytes(workdir / "report.html", html.encode())
    return files.write_bytes(workdir / "report.md", "\n".join(pages.values()).encode())


def files_of(workdir: Path) -> list[str]:
    """The names of the files of the report in the folder of a run: the pages, plots and portraits."""
    folders = [workdir / folder for folder in FOLDERS if (workdir / folder).is_dir()]
    images = (file for folder in folders for file in folder.iterdir() if file.is_file())
    return [*FILES, *sorted(f"{image.parent.name}/{image.name}" for image in images)]


def section_values(run: view.Run) -> dict[str, dict[str, Any]]:
    """What each section shows, by name and in order, without empty ones."""
    sections = {name: section(run) for name, section in view.SECTIONS.items()}
    return {name: values for name, values in sections.items() if values is not None}


def render(run: view.Run) -> str:
    """Renders report.md: the sections in order, each from its template."""
    return "\n".join(render_section(name, values) for name, values in section_values(run).items())


def render_section(name: str, values: Mapping[str, Any]) -> str:
    """Renders templates/<name>.md.j2. Values are escaped, so that Markdown and HTML in them are shown as text."""
    text = _environment().get_template(f"{name}.md.j2").render(values)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("vkd_jax.reporting"),
        autoescape=True,  # so that macros return Markup, which `finalize` leaves alone
        finalize=markdown.escape,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"code": markdown.code, **attack_view.FILTERS}
    macros = environment.get_template("macros.md.j2").module
    environment.globals |= {"table": macros.table, "accuracy": macros.accuracy}
    return environment


def _plots(run: view.Run, sheet: Mapping[str, Sequence[plots.Card]], losses: Sequence[Mapping]) -> dict[str, bytes]:
    """PNG bytes by name, without empty plots."""
    results, set_names = run.results, {role: s.name for role in Role if (s := run.set_of(role))}
    relearn, forget = results.attacks.get("relearn"), [s.name for s in results.with_role(Role.FORGET)]
    chance = results.chance.get(set_names[Role.FORGET], {})
    pngs = {
        "forget_retain": plots.forget_against_retain(results.models, set_names, chance),
        "portraits": plots.portrait_sheet(sheet),
        "losses": plots.loss_curves(losses) if losses else None,
        "relearning": relearn and plots.relearning_curves(relearn.strongest().cells, forget),
        "relearning_steps": relearn and plots.budget_curves(relearn.cells, forget),
    }
    return {name: png for name, png in pngs.items() if png is not None}


def _loss_rows(workdir: Path) -> list[dict]:
    """The logged steps in order. Of a step that was logged again after a resume, the last row counts."""
    rows: dict[int, dict] = {}  # losses and speed of a step may be on separate lines
    for row in json_lines(workdir / "train" / "metrics.jsonl", torn=True):
        if isinstance(row.get("step"), int):
            rows.setdefault(row["step"], {}).update(row)
    return [rows[step] for step in sorted(rows)]


def _attack_records(workdir: Path, results: RunResults) -> dict[str, dict[str, list[dict]]]:
    """The records of each attack by model; an attack may have none, because there was no question to ask."""
    records: dict[str, dict[str, list[dict]]] = {}
    for attack, model in itertools.product(results.attacks, results.models):
        file = workdir / "attacks" / attack / f"{model}.jsonl"
        records.setdefault(attack, {})[model] = json_lines(file) if file.exists() else []
    return records


def json_lines(file: Path, torn: bool = False) -> list[dict]:
    """Reads a file of JSON lines.

    Args:
        file: its path.
        torn: whether the file may be missing or have incomplete lines, because training writes it and may be killed.

    Raises:
        UserError: the file is missing, or has an incomplete line.
    """
    if torn and not file.exists():
        return []
    if not file.exists():
        raise UserError(f"{file} is missing; run that experiment again.")
    remedy = "run that experiment again"
    if not torn:
        return [row for _, row in json_files.read_json_lines(file, remedy=remedy, checked=False)]
    rows = []
    for line in files.read_bytes(file, json_files.MOST_BYTES).split(b"\n"):
        with contextlib.suppress(UserError):
            rows.append(json_files.parse_json(line, str(file), dict))
    return rows
