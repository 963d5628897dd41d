"""Warnings of true answers that have more tokens than a model may write."""

import re

import pytest

from vkd_jax.evaluation.answer_lengths import warn_of_long_answers
from vkd_jax.types import Example


def words(texts, add_special_tokens):
    """A tokenizer of one token for each word."""
    assert not add_special_tokens
    return {"input_ids": [text.split() for text in texts]}


def examples(answers, task="generation"):
    return [Example(f"{i}", "Ada", None, "", "Who?", answer, task=task) for i, answer in enumerate(answers)]


NAMES, JOBS = examples(["Otto Lindt", "Ada Lovelace King"]), examples(["judge", "sea captain"], "cloze")
CHOICES = examples(["one of four options"], "classification") + examples(["a suite has rules"], "suite")


@pytest.mark.parametrize(
    ("most", "sets", "problem"),
    [
        (3, dict(forget=NAMES, retain=JOBS), ""),
        (2, dict(forget=NAMES, retain=JOBS), "1 of 4 .*=2, .* the longest has 3: 'Ada Lovelace King'. Give"),
        (
            1,
            dict(forget=NAMES, retain=JOBS),
            "3 of 4 .*=1, .* has 3: .* those of the set forget do: their accuracy can",
        ),
        (1, dict(forget=NAMES, test=NAMES, retain=CHOICES), "4 of 4 .* All those of the set forget, test do: "),
        (1, dict(forget=CHOICES, retain=JOBS[:1]), ""),
    ],
)
def test_true_answers_that_no_model_can_write_are_counted_in_a_warning(most, sets, problem, caplog):
    warn_of_long_answers(sets, most, words)
    assert len(caplog.messages) == bool(problem)
    assert not problem or re.search(problem, caplog.text)
