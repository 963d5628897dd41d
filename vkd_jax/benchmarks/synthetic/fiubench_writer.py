"""Writes the synthetic people as an FIUBench snapshot: full.json, split.json and images.

Each person has one image, as published, with a question about the name and one about each fact.
"""

import json
from pathlib import Path

import numpy as np

from vkd_jax.benchmarks.fiubench import FULL, SPLIT, SPLITS
from vkd_jax.benchmarks.synthetic.facts import FACTS, NAME_QUESTION
from vkd_jax.benchmarks.synthetic.people import Person, Population, png_bytes, portrait

VIEW = 0  # of the only image
WRONG = 3  # answers
NAME_ANSWER = "This is {name}."


def write_snapshot(folder: str | Path, population: Population) -> None:
    """Writes the people of a population as an FIUBench snapshot, with the same bytes on every run."""
    folder, people = Path(folder), population.people()
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for person in people:
        (folder / _image(person)).write_bytes(png_bytes(portrait(person, VIEW)))
    lines = [json.dumps(_record(person, population)) for person in people]
    (folder / FULL).write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    (folder / SPLIT).write_text(json.dumps(_splits(population)), encoding="utf-8")


def _image(person: Person) -> str:
    return f"images/{person.id}.png"


def _splits(population: Population) -> dict[str, list[str]]:
    """Separate draws of people for each split, with the published shares; at least one person each."""
    order, splits, start = np.random.default_rng([population.seed, 11]).permutation(population.size), {}, 0
    for name in SPLITS:
        percent = int(name.removeprefix("forget").removeprefix("retain"))
        end = start + max(1, round(population.size * percent / 100))
        splits[name] = sorted(population.people()[i].id for i in order[start:end])
        start = end
    return splits


def _record(person: Person, population: Population) -> dict:
    rng = np.random.default_rng([population.seed, 12, int(person.id)])

    def wrong(truth: str, values) -> list[str]:
        return rng.permutation([value for value in values if value != truth])[:WRONG].tolist()

    names = wrong(person.name, [other.name for other in population.people()])
    questions = [
        _question(NAME_QUESTION, NAME_ANSWER, "{name}", person.name, names, ["What is the name of this person?"])
    ]
    for kind, fact in FACTS.items():
        truth, template = person.facts[kind], fact.image_cloze.replace("__", "{name}")
        asked = [f"Tell me this person's {kind}.", f"Do you know the {kind} of this person?"]
        again = fact.text_cloze.format(name=person.name).replace("__", "{name}")
        questions.append(_question(fact.image_question, template, again, truth, wrong(truth, fact.values), asked))
    return {
        "unique_id": person.id,
        "name": person.name,
        "gender": "female" if person.look.lashes else "male",
        "caption": f"A portrait of {person.name}.",
        "raw_data": person.facts,
        "image_path": f"./dataset/{_image(person)}",
        "qa_list": questions,
    }


def _question(question: str, template: str, paraphrase: str, truth: str, wrong: list[str], wordings: list[str]) -> dict:
    """A question; `{name}` stands for the answer in both templates."""
    return {
        "question": question,
        "answer": template.format(name=truth),
        "keywords": [truth],
        "paraphrased_question": wordings,
        "paraphrased_answer": paraphrase.format(name=truth),
        "perturbed_answer": [template.format(name=value) for value in wrong],
    }
