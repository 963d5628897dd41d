"""Curves of the reports as data: the points of the training losses and of relearning, for every drawing of them."""

import dataclasses
from collections.abc import Mapping, Sequence

from vkd_jax.reporting import names
from vkd_jax.results import AttackCell


@dataclasses.dataclass(frozen=True)
class Point:
    """One point of a line, with the ends of its interval if it has one."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of a panel.

    Args:
        name: the model, or the column of the training log.
        title: name in the legend.
        points: from left to right.
    """

    name: str
    title: str
    points: tuple[Point, ...]


@dataclasses.dataclass(frozen=True)
class Panel:
    """Lines that share their axes; accuracies are in percent.

    Args:
        title: heading.
        x_title: title of the horizontal axis.
        y_title: title of the vertical axis.
        lines: the lines in the order of the legend.
        percent: whether the vertical axis is 0 to 100 %.
        linear_to: end of the linear part of the horizontal axis, which is logarithmic beyond; None if all is linear.
    """

    title: str
    x_title: str
    y_title: str
    lines: tuple[Line, ...]
    percent: bool = False
    linear_to: float | None = None


def losses(rows: Sequence[Mapping[str, float]]) -> list[Panel]:
    """One panel for each training stream: first its loss, then the terms of that loss.

    Args:
        rows: logged steps, {"step", "forget_loss", "forget_ce", "retain_loss", ...}; the prefix of a name
            that ends with "_loss" is a stream, and its terms share that prefix.
    """
    columns = list(dict.fromkeys(name for row in rows for name in row))
    panels = []
    for stream in (name.removesuffix("_loss") for name in columns if name.endswith("_loss")):
        total = f"{stream}_loss"
        terms = [name for name in columns if name.startswith(f"{stream}_") and name != total]
        lines = [
            Line(
                name,
                "loss (minimized)" if name == total else name.removeprefix(f"{stream}_"),
                tuple(Point(row["step"], row[name]) for row in rows if name in row),
            )
            for name in (total, *terms)
        ]
        panels.append(Panel(f"{stream.replace('_', ' ')} set", "step", "loss", tuple(lines)))
    return panels


def relearns_rest(cell: AttackCell, forget: Sequence[str]) -> bool:
    """Whether a cell has the accuracy on the forget questions that an attacker did not train on."""
    return cell.set in forget and cell.share is not None and cell.unit != "people" and not cell.taught


def relearning(cells: Sequence[AttackCell], forget: Sequence[str]) -> list[Panel]:
    """One panel for each relearning attacker: accuracy by the share that was relearned, one line for each model.

    The first point of a line is the accuracy before the attack.

    Args:
        cells: all cells of the attack.
        forget: names of the sets with the role forget.
    """
    before = {cell.model: cell for cell in cells if cell.set in forget and cell.attacker is None}
    cells = [cell for cell in cells if relearns_rest(cell, forget)]
    models = [name for name in names.MODELS if any(cell.model == name for cell in cells)]
    panels = []
    for attacker in dict.fromkeys(cell.attacker for cell in cells):
        lines = []
        for model in models:
            shares = {c.share: c for c in cells if (c.model, c.attacker) == (model, attacker)}
            if model in before:
                shares[0.0] = before[model]
            lines.append(Line(model, names.MODELS[model], tuple(_accuracy(100 * x, shares[x]) for x in sorted(shares))))
        title, x_title = f"fine-tuning {names.attacker(attacker)}", "share of the forget set relearned (%)"
        y_title = "accuracy on the rest of the forget set (%)"
        panels.append(Panel(title, x_title, y_title, tuple(lines), percent=True))
    return panels


def budgets(cells: Sequence[AttackCell], forget: Sequence[str]) -> list[Panel]:
    """One panel for each relearning attacker: accuracy by the attacker's steps, at each with the best learning rate.

    The lines are those of the retain-only model, which is the control, and of the unlearned model.

    Args:
        cells: all cells of the attack.
        forget: names of the sets with the role forget.

    Returns:
        No panel if the attacker has one number of steps.
    """
    before = {cell.model: cell for cell in cells if cell.set in forget and cell.attacker is None}
    cells = [cell for cell in cells if relearns_rest(cell, forget) and cell.unit == "questions" and cell.steps]
    if len({cell.steps for cell in cells}) < 2:
        return []
    share = min({cell.share for cell in cells}, key=lambda share: abs(share - names.RELEARNED_SHARE))
    cells = [cell for cell in cells if cell.share == share]
    panels = []
    for attacker in dict.fromkeys(cell.attacker for cell in cells):
        lines = []
        for model in (name for name in ("retain_only", "unlearned") if any(c.model == name for c in cells)):
            best = {0: before[model]} if model in before else {}
            for cell in (c for c in cells if (c.model, c.attacker) == (model, attacker)):
                if cell.steps not in best or cell.mean > best[cell.steps].mean:
                    best[cell.steps] = cell
            lines.append(Line(model, names.MODELS[model], tuple(_accuracy(n, best[n]) for n in sorted(best))))
        title, linear_to = f"fine-tuning {names.attacker(attacker)}", min(cell.steps for cell in cells)
        x_title = f"steps of an attacker with {100 * share:g} % of the questions"
        y_title = "accuracy on the rest of the forget set (%)"
        panels.append(Panel(title, x_title, y_title, tuple(lines), percent=True, linear_to=linear_to))
    return panels


def _accuracy(x: float, cell: AttackCell) -> Point:
    return Point(x, *(100 * value for value in (cell.mean, cell.low, cell.high)))
