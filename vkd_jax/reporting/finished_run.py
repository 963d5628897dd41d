"""A finished run, as the input of its reports."""

import dataclasses
from collections.abc import Mapping, Sequence

from vkd_jax.reporting.names import MODELS
from vkd_jax.results import MeasuredSet, Meta, RunResults, Summary
from vkd_jax.types import Role

KINDS = {
    "vqa": "Multiple choice, with image",
    "qa": "Multiple choice, text only",
    "vqa_letter": "Multiple choice by letter, with image",
    "qa_letter": "Multiple choice by letter, text only",
    "vqa_options": "Multiple choice by probability, with image",
    "qa_options": "Multiple choice by probability, text only",
    "cloze_vqa": "Fill in the blank, with image",
    "cloze_qa": "Fill in the blank, text only",
    "generation_vqa": "Open answer, with image",
    "generation_qa": "Open answer, text only",
    "suite_vqa": "Standard suites of general ability",
}


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run, as input of the sections.

    Args:
        results: what is in results.json.
        answers: the records of the answers, by model.
        plots: names of the plots in the report, e.g. "losses".
    """

    results: RunResults
    answers: Mapping[str, Sequence[Mapping]]
    plots: frozenset[str] = frozenset()

    @property
    def meta(self) -> Meta:
        """The metadata of the run, with its config."""
        return self.results.meta

    @property
    def audit(self) -> bool:
        """Whether the unlearned model was trained elsewhere."""
        return self.meta.config.get("stage") == "audit"

    @property
    def models(self) -> dict[str, Mapping[str, Mapping[str, Summary]]]:
        """Summaries of the evaluated models, vanilla first."""
        return {name: self.results.models[name] for name in MODELS if name in self.results.models}

    @property
    def forgets_text(self) -> bool:
        """Whether text-only questions about the people to forget were to be forgotten, too."""
        return any(eval_set.role_of("qa").forgets for eval_set in self.results.sets)

    @property
    def facts(self) -> tuple[str, ...]:
        """The facts about the people to forget that were to be forgotten; () if everything about them was."""
        return tuple(self.meta.config.get("data", {}).get("forget_facts") or ())

    @property
    def kinds(self) -> list[str]:
        """Kinds of question, in the order of the report."""
        asked = self.results.kinds()
        return [*(kind for kind in KINDS if kind in asked), *sorted(set(asked) - KINDS.keys())]

    def sets_with(self, kind: str) -> list[MeasuredSet]:
        """Sets with questions of a kind."""
        return [s for s in self.results.sets if self.results.summary("vanilla", s.name, kind)]

    def set_of(self, role: Role) -> MeasuredSet | None:
        """The first set of a role; None without one."""
        return next(iter(self.results.with_role(role)), None)

    def people(self, role: Role) -> int:
        """Number of people of the set of a role; 0 if the data names none."""
        eval_set = self.set_of(role)
        return eval_set.people if eval_set else 0
