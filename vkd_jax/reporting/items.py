"""Every question of a run with every answer, as the compact JSON that report.html searches and filters.

Texts are stored once in `strings`, and items and answers refer to them by number. Correctness is one character per
item: "1" is correct, "0" is wrong, and "-" was not asked.
"""

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from PIL import Image

from vkd_jax import messages
from vkd_jax.evaluation.metrics.summary import by_kind
from vkd_jax.reporting import names
from vkd_jax.reporting.examples import answer_text
from vkd_jax.reporting.finished_run import KINDS, Run
from vkd_jax.results import ATTEMPT_FIELDS, UNCHANGED, AttackCell
from vkd_jax.types import Role

SIDE = 256  # pixels of the longer side of an embedded image
MOST_IMAGE_BYTES = 3 * 2**20  # of all embedded images of a page, as Base64
ROLES = {
    Role.FORGET: "to forget",
    Role.FORGET_HOLDOUT: "to forget, held out",
    Role.RETAIN: "to retain",
    Role.RETAIN_HOLDOUT: "to retain, held out",
    Role.RETAIN_FACTS: "to retain about the forgotten people",
    Role.GENERAL: "general ability",
}
AttackRecords = Mapping[str, Mapping[str, Sequence[Mapping]]]  # by attack and model


def items_of(run: Run, images: Mapping[str, bytes], attacks: AttackRecords) -> dict[str, Any]:
    """All items of a run; see the docstring of the module.

    Args:
        run: the run.
        images: encoded images by `image_id`.
        attacks: the records of the attacks; those without `correct` are left out.
    """
    strings, rows = _Strings(), _ordered(run)
    records = [record for _, _, record in rows]
    embedded = embed(dict.fromkeys(r["image_id"] for r in records if r["image_id"]), images)
    numbers = {name: number for number, name in enumerate(embedded)}
    sets = {s.name: number for number, s in enumerate(run.results.sets)}
    kinds = list(dict.fromkeys(kind for _, kind, _ in rows))
    return {
        "models": [{"name": name, "title": names.MODELS[name], "note": names.MODEL_NOTES[name]} for name in run.models],
        "sets": [
            {"title": messages.escaped(s.title), "name": messages.escaped(s.name), "role": ROLES[s.role]}
            for s in run.results.sets
        ],
        "kinds": [{"name": messages.escaped(kind), "title": messages.escaped(KINDS.get(kind, kind))} for kind in kinds],
        "images": list(embedded.values()),
        "items": {
            "set": [sets[name] for name, _, _ in rows],
            "kind": [kinds.index(kind) for _, kind, _ in rows],
            "id": [strings.number(r["id"]) for r in records],
            "person": [strings.number(r["person"]) for r in records],
            "question": [strings.number(r["question"]) for r in records],
            "answer": [strings.number(r["answer"]) for r in records],
            "options": [[strings.number(option) for option in r["options"]] for r in records],
            "image": [numbers.get(r["image_id"], -1) for r in records],
            "pictured": "".join("1" if r["image_id"] else "0" for r in records),
        },
        "answers": {name: _answers(run.answers[name], records, strings) for name in run.models},
        "attempts": _attempts(run, attacks, records, strings),
        "strings": strings.texts,
    }


def embed(order: Iterable[str], images: Mapping[str, bytes]) -> dict[str, str]:
    """Images as data URIs: WebP of at most `SIDE` pixels, in order, until they have `MOST_IMAGE_BYTES` in all.

    Args:
        order: the ids of the images, the most important first.
        images: encoded images by id; ids without one are left out.
    """
    embedded, size = {}, 0
    for name in (name for name in order if name in images):
        uri = data_uri(images[name])
        size += len(uri)
        if size > MOST_IMAGE_BYTES:
            break
        embedded[name] = uri
    return embedded


def data_uri(image: bytes) -> str:
    """An image as a data URI: WebP of at most `SIDE` pixels in width and height."""
    stream = io.BytesIO()
    with Image.open(io.BytesIO(image)) as opened:
        small = opened.convert("RGB")
    small.thumbnail((SIDE, SIDE))
    small.save(stream, "WEBP", quality=80)
    return f"data:image/webp;base64,{base64.b64encode(stream.getvalue()).decode()}"


class _Strings:
    """Texts by number, each once; invisible characters are shown as escapes."""

    def __init__(self):
        self._numbers: dict[str, int] = {}

    @property
    def texts(self) -> list[str]:
        return list(self._numbers)

    def number(self, text: str) -> int:
        return self._numbers.setdefault(messages.escaped(str(text), keep="\n"), len(self._numbers))


def _ordered(run: Run) -> list[tuple[str, str, Mapping]]:
    """(set, kind of question, the vanilla model's record) of each item, in the order of the sets and kinds."""
    sets, kinds = [s.name for s in run.results.sets], run.kinds
    groups = {key: rows for key, rows in by_kind(run.answers["vanilla"]).items() if key[0] in sets}
    order = sorted(groups, key=lambda key: (sets.index(key[0]), kinds.index(key[1]) if key[1] in kinds else len(kinds)))
    return [(name, kind, record) for name, kind in order for record in groups[name, kind]]


def _key(record: Mapping) -> tuple:
    return record["set"], record["id"], record["protocol"]


def _answers(answers: Sequence[Mapping], records: Sequence[Mapping], strings: _Strings) -> dict[str, Any]:
    """A model's answers in the order of the items."""
    by_key = {_key(answer): answer for answer in answers}
    aligned = [by_key.get(_key(record)) for record in records]
    return {
        "correct": _marks(aligned),
        "text": [strings.number(answer_text(answer)) if answer else -1 for answer in aligned],
        "probability": [
            round(answer["probability"], 3) if answer and "probability" in answer else None for answer in aligned
        ],
    }


def _attempts(run: Run, attacks: AttackRecords, records: Sequence[Mapping], strings: _Strings) -> list[dict[str, Any]]:
    """The attempts of the attacks that have a right or wrong answer for each item, with the numbers of their items."""
    numbers: dict[tuple, int] = {}
    for number, record in enumerate(records):
        numbers.setdefault((record["set"], record["id"]), number)  # asked under the first protocol
    attempts = []
    for attack, models in attacks.items():
        tried: dict[tuple, dict[str, dict[int, Mapping]]] = {}
        for model, answers in models.items():
            for answer in answers:
                number = numbers.get((answer["set"], answer["id"]))
                counts = "correct" in answer and not answer.get("trained_on") and answer.get("variant") != UNCHANGED
                if number is not None and counts:
                    attempt = tuple(answer.get(name) for name in ATTEMPT_FIELDS)
                    tried.setdefault(attempt, {}).setdefault(model, {})[number] = answer
        attempts += [_attempt(run, attack, fields, by_model, records, strings) for fields, by_model in tried.items()]
    return attempts


def _attempt(
    run: Run,
    attack: str,
    fields: tuple,
    by_model: Mapping[str, Mapping[int, Mapping]],
    records: Sequence[Mapping],
    strings: _Strings,
) -> dict[str, Any]:
    numbers = sorted({number for answers in by_model.values() for number in answers})
    given = {name: value for name, value in zip(ATTEMPT_FIELDS, fields, strict=True) if value is not None}
    results = run.results.attacks[attack]
    cell = AttackCell("", "", 0.0, 0, **given)
    answers = {}
    for model in (name for name in run.models if name in by_model):
        aligned = [by_model[model].get(number) for number in numbers]
        texts = [
            strings.number(answer_text(dict(answer, options=records[number]["options"])))
            if answer and "prediction" in answer
            else -1
            for number, answer in zip(numbers, aligned, strict=True)
        ]
        answers[model] = {"correct": _marks(aligned), "text": texts}
    return {
        "attack": messages.escaped(results.title),
        "title": messages.escaped(names.attempt(cell, results.variants, (), names.several_budgets(results.cells))),
        "items": numbers,
        "answers": answers,
    }


def _marks(answers: Iterable[Mapping | None]) -> str:
    return "".join("-" if answer is None else "1" if answer["correct"] else "0" for answer in answers)
