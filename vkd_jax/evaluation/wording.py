"""The wording of prompts: this package's, or a user's own from a JSON file (`config.eval.prompts`).

    {"letter": "{question}\\n{options}\\nAnswer with the letter only.",
     "option": "{letter}: {text}",
     "cloze": "{question}\\nFill in the blank.",
     "generation": "{question}\\nAnswer in one sentence."}

Every field is optional, and those that are left out keep this package's wording:

    field       questions                        slots
    letter      with options, protocol letter    {question}, {options} (a line for each option)
    option      the line of one option           {letter}, {text}
    cloze       with a blank                     {question} (with [Blank], without this package's instruction)
    generation  open                             {question}

Every slot of a field must occur in it; {{ and }} are braces. The wording is that of the prompts of answers that the
model writes; likelihoods are scored after the plain question, as in training.
"""

import dataclasses
import os
import string

from vkd_jax.benchmarks.mllmu import CLOZE_INSTRUCTION
from vkd_jax.evaluation.metrics.correctness import LETTERS
from vkd_jax.runtime import json_files, storage
from vkd_jax.types import Example, UserError, located

INSTRUCTION = "Answer with the letter of the right option only."
SLOTS = {
    "letter": ("question", "options"),
    "option": ("letter", "text"),
    "cloze": ("question",),
    "generation": ("question",),
}


@dataclasses.dataclass(frozen=True)
class Wording:
    """Templates of prompts; "" leaves a question as the benchmark has it.

    Example:
        >>> Wording(generation="Q: {question}").question(example)
        'Q: Who is this?'
    """

    letter: str = "{question}\n{options}\n" + INSTRUCTION
    option: str = "{letter}: {text}"
    cloze: str = ""
    generation: str = ""

    def question(self, example: Example) -> str:
        """The prompt of an open question or of one with a blank, which the model answers in its own words."""
        template = {"cloze": self.cloze, "generation": self.generation}.get(example.task, "")
        question = example.question
        if template and example.task == "cloze":
            question = question.removesuffix(f"\n{CLOZE_INSTRUCTION}")
        return template.format(question=question) if template else question

    def letter_question(self, example: Example) -> str:
        """The prompt of a question with options, which the model answers with a letter.

        Raises:
            UserError: the question has more options than the alphabet has letters.
        """
        if len(example.options) > len(LETTERS):
            raise UserError(f"{example.label} has {len(example.options)} options; use eval.protocol=options.")
        pairs = zip(LETTERS, example.options, strict=False)
        lines = [self.option.format(letter=letter, text=option) for letter, option in pairs]
        return self.letter.format(question=example.question, options="\n".join(lines))


def read_wording(path: str | os.PathLike[str]) -> Wording:
    """Reads a file of prompt wordings; "" is this package's wording.

    Raises:
        UserError: the file cannot be read, a field is unknown, or a template is not a text with exactly its slots.
    """
    if not os.fspath(path):
        return Wording()
    with located(f"--config.eval.prompts={path}"):
        values = json_files.read_json(storage.resolve(path), remedy="correct it")
        for field, template in values.items():
            if field not in SLOTS:
                raise UserError(f"unknown field {field!r}. Available: {', '.join(SLOTS)}.")
            check_template(field, template, SLOTS[field])
    return Wording(**values)


def check_template(name: str, template: object, slots: tuple[str, ...]) -> None:
    """Checks that the template of a field is a text with exactly these slots.

    Raises:
        UserError: it is not.
    """
    expected = "write a text with " + " and ".join(f"{{{slot}}}" for slot in slots)
    if not isinstance(template, str) or not template.strip():
        raise UserError(f"{name} is {json_files.describe(template)}; {expected}.")
    try:
        parts = [part[1:] for part in string.Formatter().parse(template) if part[1] is not None]
    except ValueError as error:
        raise UserError(
            f"{name} is not a template ({error}); {expected}, and other braces as {{{{ and }}}}."
        ) from error
    for slot, form, conversion in parts:
        written = slot + (f"!{conversion}" if conversion else "") + (f":{form}" if form else "")
        if slot not in slots:
            raise UserError(
                f"{name} has the unknown slot {{{written}}}; {expected}, and other braces as {{{{ and }}}}."
            )
        if form or conversion:
            raise UserError(f"{name} has {{{written}}}, and a slot has its name alone; write {{{slot}}} instead.")
    if missing := [slot for slot in slots if slot not in {part[0] for part in parts}]:
        raise UserError(f"{name} lacks the slot {{{missing[0]}}}; {expected}.")
