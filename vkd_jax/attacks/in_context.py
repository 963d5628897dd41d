"""In-context relearning: answered questions about the person in the prompt, before an unanswered one.

The attacker knows a share of the facts, changes no weight, and shows them as earlier turns of the conversation about
the same image:

    image, question 1 -> answer 1;  question 2 -> answer 2;  the question that counts

Worked examples that contain the evaluated question or its answer are left out, because repeating it would not be
recall. Questions about people of whom the attacker knows nothing are not asked.

References: Shumailov et al., "UnUnlearning", arXiv 2407.00106; Jin et al. (RWKU), arXiv 2406.10890, whose in-context
attack also shows facts about the person. Examples about other people, as in other code, only teach the form.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar

from vkd_jax.attacks import base
from vkd_jax.attacks.base import Records, Subject
from vkd_jax.attacks.lessons import attacker_rows, labeled, recoveries
from vkd_jax.config.fields import Section, setting
from vkd_jax.config.schema import RunConfig
from vkd_jax.results import UNCHANGED, AttackCell
from vkd_jax.types import Example, Role, UserError


@dataclasses.dataclass(frozen=True)
class InContext(Section):
    """Worked examples about the same person before each question."""

    SECTION: ClassVar[str] = "attacks.in_context"
    share: float = setting(
        0.2, "Share of the forget questions with an image that the attacker knows the answers of.", above=0, below=1
    )
    examples: tuple[int, ...] = setting(
        (1, 2), "Largest numbers of worked examples, each in its own attempt.", minimum=1, maximum=100
    )

    TITLE: ClassVar[str] = "In-context relearning: worked examples about the person in the prompt"
    ABOUT: ClassVar[str] = (
        "The prompt shows the image with answered questions about the same person, and then asks another question, "
        "whose answer does not occur in it. An accuracy above that of the retain-only model with the same prompts "
        "means that a few facts about a person recall the others."
    )
    METRIC: ClassVar[str] = "accuracy"
    VARIANTS: ClassVar[Mapping[str, str]] = {UNCHANGED: "without worked examples"}

    def check(self, config: RunConfig) -> None:
        """All valid settings can run."""

    def run(self, subject: Subject) -> Records:
        """The answers without and with worked examples.

        Raises:
            UserError: a prompt is too long for the model.
        """
        questions = base.questions(subject, Role.FORGET, Role.FORGET_HOLDOUT)
        rows = attacker_rows(self.share, len(subject.forgets), subject.seed)
        known = [subject.forgets[i] for i in rows]
        records = [base.attack_record(UNCHANGED, r) for r in subject.unattacked(questions)]
        for count in self.examples:
            context = {
                (name, e.id): worked
                for name, examples in questions.items()
                for e in examples
                if (worked := worked_examples(e, known, count))
            }
            sets = {name: [e for e in examples if (name, e.id) in context] for name, examples in questions.items()}
            if not context:
                continue
            try:
                answers = subject.ask_sets(subject.model, sets, context=context)
            except UserError as error:
                raise UserError(f"attacks.in_context.examples: {count} may be too many: {error}") from error
            title = f"{count} worked example{'s' if count > 1 else ''}"
            records += labeled(subject, answers, rows, variant=title, share=self.share, unit="questions")
        return records

    def summarize(self, records: Mapping[str, Records]) -> list[AttackCell]:
        """The accuracy with each number of worked examples, and the recovery."""
        return recoveries(records)


def worked_examples(example: Example, known: Sequence[Example], count: int) -> list[Example]:
    """At most `count` known questions about the person of an example, shown with the image of the example.

    Questions and answers of the example itself are left out, and each question occurs once.
    """
    others = {
        other.question: other
        for other in reversed(known)
        if other.person == example.person != "" and example.question != other.question
        if example.answer not in (other.answer, other.paraphrase)
    }
    chosen = list(others.values())[::-1][:count]
    return [dataclasses.replace(other, image=example.image, image_id=example.image_id) for other in chosen]
