"""Digests of what a run reads: its data and the models that its config gives. A workdir belongs to them."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import logging

from vkd_jax.messages import listed
from vkd_jax.runtime import json_files, records, storage
from vkd_jax.runtime.records import changed_keys, mapping
from vkd_jax.types import Example, UserError

FILE = "inputs.json"
PROVENANCE = "provenance.json"  # in a model folder that a run exported: config and version of that run
START_OVER = "pass another --workdir, or remove that folder to start over"
WORDINGS = ("prompts", "judge_prompts")  # fields of `config.eval` that name files
REFERENCE = "attacks.membership.reference"  # the field of a model that attacked models are compared with
Inputs = dict[str, Any]  # as JSON; see `describe`


def describe(
    sets: Mapping[str, Sequence[Example]],
    models: Mapping[str, Path],
    wordings: Mapping[str, str] = {},  # noqa: B006
) -> Inputs:
    """Computes the digests of a run's inputs.

    Args:
        sets: the examples of each set.
        models: the folder of each model, by its field of `config.model`; "eval.judge" is the judge's, and
            `REFERENCE` that of the membership attack.
        wordings: the file of each wording of `WORDINGS`; "" for none.

    Returns:
        {"sets": {set: {"questions": n, "images": n, "sha256": digest}}, "models": {field: {file: digest}},
        "prompts": digest or "", "judge_prompts": digest or ""}
    """
    return {
        "sets": {name: _describe_set(examples) for name, examples in sets.items()},
        "models": {name: describe_model(folder) for name, folder in models.items()},
        **{name: _describe_file(wordings.get(name, "")) for name in WORDINGS},
    }


def differences(saved: Mapping[str, Any], current: Inputs) -> Iterator[str]:
    """What changed in the inputs, as parts of a sentence."""
    saved_sets, saved_models = (mapping(saved.get(key)) for key in ("sets", "models"))
    for name in sorted(saved_sets.keys() | current["sets"].keys()):
        old, new = mapping(saved_sets.get(name)), mapping(current["sets"].get(name))
        if old == new:
            continue
        counts = [f"{x.get('questions', 0)} questions with {x.get('images', 0)} images" for x in (old, new)]
        if counts[0] != counts[1]:
            yield f"the set {name} had {counts[0]} and has {counts[1]}"
        else:
            yield f"the set {name} has other questions, answers or images ({counts[1]}, as before)"
    for field in sorted(saved_models.keys() | current["models"].keys()):
        if field == REFERENCE and field not in saved_models:  # results of earlier versions do not name it
            continue
        if changed := changed_keys(saved_models.get(field), current["models"].get(field)):
            yield f"{label(field)} changed in {', '.join(changed[:3])}"
    for name in WORDINGS:
        if saved.get(name, "") != current.get(name, ""):
            yield f"the file of config.eval.{name} changed"


def check(path: str | Path, values: Inputs) -> None:
    """Checks that the results in the folder of a run have these inputs.

    Args:
        path: the folder.
        values: what `describe` returned.

    Raises:
        UserError: the data or a model changed since the results were computed.
    """
    file, remedy = storage.resolve(path) / FILE, f"restore that file from a copy, {START_OVER}"
    if not file.exists():
        raise UserError(f"{file} is missing; {remedy}.")
    saved = json_files.read_json(file, remedy=remedy)
    if changes := list(differences(saved, values)):
        raise UserError(f"{path} was computed from other inputs: {listed(changes, '; ')}. Restore them, {START_OVER}.")


def label(field: str) -> str:
    """A given model in messages, by its field."""
    return f"the model of config.{field if '.' in field else f'model.{field}'}"


def of_both(saved: Mapping[str, Any], current: Inputs) -> tuple[Inputs, Inputs]:
    """The inputs of two runs without the sets and models that only one of them reads."""
    wordings = {name: saved.get(name, "") for name in WORDINGS}
    saved = {key: mapping(saved.get(key)) for key in ("sets", "models")} | wordings
    common = {key: saved[key].keys() & current[key].keys() for key in ("sets", "models")}

    def restricted(values: Mapping[str, Any]) -> Inputs:
        subsets = {key: {name: values[key][name] for name in names} for key, names in common.items()}
        return {**values, **subsets}

    return restricted(saved), restricted(current)


def check_models(values: Inputs) -> None:
    """Checks that the models of a run are different ones, by the digests of their weights.

    An unlearned model with the weights of the vanilla one is the baseline that changed nothing, so it is only logged.

    Raises:
        UserError: the retain-only model has the weights of the vanilla or the unlearned one, or the reference model of
            the membership attack those of a model that is attacked.
    """
    weights = {field: _weights(digests) for field, digests in values["models"].items()}

    def same(first: str, second: str) -> bool:
        return bool(weights.get(first)) and weights[first] == weights.get(second)

    if same("retain_only", "path"):
        raise UserError(
            "config.model.retain_only has the same weights as config.model.path, the vanilla model. Give a model that "
            "was trained without the forget set, or leave the field empty."
        )
    if same("unlearned", "retain_only"):
        raise UserError(
            "config.model.unlearned has the same weights as config.model.retain_only, the model that it is compared "
            "with. Give the unlearned model, or leave model.retain_only empty."
        )
    for field in ("path", "unlearned", "retain_only"):
        if same(REFERENCE, field):
            raise UserError(
                f"config.{REFERENCE} has the same weights as config.model.{field}, which is attacked, so that their "
                "difference is 0 for everybody. Give a model that was trained on none of these people, or leave the "
                "field empty."
            )
    if same("unlearned", "path"):
        logging.warning("config.model.unlearned has the same weights as config.model.path: nothing was unlearned")


def read_provenance(folder: Path) -> dict[str, Any]:
    """The provenance in the folder of a model, which may be somebody else's; {} without one.

    Raises:
        UserError: it is damaged, or is not the one that the run in the folder above wrote.
    """
    file, remedy = folder / PROVENANCE, "restore it from a copy"
    if not file.exists():
        return {}
    content = json_files.read_json(file, remedy=f"{remedy}, or remove it if no run of vkd_jax wrote it")
    entries = records.read_or(folder.parent / records.FILE, {}, f"{file} is not compared with its run")
    known = mapping(mapping(entries.get(folder.name)).get("files")).get(PROVENANCE)
    if known is not None and known != hashlib.sha256(file.read_bytes()).hexdigest():
        raise UserError(f"{file} is not the one that the run in the folder above wrote; {remedy}.")
    return content


def _weights(digests: Mapping[str, str]) -> list[str]:
    """The digests of the files of a model that have weights."""
    return sorted(digest for name, digest in digests.items() if name.endswith(".safetensors"))


def _describe_set(examples: Sequence[Example]) -> dict[str, Any]:
    digest = hashlib.sha256()
    image_digests: dict[int, str] = {}  # by object: the examples of one row share their images
    for example in examples:
        fields = example.fields
        if (image := fields.pop("image")) is not None:
            if id(image) not in image_digests:
                image_digests[id(image)] = hashlib.sha256(image).hexdigest()
            fields["image"] = image_digests[id(image)]
        digest.update(json.dumps(fields, sort_keys=True).encode() + b"\n")
    images = {e.image_id for e in examples if e.image is not None}
    return {"questions": len(examples), "images": len(images), "sha256": digest.hexdigest()}


def _describe_file(path: str) -> str:
    return hashlib.sha256(storage.resolve(path).read_bytes()).hexdigest() if path else ""


def describe_model(folder: Path) -> dict[str, str]:
    """The digests of the files of a model folder, but for its provenance."""
    return without_provenance(storage.model_digests(folder))


def without_provenance(digests: Mapping[str, str]) -> dict[str, str]:
    """The digests of a model without its provenance, which has the date of the export and influences no answer."""
    return {name: digest for name, digest in digests.items() if name != PROVENANCE}
