"""Reads results.json of the layout that the pipeline writes until it writes `RunResults`."""

from collections.abc import Mapping
from typing import Any

from vkd_jax.results import SCHEMA_VERSION

SETS = (
    ("forget", "forget", "people to forget", "forget"),
    ("test", "forget_holdout", "people to forget, other images or wordings", "test"),
    ("retain", "retain", "people to retain", "retain"),
    ("retain_test", "retain_holdout", "people to retain, other images or wordings", "retain test"),
    ("real", "general", "general ability, nothing about these people", "real"),
    ("real_faces", "general", "other people, known from elsewhere", "real faces"),
    ("real_world", "general", "the world at large, nothing about people", "real world"),
)
SUFFIXES = {"other pictures": "test", "people to keep": "retain", "other pictures of those taught": "test"}


def converted(results: Mapping[str, Any]) -> dict[str, Any]:
    """results.json in the layout of `RunResults`; unchanged if it has that layout."""
    if "schema_version" in results:
        return dict(results)
    meta = dict(results["meta"])
    people = meta["benchmark"]["people"]
    meta["benchmark"] = {
        "title": meta["benchmark"]["title"],
        "source": meta["benchmark"]["source"],
        "sets": [
            {"name": name, "role": role, "title": title, "short": short, "people": people.get(name, 0)}
            for name, role, title, short in SETS
            if name in results["models"]["vanilla"]
        ],
    }
    attacks = {name: _attack(attack) for name, attack in results.get("attacks", {}).items()}
    return dict(results) | {"meta": meta, "attacks": attacks, "schema_version": SCHEMA_VERSION}


def _attack(attack: Mapping[str, Any]) -> dict[str, Any]:
    cells = []
    for variant, models in attack["summary"].items():
        title, _, suffix = variant.partition(", ")
        known = suffix in SUFFIXES
        for model, cell in models.items():
            fields = {key: value for key, value in cell.items() if value is not None and key != "people"}
            fields |= {"share": cell["people"], "unit": "people"} if "attacker" in cell and "people" in cell else {}
            set_name = SUFFIXES[suffix] if known else "forget"
            taught = suffix == "other pictures of those taught"
            name = "" if "attacker" in cell else title if known else variant
            cells.append(fields | {"model": model, "variant": name, "set": set_name, "taught": taught})
    metric = "auc" if attack["unit"] == "AUC" else "accuracy"
    return {"title": attack["title"], "about": attack["about"], "metric": metric, "cells": cells}
