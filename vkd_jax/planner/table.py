"""The rows of docs/results/plans.json, planned one after the other and resumable."""

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_collections

from vkd_jax import messages
from vkd_jax.planner.compile import versions
from vkd_jax.planner.plan import why_not
from vkd_jax.runtime import files, json_files, provenance
from vkd_jax.types import UserError

Row = dict[str, Any]


def write(config: ml_collections.ConfigDict, file: Path, plan_flags: Callable[[str], Row]) -> None:
    """Plans the rows of configs/plans.py that the config selects, and writes each as soon as it is known.

    A row of the file is one line of a JSON list: the results of `planner.plan`, and its model, chips, command and
    commit. Rows of the present commit and compiler are not planned again.

    Args:
        config: The config of configs/plans.py.
        file: The JSON file.
        plan_flags: Function of the planner's flags to the results, or to {"error": message}.

    Raises:
        UserError: The file contains something else, or no row matches.
    """
    rows = [(tuple(row[:2]), row[2]) for row in config.plans.rows]
    selected = [(cell, given) for cell, given in rows if set(config.plans.only) <= set(cell)]
    if not selected:
        raise UserError(
            f"no row is of {messages.listed(config.plans.only, ' and ')}: give one model, one slice, or one of each."
        )
    source = {"commit": provenance.commit(but=file), "versions": versions()}
    for cell, given in selected:
        row = dict(zip(("model_name", "slice"), cell, strict=True), command=f"python -m vkd_jax.plan {given}") | source
        previous = _read(file).get(cell, {"error": ""})
        if "+changes" not in row["commit"] and "error" not in previous and row.items() <= previous.items():
            continue
        started = time.perf_counter()
        row |= plan_flags(given) | {"run": {"examples": config.plans.examples}}
        print(f"{cell[0]} on {cell[1]}, {time.perf_counter() - started:.0f} s: {_verdict(row)}", flush=True)
        table = _read(file) | {cell: row}  # another process may have written in the meantime
        ordered = [json.dumps(table[cell]) for cell, _ in rows if cell in table]
        files.write_bytes(file, ("[\n" + ",\n".join(ordered) + "\n]\n").encode())


def _read(file: Path) -> dict[tuple[str, str], Row]:
    """The rows of the file, by model and slice."""
    try:
        rows = json_files.read_json(file, list) if file.exists() else []
        return {(row["model_name"], row["slice"]): row for row in rows}
    except (UserError, KeyError, TypeError) as error:
        raise UserError(f"--json={file} exists and contains no rows of this table: {error}") from error


def _verdict(row: Mapping[str, Any]) -> str:
    if "error" in row:
        return row["error"]
    step = next(iter(row["steps"].values()))
    return "fits" if step["fits"] else f"does not fit: {why_not(step, row['usable_gib'])}"
