"""Checks of what any benchmark reads: of each question, and of what its sets have in common.

A fault that many rows have means that the data are not what they should be, and is refused. A few such rows, which
published data may have, are counted in a warning.
"""

import dataclasses
import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from absl import logging

from vkd_jax.benchmarks.names import has_words, name_key, plain_name, similar_names, text_key
from vkd_jax.benchmarks.rows import EncodedImage
from vkd_jax.messages import listed, people
from vkd_jax.types import EvalSet, Example, UserError


class _Asked(NamedTuple):
    """A question: its id, the person, the fact if the data have pairs, and whether it has an image."""

    id: str
    person: str
    pair: str
    shown: bool = True


class SetChecks:
    """Checks the sets of a part of a benchmark while they are read, one after another.

    Images are compared by their pixels, whose digests were computed when the images were read: 100,000 of them take
    30 MB, and as many questions 20 MB. Images that a benchmark does not read by `rows.Row` are compared by their bytes.

    Args:
        eval_sets: the evaluation sets of the benchmark. What is not to be forgotten is checked against what is.
    """

    def __init__(self, eval_sets: Sequence[EvalSet]):
        self._evaluated = {s.name for s in eval_sets}
        self._forgetting = {s.name for s in eval_sets if s.role.forgets}
        self._images: dict[bool, dict[bytes, tuple[str, str]]] = {True: {}, False: {}}  # by whether to be forgotten
        self._asked: dict[str, dict[bytes, _Asked]] = {}  # by set; those that were read to their end

    def checked(self, name: str, rows: Iterable[list[Example]]) -> Iterator[list[Example]]:
        """The rows of a set. Wrong answers (`Example.perturbed`) that are the true one are left out.

        Raises:
            UserError: a question, the set, or what it has in common with sets that were read before is wrong.
        """
        forgets, questions = self._forgets(name), _Questions(name)
        for row in rows:
            self._check_images(row, forgets)
            for example in row:
                check_example(example)
                if self._forgetting:
                    questions.add(example)
            yield [_without_true_ones(example) for example in row]
        questions.check()
        self._compare(name, questions.asked)

    def _forgets(self, name: str) -> bool:
        return name.removeprefix("finetune_") in self._forgetting

    def _check_images(self, row: list[Example], forgets: bool) -> None:
        """Checks that no image of a person to forget is another's in one of the other sets.

        An image of one person may be in both where some facts about a person are forgotten and others stay.
        """
        for example in {e.image_id: e for e in row if e.image is not None}.values():
            pixels, person = _pixels(example), example.person
            other, owner = self._images[not forgets].get(pixels, ("", person))
            if owner != person:
                pair = (example.image_id, other) if forgets else (other, example.image_id)
                raise UserError(
                    f"The image {pair[0]}, which is to be forgotten, has the same pixels as the image {pair[1]} of "
                    "somebody else, which is not; remove one of them from the data."
                )
            self._images[forgets].setdefault(pixels, (example.image_id, person))

    def _compare(self, name: str, asked: Mapping[bytes, _Asked]) -> None:
        """Checks that a question about an image is not both to be forgotten and not, and that sets differ."""
        for other, before in self._asked.items():
            both = [(before[key], asked[key]) for key in before.keys() & asked.keys()]
            if self._forgets(name) != self._forgets(other):
                both = [(a, b) for a, b in both if not (a.pair and b.pair and a.pair != b.pair)]  # different facts
                if both:
                    raise UserError(
                        f"{len(both)} questions are both to be forgotten and not: the sets {other} and {name} share "
                        f"{_examples(both)}; remove them from one of the two."
                    )
            elif {name, other} <= self._evaluated:
                fewest = min(sum(each.shown for each in found.values()) for found in (before, asked))
                both = [(a, b) for a, b in both if a.shown]
                refuse_most(both, fewest, f"questions with an image of the set {name} are also in the set {other}")
        self._asked[name] = dict(asked)


class _Questions:
    """The questions of a set, and what is wrong with some of them.

    Attributes:
        asked: the questions by `_key`: those with an image, and those in text about somebody.
    """

    def __init__(self, name: str):
        self._name = name
        self.asked: dict[bytes, _Asked] = {}
        self._facts: dict[tuple[str, str], tuple[str, str]] = {}  # (id, answer) of a fact, by task
        self._counts = dict.fromkeys(("perturbed", "keywords", "chat"), 0)  # of questions that have them
        self._found: dict[str, list] = {"perturbed": [], "keywords": [], "chat": [], "person": [], "pair": []}

    def add(self, example: Example) -> None:
        """Adds a question."""
        if example.perturbed:
            self._counts["perturbed"] += 1
            self._found["perturbed"] += [] if _without_true_ones(example).perturbed else [example.id]
        if example.keywords:
            self._counts["keywords"] += 1
            answer = text_key(example.answer)
            self._found["keywords"] += [] if any(text_key(x) in answer for x in example.keywords) else [example.id]
        if example.task == "chat":
            self._counts["chat"] += 1
            self._found["chat"] += [] if has_words(example.answer) else [example.id]
        if example.image is not None or example.person:
            shown = example.image is not None
            this = _Asked(example.id, example.person, example.pair, shown)
            first = self.asked.setdefault(_key(example), this)
            self._found["person"] += [(first.id, example.id)] if first.person != example.person else []
        if example.pair and example.task in ("classification", "cloze"):
            answer = text_key(example.answer)
            first_id, other = self._facts.setdefault((example.pair, example.task), (example.id, answer))
            self._found["pair"] += [(first_id, example.id)] if answer != other else []

    def check(self) -> None:
        """Refuses what most questions have, and warns of what a few have.

        Raises:
            UserError: most have it.
        """
        of_set, found = f"questions of the set {self._name}", self._found
        problem = f"{of_set} have wrong answers that are the true one"
        refuse_most(found["perturbed"], self._counts["perturbed"], problem)
        problem = f"{of_set} have keywords of which none is in the true answer"
        refuse_most(found["keywords"], self._counts["keywords"], problem)
        refuse_most(found["chat"], self._counts["chat"], f"{of_set} have answers without a letter or a digit")
        shown = sum(each.shown for each in self.asked.values())
        refuse_most(found["person"], shown, f"{of_set} are asked about somebody else with the same image")
        problem = f"{of_set} have another answer than the same fact in the other modality"
        _warn(found["pair"], len(self._facts), problem)


def check_example(example: Example) -> None:
    """Checks that a question asks something, and that not every answer is right.

    Raises:
        UserError: one of these is not the case.
    """
    if not plain_name(example.question):
        raise UserError(f"{example.label}: the question is blank; correct the row.")
    if not all(map(plain_name, example.options)):
        raise UserError(f"{example.label}: one of its options is blank; correct the row.")
    if example.task in ("generation", "cloze") and not has_words(example.answer):
        problem = f"the answer {example.answer!a} has no letter and no digit, so that almost any answer has it"
        raise UserError(f"{example.label}: {problem}; correct the row.")
    if example.options and len(set(map(plain_name, example.options))) < 2:
        problem = f"all of its options are {example.options[0]!r}, so that every answer would be right"
        raise UserError(f"{example.label}: {problem}; give it two or more different ones.")


def check_names(sets: Mapping[str, Sequence[Example]], eval_sets: Sequence[EvalSet]) -> None:
    """Checks all sets, those for training included, by the names of people and facts.

    Nobody to forget may be in other sets under another spelling, nor may a fact to forget (`Example.pair`) be in any,
    as where two files name different people for it.

    Raises:
        UserError: one of them may be.
    """
    forgetting = {s.name for s in eval_sets if s.role.forgets}
    names = {name: ({e.person for e in x} - {""}, {e.pair for e in x} - {""}) for name, x in sets.items()}
    forget = [name for name in sets if name.removeprefix("finetune_") in forgetting]
    for name, other in itertools.product(forget, [name for name in sets if name not in forget]):
        (forgotten, facts), (persons, others) = names[name], names[other]
        if pairs := similar_names(forgotten, persons):
            raise UserError(
                f"The set {name} has {people(len(pairs))} who may be in the set {other} under another spelling: "
                f"{listed(pairs)}; spell one person's name in one way in all files of the data."
            )
        if both := sorted(facts & others):
            raise UserError(
                f"{len(both)} facts are in the set {name}, which is to be forgotten, and in the set {other}, which is "
                f"not: {listed(both)}; say of each whom it is about in the same way in all files of the data."
            )


def check_held_out(held_out: Sequence[Example], sets: Mapping[str, Sequence[Example]], field: str) -> None:
    """Checks that questions about people whom no model was trained on have neither people nor images of the data.

    Args:
        held_out: these questions.
        sets: all sets of the data.
        field: the field of the config that gives them, for messages.

    Raises:
        UserError: they have some.
    """
    strangers = {name_key(e.person): e.person for e in held_out} | {"": ""}
    images = {hashlib.sha256(image).digest() for image in {e.image_id: e.image for e in held_out if e.image}.values()}
    for name, examples in sets.items():
        known = {name_key(e.person) for e in examples} - {""}
        if both := [strangers[key] for key in sorted(known & strangers.keys())]:
            raise UserError(f"{field}: {people(len(both))} also in the set {name}: {listed(both)}; give other people.")
        shown = {e.image_id: e.image for e in examples if e.image}
        if both := sorted(key for key, image in shown.items() if hashlib.sha256(image).digest() in images):
            raise UserError(f"{field}: {len(both)} images also in the set {name}: {listed(both)}; give other people.")


def refuse_most(found: Sequence, count: int, problem: str) -> None:
    """Refuses a fault that more than half of some questions have, and warns of fewer.

    Args:
        found: the ids of the questions that have it, or pairs of questions.
        count: the number of all questions.
        problem: the fault, as it continues "3 of 7".

    Raises:
        UserError: more than half have it.
    """
    if 2 * len(found) > count:
        raise UserError(f"{_counted(found, count, problem)}; get the data again, or correct them.")
    _warn(found, count, problem)


def _warn(found: Sequence, count: int, problem: str) -> None:
    if found:
        logging.warning("%s", _counted(found, count, problem))


def _counted(found: Sequence, count: int, problem: str) -> str:
    return f"{len(found)} of {count} {problem}, such as {_examples(found)}"


def _examples(found: Sequence) -> str:
    """The first of some questions, or pairs of questions, by their ids."""
    first = min(found)
    ids = [getattr(each, "id", each) for each in first] if isinstance(first, tuple) else [first]
    return " and ".join(ids)


def _without_true_ones(example: Example) -> Example:
    """An example whose wrong answers are neither the true answer nor its paraphrase, and whose paraphrase is seen."""
    if example.paraphrase and not plain_name(example.paraphrase):
        example = dataclasses.replace(example, paraphrase="")
    true = {text_key(example.answer), text_key(example.paraphrase)}
    if not any(text_key(text) in true for text in example.perturbed):
        return example
    return dataclasses.replace(example, perturbed=tuple(x for x in example.perturbed if text_key(x) not in true))


def _pixels(example: Example) -> bytes:
    image = example.image
    return image.pixels if isinstance(image, EncodedImage) else hashlib.sha256(image).digest()


def _key(example: Example) -> bytes:
    """What equal questions about equal images share; without an image, equal questions and answers about one person."""
    question = text_key(example.question)
    if example.image is not None:
        return hashlib.sha256(_pixels(example) + question.encode()).digest()[:16]
    return hashlib.sha256(repr((example.person, question, text_key(example.answer))).encode()).digest()[:16]
