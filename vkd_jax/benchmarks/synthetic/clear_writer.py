"""Writes the synthetic people as a CLEAR snapshot.

    write_snapshot(folder, configs, population)   <config>/train-00000-of-00001.parquet, the same bytes on every run

Each person has eight images with captions that begin with the name, and seven text-only questions. The wrong captions
of an image are its caption with other names. real_faces has the people of the next seed, whom a base model may have
learned; real_world asks about drawn objects.
"""

import functools
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from vkd_jax import messages
from vkd_jax.benchmarks.clear import FORGET_RATIOS
from vkd_jax.benchmarks.synthetic.facts import CAPTION, FACTS, PARAPHRASED_CAPTION
from vkd_jax.benchmarks.synthetic.mllmu_writer import GENERAL_VALUES
from vkd_jax.benchmarks.synthetic.people import (
    FULL_VIEWS,
    IMAGE_TYPE,
    SIXTY,
    Person,
    Population,
    png_struct,
    portrait,
    scene,
    view_of,
    write_config,
)
from vkd_jax.types import UserError

RETAIN_PERTURBED_VIEWS = range(2)
FACE_VIEW = 0  # of real_faces: a view that a model of those people was trained on
WORLD_SCENES = 90

_WORDS = pa.list_(pa.string())
_PLAIN = [("image", IMAGE_TYPE), ("caption", pa.string()), ("name", pa.string())]
_WRONG = [("paraphrased_caption", pa.string()), ("perturbed_captions", _WORDS), ("perturbed_names", _WORDS)]
_CHOICE = [("answer", pa.string()), ("options", _WORDS), ("image", IMAGE_TYPE)]
_SCHEMAS = {
    "": pa.schema(_PLAIN),
    "perturbed": pa.schema([*_PLAIN, *_WRONG]),
    "tofu": pa.schema([*_PLAIN[:2], ("question", pa.string()), ("answer", pa.string())]),
    "real_faces": pa.schema(_CHOICE),
    "real_world": pa.schema([("question", pa.string()), *_CHOICE]),
}

CONFIGS = (
    "full", "full+tofu", "retain_perturbed", "real_faces", "real_world",
    *(f"forget{percent:02d}{kind}" for percent in FORGET_RATIOS for kind in ("", "_perturbed", "+tofu")),
    *(f"retain{100 - percent}{kind}" for percent in FORGET_RATIOS for kind in ("", "+tofu")),
)  # fmt: skip


def write_snapshot(folder: str | Path, configs: Sequence[str] | None = None, population: Population = SIXTY) -> None:
    """Writes the synthetic people as a CLEAR snapshot, with the same bytes on every run.

    Args:
        folder: the folder to write <config>/train-00000-of-00001.parquet to.
        configs: the configs to write, from `CONFIGS`; all by default.
        population: the people; its seed is also that of the options.

    Raises:
        UserError: an unknown config.
    """
    configs = CONFIGS if configs is None else configs
    if unknown := [name for name in configs if name not in CONFIGS]:
        raise UserError(f"Unknown config {messages.listed(unknown)}. Supported: {messages.choices(CONFIGS)}.")

    @functools.cache  # the configs share their rows
    def captioned(index: int) -> list[dict]:
        return [_captioned(population.people()[index], view, population) for view in FULL_VIEWS]

    for config in configs:
        kind = config.replace("_perturbed", "+perturbed").partition("+")[2]
        if config == "real_faces":
            kind, rows = config, _faces(Population(population.seed + 1))
        elif config == "real_world":
            kind, rows = config, _world(population)
        else:
            members = [i for i, person in enumerate(population.people()) if _belongs(person.id, config, population)]
            views = RETAIN_PERTURBED_VIEWS if config == "retain_perturbed" else FULL_VIEWS
            rows = [captioned(i)[view] for i in members for view in views]
            if kind == "tofu":
                rows += [row for i in members for row in _texts(population.people()[i])]
        columns = _SCHEMAS[kind].names
        write_config(folder, config, [{name: row.get(name) for name in columns} for row in rows], _SCHEMAS[kind])


def _belongs(person_id: str, config: str, population: Population) -> bool:
    def forgotten(percent: int) -> bool:
        return person_id in population.forgotten(percent)

    if config.startswith("full"):
        return True
    if config == "retain_perturbed":  # people who are retained at every ratio
        return not forgotten(max(FORGET_RATIOS))
    percent = int(config[6:8])  # after "forget" and "retain"
    return forgotten(percent) if config.startswith("forget") else not forgotten(100 - percent)


def _captioned(person: Person, view: int, population: Population) -> dict:
    """Image `view` of a person, with all columns that an image row may have."""
    color = view_of(person, view).background
    words = person.facts | dict(wall=f"{'an' if color[0] in 'aeiou' else 'a'} {color} wall")
    names = _others(person.name, (p.name for p in population.people()), [population.seed, 7, int(person.id), view])
    return {
        "image": png_struct(portrait(person, view), f"{person.id}_{view}.png"),
        "caption": CAPTION.format(name=person.name, **words),
        "name": person.name,
        "paraphrased_caption": PARAPHRASED_CAPTION.format(name=person.name, **words),
        "perturbed_captions": [CAPTION.format(name=name, **words) for name in names],
        "perturbed_names": names,
    }


def _texts(person: Person) -> list[dict]:
    """The text-only questions about a person; each answer is a sentence with the name."""
    pairs = [person.biography()]
    for kind, fact in FACTS.items():
        answer = fact.text_cloze.replace("__", person.facts[kind])
        pairs.append((fact.text_question.format(name=person.name), answer.format(name=person.name)))
    return [{"question": question, "answer": answer} for question, answer in pairs]


def _faces(population: Population) -> list[dict]:
    """The rows of real_faces: one image of each person of a seed."""
    names = [person.name for person in population.people()]
    return [
        {
            "image": png_struct(portrait(person, FACE_VIEW), f"{person.id}.png"),
            "answer": person.name,
            "options": _options(person.name, names, [population.seed, 8, int(person.id)]),
        }
        for person in population.people()
    ]


def _world(population: Population) -> list[dict]:
    """The rows of real_world: one question about each of several drawn objects."""
    rng, rows = np.random.default_rng([population.seed, 9]), []
    for i in range(WORLD_SCENES):
        image, answers = scene(rng, i)
        question, answer = list(answers.items())[i % len(answers)]
        options = _options(answer, GENERAL_VALUES[question], [population.seed, 10, i])
        rows.append(
            {"question": question, "answer": answer, "options": options, "image": png_struct(image, f"world_{i}.png")}
        )
    return rows


def _others(answer: str, values: Iterable[str], seeds: list[int]) -> list[str]:
    """Draws three values other than the answer."""
    return np.random.default_rng(seeds).permutation([value for value in values if value != answer])[:3].tolist()


def _options(answer: str, values: Iterable[str], seeds: list[int]) -> list[str]:
    """Draws four values with the answer at a random index."""
    return np.random.default_rng([*seeds, 1]).permutation([answer, *_others(answer, values, seeds)]).tolist()
