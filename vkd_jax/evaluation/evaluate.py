"""Asks a model every question of every set, and says per item what it answered and whether that is right.

Two protocols for questions with options, never mixed:

- `letter`: MLLMU-Bench's own. Question and options are shown, the model writes, and the first letter decides.
- `options`: only the question is shown, and the option text with the highest log-probability is the answer.

Cloze and open questions are answered by greedy generation. Besides, whatever the protocol, the answer, the answer in
other words and the wrong answers are scored after the plain question, all in one pass: see `metrics.likelihoods`.

With one shot, a worked example (picture, question, answer) is shown before each question, as an earlier turn of the
conversation: a question of the same task and modality out of the retain set, about somebody else and another image.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np

from vkd_jax.data.batching import rng
from vkd_jax.evaluation import metrics
from vkd_jax.evaluation.inference import Answerer, Seen, Turns
from vkd_jax.evaluation.metrics.judging import LETTERS, cloze_correct, first_letter
from vkd_jax.evaluation.metrics.likelihoods import likelihood
from vkd_jax.types import Example, UserError

PROTOCOLS = ("letter", "options")
INSTRUCTION = "Answer with the letter of the right option only."

Form = Callable[[Example], tuple[str, str]]  # an example's question and answer, as they are said


def check(protocol: str, shots: int = 0) -> tuple[str, ...]:
    """The names of the protocols, in order.

    Raises:
        UserError: a name is unknown or given twice, or there is another number of shots than 0 and 1.
    """
    names = tuple(name.strip() for name in protocol.split(","))
    if not set(names) <= set(PROTOCOLS) or len(set(names)) < len(names):
        raise UserError(
            f"eval.protocol={protocol!r}: give one of {', '.join(PROTOCOLS)}, or both, as in options,letter."
        )
    if shots not in (0, 1):
        raise UserError(f"eval.shots={shots!r}: give 0, or 1 for a worked example before each question.")
    return names


def evaluate(
    answerer: Answerer,
    sets: Mapping[str, Iterable[Example]],
    *,
    protocol: str,
    max_new_tokens: int,
    shots: int = 0,
    shown: Sequence[Example] = (),
    seed: int = 0,
) -> list[dict]:
    """One record per question, in the order of the sets; with two protocols, two per question with options.

    Questions of one kind are batched together across sets, so that each kind is compiled once.

    Args:
        answerer: the model.
        sets: the questions of each set.
        protocol: "options", "letter", or both, separated by a comma. The first one's record has the likelihoods.
        max_new_tokens: at most so many tokens a generated answer.
        shots: worked examples before each question, 0 or 1.
        shown: where the worked examples are drawn from.
        seed: of which examples are shown.

    Raises:
        UserError: the protocol is unknown, there is no example to show, or a prompt is too long for the model.
    """
    protocols = check(protocol, shots)
    sets = {name: list(part) for name, part in sets.items()}
    items = [(name, example) for name, part in sets.items() for example in part]
    examples = [example for _, example in items]
    asked = _Asked(answerer, examples, worked(shown, examples, seed) if shots else [None] * len(examples))
    said = dict(_generated(asked, protocols, max_new_tokens))  # first, since these prompts are the longest
    likelihoods, scores = _likelihoods(asked)
    records = []
    for i, (name, example) in enumerate(items):
        choice = example.task == "classification"
        for number, how in enumerate(protocols if choice else (example.task,)):
            verdict = _chosen(example, scores[i]) if choice and how == "options" else _judged(example, said[i])
            example_shown = {"worked_example": asked.worked[i].id} if shots else {}
            records.append(
                {
                    "set": name,
                    "id": example.id,
                    "person": example.person,
                    "task": example.task,
                    "modality": example.modality,
                    "question": example.question,
                    "answer": example.answer,
                    "options": list(example.options),
                    "image_id": example.image_id,
                    "protocol": how,
                    **example_shown,
                    **verdict,
                    **(likelihoods[i] if number == 0 else {}),
                }
            )
    return records


def sample(examples: Sequence[Example], most: int, seed: int, name: str) -> list[Example]:
    """At most `most` examples of each task and modality, drawn without replacement, in their order."""
    kept = []
    for task, modality in sorted({(e.task, e.modality) for e in examples}):
        rows = [i for i, e in enumerate(examples) if (e.task, e.modality) == (task, modality)]
        if 0 < most < len(rows):
            rows = sorted(rng(seed, f"eval/{name}/{task}/{modality}").permutation(rows)[:most])
        kept.extend(rows)
    return [examples[i] for i in sorted(kept)]


def letter_question(example: Example) -> str:
    """The question, its options one a line, and the instruction to name a letter.

    Raises:
        UserError: there are more options than letters.
    """
    if len(example.options) > len(LETTERS):
        raise UserError(f"question {example.id} has {len(example.options)} options; use eval.protocol=options.")
    lines = [f"{letter}: {option}" for letter, option in zip(LETTERS, example.options, strict=False)]
    return "\n".join([example.question, *lines, INSTRUCTION])


def _plain(example: Example) -> tuple[str, str]:
    return example.question, example.answer


def _lettered(example: Example) -> tuple[str, str]:
    return letter_question(example), LETTERS[example.options.index(example.answer)]


def _right(example: Example) -> list[str]:
    """The letters of the right option; several where its text stands twice."""
    return [letter for letter, option in zip(LETTERS, example.options, strict=False) if option == example.answer]


class _Asked:
    """The questions with their pictures and worked examples, as an answerer takes them."""

    def __init__(self, answerer: Answerer, examples: Sequence[Example], worked: Sequence[Example | None]):
        self.answerer, self.examples, self.worked = answerer, examples, worked
        shown = [e for e in (*examples, *worked) if e is not None and e.image is not None]
        pictures = {e.image_id: e.image for e in shown}
        self.seen = answerer.look(list(pictures.values())) if pictures else None
        self.row_of = {image_id: i for i, image_id in enumerate(pictures)}

    def groups(self, key: Callable[[Example], tuple]) -> Iterator[list[int]]:
        """Numbers of the questions that may share a batch: of one key and one modality."""
        groups: dict[tuple, list[int]] = {}
        for i, example in enumerate(self.examples):
            groups.setdefault((example.modality, *key(example)), []).append(i)
        yield from groups.values()

    def prompts(self, indices: Sequence[int], form: Form) -> tuple[list[str], Seen | None, list[Turns] | None]:
        """Questions, pictures and worked examples of some questions of one modality."""
        examples, worked = ([part[i] for i in indices] for part in (self.examples, self.worked))
        seen, turns = None, None
        if examples[0].image is not None:
            both = ([w, e] if w else [e] for w, e in zip(worked, examples, strict=True))
            seen = self.seen.show([[self.row_of[e.image_id] for e in row] for row in both])
        if worked[0] is not None:
            turns = [[(*form(w), int(w.image is not None))] for w in worked]
        return [form(e)[0] for e in examples], seen, turns


def _likelihoods(asked: _Asked) -> tuple[list[dict], list[list[float]]]:
    """Of each question: its likelihoods, and the log-probability of each of its options."""
    likelihoods: list[dict] = [{}] * len(asked.examples)
    scores: list[list[float]] = [[]] * len(asked.examples)

    def kind(e: Example) -> tuple[bool, ...]:
        return bool(e.options), bool(e.perturbed)

    for indices in asked.groups(kind):
        texts = [_texts(asked.examples[i]) for i in indices]
        questions, seen, turns = asked.prompts(indices, _plain)
        found = asked.answerer.score(questions, texts, seen, turns=turns)
        for i, row, nll, log_probs in zip(indices, texts, found.nll, found.log_probs, strict=True):
            example = asked.examples[i]
            of = {text: float(x) for text, x in zip(row, nll, strict=False)}
            wrong = example.perturbed or [option for option in example.options if option != example.answer]
            likelihoods[i] = likelihood(
                of[example.answer],
                [of[text] for text in wrong],
                of[example.paraphrase] if example.paraphrase else None,
            )
            scores[i] = [float(log_probs[row.index(option)]) for option in example.options]
    return likelihoods, scores


def _texts(e: Example) -> list[str]:
    """All that is scored after a question, each once."""
    return list(dict.fromkeys([e.answer, *e.options, *filter(None, [e.paraphrase]), *e.perturbed]))


def _generated(asked: _Asked, protocols: Sequence[str], max_new_tokens: int) -> Iterator[tuple[int, str]]:
    """(number, what was written) of each question that is answered in free text."""
    for indices in asked.groups(lambda e: (e.task == "classification",)):
        choice = asked.examples[indices[0]].task == "classification"
        if choice and "letter" not in protocols:
            continue
        questions, seen, turns = asked.prompts(indices, _lettered if choice else _plain)
        texts = asked.answerer.generate(questions, seen, max_new_tokens=max_new_tokens, turns=turns)
        yield from zip(indices, texts, strict=True)


def _chosen(example: Example, scores: Sequence[float]) -> dict:
    """The option of the highest score."""
    prediction = example.options[int(np.argmax(scores))]
    return {"prediction": prediction, "correct": prediction == example.answer, "scores": list(scores)}


def _judged(example: Example, text: str) -> dict:
    """What was written, and whether it is right."""
    if example.task == "classification":
        letter = first_letter(text, len(example.options))
        return {"prediction": text, "correct": letter in _right(example)}
    verdict = {"prediction": text, "correct": cloze_correct(text, example.answer)}
    return verdict | metrics.stored_values({"task": example.task, "answer": example.answer, **verdict})


def worked(shown: Iterable[Example], examples: Sequence[Example], seed: int) -> list[Example]:
    """The worked example before each question: one for all of a kind, but for those that it would help too much."""
    candidates: dict[tuple[str, str], list[Example]] = {}
    for example in shown:
        candidates.setdefault((example.task, example.modality), []).append(example)
    for (task, modality), some in candidates.items():
        order = rng(seed, f"eval/shots/{task}/{modality}").permutation(len(some))
        candidates[task, modality] = [some[i] for i in order]
    return [_first_other(candidates.get((e.task, e.modality), ()), e) for e in examples]


def _first_other(candidates: Iterable[Example], example: Example) -> Example:
    """The first that is neither about the example's person nor shows its picture, nor, as text alone, asks the same."""
    for other in candidates:
        person = example.person and other.person == example.person
        picture = other.image_id == example.image_id or other.image == example.image
        if not person and not (other.question == example.question if example.image is None else picture):
            return other
    about = "with a picture" if example.image is not None else "of text alone"
    raise UserError(
        f"eval.shots=1: the retain set has no {example.task} question {about} about somebody else that could be shown "
        f"before question {example.id}; use eval.shots=0."
    )
