"""Tests of prompts in a user's own wording."""

import json
import re

import pytest

from vkd_jax.benchmarks.mllmu import cloze_prompt
from vkd_jax.evaluation.metrics.correctness import LETTER_RULES
from vkd_jax.evaluation.wording import Wording, read_wording
from vkd_jax.types import Example, UserError


def example(task, question="Who is {this}?", options=()):
    return Example("0", "", None, "", question, "cook", options, task)


def write(tmp_path, values):
    path = tmp_path / "prompts.json"
    path.write_text(values if isinstance(values, str) else json.dumps(values))
    return path


def test_each_kind_of_question_has_its_wording(tmp_path):
    values = {
        "letter": "<{question}>\n{options}\n{{x}}",
        "option": "({letter}) {text}",
        "cloze": "Fill: {question}",
        "generation": "Q: {question} A:",
    }
    wording = read_wording(write(tmp_path, values))
    choice = example("classification", options=("cook", "a {pilot}"))
    assert wording.letter_question(choice) == "<Who is {this}?>\n(A) cook\n(B) a {pilot}\n{x}"
    assert wording.question(example("cloze", cloze_prompt("She is a __."))) == "Fill: She is a [Blank]."
    assert wording.question(example("generation")) == "Q: Who is {this}? A:"
    assert wording.question(choice) == choice.question


def test_fields_that_are_left_out_keep_the_wording(tmp_path):
    for wording in (read_wording(""), read_wording(write(tmp_path, {}))):
        assert wording == Wording()
        cloze = example("cloze", cloze_prompt("She is a __."))
        assert wording.question(cloze) == cloze.question


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ("{", "prompts.json: it is not JSON"),
        ("[]", "prompts.json: expected an object, not an array"),
        ({"letters": "{question}"}, "unknown field 'letters'. Available: letter, option, cloze, generation."),
        ({"letter": 3}, "letter is the number 3; write a text with {question} and {options}."),
        ({"letter": None}, "letter is null; write a text"),
        ({"cloze": " "}, "cloze is the text ' '; write a text with {question}."),
        ({"letter": "{question}"}, "letter lacks the slot {options}"),
        ({"option": "{text}"}, "option lacks the slot {letter}"),
        ({"generation": "{question} {answer}"}, "generation has the unknown slot {answer}"),
        ({"generation": "{question.__class__}"}, "generation has the unknown slot {question.__class__}"),
        (
            {"generation": "{question!r}"},
            "generation has {question!r}, and a slot has its name alone; write {question}",
        ),
        ({"generation": "{question:>{width}}"}, "generation has {question:>{width}}, and a slot has its name alone"),
        ({"generation": "{question:>1000000000}"}, "generation has {question:>1000000000}, and a slot"),
        ({"generation": "{question}{question!s:5}"}, "generation has {question!s:5}, and a slot"),
        ({"generation": "{question[0]}"}, "generation has the unknown slot {question[0]}"),
        ({"generation": "{0}"}, "generation has the unknown slot {0}"),
        ({"generation": "{}"}, "generation has the unknown slot {}"),
        ({"generation": "{question} }"}, "generation is not a template"),
        ({"generation": "{question"}, "generation is not a template"),
        ({"generation": "{question}\ud800"}, "generation is not Unicode"),
    ],
)
def test_faults_of_the_file(tmp_path, values, problem):
    with pytest.raises(UserError, match=re.escape(problem)):
        read_wording(write(tmp_path, values))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="There is no file .*prompts.json"):
        read_wording(tmp_path / "prompts.json")


@pytest.mark.parametrize(
    ("answer", "letter", "first_character"),
    [
        ("accordion", None, "A"),
        (" cycling", None, "C"),
        ("dentist", None, "D"),
        ("B: pilot", "B", "B"),
        ("**c**", "C", "C"),
        ("The answer is C", "C", None),
        ("E", None, None),
        ("4", None, None),
        ("", None, None),
        (None, None, None),
        ("ß", None, None),
    ],
)
def test_the_rules_of_letters(answer, letter, first_character):
    options = ("cook", "pilot", "nurse", "judge")
    rules = {name: LETTER_RULES[name](answer, options) for name in ("letter", "letter:first_character")}
    assert rules == {"letter": letter, "letter:first_character": first_character}
