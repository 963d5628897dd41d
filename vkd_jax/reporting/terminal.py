"""The results of a run in a few lines, for the terminal; the reports have them all."""

from vkd_jax.reporting import attack_view, main_figures, names
from vkd_jax.reporting.attack_view import interval
from vkd_jax.results import FILE, AttackCell, RunResults, Summary


def summary(results: RunResults, workdir: str) -> str:
    """Accuracy of each model by set and main kind of question, what relearning brings back, and where to read more.

    Args:
        results: results of a finished run.
        workdir: its folder.
    """
    models, accuracies = main_figures.rows(results)
    rows = [["accuracy in % (95 % interval)", *(names.MODELS[name] for name in models)]]
    rows += [[row.title, *map(_cell, row.summaries)] for row in accuracies]
    if relearned := attack_view.relearned(results):
        title = f"people to forget, after an attacker relearned {relearned['share']} %"
        rows.append([title, *(_after(relearned.get(name)) for name in models)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(models) + 1)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    page = "report.html" if "unlearned" in models else FILE
    return "\n".join([*lines, "", f"{workdir}/{page}"])


def _after(cell: AttackCell | None) -> str:
    return f"{100 * cell.mean:.1f} ({interval(cell)})" if cell else "-"


def _cell(figure: Summary | None) -> str:
    return f"{100 * figure.accuracy:.1f} ({interval(figure)})" if figure else "-"
