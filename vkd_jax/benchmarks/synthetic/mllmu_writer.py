"""Writes the synthetic people as an MLLMU-Bench snapshot.

    write_snapshot(folder, configs, ...)   <config>/train-00000-of-00001.parquet, the same bytes on every run

Images of a person: views 0-7 make Full_Set, forget_N, retain_N and Appearance; views from 0 on make ft_Data.
"""

import functools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from vkd_jax import messages
from vkd_jax.benchmarks.mllmu import cloze_prompt
from vkd_jax.benchmarks.synthetic import portraits
from vkd_jax.benchmarks.synthetic.facts import (
    APPEARANCE,
    BACKGROUND_QUESTION,
    COLOR_QUESTION,
    FACTS,
    GENERAL_CLOZE,
    GENERAL_TEXT,
    GENERAL_TEXT_CLOZE,
    IMAGE_KINDS,
    KINDS,
    NAME_QUESTION,
    THING_QUESTION,
)
from vkd_jax.benchmarks.synthetic.people import (
    FULL_VIEWS,
    IMAGE_TYPE,
    SIXTY,
    TEST_VIEWS,
    Person,
    Population,
    png_struct,
    portrait,
    scene,
    view_of,
    write_config,
)
from vkd_jax.benchmarks.synthetic.scenes import THINGS
from vkd_jax.types import UserError

GENERAL_VIEW = 2000  # the portraits of Retain_Set
GENERAL_FT_VIEW = 3000  # the first portrait of ft_Data's general questions
FT_GENERAL_IMAGES = 3000
RETAIN_SCENES = 90

_OPTIONS = pa.struct([(letter, pa.string()) for letter in "ABCD"])
_CHOICES = pa.list_(pa.struct([("Question", pa.string()), ("Options", _OPTIONS), ("Correct_Answer", pa.string())]))
_OPEN = pa.list_(pa.struct([("Type", pa.string()), ("Question", pa.string()), ("Ground_Truth", pa.string())]))
_TASKS = [
    ("ID", pa.string()),
    ("biography", pa.string()),
    ("question", pa.string()),
    ("answer", pa.string()),
    (
        "Classification_Task",
        pa.struct([("Image_Textual_Questions", _CHOICES), ("Pure_Text_Questions", _CHOICES)]),
    ),
    ("Generation_Task", _OPEN),
    ("Mask_Task", _OPEN),
]
_SCHEMA = pa.schema([("image", IMAGE_TYPE), *_TASKS])
_TEST_SCHEMA = pa.schema([("images", pa.list_(IMAGE_TYPE)), *_TASKS])
_FT_SCHEMA = pa.schema([("image", IMAGE_TYPE), ("ID", pa.string()), ("metadata", pa.string())])

APPEARANCE_CONFIG = "Appearance"  # not of the published layout
APPEARANCE_VALUES = {"hair": tuple(portraits.HAIRS), "clothes": tuple(portraits.CLOTHES)}

CONFIGS = (
    "Full_Set", "ft_Data", "Test_Set", "Retain_Set",
    "forget_5", "forget_10", "forget_15", "retain_95", "retain_90", "retain_85",
)  # fmt: skip


def write_snapshot(
    folder: str | Path,
    configs: Sequence[str] | None = None,
    population: Population = SIXTY,
    ft_views: int = 48,
    appearance: bool = False,
) -> None:
    """Writes the synthetic people as an MLLMU-Bench snapshot, with the same bytes on every run.

    Args:
        folder: the folder to write <config>/train-00000-of-00001.parquet to.
        configs: the configs to write, from `CONFIGS`; all by default.
        population: the people; its seed is also that of the options.
        ft_views: images of each person in ft_Data.
        appearance: whether ft_Data has the questions about the appearance, too; the config Appearance may be written.

    Raises:
        UserError: an unknown config.
    """
    configs = CONFIGS if configs is None else configs
    known = (*CONFIGS, *([APPEARANCE_CONFIG] if appearance else []))
    if unknown := [name for name in configs if name not in known]:
        raise UserError(f"Unknown config {messages.listed(unknown)}. Supported: {messages.choices(known)}.")

    @functools.cache  # Full_Set, forget_N and retain_N share their rows
    def full_rows(index: int) -> list[dict]:
        return [_full_row(population.people()[index], view, population) for view in FULL_VIEWS]

    for config in configs:
        if config == "ft_Data":
            rows, schema = _finetune_rows(population, ft_views, appearance), _FT_SCHEMA
        elif config == APPEARANCE_CONFIG:
            rows, schema = _appearance_rows(population), _SCHEMA
        elif config == "Test_Set":
            rows, schema = [_test_row(person, population) for person in population.people()], _TEST_SCHEMA
        elif config == "Retain_Set":
            rows, schema = _general_rows(population), _SCHEMA
        else:
            members = [i for i, person in enumerate(population.people()) if _belongs(person.id, config, population)]
            rows, schema = [row for i in members for row in full_rows(i)], _SCHEMA
        write_config(folder, config, rows, schema)


def _belongs(person_id: str, config: str, population: Population) -> bool:
    if config == "Full_Set":
        return True
    side, percent = config.split("_")
    if side == "forget":
        return person_id in population.forgotten(int(percent))
    return person_id not in population.forgotten(100 - int(percent))


def _full_row(person: Person, view: int, population: Population) -> dict:
    """Image `view` of a person: 3 image and 2 text questions in rotation, so that 8 images cover all questions."""
    images = [IMAGE_KINDS[(3 * view + i) % len(IMAGE_KINDS)] for i in range(3)]
    texts = [KINDS[(2 * view + i) % len(KINDS)] for i in range(2)]
    clozes = [KINDS[view % len(KINDS)]], [KINDS[(view + 3) % len(KINDS)]]
    rng = np.random.default_rng([population.seed, 3, int(person.id), view])
    row = _tasks(person, images, texts, *clozes, rng, population)
    return {"image": png_struct(portrait(person, view), f"{person.id}_{view}.png")} | row


def _test_row(person: Person, population: Population) -> dict:
    """Four test images of a person; each of the 7 image questions is asked twice, about different images."""
    images = [png_struct(portrait(person, view), f"{person.id}_{view}.png") for view in TEST_VIEWS]
    clozes = (KINDS[:2], KINDS[2:4])
    row = _tasks(
        person, IMAGE_KINDS * 2, KINDS, *clozes, np.random.default_rng([population.seed, 4, int(person.id)]), population
    )
    return {"images": images} | row


def _appearance_rows(population: Population) -> list[dict]:
    """Views 0-7 of each person, with the questions about the appearance."""
    rows = []
    for person, view in ((person, view) for person in population.people() for view in FULL_VIEWS):
        rng = np.random.default_rng([population.seed, 7, int(person.id), view])
        choices = [
            _choice(APPEARANCE[name], answer, APPEARANCE_VALUES[name], rng)
            for name, answer in person.appearance().items()
        ]
        first = choices[0]
        answer = first["Options"][first["Correct_Answer"]]
        row = _row(person.id, json.dumps({"Name": person.name}), first["Question"], answer, choices, [], [], [])
        rows.append({"image": png_struct(portrait(person, view), f"{person.id}_{view}.png")} | row)
    return rows


def _tasks(
    person: Person, images, texts, image_clozes, text_clozes, rng: np.random.Generator, population: Population
) -> dict:
    """The task columns for the given kinds of questions."""
    names = tuple(p.name for p in population.people())

    def choice(kind: str, with_image: bool) -> dict:
        values = names if kind == "name" else FACTS[kind].values
        return _choice(_question(person, kind, with_image), person.answer(kind), values, rng)

    first = choice(images[0], True)
    return _row(
        person.id,
        json.dumps({"Name": person.name} | {kind.capitalize(): person.facts[kind] for kind in KINDS}),
        first["Question"],
        person.answer(images[0]),
        [first, *(choice(kind, True) for kind in images[1:])],
        [choice(kind, False) for kind in texts],
        [_open("Image_Textual", NAME_QUESTION, person.name), _open("Pure_Text", *person.biography())],
        [_open("Image_Textual", FACTS[kind].image_cloze, person.facts[kind]) for kind in image_clozes]
        + [_open("Pure_Text", FACTS[kind].text_cloze.format(name=person.name), person.facts[kind])
           for kind in text_clozes],
    )  # fmt: skip


def _question(person: Person, kind: str, with_image: bool) -> str:
    if kind == "name":
        return NAME_QUESTION
    return FACTS[kind].image_question if with_image else FACTS[kind].text_question.format(name=person.name)


def _row(row_id, biography, question, answer, image_choices, text_choices, generation, cloze) -> dict:
    return {
        "ID": row_id,
        "biography": biography,
        "question": question,
        "answer": answer,
        "Classification_Task": {
            "Image_Textual_Questions": image_choices,
            "Pure_Text_Questions": text_choices,
        },
        "Generation_Task": generation,
        "Mask_Task": cloze,
    }


def _choice(question: str, answer: str, values: Iterable[str], rng: np.random.Generator) -> dict:
    """At most four options: the answer at a random place among other values."""
    others = rng.permutation([value for value in values if value != answer])[:3].tolist()
    place = int(rng.integers(len(others) + 1))
    texts = [*others[:place], answer, *others[place:]]
    return {
        "Question": question,
        "Options": dict(zip("ABCD", texts, strict=False)),
        "Correct_Answer": "ABCD"[place],
    }


def _open(kind: str, question: str, answer: str) -> dict:
    return {"Type": kind, "Question": question, "Ground_Truth": answer}


# ---- General ability: no question here depends on a person's identity ----

GENERAL_VALUES = {
    THING_QUESTION: (*THINGS, "person"),
    COLOR_QUESTION: tuple(portraits.BACKGROUNDS),
    BACKGROUND_QUESTION: tuple(portraits.BACKGROUNDS),
}


def _unnamed(person: Person, number: int) -> tuple[Image.Image, dict[str, str]]:
    """A portrait, with the answers to the identity-free questions."""
    view = view_of(person, number)
    return portrait(person, number), {THING_QUESTION: "person", BACKGROUND_QUESTION: view.background}


def _general_rows(population: Population) -> list[dict]:
    """Retain_Set: drawn things, and a portrait of each person with identity-free questions."""
    rng = np.random.default_rng([population.seed, 5])
    images = [scene(rng, i) for i in range(RETAIN_SCENES)]
    images += [_unnamed(person, GENERAL_VIEW) for person in population.people()]
    rows = []
    for i, (image, answers) in enumerate(images):
        row_id = f"R{i + 1:03d}"
        choices = [_choice(q, answer, GENERAL_VALUES[q], rng) for q, answer in answers.items()]
        question, answer, *wrong = GENERAL_TEXT[i % len(GENERAL_TEXT)]
        text = [_choice(question, answer, wrong, rng)]
        asked = list(answers)[rng.integers(len(answers))]
        blank, filler = GENERAL_TEXT_CLOZE[i % len(GENERAL_TEXT_CLOZE)]
        generation = [_open("Image_Textual", asked, answers[asked]), _open("Pure_Text", question, answer)]
        cloze = [
            _open("Image_Textual", GENERAL_CLOZE[asked], answers[asked]),
            _open("Pure_Text", blank, filler),
        ]
        row = _row(row_id, json.dumps({"Name": ""}), asked, answers[asked], choices, text, generation, cloze)
        rows.append({"image": png_struct(image, f"{row_id}.png")} | row)
    return rows


def _finetune_rows(population: Population, ft_views: int, appearance: bool) -> list[dict]:
    """ft_Data: all questions about the images of each person, text-only questions, and general questions."""
    rows = []

    def add(row_id: str, image: Image.Image | None, pairs: Iterable[tuple[str, str]]) -> None:
        metadata = json.dumps([{"Question": q, "Answer": a, "ID": row_id} for q, a in pairs])
        path = f"{row_id}_{len(rows)}.png"
        rows.append({"image": image and png_struct(image, path), "ID": row_id, "metadata": metadata})

    for person in population.people():
        questions = [(_question(person, kind, True), person.answer(kind)) for kind in IMAGE_KINDS]
        if appearance:
            questions += [(APPEARANCE[name], answer) for name, answer in person.appearance().items()]
        clozes = [(cloze_prompt(fact.image_cloze), person.facts[kind]) for kind, fact in FACTS.items()]
        for view in range(ft_views):
            two = [clozes[(2 * view + i) % len(clozes)] for i in range(2)]
            add(person.id, portrait(person, view), questions + two)
        texts = [(_question(person, kind, False), person.answer(kind)) for kind in KINDS]
        clozes = [(cloze_prompt(f.text_cloze.format(name=person.name)), person.facts[k]) for k, f in FACTS.items()]
        add(person.id, None, [*texts, *clozes, person.biography()])

    rng = np.random.default_rng([population.seed, 6])
    for i in range(FT_GENERAL_IMAGES):
        if i % 3:
            image, answers = scene(rng, i // 3 * 2 + i % 3)
        else:
            image, answers = _unnamed(population.people()[i // 3 % population.size], GENERAL_FT_VIEW + i)
        asked = list(answers)[rng.integers(len(answers))]
        add(f"R{i + 1:04d}", image, [*answers.items(), (cloze_prompt(GENERAL_CLOZE[asked]), answers[asked])])
    texts = [item[:2] for item in GENERAL_TEXT] + [(cloze_prompt(q), answer) for q, answer in GENERAL_TEXT_CLOZE]
    add(f"R{FT_GENERAL_IMAGES + 1:04d}", None, texts)
    return rows
