"""Asks a model every question of every set, and says per item what it answered and whether that is right.

Two protocols for four-option questions, never mixed:

- `letter`: MLLMU-Bench's own. Question and options are shown, the model writes, and the first letter decides.
- `options`: only the question is shown, and the option text with the highest log-probability is the answer.

Cloze and open questions are answered by greedy generation.
"""

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from PIL import Image

from vkd_jax import metrics
from vkd_jax.data.processing import Processor
from vkd_jax.methods.base import in_batches, padded_rows, rng
from vkd_jax.models import generate
from vkd_jax.models.base import VisualTokens, bind
from vkd_jax.types import Example, Params, UserError

PROTOCOLS = ("letter", "options")
LETTERS = "ABCDEFGH"
INSTRUCTION = "Answer with the letter of the right option only."


@functools.partial(jax.jit, static_argnames="graphdef")
def _encode(graphdef, params, pictures):
    return bind(graphdef, params).encode(pictures)[0]


@functools.partial(jax.jit, static_argnames="graphdef")
def _score(graphdef, params, *args):
    return generate.option_log_probs(bind(graphdef, params), *args)


@functools.partial(jax.jit, static_argnames=("graphdef", "max_new_tokens", "eos_ids", "pad_id"))
def _greedy(graphdef, params, tokens, mask, features, **options):
    return generate.greedy(bind(graphdef, params), tokens, mask, features, **options)


@dataclasses.dataclass(frozen=True)
class Seen:
    """Pictures as the language model sees them. Many rows may show one picture, which is held once."""

    images: Sequence[np.ndarray]  # [height, width, 3] each, normalised
    features: VisualTokens  # NumPy arrays, a row each
    rows: np.ndarray  # which picture each row shows

    def of(self, rows: Sequence[int]) -> "Seen":
        """Some of the rows, in this order, repeated as asked."""
        return dataclasses.replace(self, rows=self.rows[np.asarray(rows)])

    def tokens(self) -> VisualTokens:
        """The features, gathered: a row for each row."""
        return jax.tree.map(lambda x: x[self.rows], self.features)


def _shown(seen: Seen | None, row: int) -> Sequence[np.ndarray]:
    return () if seen is None else [seen.images[seen.rows[row]]]


class Answerer:
    """A model with its processor, ready to be asked; two models of one architecture share what is compiled."""

    def __init__(self, graphdef: Any, params: Params, config: Any, processor: Processor, *, batch_size: int = 32):
        self.graphdef, self.params, self.config = graphdef, params, config
        self.processor, self.batch_size = processor, batch_size

    def look(self, pictures: Sequence[bytes | Image.Image]) -> Seen:
        """Each picture through the vision tower once, however many questions it will carry."""
        images = [self.processor.image(picture) for picture in pictures]
        packed = self.config.pack([[image] for image in images])
        features = in_batches(lambda part: _encode(self.graphdef, self.params, part), packed, self.batch_size)
        return Seen(images, features, np.arange(len(images)))

    def generate(self, questions: Sequence[str], seen: Seen | None = None, *, max_new_tokens: int = 50) -> list[str]:
        """Greedy answers; `seen` holds a picture per question, or is None for text-only questions."""
        tokens, mask = self._prompts(questions, seen, max_new_tokens)
        texts = []
        for rows in padded_rows(len(questions), self.batch_size):
            out = _greedy(
                self.graphdef,
                self.params,
                tokens[rows],
                mask[rows],
                seen and seen.of(rows).tokens(),
                max_new_tokens=max_new_tokens,
                eos_ids=self.processor.eos_ids,
                pad_id=self.processor.pad_id,
            )
            texts.extend(self.processor.tokenizer.batch_decode(np.asarray(out), skip_special_tokens=True))
        return [text.strip() for text in texts[: len(questions)]]

    def score(self, questions: Sequence[str], options: Sequence[Sequence[str]], seen: Seen | None = None) -> np.ndarray:
        """[n, o] log p(option and end of sequence | question); rows with fewer options are -inf beyond."""
        encoded = [
            [self.processor.encode(question, option, _shown(seen, i))[1] for option in row]
            for i, (question, row) in enumerate(zip(questions, options, strict=True))
        ]
        count = max(len(row) for row in encoded)
        length = max(len(ids) for row in encoded for ids in row)
        ids = np.full((len(encoded), count, length), self.processor.pad_id, np.int32)
        valid = np.zeros(ids.shape, bool)
        for i, row in enumerate(encoded):
            for j, option in enumerate(row):
                ids[i, j, : len(option)], valid[i, j, : len(option)] = option, True
        tokens, mask = self._prompts(questions, seen, length)
        parts = [
            _score(
                self.graphdef,
                self.params,
                tokens[rows],
                mask[rows],
                seen and seen.of(rows).tokens(),
                ids[rows],
                valid[rows],
            )
            for rows in padded_rows(len(questions), self.batch_size)
        ]
        scores = np.concatenate([np.asarray(p) for p in parts])[: len(questions)]
        return np.where(valid.any(-1), scores, -np.inf)

    def _prompts(self, questions: Sequence[str], seen: Seen | None, room: int):
        """Left-padded prompts of one shape, with `room` for what follows them."""
        rows = [self.processor.encode(question, None, _shown(seen, i))[0] for i, question in enumerate(questions)]
        longest = max(len(row) for row in rows)
        limit = self.config.text.max_positions
        if longest + room > limit:
            raise UserError(f"a question of {longest} tokens and {room} for the answer exceed the model's {limit}.")
        length = min(-(-longest // 8) * 8, limit - room)
        tokens = np.full((len(rows), length), self.processor.pad_id, np.int32)
        mask = np.zeros((len(rows), length), bool)
        for i, row in enumerate(rows):
            tokens[i, length - len(row) :], mask[i, length - len(row) :] = row, True
        return tokens, mask


def evaluate(
    answerer: Answerer, sets: Mapping[str, Iterable[Example]], *, protocol: str, max_new_tokens: int
) -> list[dict]:
    """One record per question, in the order of the sets.

    Questions of one kind are batched together across sets, so that each kind is compiled once.
    """
    if protocol not in PROTOCOLS:
        raise UserError(f"eval.protocol={protocol!r}: give one of {', '.join(PROTOCOLS)}.")
    items = [(name, example) for name, examples in sets.items() for example in examples]
    pictures = {e.image_id: e.image for _, e in items if e.image is not None}
    seen = answerer.look(list(pictures.values())) if pictures else None
    row_of = {image_id: i for i, image_id in enumerate(pictures)}
    records: dict[int, dict] = {}
    groups: dict[tuple[str, str], list[int]] = {}
    for index, (_, example) in enumerate(items):
        by_options = example.task == "classification" and protocol == "options"
        groups.setdefault((by_options, example.modality), []).append(index)
    for (by_options, modality), indices in groups.items():
        examples = [items[i][1] for i in indices]
        shown = None if modality == "qa" else seen.of([row_of[e.image_id] for e in examples])
        if by_options:
            answers = _ask_options(answerer, examples, shown)
        else:
            answers = _ask_freely(answerer, examples, shown, max_new_tokens)
        for index, example, answer in zip(indices, examples, answers, strict=True):
            records[index] = {
                "set": items[index][0],
                "id": example.id,
                "person": example.person,
                "task": example.task,
                "modality": modality,
                "question": example.question,
                "answer": example.answer,
                "options": list(example.options),
                "image_id": example.image_id,
                **answer,
            }
    return [records[i] for i in range(len(items))]


def summarise(records: Sequence[Mapping]) -> dict[str, dict[str, dict]]:
    """{set: {"vqa": accuracy, "qa": .., "cloze_vqa": .., "generation_vqa": ..}} with counts and intervals."""
    groups: dict[str, dict[str, list]] = {}
    for record in records:
        prefix = "" if record["task"] == "classification" else record["task"] + "_"
        groups.setdefault(record["set"], {}).setdefault(prefix + record["modality"], []).append(record)
    return {name: {kind: metrics.summarise(items) for kind, items in kinds.items()} for name, kinds in groups.items()}


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
    """The question, its options one a line, and the instruction to name a letter."""
    lines = [f"{letter}: {option}" for letter, option in zip(LETTERS, example.options, strict=False)]
    return "\n".join([example.question, *lines, INSTRUCTION])


def _ask_options(answerer: Answerer, examples: Sequence[Example], seen: Seen | None) -> list[dict]:
    scores = answerer.score([e.question for e in examples], [e.options for e in examples], seen)
    predictions = [e.options[int(np.argmax(row))] for e, row in zip(examples, scores, strict=True)]
    return [
        {
            "protocol": "options",
            "prediction": p,
            "correct": p == e.answer,
            "scores": row[: len(e.options)].tolist(),
        }
        for e, p, row in zip(examples, predictions, scores, strict=True)
    ]


def _ask_freely(answerer: Answerer, examples: Sequence[Example], seen: Seen | None, max_new_tokens: int) -> list[dict]:
    letter = [e.task == "classification" for e in examples]
    questions = [letter_question(e) if is_letter else e.question for e, is_letter in zip(examples, letter, strict=True)]
    texts = answerer.generate(questions, seen, max_new_tokens=max_new_tokens)
    return [
        {
            "protocol": "letter" if is_letter else e.task,
            "prediction": text,
            "correct": metrics.first_letter(text) == LETTERS[e.options.index(e.answer)]
            if is_letter
            else metrics.cloze_correct(text, e.answer),
        }
        for e, text, is_letter in zip(examples, texts, letter, strict=True)
    ]
