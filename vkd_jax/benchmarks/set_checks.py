"""Checks of what any benchmark reads: of each question, and of what its sets have in common.

A fault that many rows have means that the data are not what they should be, and is refused. A few such rows, which
published data may have, are counted in a warning.
"""

import collections
import dataclasses
import hashlib
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from absl import logging

from vkd_jax.benchmarks.names import (
    MISSING,
    answer_key,
    check_scripts,
    has_words,
    name_key,
    plain_name,
    question_key,
    similar_names,
    text_key,
)
from vkd_jax.benchmarks.rows import EncodedImage
from vkd_jax.messages import listed, people
from vkd_jax.types import EvalSet, Example, Role, UserError

# What questions may have, in the order in which it is checked.
_FAULTS = {
    "wordless": "wrong answers without a letter or a digit",
    "paraphrase": "a paraphrase of the true answer without a letter or a digit",
    "wrong": "a paraphrase of the true answer that is one of the wrong ones",
    "perturbed": "wrong answers that are the true one",
    "keywords": "keywords of which none is in the true answer",
    "letters": "only keywords of one letter or digit, or such as 'the', which almost any answer has",
    "chat": "answers without a letter or a digit",
    "lost": "the character U+FFFD, which stands for one that was lost",
    "missing": "a text such as nan, NaN or <NA>, as programs write a missing value",
    "role": "answers that begin with the name of who speaks, such as ASSISTANT:",
    "equal": "the same option twice",
    "letters_of_options": "options that begin with the letter of another place",
    "index": "a number or a letter for the true option, unlike the others",
}
# The same, where the question is asked all the same.
_MENDED = {
    "keywords_twice": "the same keyword twice, which counts once unless the rules are upstream's",
    "left_out": "wrong answers that are the true one or there twice, which are left out",
}
MOST_OF_NAME = 100  # characters of an answer that may be a name
# Tasks whose true answer is not a sentence, which another set may word otherwise.
_ONE_ANSWER = ("classification", "cloze")
# Who speaks, in front of an answer that was cut out of a conversation.
_ROLE = re.compile(r"(assistant|gpt|bot|answer)\s*:", re.IGNORECASE)
# Words that say nothing about whom or what a text is about.
_FUNCTION_WORDS = frozenset(
    "a an and are as at be by for from had has have he her his in is it its of on or she that the their they this to "
    "was were who with".split()
)
# The letter that an option begins with, or is.
_LABEL = re.compile(r"\(?([A-Za-z])(?:[.):].*)?", re.DOTALL)


class _Asked(NamedTuple):
    """A question: its id, the person, the fact if the data have pairs, and whether it has an image."""

    id: str
    person: str
    pair: str
    shown: bool = True


class _Answered(NamedTuple):
    """A question with its answer: its id, the key of the answer, and the task."""

    id: str
    answer: str
    task: str


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
        self._answers: dict[str, dict[bytes, _Answered]] = {}  # the same

    def checked(self, name: str, rows: Iterable[list[Example]]) -> Iterator[list[Example]]:
        """The rows of a set. Wrong answers (`Example.perturbed`) that are true or have no words are left out.

        Equal wrong answers or keywords of a question count once.

        Raises:
            UserError: a question, the set, or what it has in common with sets that were read before is wrong.
        """
        forgets, questions = self._forgets(name), _Questions(name)
        for row in rows:
            self._check_images(row, forgets)
            for example in row:
                check_example(example)
                questions.add_options(example)
                if self._forgetting:
                    questions.add(example)
                else:
                    questions.add_answer(example)
            questions.end_row()
            yield [_usable(example) for example in row]
        questions.check()
        self._compare(name, questions.asked)
        self._compare_answers(name, questions.answers)

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

    def _compare_answers(self, name: str, answers: Mapping[bytes, _Answered]) -> None:
        """Checks that a question with one right answer has the same one in all sets to forget, or to retain."""
        for other, before in self._answers.items():
            if self._forgets(name) != self._forgets(other):  # a question there may ask for another fact
                continue
            both = [(before[key], answers[key]) for key in before.keys() & answers.keys()]
            both = [(a, b) for a, b in both if a.task in _ONE_ANSWER]
            contradictions = [(a.id, b.id) for a, b in both if a.answer != b.answer]
            problem = f"questions of the set {name} have another answer in the set {other}"
            refuse_most(contradictions, len(both), problem)
        self._answers[name] = dict(answers)


class _Questions:
    """The questions of a set, and what is wrong with some of them.

    Attributes:
        asked: the questions by `_key`: those with an image, and those in text about somebody.
        answers: the answers by question and the way in which it is asked.
    """

    def __init__(self, name: str):
        self._name = name
        self.asked: dict[bytes, _Asked] = {}
        self._by_answer: dict[tuple[str, str], list[str]] = collections.defaultdict(list)  # and by person
        self._facts: dict[tuple[str, str], tuple[str, str]] = {}  # (id, answer) of a fact, by task
        self.answers: dict[bytes, _Answered] = {}
        self._twice: dict[bytes, tuple[str, str]] = {}  # the ids of the first two of equal questions
        self._repeats: list[tuple[bool, bytes, tuple[str, str]]] = []  # of a row: whether with an image, and the ids
        self._has_new_image = False  # whether the row has a new question with an image
        self._counts: dict[str, int] = collections.Counter()  # of questions that may have a fault
        self._found: dict[str, list] = collections.defaultdict(list)  # those that have it

    def _note(self, fault: str, example: Example, has_it: bool) -> None:
        self._counts[fault] += 1
        self._found[fault] += [example.id] if has_it else []

    def add_options(self, example: Example) -> None:
        """Adds the options of a question, if it has some."""
        if not example.options:
            return
        answer, keys = answer_key(example.answer), [answer_key(option) for option in example.options]
        self._note("equal", example, len(set(keys)) < len(keys))
        self._note("letters_of_options", example, misplaced(example.options))
        others = [key for key in keys if key != answer]
        self._note("index", example, _is_index(answer) and not any(_is_index(key) or key.isdecimal() for key in others))

    def add(self, example: Example) -> None:
        """Adds a question."""
        self._add_wrong_answers(example)
        if example.keywords:
            answer, keywords = text_key(example.answer), list(map(text_key, example.keywords))
            self._note("keywords", example, not any(keyword in answer for keyword in keywords))
            self._note("letters", example, all(_is_common(key) and len(key) < len(answer) for key in keywords))
            self._note("keywords_twice", example, len(set(keywords)) < len(keywords))
        if example.task == "chat":
            self._note("chat", example, not has_words(example.answer))
        texts = (example.question, example.answer, *example.options)
        self._note("lost", example, any("\N{REPLACEMENT CHARACTER}" in text for text in texts))
        self._note("missing", example, any(text.strip() in MISSING for text in texts))
        if not example.options:
            self._note("role", example, bool(_ROLE.match(plain_name(example.answer))))
        if example.person and len(example.answer) <= MOST_OF_NAME:
            self._by_answer[name_key(example.answer), name_key(example.person)].append(example.id)
        if example.image is not None or example.person:
            self.add_answer(example)
            shown = example.image is not None
            this = _Asked(example.id, example.person, example.pair, shown)
            first = self.asked.setdefault(_key(example), this)
            self._found["person"] += [(first.id, example.id)] if first.person != example.person else []
        if example.pair and example.task in ("classification", "cloze"):
            answer = text_key(example.answer)
            first_id, other = self._facts.setdefault((example.pair, example.task), (example.id, answer))
            self._found["pair"] += [(first_id, example.id)] if answer != other else []

    def add_answer(self, example: Example) -> None:
        """Compares the answer with that of the same question, if it was asked in the same way before."""
        answer = text_key(example.answer)
        chat = answer if example.task == "chat" else ""  # an image may have several captions to train on
        way = example.person, example.pair, example.task, sorted(map(text_key, example.options)), chat
        key = hashlib.sha256(_subject(example) + repr(way).encode()).digest()[:16]
        shown = example.image is not None
        if (first := self.answers.get(key)) is None:
            self.answers[key] = _Answered(example.id, answer, example.task)
            self._has_new_image |= shown
        elif answer == first.answer:
            self._repeats.append((shown, key, (first.id, example.id)))
        else:
            self._found["contradiction"].append((first.id, example.id))

    def end_row(self) -> None:
        """Counts the questions of a row that were there before.

        Several images of somebody may come with the same questions in text, one row each: those are not counted.
        """
        for shown, key, ids in self._repeats:
            if shown or not self._has_new_image:
                self._twice.setdefault(key, ids)
        self._repeats, self._has_new_image = [], False

    def _add_wrong_answers(self, example: Example) -> None:
        """Adds the wrong answers and the paraphrase, of which truth ratios are computed."""
        paraphrase = text_key(example.paraphrase)
        if paraphrase:
            self._note("paraphrase", example, not has_words(paraphrase))
            is_wrong = paraphrase != text_key(example.answer) and paraphrase in map(text_key, example.perturbed)
            self._note("wrong", example, is_wrong)
        if example.perturbed:
            worded = list(filter(has_words, example.perturbed))
            self._note("wordless", example, len(worded) < len(example.perturbed))
            left = _usable(example).perturbed
            self._note("perturbed", example, bool(worded) and not left)
            self._note("left_out", example, 0 < len(left) < len(worded))

    def check(self) -> None:
        """Refuses what most questions have, and warns of what a few have.

        Raises:
            UserError: most have it.
        """
        of_set, found = f"questions of the set {self._name}", self._found
        for fault, problem in _FAULTS.items():
            refuse_most(found[fault], self._counts[fault], f"{of_set} have {problem}")
        shown = sum(each.shown for each in self.asked.values())
        refuse_most(found["person"], shown, f"{of_set} are asked about somebody else with the same image")
        refuse_most(found["contradiction"], len(self.answers), f"{of_set} have two different answers")
        refuse_most(list(self._twice.values()), len(self.answers), f"{of_set} are there twice")
        for fault, problem in _MENDED.items():
            _warn(found[fault], self._counts[fault], f"{of_set} have {problem}")
        people_of_set = {person for _, person in self._by_answer}
        named = {pair: ids for pair, ids in self._by_answer.items() if pair[0] in people_of_set}
        others = [question for (answer, person), ids in named.items() if answer != person for question in ids]
        names = f"{of_set} whose answer is the name of one of its people have somebody else's"
        _warn(others, sum(map(len, named.values())), names)
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


def misplaced(options: Sequence[str]) -> bool:
    """Whether options begin with the letters A, B, C, ..., but in another order than that of their places.

    Example:
        >>> misplaced(["B. nurse", "A. judge"]), misplaced(["B. Obama", "J. Biden"])
        (True, False)
    """
    letters = [match[1].upper() if (match := _LABEL.fullmatch(plain_name(text))) else "" for text in options]
    expected = [chr(ord("A") + number) for number in range(len(options))]
    return letters != expected and sorted(letters) == expected


def check_names(
    sets: Mapping[str, Sequence[Example]], eval_sets: Sequence[EvalSet], shares_people: bool = False
) -> None:
    """Checks all sets, those for training included, by the names of people and facts.

    Refused are people to forget who are in another set, under another spelling or, unless facts divide people, under
    the same name; facts to forget (`Example.pair`) that another set has, as where two files name different people for
    them; and training that forgets other people than those of the forget set.

    Args:
        sets: the sets.
        eval_sets: the evaluation sets of the benchmark.
        shares_people: whether one person may be in sets to forget and to retain, see `vkd_jax.benchmarks`.

    Raises:
        UserError: one of them may be.
    """
    forgetting = {s.name for s in eval_sets if s.role.forgets}
    names = {name: ({e.person for e in x} - {""}, {e.pair for e in x} - {""}) for name, x in sets.items()}
    check_scripts(set().union(*(persons for persons, _ in names.values())))
    forget = [name for name in sets if name.removeprefix("finetune_") in forgetting]
    retaining = {s.name for s in eval_sets if not (s.role.forgets or s.role is Role.RETAIN_FACTS)}
    for name, other in itertools.product(forget, [name for name in sets if name not in forget]):
        (forgotten, facts), (persons, others) = names[name], names[other]
        if pairs := similar_names(forgotten, persons):
            raise UserError(
                f"The set {name} has {people(len(pairs))} who may be in the set {other} under another spelling: "
                f"{listed(pairs)}; spell one person's name in one way in all files of the data."
            )
        apart = not shares_people and (other in retaining or other.startswith("finetune_"))
        if both := sorted(forgotten & persons) if apart else []:
            raise UserError(
                f"{people(len(both))} of the set {name}, which is to be forgotten, also in the set {other}, which is "
                f"not: {listed(both)}; remove them from one of the two."
            )
        if both := sorted(facts & others):
            raise UserError(
                f"{len(both)} facts are in the set {name}, which is to be forgotten, and in the set {other}, which is "
                f"not: {listed(both)}; say of each whom it is about in the same way in all files of the data."
            )

    for name in (s.name for s in eval_sets if s.role is Role.FORGET):
        asked, trained = (names.get(key, (set(),))[0] for key in (name, f"finetune_{name}"))
        if not (asked and trained):
            continue
        if strangers := sorted(trained - asked):
            raise UserError(
                f"The set finetune_{name} has {people(len(strangers))} not in the set {name}: {listed(strangers)}; "
                "training must forget the people that the evaluation asks about. Get the data again, or correct them."
            )
        problem = f"people of the set {name} are not in the set finetune_{name}"
        refuse_most(sorted(asked - trained), len(asked), problem)


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


def _usable(example: Example) -> Example:
    """An example whose paraphrase and wrong answers have words, and whose wrong answers differ and are not true.

    Equal keywords count once, but for the rules of a benchmark's own code.
    """
    if example.paraphrase and not has_words(example.paraphrase):
        example = dataclasses.replace(example, paraphrase="")
    true = {answer_key(example.answer), answer_key(example.paraphrase)}
    wrong = (x for x in example.perturbed if has_words(x) and answer_key(x) not in true)
    perturbed = _different(wrong, answer_key)
    is_upstream = example.rule.endswith(":upstream")
    keywords = example.keywords if is_upstream else _different(example.keywords, text_key)
    if (perturbed, keywords) == (example.perturbed, example.keywords):
        return example
    return dataclasses.replace(example, perturbed=perturbed, keywords=keywords)


def _different(texts: Iterable[str], key: Callable[[str], str]) -> tuple[str, ...]:
    """The texts without those whose key is that of an earlier one."""
    first: dict[str, str] = {}
    for text in texts:
        first.setdefault(key(text), text)
    return tuple(first.values())


def _is_index(key: str) -> bool:
    """Whether an option is a number or one letter."""
    return key.isdecimal() or (len(key) == 1 and key.isalpha() and key.isascii())


def _is_common(key: str) -> bool:
    """Whether almost any answer has a keyword."""
    return (_is_index(key) and len(key) == 1) or all(word in _FUNCTION_WORDS for word in key.split())


def _pixels(example: Example) -> bytes:
    image = example.image
    return image.pixels if isinstance(image, EncodedImage) else hashlib.sha256(image).digest()


def _subject(example: Example) -> bytes:
    """What questions share that ask the same: the words, and the image or, without one, the person."""
    question = question_key(example.question)
    if example.image is not None:
        return _pixels(example) + question.encode(errors="surrogatepass")
    return repr((example.person, question)).encode()


def _key(example: Example) -> bytes:
    """What equal questions about equal images share; without an image, equal questions and answers about one person."""
    answer = b"" if example.image is not None else text_key(example.answer).encode(errors="surrogatepass")
    return hashlib.sha256(_subject(example) + answer).digest()[:16]
