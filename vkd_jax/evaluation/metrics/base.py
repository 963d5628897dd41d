"""`Metric`: how an answer is scored, how scores are averaged, and how the figure is shown."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from vkd_jax.evaluation.metrics import intervals
from vkd_jax.results import Figure
from vkd_jax.types import Role

ARROWS = {"up": "↑", "down": "↓", "half": "→ 0.5"}


@dataclasses.dataclass(frozen=True)
class Metric:
    """One metric, with everything that report, tables and plots show about it.

    Args:
        name: key in `METRICS`, in the answers, and in results.json.
        title: name in headings.
        direction: which values are better. "by_role" is for knowledge: lower is better for what is to be forgotten,
            and higher is better otherwise. "half" is for metrics whose best value is 0.5.
        unit: "%" for shares that are shown in percent; "" for plain numbers.
        tasks: tasks that the metric applies to; () for all.
        roles: roles of the sets that the metric applies to; () for all.
        item: computes the value of one record of the answers, in the form that `aggregate` takes, or None if the
            record lacks a required field. None for a metric of whole models.
        aggregate: computes the figure of several values, given the cluster of each: the person that it is about, or
            the group of a suite.
        stored: whether the value is computed when the answer is judged, and stored in the record.
        in_report: whether the report has tables of the metric in addition to its tables of accuracy: of open questions,
            and of the others that `tasks` names.

    Example:
        >>> words = Metric("words", "words per answer", "up", item=lambda record: len(record["prediction"].split()))
        >>> words.value({"task": "generation", "prediction": "a tall man"})
        3
    """

    name: str
    title: str
    direction: Literal["up", "down", "half", "by_role"]
    unit: str = ""
    tasks: tuple[str, ...] = ()
    roles: tuple[Role, ...] = ()
    item: Callable[[Mapping], Any] | None = None
    aggregate: Callable[[Sequence[Any], Sequence[intervals.Cluster]], Figure] = intervals.mean
    stored: bool = False
    in_report: bool = True

    def value(self, record: Mapping) -> Any:
        """The stored or computed value of one record; None if the metric does not apply."""
        if self.name in record:
            return record[self.name]
        if self.item is None or (self.tasks and record["task"] not in self.tasks):
            return None
        return self.item(record)

    def arrow(self, role: Role | None = None) -> str:
        """The arrow to the better values, for questions with a role; see `EvalSet.role_of`."""
        if self.direction == "by_role":
            return ARROWS["down" if role is not None and role.forgets else "up"]
        return ARROWS[self.direction]


def rule_of(record: Mapping) -> tuple[str, str]:
    """The published rule that judges an answer, and its variant.

    The rule is the name of a benchmark, "" for questions without one. The variant is "" for the default of
    this package, and "upstream" for that of the benchmark's own code where the two differ.

    Example:
        >>> rule_of({"rule": "fiubench:upstream"})
        ('fiubench', 'upstream')
    """
    name, _, variant = record.get("rule", "").partition(":")
    return name, variant


def counted_text(record: Mapping) -> str:
    """The text of an open answer that counts.

    FIUBench's code cuts an answer at its first period, and nothing is left of an answer without one.
    """
    prediction = record["prediction"] or ""
    if rule_of(record) != ("fiubench", "upstream"):
        return prediction
    sentence, period, _ = prediction.partition(".")
    return sentence + period if period else ""
