"""Runs from Python: models and components by name, settings as on the command line.

Each function writes a folder as `python -m vkd_jax.main` does, and resumes it if it is called again.

>>> import vkd_jax
>>> results = vkd_jax.unlearn("tiny_llava", retain_only="tiny_retain_only", workdir="OUT")  # doctest: +SKIP
>>> results.summary("unlearned", "forget", "vqa").accuracy  # doctest: +SKIP
0.042
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_collections

from vkd_jax.config import defaults, schema
from vkd_jax.results import RunResults
from vkd_jax.runs import pipeline


def unlearn(
    model: str | Path,
    *,
    workdir: str | Path,
    benchmark: str = "mllmu",
    method: str = "vkd",
    retain_only: str | Path = "",
    settings: Mapping[str, Any] = {},  # noqa: B006 (never written to)
) -> RunResults:
    """Unlearns the forget set of a benchmark from a model, evaluates the result, and writes a report.

    The unlearned model is in the folder `unlearned` of `workdir`.

    Args:
        model: vanilla model: a Hugging Face folder, an id on its hub, or the name of a shipped model.
        workdir: folder for everything that the run writes.
        benchmark: name of the benchmark, a key of `registry.BENCHMARKS`.
        method: name of the method, a key of `registry.METHODS`.
        retain_only: a model that was trained without the forget set, for comparison; "" for none.
        settings: values of other fields of the config by their dotted names, {"data.forget": 5, "train.steps": 100};
            docs/configuration.md explains them.

    Returns:
        What is in results.json.

    Raises:
        UserError: the settings, the data or the models are wrong, or the folder has another run.
        Diverged: a loss became NaN or infinite.
    """
    config = _config("unlearn", benchmark, settings, method=method, path=model, retain_only=retain_only)
    return pipeline.run(config, workdir, "called from Python: vkd_jax.unlearn")


def evaluate(
    model: str | Path,
    *,
    workdir: str | Path,
    benchmark: str = "mllmu",
    unlearned: str | Path = "",
    retain_only: str | Path = "",
    settings: Mapping[str, Any] = {},  # noqa: B006 (never written to)
) -> RunResults:
    """Asks given models every question of a benchmark; with an unlearned model, also writes a report.

    Args:
        model: vanilla model; see `unlearn`.
        workdir: folder for everything that the run writes.
        benchmark: name of the benchmark, a key of `registry.BENCHMARKS`.
        unlearned: a model that was unlearned from `model`, by this package or another; "" for none.
        retain_only: a model that was trained without the forget set, for comparison; "" for none.
        settings: values of other fields of the config; see `unlearn`.

    Returns:
        What is in results.json.

    Raises:
        UserError: the settings, the data or the models are wrong, or the folder has another run.
    """
    config = _config("audit", benchmark, settings, path=model, unlearned=unlearned, retain_only=retain_only)
    return pipeline.run(config, workdir, "called from Python: vkd_jax.evaluate")


def attack(
    model: str | Path,
    attacks: str = "all",
    *,
    workdir: str | Path,
    benchmark: str = "mllmu",
    unlearned: str | Path = "",
    retain_only: str | Path = "",
    settings: Mapping[str, Any] = {},  # noqa: B006 (never written to)
) -> RunResults:
    """Evaluates given models as `evaluate` does, and attacks each of them.

    Args:
        attacks: names of the attacks with commas, keys of `registry.ATTACKS`; "all" for all. The other arguments are
            those of `evaluate`.

    Returns:
        What is in results.json; its field `attacks` has the figures of the attacks.

    Raises:
        UserError: the settings, the data or the models are wrong, or the folder has another run.
        Diverged: a loss of an attacker became NaN or infinite.
    """
    models = dict(path=model, unlearned=unlearned, retain_only=retain_only)
    config = _config("audit", benchmark, settings, attacks=attacks, **models)
    return pipeline.run(config, workdir, "called from Python: vkd_jax.attack")


def _config(
    stage: str,
    benchmark: str,
    settings: Mapping[str, Any],
    *,
    method: str = "vkd",
    attacks: str = "",
    **models: str | Path,
) -> ml_collections.ConfigDict:
    """The config of a run with all fields, of which `settings` change some, and `models` those of `config.model`."""
    config = defaults.base()
    config.stage, config.data, config.method = stage, defaults.benchmark(benchmark), defaults.method(method)
    config.attacks.names = attacks
    config.model.update({field: str(folder) for field, folder in models.items()})
    schema.override(config, settings)
    return config
