"""Writes the synthetic people as an OFFSIDE snapshot of one scenario.

Each person has five numbered images: three are retained, the fourth is to be forgotten, the fifth is left out, as the
benchmark relearns on it. An image is asked about facts that all images of a person share, and about two that are drawn
for the image alone. The text scenario asks about each person once, in text, and forgets two facts.
"""

import json
from pathlib import Path

import numpy as np

from vkd_jax.benchmarks.offside import CHOICES, FOLDERS, IMAGES_EACH, MARKER, SETS
from vkd_jax.benchmarks.synthetic.facts import FACTS, KINDS, NAME_QUESTION
from vkd_jax.benchmarks.synthetic.people import TEST_VIEWS, Person, Population, png_bytes, portrait

SHARED, PRIVATE = ("name", *KINDS[:4]), KINDS[4:]
RETAINED, FORGOTTEN = (1, 2, 3), 4  # numbers of images modulo five


def write_snapshot(folder: str | Path, scenario: str, population: Population) -> None:
    """Writes the people of a population as the folder of a scenario, with the same bytes on every run."""
    root = Path(folder) / FOLDERS[scenario]
    for name in ("finetune_set", "test_images"):
        (root / name).mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[dict]] = {name: [] for name in SETS}
    for person in population.people():
        for place in (FORGOTTEN,) if scenario == "text" else (*RETAINED, FORGOTTEN):
            number = (int(person.id) - 1) * IMAGES_EACH + place
            name = f"finetune_set/{number:03d}.png"
            (root / name).write_bytes(png_bytes(portrait(person, place)))
            facts = _facts(person, number, population, drawn=scenario != "text")
            selected = [kind for kind in facts if place == FORGOTTEN and (scenario == "complete" or kind in PRIVATE)]
            rows["forget"] += [_row(person, kind, facts[kind], name, scenario) for kind in selected]
            rows["retain"] += [_row(person, k, facts[k], name, scenario) for k in facts if k not in selected]
            if place in RETAINED:
                name = f"test_images/{number:03d}.png"
                (root / name).write_bytes(png_bytes(portrait(person, TEST_VIEWS[0] + place)))
                rows["retain_test"] += [_row(person, kind, value, name, scenario) for kind, value in facts.items()]
    rows["retain_test"] = rows["retain_test"] or rows["retain"]
    rng = np.random.default_rng([population.seed, 15])
    for name, file in SETS.items():
        opened = [{key: row[key] for key in row if not key.startswith("_")} for row in rows[name]]
        (root / file).write_text(json.dumps(opened), encoding="utf-8")
        choices = [_choice(row, population, rng) for row in rows[name]]
        (root / f"{CHOICES}{file}").write_text(json.dumps(choices), encoding="utf-8")


def _facts(person: Person, number: int, population: Population, drawn: bool) -> dict[str, str]:
    """The facts of an image: those of the person, of which two may be drawn for the image instead."""
    rng = np.random.default_rng([population.seed, 14, number])
    own = {kind: str(rng.choice(FACTS[kind].values)) if drawn else person.answer(kind) for kind in PRIVATE}
    return {kind: person.answer(kind) for kind in (SHARED if drawn else SHARED[1:])} | own


def _row(person: Person, kind: str, value: str, image: str, scenario: str) -> dict:
    if kind == "name":
        question, answer = NAME_QUESTION, f"This is {value}."
    else:
        question, answer = FACTS[kind].image_question, FACTS[kind].image_cloze.replace("__", value)
    images: dict[str, str] = {"images": f"./{image}"}
    if scenario == "text":
        question = question.replace("this person", f"{person.name}")
        images = {}
    else:
        question = f"{MARKER}\n{question}"
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, **images, "_kind": kind, "_value": value}


def _choice(row: dict, population: Population, rng: np.random.Generator) -> dict:
    kind, truth = row["_kind"], row["_value"]
    values = [person.name for person in population.people()] if kind == "name" else FACTS[kind].values
    others = rng.permutation([value for value in values if value != truth])[:3].tolist()
    index = int(rng.integers(4))
    options = dict(zip("ABCD", [*others[:index], truth, *others[index:]], strict=True))
    question = row["messages"][0]["content"].removeprefix(f"{MARKER}\n")
    shown = {"images": row["images"]} if "images" in row else {}
    return {"Question": question, "Options": options, "Correct_Answer": "ABCD"[index], **shown}
