"""Runs from Python: models and components by name, settings as on the command line.

Each function writes a folder as `python -m vkd_jax.main` does, and resumes it if it is called again.

>>> import vkd_jax
>>> results = vkd_jax.unlearn("tiny_llava", retain_only="tiny_retain_only", workdir="OUT")  # doctest: +SKIP
>>> results.summary("unlearned", "forget", "vqa").accuracy  # doctest: +SKIP
0.042
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections

from vkd_jax.config import defaults, schema
from vkd_jax.results import RunResults
from vkd_jax.runs import pipeline
from vkd_jax.types import PATH, UserError, check_argument


def unlearn(
    model: str | Path,
    *,
    workdir: str | Path,
    benchmark: str = "mllmu",
    method: str = "vkd",
    retain_only: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
) -> RunResults:
    """Unlearns the forget set of a benchmark from a model, evaluates the result, and writes a report.

    The unlearned model is in the folder `unlearned` of `workdir`.

    Args:
        model: vanilla model: a Hugging Face folder, an id on its hub, or the name of a shipped model.
        workdir: folder for everything that the run writes.
        benchmark: name of the benchmark, a key of `registry.BENCHMARKS`.
        method: name of the method, a key of `registry.METHODS`.
        retain_only: a model that was trained without the forget set, for comparison; None or "" for none.
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
    unlearned: str | Path | None = None,
    retain_only: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
) -> RunResults:
    """Asks given models every question of a benchmark; with an unlearned model, also writes a report.

    Args:
        model: vanilla model; see `unlearn`.
        workdir: folder for everything that the run writes.
        benchmark: name of the benchmark, a key of `registry.BENCHMARKS`.
        unlearned: a model that was unlearned from `model`, by this package or another; None or "" for none.
        retain_only: a model that was trained without the forget set, for comparison; None or "" for none.
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
    attacks: str | Sequence[str] = "all",
    *,
    workdir: str | Path,
    benchmark: str = "mllmu",
    unlearned: str | Path | None = None,
    retain_only: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
) -> RunResults:
    """Evaluates given models as `evaluate` does, and attacks each of them.

    Args:
        attacks: names of the attacks, keys of `registry.ATTACKS`, as a list or a text with commas; "all" for all. The
            other arguments are those of `evaluate`.

    Returns:
        What is in results.json; its field `attacks` has the figures of the attacks.

    Raises:
        UserError: the settings, the data or the models are wrong, or the folder has another run.
        Diverged: a loss of an attacker became NaN or infinite.
    """
    models = dict(path=model, unlearned=unlearned, retain_only=retain_only)
    names = [attacks] if isinstance(attacks, str) else attacks
    check_argument("attacks", names, Sequence, "names of attacks")
    for name in names:
        check_argument("attacks", name, str, "names of attacks")
    if not "".join(names).strip():
        raise UserError('attacks: no attack is named. Give names of attacks, or "all"; or call evaluate.')
    config = _config("audit", benchmark, settings, attacks=",".join(names), **models)
    return pipeline.run(config, workdir, "called from Python: vkd_jax.attack")


def _config(
    stage: str,
    benchmark: str,
    settings: Mapping[str, Any] | None,
    *,
    method: str = "vkd",
    attacks: str = "",
    **models: str | Path | None,
) -> ml_collections.ConfigDict:
    """The config of a run with all fields, of which `settings` change some, and `models` those of `config.model`."""
    settings = {} if settings is None else settings
    check_argument("settings", settings, Mapping, 'a mapping of fields to values, such as {"train.steps": 100}')
    config = defaults.base()
    config.stage, config.data, config.method = stage, defaults.benchmark(benchmark), defaults.method(method)
    config.attacks.names = attacks
    given = {"stage", "method.name", "data.benchmark", *(f"model.{field}" for field in models)}
    given |= {"attacks.names"} if attacks else set()
    if both := sorted(given & settings.keys()):
        raise UserError(f"settings: {both[0]} is what another argument says; leave it out, and give that argument.")
    for field, folder in models.items():
        if folder is None and field != "path":
            continue
        check_argument("model" if field == "path" else field, folder, PATH, "the folder or the name of a model")
        config.model[field] = str(folder)
    schema.override(config, settings)
    return config
