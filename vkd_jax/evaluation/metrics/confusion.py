"""With whom a model confuses the forgotten people, and the accuracy on retained people who share facts with them.

A fact is the true answer to a question with an image, as "Who is this person?" or "What is this person's job?". Two
people share a fact if the data gives the same answer to the same question about both. Texts are compared without regard
to case and spelling, see `names.text_key`.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from vkd_jax.benchmarks.names import text_key
from vkd_jax.evaluation.metrics import intervals
from vkd_jax.evaluation.metrics.correctness import LETTERS, counted_option
from vkd_jax.results import Confusion, SimilarityGroup
from vkd_jax.types import EvalSet, Example, Role

Facts = Mapping[str, Mapping[str, str]]  # {person: {question: answer}}


def facts(examples: Iterable[Example]) -> dict[str, dict[str, str]]:
    """The facts of each person, from all questions with an image."""
    people: dict[str, dict[str, str]] = {}
    for example in examples:
        if example.image is not None and example.person and example.task != "chat":
            people.setdefault(example.person, {})[text_key(example.question)] = text_key(example.answer)
    return people


def confusion(records: Iterable[Mapping], retained: Facts, sets: Sequence[EvalSet]) -> Confusion | None:
    """Counts the wrong answers about forgotten people that are true of retained ones; None without such questions.

    An answer is true of a retained person if it contains, as whole words, the person's answer to the same question. A
    name is usually true of one person, and a job of several.

    Args:
        records: answers of a model.
        retained: the facts of the retained people.
        sets: the evaluation sets; those with the role `forget` count.
    """
    names = {eval_set.name for eval_set in sets if eval_set.role is Role.FORGET}
    asked = [r for r in records if r["set"] in names and r["modality"] == "vqa" and r["person"]]
    if not asked or not retained:
        return None
    people: dict[str, dict[str, set[str]]] = {}  # question -> answer -> people
    for person, answers in retained.items():
        for question, answer in answers.items():
            people.setdefault(question, {}).setdefault(answer, set()).add(person)
    several, named = 0, Counter()
    for record in (r for r in asked if not r["correct"]):
        given, known = text_key(answered(record)), people.get(text_key(record["question"]), {})
        matches = [known[answer] for answer in known if re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", given)]
        candidates = set().union(*matches)
        several += len(candidates) > 1
        named.update(candidates if len(candidates) == 1 else ())
    return Confusion(
        n=len(asked),
        correct=sum(bool(r["correct"]) for r in asked),
        one=named.total(),
        several=several,
        people=dict(sorted(named.items(), key=lambda item: (-item[1], item[0]))),
    )


def similarity_groups(
    answers: Mapping[str, Iterable[Mapping]], forgotten: Facts, retained: Facts, sets: Sequence[EvalSet]
) -> tuple[SimilarityGroup, ...]:
    """Accuracy on the retain set by similarity to the forgotten people, in up to three groups, the least similar first.

    The similarity of a retained person is the largest share of facts that the person shares with a forgotten one, of
    the questions that are asked about both. Groups are tertiles; equally similar people are in one group. Empty if all
    are equally similar.

    Args:
        answers: records of each model.
        forgotten: the facts of the forgotten people.
        retained: the facts of the retained people.
        sets: the evaluation sets; those with the role `retain` count.
    """
    names = {eval_set.name for eval_set in sets if eval_set.role is Role.RETAIN}
    models = {
        model: [r for r in records if r["set"] in names and r["modality"] == "vqa"]
        for model, records in answers.items()
    }
    asked = {r["person"] for records in models.values() for r in records}
    similar = {
        person: max(shares)
        for person in sorted(asked & retained.keys())
        if (shares := [x for other in forgotten.values() if (x := _shared(retained[person], other)) is not None])
    }
    order = sorted(similar.values())
    if not order or order[0] == order[-1]:
        return ()
    cuts = order[len(order) // 3], order[2 * len(order) // 3]
    members: dict[int, list[str]] = {}
    for person, value in similar.items():
        members.setdefault(sum(value >= cut for cut in cuts), []).append(person)
    return tuple(
        SimilarityGroup(
            low=min(similar[person] for person in people),
            high=max(similar[person] for person in people),
            people=len(people),
            accuracy={model: _accuracy(records, set(people)) for model, records in models.items()},
        )
        for _, people in sorted(members.items())
    )


def answered(record: Mapping) -> str:
    """The text of a model's answer; of a letter, the option that it stands for."""
    letter = counted_option(record)
    return record["options"][LETTERS.index(letter)] if letter else record["prediction"] or ""


def _accuracy(records: Sequence[Mapping], people: set[str]):
    about = [r for r in records if r["person"] in people]
    return intervals.proportion([bool(r["correct"]) for r in about], [r["person"] for r in about])


def _shared(one: Mapping[str, str], other: Mapping[str, str]) -> float | None:
    """The share of equal answers to the questions that are asked about both people."""
    questions = one.keys() & other.keys()
    return sum(one[q] == other[q] for q in questions) / len(questions) if questions else None
