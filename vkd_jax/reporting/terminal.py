"""The results of a run in a few lines, for the terminal; report.md has them all."""

from vkd_jax.reporting import names
from vkd_jax.reporting.attack_view import interval
from vkd_jax.results import FILE, RunResults, Summary, main_kind


def summary(results: RunResults, workdir: str) -> str:
    """Accuracy of each model on each set by the main kind of question, and where to read more.

    Args:
        results: results of a finished run.
        workdir: its folder.
    """
    models = [name for name in names.MODELS if name in results.models]
    rows = [["accuracy in % (95 % interval)", *(names.MODELS[name] for name in models)]]
    for eval_set in results.sets:
        for modality, words in (("vqa", "with image"), ("qa", "text only")):
            kind = main_kind(results.models[models[0]].get(eval_set.name, {}), modality)
            summaries = [results.summary(name, eval_set.name, kind or "") for name in models]
            if any(summaries):
                rows.append([f"{eval_set.title}, {words}", *map(_cell, summaries)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(models) + 1)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    page = "report.md" if "unlearned" in models else FILE
    return "\n".join([*lines, "", f"{workdir}/{page}"])


def _cell(figure: Summary | None) -> str:
    return f"{100 * figure.accuracy:.1f} ({interval(figure)})" if figure else "-"
