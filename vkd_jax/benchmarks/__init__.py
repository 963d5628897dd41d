"""Benchmarks: questions about people to forget and people to retain, with images and answers.

    mllmu, clear, fiubench, umu, offside, ppu, covubench, safeeraser
                   published benchmarks, or the synthetic people in their layouts
    folder         your own folders of images and questions
    parquet        snapshots of parquet and JSON files and their checks
    rows           rows that others wrote, with typed access to their fields
    set_checks     checks of questions, and of what sets have in common, for all benchmarks
    selection      the people of a request instead of a benchmark's forget set
    partial        some facts about the people to forget instead of all
    cache          benchmarks as tensorflow-datasets, and `Benchmark`, the contract
    general/       standard suites of general ability, for any benchmark
    synthetic/     the synthetic people and the writers of their snapshots

A benchmark reads a source into named sets of `Example`s. It is a frozen dataclass that satisfies `cache.Benchmark`:

    fields         hyperparameters, such as the source and the forget ratio; they become `config.data` fields
    TITLE          the name in reports
    EVAL_SETS      the sets that the evaluation asks, each an `EvalSet` with a role: forget, forget_holdout, retain,
                   retain_holdout, retain_facts or general. Reports, tuning and attacks ask for roles, never for
                   names. `eval_sets` resolves the role of text-only questions.
    further_sets   optional: sets that fields of the benchmark add to EVAL_SETS
    UNLEARN        the sets that unlearning trains on: {"forget": NAME, "retain": NAME}; optionally "decouple", harmless
                   images with the questions of the forget set, "other_facts", facts about the people to forget that
                   are retained, and "refusals", rows whose answers are refusals
    forget_facts   optional field: the facts about the people to forget that are forgotten, see `partial`
    shares_people  optional: whether one person may be in sets to forget and to retain, as where some facts are
                   forgotten and others are not; without it, and without forget_facts, that is refused
    RECIPE         hyperparameters of the fine-tuning that makes the vanilla model
    label          the name with the forget ratio, for folders
    check()        raises a `UserError` if a field is invalid, before anything is read
    state(part)    a JSON value that changes when the source changes; it is part of the name of the cached data set
    rows(part)     context manager that opens the sets of a part, {name: iterator of lists of examples}

There are two parts: "evaluation" has the sets of EVAL_SETS, and "finetune" the sets that fine-tuning and, if UNLEARN
names them, unlearning train on. A list of examples is one row of the source; its examples share images.

To add a benchmark, write the dataclass in a new file and add one line to `BENCHMARKS` in vkd_jax/registry.py;
docs/extending.md has an example.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vkd_jax import registry
from vkd_jax.benchmarks import partial
from vkd_jax.types import EvalSet, Example

STRANGERS = 1000  # added to the seed of synthetic people for people that no model was trained on


def create(name: str, fields: Mapping[str, Any]) -> Any:
    """Creates the benchmark `name` with these hyperparameters; see `registry.create`.

    Example:
        >>> benchmark = create("mllmu", {"forget": 5})
    """
    return registry.create("benchmark", registry.BENCHMARKS, name, fields)


def eval_sets(benchmark: Any, forgets_text: bool = False) -> tuple[EvalSet, ...]:
    """The evaluation sets of a benchmark, with the role of their text-only questions.

    This is the one place that decides whether text-only questions about the people to forget are to be forgotten, too:
    `config.data.forgets` asks for it.

    Args:
        benchmark: the benchmark.
        forgets_text: whether they are.

    Example:
        >>> eval_sets(create("mllmu", {}), forgets_text=True)[0].role_of("qa")
        <Role.FORGET: 'forget'>
    """
    sets = (*benchmark.EVAL_SETS, *getattr(benchmark, "further_sets", ()))
    if getattr(benchmark, "forget_facts", ()):
        sets = partial.retitled(sets)
    if not forgets_text:
        return sets
    return tuple(dataclasses.replace(s, text_role=s.role) if s.role.forgets else s for s in sets)


def read(benchmark: Any, folder: str | Path, finetune: bool = False) -> dict[str, list[Example]]:
    """Reads the sets of a benchmark, by name; see `vkd_jax.benchmarks.cache.read`."""
    from vkd_jax.benchmarks import cache  # tensorflow-datasets takes a while to import

    return cache.read(benchmark, folder, finetune)


def held_out(benchmark: Any, folder: str | Path, questions: str = "") -> list[Example]:
    """Questions like those of the forget set, each with an image, about people that no model was trained on.

    For the synthetic people, other synthetic people are generated with the same questions; real people need a folder.

    Args:
        benchmark: the benchmark whose forget set they are compared with.
        folder: the folder of cached data sets, see `cache.read`.
        questions: a folder of images and questions as described in `vkd_jax.benchmarks.folder`, used instead.

    Returns:
        Each pair of image and question once; [] for a benchmark of real people without a folder.

    Raises:
        UserError: the folder cannot be read.
    """
    from vkd_jax.benchmarks.folder import Folder

    if questions:
        links = getattr(benchmark, "symlinks", False)
        examples = [example for row in Folder(test=questions, symlinks=links).questions("test") for example in row]
    elif getattr(benchmark, "source", None) == "":
        strangers = dataclasses.replace(benchmark, people=benchmark.people + STRANGERS)
        name = benchmark.UNLEARN["forget"]
        examples = read(strangers, folder, finetune=name.startswith("finetune_"))[name]
    else:
        examples = []
    return list({(e.image_id, e.question): e for e in examples if e.image is not None}.values())
