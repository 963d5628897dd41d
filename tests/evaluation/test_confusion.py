"""With whom the model confuses the forgotten people, and retained people by similarity."""

import pytest

from vkd_jax.evaluation.metrics import confusion
from vkd_jax.evaluation.metrics.summary import summarize
from vkd_jax.results import Confusion
from vkd_jax.types import EvalSet, Example

SETS = (
    EvalSet("forget", "forget", "people to forget", "forget"),
    EvalSet("retain", "retain", "people to retain", "retain"),
)
WHO, JOB, TOWN = "Who is this person?", "What is this person's job?", "Which town?"
PEOPLE = {  # name, job, town
    "f1": ("Ann Lee", "nurse", "Kyoto"),
    "r1": ("Bob Ray", "nurse", "Kyoto"),  # shares two of three facts with f1
    "r2": ("Cy Dow", "nurse", "Quito"),
    "r3": ("Di Fox", "pilot", "Delhi"),
    "r4": ("Di Foxe", "sailor", "Oslo"),
}


def examples(*people):
    return [
        Example(f"{person}/{number}", person, b"image", person, question, answer)
        for person in people
        for number, (question, answer) in enumerate(zip((WHO, JOB, TOWN), PEOPLE[person], strict=True))
    ]


def record(person, question, prediction, correct=False, options=(), set_name="forget", **more):
    return dict(
        set=set_name, id="0", person=person, task="classification", modality="vqa", question=question,
        options=list(options), prediction=prediction, correct=correct, protocol="options",
    ) | more  # fmt: skip


RETAINED = confusion.facts(examples("r1", "r2", "r3", "r4"))


@pytest.mark.parametrize(
    ("question", "prediction", "options", "one", "several", "people"),
    [
        (WHO, "Bob Ray", (), 1, 0, {"r1": 1}),
        (WHO, " bob  RAY.", (), 1, 0, {"r1": 1}),
        (WHO, "It is Di Fox, I think", (), 1, 0, {"r3": 1}),
        (WHO, "Di Foxe", (), 1, 0, {"r4": 1}),  # not r3: whole words
        (WHO, "B", ("Ann Lee", "Cy Dow"), 1, 0, {"r2": 1}),
        (WHO, "Bob Ray or Cy Dow", (), 0, 1, {}),
        (JOB, "nurse", (), 0, 1, {}),
        (JOB, "sailor", (), 1, 0, {"r4": 1}),
        (JOB, "Bob Ray", (), 0, 0, {}),  # the answer to another question
        ("Another?", "Bob Ray", (), 0, 0, {}),
        (WHO, "", (), 0, 0, {}),
        (WHO, None, (), 0, 0, {}),
    ],
)
def test_a_wrong_answer_is_true_of_the_people_with_that_fact(question, prediction, options, one, several, people):
    records = [
        record("f1", question, prediction, options=options),
        record("f1", WHO, "Bob Ray", correct=True),
        record("r3", WHO, "Bob Ray", set_name="retain"),
        record("f1", WHO, "Bob Ray", modality="qa"),
    ]
    assert confusion.confusion(records, RETAINED, SETS) == Confusion(2, 1, one, several, people)


def test_without_people_there_is_no_confusion():
    assert confusion.confusion([record("", WHO, "Bob Ray")], RETAINED, SETS) is None
    assert confusion.confusion([record("f1", WHO, "Bob Ray")], {}, SETS) is None


def test_retained_people_are_grouped_by_the_facts_that_they_share():
    forgotten = confusion.facts(examples("f1"))
    answers = {
        "vanilla": [record(p, WHO, "", correct=True, set_name="retain") for p in ("r1", "r2", "r3", "r4")],
        "unlearned": [record(p, WHO, "", correct=p != "r1", set_name="retain") for p in ("r1", "r2", "r3", "r4")],
    }
    groups = confusion.similarity_groups(answers, forgotten, RETAINED, SETS)
    table = [(round(g.low, 2), round(g.high, 2), g.people, g.accuracy["unlearned"].mean) for g in groups]
    assert table == [(0.0, 0.0, 2, 1.0), (0.33, 0.67, 2, 0.5)]  # equally similar people are together
    assert [g.accuracy["vanilla"].n for g in groups] == [2, 2]
    only_far = confusion.facts(examples("r3", "r4"))
    assert confusion.similarity_groups(answers, forgotten, only_far, SETS) == ()
    assert confusion.similarity_groups(answers, {}, RETAINED, SETS) == ()


@pytest.mark.parametrize(
    ("protocol", "predictions", "share"),
    [("letter", ["B", "a baker", "no idea", ""], 0.75), ("options", ["a baker"], None)],
)
def test_answers_without_a_letter_are_counted_when_they_are_summarized(protocol, predictions, share):
    records = [record("f1", WHO, text, options="abcd", protocol=protocol) for text in predictions]
    figure = summarize(records).metrics.get("no_letter")
    assert (figure and figure.mean) == share
