"""Writes the synthetic people as a UMU-Bench snapshot: one row for each person, with one image.

Real_Person_Set has people of the next seed, whom a base model may have learned.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from vkd_jax.benchmarks.synthetic.facts import FACTS, NAME_QUESTION
from vkd_jax.benchmarks.synthetic.people import (
    IMAGE_TYPE,
    MIN_SIZE,
    Person,
    Population,
    png_struct,
    portrait,
    write_config,
)
from vkd_jax.benchmarks.umu import IMAGE, REAL, TEXT

VIEW = 0  # of the only image
_COLUMNS = ("Biography", "MM_QA", "UM_QA", "Classify", "Cloze", "Generation")
_SCHEMA = pa.schema([("ID", pa.string()), ("image", IMAGE_TYPE), *((name, pa.string()) for name in _COLUMNS)])


def write_snapshot(folder: str | Path, configs: Sequence[str], population: Population) -> None:
    """Writes configs of the people of a population as a UMU-Bench snapshot, with the same bytes on every run."""
    real = Population(population.seed + 1, MIN_SIZE)
    for config in configs:
        source = real if config == REAL else population
        rows = [_row(person, source) for person in source.people() if _belongs(person.id, config, population)]
        write_config(folder, config, rows, _SCHEMA)


def _belongs(person_id: str, config: str, population: Population) -> bool:
    side, _, percent = config.partition("_")
    if side == "forget":
        return person_id in population.forgotten(int(percent))
    return side != "retain" or person_id not in population.forgotten(100 - int(percent))


def _row(person: Person, population: Population) -> dict:
    rng = np.random.default_rng([population.seed, 13, int(person.id)])
    pairs = {side: {} for side in (IMAGE, TEXT)}  # key: (question, answer)
    choices, clozes = ({side: {} for side in (IMAGE, TEXT)} for _ in range(2))
    for kind, fact in FACTS.items():
        truth = person.facts[kind]
        others = rng.permutation([value for value in fact.values if value != truth])[:3].tolist()
        index = int(rng.integers(4))
        options = dict(zip("ABCD", [*others[:index], truth, *others[index:]], strict=True))
        wordings = {
            IMAGE: (fact.image_question, fact.image_cloze),
            TEXT: (fact.text_question.format(name=person.name), fact.text_cloze.format(name=person.name)),
        }
        for side, (question, cloze) in wordings.items():
            pairs[side][kind] = (question, truth)
            answer = f"{'ABCD'[index]}. {truth}"
            choices[side][kind] = {"question": question, "options": options, "answer": answer}
            clozes[side][kind] = {"question": cloze, "answer": f"{truth}."}
    question, biography = person.biography()
    generation = {
        IMAGE: {"who": {"question": NAME_QUESTION, "answer": biography}},
        TEXT: {"who": {"question": question, "answer": biography}},
    }
    pairs[IMAGE]["who"], pairs[TEXT]["who"] = (NAME_QUESTION, biography), (question, biography)
    cells = {
        "Biography": biography,
        "MM_QA": repr(_transposed(pairs[IMAGE])),
        "UM_QA": repr(_transposed(pairs[TEXT])),
        "Classify": repr(choices),
        "Cloze": repr(clozes),
        "Generation": repr(generation),
    }
    return {"ID": person.id, "image": png_struct(portrait(person, VIEW), f"{person.id}.png"), **cells}


def _transposed(pairs: dict[str, tuple[str, str]]) -> dict:
    return {name: {key: pair[i] for key, pair in pairs.items()} for i, name in enumerate(("question", "answer"))}
