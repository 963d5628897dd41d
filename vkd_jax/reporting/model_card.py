"""README.md of an exported model: its model card on the Hugging Face Hub."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import vkd_jax
from vkd_jax.reporting import attack_view, main_figures, report
from vkd_jax.reporting.names import MODELS
from vkd_jax.results import RunResults, Summary

FILE = "README.md"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")  # of a model that others can find


def render(results: RunResults, forgotten: Sequence[str]) -> str:
    """The card of the unlearned model.

    Args:
        results: results of its run.
        forgotten: the people who are forgotten, as `types.person_digest` names them.
    """
    base = results.meta.config["model"]["path"]
    metadata: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "image-text-to-text"}
    if HUB_ID.fullmatch(base) and not os.path.exists(base):  # a local folder takes precedence
        metadata |= {"base_model": base}
    metadata |= {"tags": ["unlearning", "vkd_jax"]}
    header = "".join(f"{key}: {json.dumps(value, ensure_ascii=False)}\n" for key, value in metadata.items())
    body = report.render_section("model_card", _values(results, base, forgotten))
    return f"---\n{header}---\n\n{body}"


def _values(results: RunResults, base: str, forgotten: Sequence[str]) -> Mapping[str, Any]:
    models, accuracies = main_figures.rows(results)
    return {
        "base": base or "a model that was fine-tuned in the same run",
        "method": results.meta.config["method"]["name"],
        "version": vkd_jax.__version__,
        "commit": results.meta.commit,
        "command": results.meta.command,
        "digests": sorted(forgotten),
        "heads": ["questions about", "n", *(MODELS[name] for name in models)],
        "rows": [[row.title, row.n, *map(_cell, row.summaries)] for row in accuracies],
        "has_retain_only": "retain_only" in models,
        "relearned": attack_view.relearned(results),
        "attacked": bool(results.attacks),
        "facts": results.meta.config.get("data", {}).get("forget_facts") or (),
        "forgets_text": any(eval_set.role_of("qa").forgets for eval_set in results.sets),
        "language_model_unchanged": results.manifest.language_model_changed == 0,
    }


def _cell(figure: Summary | None) -> str:
    return f"{attack_view.percent(figure.accuracy)} ({attack_view.interval(figure)})" if figure else "–"
