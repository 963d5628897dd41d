"""What a metric is: how one answer is scored, how scores are averaged, and how the figure is printed."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from vkd_jax.evaluation.metrics import intervals
from vkd_jax.results import Figure
from vkd_jax.types import Role

ARROWS = {"up": "↑", "down": "↓", "half": "→ 0.5"}


@dataclasses.dataclass(frozen=True)
class Metric:
    """One metric, with all that tables, report and charts print about it.

    Args:
        name: key in `METRICS`, in the answers, and in results.json.
        title: name in headings.
        direction: which values are better. "by_role" is for knowledge: less is better about the people to forget where
            an image is shown, more is better everywhere else (visual unlearning keeps what text says of a name).
            "half" is for metrics of which 0.5 is the best value.
        unit: "%" for shares that are printed in per cent; "" for plain numbers.
        tasks: the tasks whose questions it applies to; () for all.
        item: the value of one record of the answers, None where the record lacks what it needs. None for a metric of
            whole models.
        aggregate: the figure of several values, given the person that each is about.
        in_report: whether the report has a table of it, beside its tables of accuracy.
        stored: whether the value is computed when the answer is judged, and kept in the record.

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
    item: Callable[[Mapping], float | None] | None = None
    aggregate: Callable[[Sequence[float], Sequence[str]], Figure] = intervals.mean
    stored: bool = False
    in_report: bool = True

    def value(self, record: Mapping) -> float | None:
        """The value of one record: the stored one, else a computed one; None where the metric does not apply."""
        if self.name in record:
            return record[self.name]
        if self.item is None or (self.tasks and record["task"] not in self.tasks):
            return None
        return self.item(record)

    def arrow(self, role: Role | None = None, kind: str = "vqa") -> str:
        """The arrow that says which values are better, on a set of that role and for that kind of question."""
        if self.direction == "by_role":
            forgets = role is not None and role.forgets and "vqa" in kind
            return ARROWS["down" if forgets else "up"]
        return ARROWS[self.direction]
