"""Asks a model every question of every set; each record has the answer and whether it is correct.

Protocols for questions with options, never mixed:

- `letter`: the prompt has the question and its options, the model writes an answer, and the letter that it chooses
  counts: see `metrics.correctness.first_letter`.
- `letter:first_character`: the same prompt, and the first letter of whatever the model writes counts, as in the code of
  MLLMU-Bench, where "accordion" is A. As there, open answers may then have the true words within longer ones.
- `letter:similar_option`: the same prompt, and the option whose text is most similar to the answer counts, as in the
  code of UMU-Bench.
- `letter:strict`: the same prompt, and only "The answer is B" and a lone "B" count, as in the code of OFFSIDE.
- `options`: the prompt has only the question, and the option text with the highest log-probability is the answer.

Cloze and open questions are answered by greedy decoding, and so are those of the standard suites, which have their own
prompts and rules: see `metrics.suites`. Under every protocol, the true answer, its paraphrase and the wrong answers of
all other questions are also scored after the plain question, in one pass: see `metrics.likelihoods`.

With one shot, a worked example (image, question, answer) precedes each question of the benchmark as an earlier turn of
the conversation: a question of the retain set with the same task and modality, about another person and another image.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from vkd_jax.benchmarks.names import text_key
from vkd_jax.config.evaluation import EvalConfig
from vkd_jax.data.batching import rng
from vkd_jax.evaluation import metrics
from vkd_jax.evaluation.encoded_images import EncodedImages
from vkd_jax.evaluation.inference import Answerer
from vkd_jax.evaluation.metrics import suites
from vkd_jax.evaluation.metrics.base import rule_of
from vkd_jax.evaluation.metrics.correctness import LETTER_RULES, LETTERS, open_correct
from vkd_jax.evaluation.metrics.likelihoods import likelihood
from vkd_jax.evaluation.wording import Wording, read_wording
from vkd_jax.types import Example, SuiteQuestion, UserError

Form = Callable[[Example], tuple[str, str]]  # from an example to its question and answer in the prompt


def evaluate(
    answerer: Answerer,
    sets: Mapping[str, Iterable[Example]],
    config: EvalConfig,
    shown: Sequence[Example] = (),
    *,
    context: Mapping[tuple[str, str], Sequence[Example]] | None = None,
) -> list[dict]:
    """Returns one record per question, in the order of the sets; questions with options have one per protocol.

    Questions of one kind are batched together across sets, so that each kind is compiled once.

    Args:
        answerer: the model.
        sets: the questions of each set.
        config: protocols, shots and length of answers. The likelihoods are in the record of the first protocol.
        shown: questions that worked examples are drawn from.
        context: worked examples before each question, by its set and ID, instead of drawn ones; other questions are
            asked alone. An image that consecutive turns share is shown once.

    Raises:
        UserError: no worked example fits a question, or a prompt is too long for the model.
    """
    protocols, shots = config.protocols, config.shots
    items = [(name, example) for name, examples in sets.items() for example in examples]
    examples = [example for _, example in items]
    chosen = worked_examples(shown, examples, config.seed) if shots else []
    worked = [(other,) if other else () for other in chosen]
    batch = _Questions(answerer, examples, worked or [(context or {}).get((name, e.id), ()) for name, e in items])
    texts = dict(_generated(batch, config, read_wording(config.prompts)))  # first, since these prompts are the longest
    likelihoods, scores = _likelihoods(batch)
    records = []
    for i, (name, example) in enumerate(items):
        choice = example.task == "classification"
        for number, record_protocol in enumerate(protocols if choice else (example.task,)):
            verdict = (
                _chosen(example, scores[i])
                if choice and record_protocol == "options"
                else _scored(example, texts[i], record_protocol, substring="letter:first_character" in protocols)
            )
            worked_example = {"worked_example": batch.worked[i][0].id} if shots and batch.worked[i] else {}
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
                    "protocol": record_protocol,
                    **_suite_fields(example),
                    **_published(example),
                    **worked_example,
                    **verdict,
                    **(likelihoods[i] if number == 0 else {}),
                }
            )
    return records


def _suite_fields(example: Example) -> dict:
    """The fields of a record that the scoring of a standard suite needs."""
    if not isinstance(example, SuiteQuestion):
        return {}
    names = ("suite", "group", "category", "rotation")
    return {name: getattr(example, name) for name in names} | {"references": list(example.references)}


def sample(examples: Sequence[Example], most: int, seed: int, name: str) -> list[Example]:
    """At most `most` examples of each task and modality, drawn without replacement, in their order.

    The questions of standard suites are drawn when they are read, since some belong together.
    """
    chosen = []
    for task, modality in sorted({(e.task, e.modality) for e in examples}):
        rows = [i for i, e in enumerate(examples) if (e.task, e.modality) == (task, modality)]
        if 0 < most < len(rows) and task != "suite":
            rows = sorted(rng(seed, f"eval/{name}/{task}/{modality}").permutation(rows)[:most])
        chosen.extend(rows)
    return [examples[i] for i in sorted(chosen)]


def _published(example: Example) -> dict:
    """What metrics of published benchmarks read of an example."""
    fields = {"keywords": list(example.keywords), "pair": example.pair, "rule": example.rule}
    return {name: value for name, value in fields.items() if value}


def _plain(example: Example) -> tuple[str, str]:
    return example.question, example.answer


def _correct_letters(example: Example) -> list[str]:
    """The letters of the correct option; several if its text occurs more than once, in whichever spelling."""
    true = text_key(example.answer)
    return [letter for letter, option in zip(LETTERS, example.options, strict=False) if text_key(option) == true]


class _Questions:
    """The questions with their images and worked examples, in the form that an answerer takes."""

    def __init__(self, answerer: Answerer, examples: Sequence[Example], worked: Sequence[Sequence[Example]]):
        self.answerer, self.examples, self.worked = answerer, examples, worked
        with_image = [e for e in (*examples, *(w for row in worked for w in row)) if e.image is not None]
        images = {e.image_id: e.image for e in with_image}
        self.encoded_images = answerer.encode_images(list(images.values()), list(images)) if images else None
        self.row_of = {image_id: i for i, image_id in enumerate(images)}

    def groups(self, key: Callable[[Example], tuple]) -> Iterator[list[int]]:
        """Indices of the questions that may share a batch: those with one modality and one key."""
        groups: dict[tuple, list[int]] = {}
        for i, example in enumerate(self.examples):
            groups.setdefault((example.modality, *key(example)), []).append(i)
        yield from groups.values()

    def prompts(self, indices: Sequence[int], form: Form) -> tuple[list[str], EncodedImages | None, dict[str, Any]]:
        """Prompts and images of some questions of one modality, and their worked examples and names as options."""
        examples, worked = ([items[i] for i in indices] for items in (self.examples, self.worked))
        encoded_images, turns = None, None
        dialogs = [[*w, e] for w, e in zip(worked, examples, strict=True)]
        if examples[0].image is not None:
            shown = [[e for e, new in zip(dialog, _new_images(dialog), strict=True) if new] for dialog in dialogs]
            rows = [[self.row_of[e.image_id] for e in row] for row in shown]
            encoded_images = self.encoded_images.for_prompts(rows)
        if any(worked):
            turns = [
                [(*form(w), int(new)) for w, new in zip(dialog[:-1], _new_images(dialog), strict=False)]
                for dialog in dialogs
            ]
        return [form(e)[0] for e in examples], encoded_images, {"turns": turns, "names": [e.label for e in examples]}


def _new_images(dialog: Sequence[Example]) -> list[bool]:
    """Whether each turn shows an image, which is not that of the turn before."""
    before = [None, *(e.image_id for e in dialog)]
    return [e.image is not None and e.image_id != image_id for e, image_id in zip(dialog, before, strict=False)]


def _likelihoods(batch: _Questions) -> tuple[list[dict], list[list[float]]]:
    """For each question, its likelihoods, and the log-probability of each of its options."""
    likelihoods: list[dict] = [{}] * len(batch.examples)
    scores: list[list[float]] = [[]] * len(batch.examples)

    def kind(e: Example) -> tuple[bool, ...]:
        return bool(e.options), bool(e.perturbed), e.task == "suite"

    for indices in batch.groups(kind):
        if batch.examples[indices[0]].task == "suite":
            continue
        texts = [_texts(batch.examples[i]) for i in indices]
        questions, encoded_images, options = batch.prompts(indices, _plain)
        scored = batch.answerer.score(questions, texts, encoded_images, **options)
        for i, row, nll, log_probs in zip(indices, texts, scored.nll, scored.log_probs, strict=True):
            example = batch.examples[i]
            nll_of = {text: float(x) for text, x in zip(row, nll, strict=False)}
            wrong = example.perturbed or [option for option in example.options if option != example.answer]
            likelihoods[i] = likelihood(
                nll_of[example.answer],
                [nll_of[text] for text in wrong],
                nll_of[example.paraphrase] if example.paraphrase else None,
            )
            log_prob_of = dict(zip(row, map(float, log_probs), strict=False))
            scores[i] = [log_prob_of[option] for option in example.options]
    return likelihoods, scores


def _texts(e: Example) -> list[str]:
    """The texts that are scored after a question, each once."""
    return list(dict.fromkeys([e.answer, *e.options, *filter(None, [e.paraphrase]), *e.perturbed]))


def _generated(batch: _Questions, config: EvalConfig, wording: Wording) -> Iterator[tuple[int, str]]:
    """Yields (index, text) for each question that is answered by generation."""

    def lettered(example: Example) -> tuple[str, str]:
        if not example.options:  # an earlier turn
            return worded(example)
        return wording.letter_question(example), LETTERS[example.options.index(example.answer)]

    def worded(example: Example) -> tuple[str, str]:
        return wording.question(example), example.answer

    for indices in batch.groups(lambda e: (e.task == "classification", e.task == "suite")):
        choice = batch.examples[indices[0]].task == "classification"
        if choice and not set(LETTER_RULES) & set(config.protocols):
            continue
        questions, encoded_images, options = batch.prompts(indices, lettered if choice else worded)
        texts = batch.answerer.generate(questions, encoded_images, max_new_tokens=config.max_new_tokens, **options)
        yield from zip(indices, texts, strict=True)


def _chosen(example: Example, scores: Sequence[float]) -> dict:
    """The option with the highest score."""
    prediction = example.options[int(np.argmax(scores))]
    return {
        "prediction": prediction,
        "correct": text_key(prediction) == text_key(example.answer),
        "scores": list(scores),
    }


def _scored(example: Example, text: str, protocol: str, substring: bool) -> dict:
    """The generated text, and whether it is correct; see `open_correct` for `substring`, as of upstream's rules."""
    if example.task == "classification":
        letter = LETTER_RULES[protocol](text, example.options)
        return {"prediction": text, "correct": letter in _correct_letters(example)}
    if isinstance(example, SuiteQuestion):
        record = {name: getattr(example, name) for name in ("task", "answer", "options")} | _suite_fields(example)
        record["prediction"] = text
        return {"prediction": text, "correct": suites.correct(record)} | metrics.stored_values(record)
    record = {"task": example.task, "answer": example.answer, **_published(example)}
    substring = substring or rule_of(record)[1] == "upstream"
    verdict = {"prediction": text, "correct": open_correct(text, example.answer, substring)}
    record |= verdict
    return verdict | metrics.stored_values(record)


def worked_examples(shown: Iterable[Example], examples: Sequence[Example], seed: int) -> list[Example | None]:
    """The worked example before each question: the same for all of a kind, unless it would reveal the answer.

    The questions of standard suites have none.
    """
    candidates: dict[tuple[str, str], list[Example]] = {}
    for example in shown:
        candidates.setdefault((example.task, example.modality), []).append(example)
    for (task, modality), pool in candidates.items():
        order = rng(seed, f"eval/shots/{task}/{modality}").permutation(len(pool))
        candidates[task, modality] = [pool[i] for i in order]
    return [
        None if e.task == "suite" else _first_unrelated(candidates.get((e.task, e.modality), ()), e) for e in examples
    ]


def _first_unrelated(candidates: Iterable[Example], example: Example) -> Example:
    """The first candidate about another person and another image or, if text-only, with another question."""
    for other in candidates:
        same_person = example.person and other.person == example.person
        same_image = other.image_id == example.image_id or other.image == example.image
        if not same_person and not (other.question == example.question if example.image is None else same_image):
            return other
    about = "with an image" if example.image is not None else "without an image"
    raise UserError(
        f"eval.shots=1: the retain set has no {example.task} question {about} about another person to show before "
        f"{example.label}. Use eval.shots=0."
    )
