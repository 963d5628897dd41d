"""View model of the attacks: the tables of their section, and what the first sections say about them."""

from collections.abc import Collection, Iterable
from typing import Any

from vkd_jax import messages
from vkd_jax.reporting import names
from vkd_jax.reporting.curves import relearns_rest
from vkd_jax.results import UNCHANGED, AttackCell, AttackResults, Figure, RunResults, Summary
from vkd_jax.types import Role

FOLDED_ABOVE = 8  # a table with more rows is folded
PLOTS = {  # the plots of an attack by name, with what they show
    "relearn": {
        "relearning": "Accuracy on the rest of the forget set by the share that was relearned",
        "relearning_steps": "Accuracy on the rest of the forget set by the attacker's steps",
    }
}


def tables(results: RunResults, models: Iterable[str], plots: Collection[str]) -> list[dict[str, Any]]:
    """One table for each attack, with a row for each attempt and a column for each model."""
    models = list(models)
    views = []
    for name, attack in results.attacks.items():
        budget = names.several_budgets(attack.cells)
        rows = [
            [
                names.attempt(next(iter(cells.values())), attack.variants, results.sets, budget),
                *(_cell(cells.get(model), attack) for model in models),
            ]
            for cells in attack.rows()
        ]
        views.append(
            {
                "name": name,
                "title": attack.title,
                "about": attack.about,
                "plots": {plot: text for plot, text in PLOTS.get(name, {}).items() if plot in plots},
                "heads": ["variant", *(names.MODELS[model] for model in models)],
                "rows": rows,
                "folded": len(rows) > FOLDED_ABOVE,
            }
        )
    return views


def relearned(results: RunResults) -> dict[str, Any] | None:
    """The strongest attacker whose share of the forget set is nearest to 20 %, or None if nothing was relearned."""
    rows = results.attacks["relearn"].strongest().rows() if "relearn" in results.attacks else []
    forget = [s.name for s in results.with_role(Role.FORGET)]
    rows = [row for row in rows if "unlearned" in row and relearns_rest(row["unlearned"], forget)]
    if not rows:
        return None
    row = min(rows, key=lambda row: (abs(row["unlearned"].share - names.RELEARNED_SHARE), -row["unlearned"].mean))
    cell, cells = row["unlearned"], results.attacks["relearn"].cells
    before = (c for c in cells if c.model == "unlearned" and c.variant == UNCHANGED and c.set == cell.set)
    return {
        "title": names.attempt(cell, results.attacks["relearn"].variants, results.sets),
        "trained": names.attacker(cell.attacker),
        "share": f"{100 * cell.share:g}",
        "before": next(before, None),
        "unlearned": cell,
        "retain_only": row.get("retain_only"),
    }


def strongest_attempts(results: RunResults) -> list[dict[str, Any]]:
    """For each attack but relearning: its highest accuracy on the forget set, for the unlearned model.

    An attack that shows or trains something also teaches a model that never saw the people, so that it is compared with
    the retain-only model under the same attack; other attacks are compared with the model without the attack.
    """
    forget, attempts = [s.name for s in results.with_role(Role.FORGET)], []
    for name, attack in results.attacks.items():
        rows = [row for row in attack.rows() if "unlearned" in row and row["unlearned"].set in forget]
        before = next((row["unlearned"] for row in rows if row["unlearned"].variant == UNCHANGED), None)
        tried = [row for row in rows if row["unlearned"].variant != UNCHANGED and not row["unlearned"].taught]
        if before and tried and name != "relearn":
            row = max(tried, key=lambda row: row["unlearned"].mean)
            cell = row["unlearned"]
            title = names.attempt(cell, attack.variants, results.sets)
            teaches = cell.attacker or cell.steps or cell.share is not None
            retain_only = row.get("retain_only") if teaches else None
            attempt = {"attack": attack.title, "title": title, "before": before, "after": cell}
            attempts.append(attempt | {"retain_only": retain_only})
    return attempts


def _cell(cell: AttackCell | None, attack: AttackResults) -> str:
    if not cell:
        return "–"
    if attack.metric != "accuracy":
        return f"{cell.mean:.2f} ({cell.low:.2f} to {cell.high:.2f})"
    count = f" ({cell.correct}/{cell.n})" if cell.correct is not None else ""
    recovery = "" if cell.recovery is None else f"; recovery {cell.recovery:.2f}"
    return f"{percent(cell.mean)}{count}, {interval(cell)}{recovery}"


def percent(share: float) -> str:
    """A share in percent, e.g. "12.3 %"."""
    return f"{100 * share:.1f} %"


def interval(figure: Summary | Figure | AttackCell) -> str:
    """The interval of a share in percent, e.g. "1.9 to 8.8"."""
    return f"{100 * figure.low:.1f} to {100 * figure.high:.1f}"


FILTERS = {"percent": percent, "interval": interval, "people": messages.people}  # of all templates
