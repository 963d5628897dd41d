"""How the models of a run were made, by what their folders say when the results are written.

A folder is somebody else's: its provenance and its certificate may be missing, malformed or about other people.
"""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vkd_jax.benchmarks.names import text_key
from vkd_jax.checkpoints import certificate
from vkd_jax.results import Origins
from vkd_jax.runs.inputs import PROVENANCE
from vkd_jax.runs.job import Job
from vkd_jax.runtime import json_files
from vkd_jax.runtime.records import mapping
from vkd_jax.types import UserError, person_digest

EVERYBODY = ("benchmark", "source", "people", "n_people")  # fields of config.data that choose the people of a benchmark


def read(job: Job) -> Origins:
    """How the models of a run were made."""
    config, given = job.config.to_dict(), job.workdir.given
    people, facts = set(map(person_digest, job.forget_people)), config["data"].get("forget_facts") or ()
    vanilla, base = vanilla_origin(config, _provenance(given.get("path")))
    retain_only = given.get("retain_only")
    # A model that was trained on the people to forget is refused, if its folder says so.
    known = not retain_only or bool(people) and people <= _without(_provenance(retain_only))
    return Origins(
        vanilla,
        base,
        vanilla_forgot=_forgotten(given.get("path"), people, facts) or 0,
        unlearned_forgot=_forgotten(given.get("unlearned"), people, facts),
        retain_only="run" if known else "elsewhere",
    )


def vanilla_origin(config: Mapping[str, Any], made: Mapping[str, Any]) -> tuple[str, str]:
    """Who made the vanilla model, as in `Origins.vanilla`, and the model that was fine-tuned, if that is known.

    Args:
        config: the config of this run.
        made: the provenance in the model's folder; {} if it has none. It counts only if its run chose the same people
            of a benchmark: folders of the same names may hold others.
    """
    if config["stage"] == "all":
        return "run", config["model"]["base"] or "a new model"
    if made.get("model") == "unlearned":
        return "unlearned", ""
    theirs = mapping(made.get("config"))
    base, ours, data = mapping(theirs.get("model")).get("base"), config["data"], mapping(theirs.get("data"))
    same = "source" in ours and all(ours[name] == data.get(name) for name in EVERYBODY if name in ours)
    known = isinstance(base, str) and base and not made.get("without") and same
    return ("folder", base) if known else ("elsewhere", "")


def _provenance(folder: Path | None) -> dict[str, Any]:
    """The provenance in the folder of a model; {} if it has none that can be read."""
    with contextlib.suppress(UserError):
        return json_files.read_json(folder / PROVENANCE) if folder else {}
    return {}


def _without(made: Mapping[str, Any]) -> set[str]:
    """The digests of the people whom a model was trained without, by its provenance."""
    without = made.get("without")
    return {person_digest(x) for x in without if isinstance(x, str)} if isinstance(without, list) else set()


def _forgotten(folder: Path | None, people: set[str], facts: tuple[str, ...]) -> int | None:
    """How many of some people a certificate names as forgotten; None without one that can be read.

    Args:
        folder: the folder of the model.
        people: their digests.
        facts: the facts to forget; () for everything. A certificate of other facts counts as nobody.
    """
    if folder is None:
        return None
    try:
        content = certificate.read(folder)
    except UserError:
        return None
    theirs = mapping(mapping(content.get("config")).get("data")).get("forget_facts")
    theirs = set(map(text_key, theirs)) if isinstance(theirs, list) and all(isinstance(x, str) for x in theirs) else ()
    same = not theirs or (bool(facts) and set(map(text_key, facts)) <= theirs)
    return len(people.intersection(content["forgotten"])) if same else 0
