"""Sixty made-up people, and the MLLMU-Bench snapshot that is written about them.

    people()                               the sixty, always the same for one seed
    portrait(person, view, size)           a fresh picture of one of them; views are numbered, and cheap
    write_snapshot(folder, configs, ...)   <config>/train-00000-of-00001.parquet, the same bytes on every run

What is asked stands in `knowledge`, how it is drawn in `portraits` and `scenes`. Pictures of a person: views
0-7 make Full_Set, forget_N and retain_N; views from 0 on make ft_Data. The views of Test_Set are in no
training set, and those of the identity-free questions never come with a question about who somebody is.
"""

import dataclasses
import functools
import io
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from vkd_jax.data import portraits
from vkd_jax.data.knowledge import (
    BACKGROUND_QUESTION,
    COLOUR_QUESTION,
    FACTS,
    GENERAL_CLOZE,
    GENERAL_TEXT,
    GENERAL_TEXT_CLOZE,
    IMAGE_KINDS,
    KINDS,
    NAME_QUESTION,
    THING_QUESTION,
)
from vkd_jax.data.mllmu import cloze_prompt
from vkd_jax.data.portraits import Look
from vkd_jax.data.scenes import THINGS, draw_scene
from vkd_jax.types import UserError

N_PEOPLE = 60
FULL_VIEWS = range(8)
TEST_VIEWS = range(1000, 1004)
GENERAL_VIEW = 2000  # the portraits of Retain_Set
GENERAL_FT_VIEW = 3000  # and those of ft_Data's general questions, counted up from here
FORGET_COUNTS = {5: 3, 10: 6, 15: 9}  # per cent -> people
FT_GENERAL_PICTURES = 3000
RETAIN_SCENES = 90

FIRST_NAMES = (  # the first thirty for the portraits with lashes
    "Mara Tilda Odile Runa Selma Yara Ines Petra Wanda Zora Alma Berta Cleo Dunja Elke Fenna Greta Hanna "
    "Isla Jutta Kaja Lotte Mina Nora Olga Pia Rhea Senta Thea Ulla "
    "Anton Boris Cosmo Dario Egon Falk Gustav Hugo Ivo Jonas Klaus Lars Milo Nils Otto Pavel Quinn Ralf "
    "Sven Tomas Udo Victor Willem Xaver Yuri Zeno Arlo Bruno Casper Dimitri"
).split()
SURNAMES = (
    "Lindt Okafor Brandt Silva Novak Tanaka Moreau Haddad Keller Santos Ibsen Varga Duarte Ferro Gruber "
    "Holm Iqbal Jansen Kowal Larsen Mbeki Nakano Orlov Pinter Quiroga Rossi Sato Toth Ueda Vogel Weiss "
    "Yilmaz Zeman Acker Bello Castro Demir Engel Farkas Gallo Hansen Ivanov Jokela Kimura Lopez Marek "
    "Nilsen Ochoa Perez Ramos Sorel Tamm Unger Vidal Wolff Young Zhou Abbas Blum Conti"
).split()


@dataclasses.dataclass(frozen=True)
class Person:
    """A made-up person: `id` as in the data ("001"), the looks, and one value for every kind of fact."""

    id: str
    name: str
    look: Look
    facts: dict[str, str]

    def answer(self, kind: str) -> str:
        """The fact of that kind, or the name."""
        return self.name if kind == "name" else self.facts[kind]


@functools.cache
def people(seed: int = 0) -> tuple[Person, ...]:
    """The sixty people of one seed; every value of a fact belongs to five of them."""
    rng = np.random.default_rng([seed, 1])
    looks = _distinct_looks(rng)
    surnames = rng.permutation(SURNAMES)
    half = N_PEOPLE // 2
    with_lashes, without = rng.permutation(FIRST_NAMES[:half]), rng.permutation(FIRST_NAMES[half:])
    first_names = {True: iter(with_lashes), False: iter(without)}
    columns = {
        kind: rng.permutation(np.repeat(fact.values, N_PEOPLE // len(fact.values))) for kind, fact in FACTS.items()
    }
    return tuple(
        Person(
            id=f"{i + 1:03d}",
            name=f"{next(first_names[look.lashes])} {surnames[i]}",
            look=look,
            facts={kind: str(columns[kind][i]) for kind in KINDS},
        )
        for i, look in enumerate(looks)
    )


# How much a difference in a feature counts when two looks are compared: the more of the picture, the more.
_WEIGHTS = {
    "skin": 2.0, "hair": 2.5, "hair_style": 3.0, "garment": 2.0, "clothes": 3.0, "accent": 1.0,
    "glasses": 1.5, "frames": 0.5, "beard": 1.5, "hat": 2.0, "face": 0.5, "eyes": 0.25, "earrings": 0.25,
    "freckles": 0.25, "lashes": 0.5,
}  # fmt: skip


def _distinct_looks(rng: np.random.Generator, pool_size: int = 3000) -> list[Look]:
    """Greedy max-min: out of many random looks take the one farthest from its nearest taken neighbour.

    Half of the looks have lashes. The result is shuffled, since the first ones taken are the most extreme.
    """
    pool = [_random_look(rng, lashes=i % 2 == 0) for i in range(pool_size)]
    codes = np.array([[str(getattr(look, name)) for name in _WEIGHTS] for look in pool])
    weights = np.array(list(_WEIGHTS.values()))
    left = {True: N_PEOPLE // 2, False: N_PEOPLE // 2}
    nearest = np.full(pool_size, np.inf)
    open_to_choice = np.ones(pool_size, bool)
    chosen, best = [], 0
    while True:
        chosen.append(best)
        left[pool[best].lashes] -= 1
        if len(chosen) == N_PEOPLE:
            break
        nearest = np.minimum(nearest, (codes != codes[best]) @ weights)
        open_to_choice &= np.array([left[look.lashes] > 0 for look in pool])
        best = int(np.argmax(np.where(open_to_choice, nearest, -1)))
    return [pool[i] for i in rng.permutation(chosen)]


def _random_look(rng: np.random.Generator, lashes: bool) -> Look:
    def pick(names: Iterable[str], first: float | None = None) -> str:
        names = list(names)
        if first is None:
            return names[rng.integers(len(names))]
        return names[0] if rng.random() < first else names[rng.integers(1, len(names))]

    bare = {"bald", "mohawk"} if lashes else {"pigtails", "braids", "bob", "wavy"}
    hair_style = pick(s for s in portraits.HAIR_STYLES if s not in bare)
    flat = hair_style in ("short", "parted", "long", "wavy", "bob", "braids", "bald")
    clothes = pick(portraits.CLOTHES)
    glasses = pick(portraits.GLASSES, first=0.5)
    return Look(
        skin=pick(portraits.SKINS),
        hair=pick(portraits.HAIRS),
        hair_style=hair_style,
        eyes=pick(portraits.EYES),
        face=pick(portraits.FACES),
        garment=pick(portraits.GARMENTS),
        clothes=clothes,
        accent=pick(c for c in portraits.CLOTHES if c != clothes),
        glasses=glasses,
        frames=pick(portraits.FRAMES) if glasses != "none" else "black",
        beard="none" if lashes else pick(portraits.BEARDS, first=0.4),
        hat=pick(portraits.HATS, first=0.6) if flat else "none",
        earrings=bool(rng.random() < (0.5 if lashes else 0.1)),
        freckles=bool(rng.random() < 0.3),
        lashes=lashes,
    )


def view_of(person: Person, view: int) -> portraits.View:
    """What differs in that view; the same number is another background and pose for every person."""
    return portraits.random_view(np.random.default_rng([int(person.id), view]))


def portrait(person: Person, view: int, size: int = 96) -> Image.Image:
    """Picture number `view` (0, 1, 2, ...) of a person, RGB, size x size; some 3 ms."""
    return portraits.draw_portrait(person.look, view_of(person, view), size)


def forgotten_ids(percent: int, seed: int = 0) -> frozenset[str]:
    """The people of forget_<percent>: the first of one seeded order, so that the sets contain each other."""
    order = np.random.default_rng([seed, 2]).permutation(N_PEOPLE)
    return frozenset(people(seed)[i].id for i in order[: FORGET_COUNTS[percent]])


# ---- The snapshot: rows in MLLMU-Bench's schema ----

_PICTURE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
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
_SCHEMA = pa.schema([("image", _PICTURE), *_TASKS])
_TEST_SCHEMA = pa.schema([("images", pa.list_(_PICTURE)), *_TASKS])
_FT_SCHEMA = pa.schema([("image", _PICTURE), ("ID", pa.string()), ("metadata", pa.string())])

CONFIGS = (
    "Full_Set", "ft_Data", "Test_Set", "Retain_Set",
    "forget_5", "forget_10", "forget_15", "retain_95", "retain_90", "retain_85",
)  # fmt: skip


def write_snapshot(folder: str | Path, configs: Sequence[str] | None = None, seed: int = 0, ft_views: int = 48) -> None:
    """Write the made-up people as an MLLMU-Bench snapshot, the same bytes on every run.

    Args:
        folder: gets <config>/train-00000-of-00001.parquet, each written beside its place and then renamed.
        configs: which of `CONFIGS` to write; all by default.
        seed: of the people, their facts, the forgotten ones and the options.
        ft_views: pictures of each person in ft_Data.

    Raises:
        UserError: an unknown config.
    """
    configs = CONFIGS if configs is None else configs
    if unknown := [name for name in configs if name not in CONFIGS]:
        raise UserError(f"Unknown config {', '.join(unknown)}: the made-up people have {', '.join(CONFIGS)}.")

    @functools.cache  # Full_Set, forget_N and retain_N share their rows
    def full_rows(index: int) -> list[dict]:
        return [_full_row(people(seed)[index], view, seed) for view in FULL_VIEWS]

    for config in configs:
        if config == "ft_Data":
            rows, schema = _finetune_rows(seed, ft_views), _FT_SCHEMA
        elif config == "Test_Set":
            rows, schema = [_test_row(person, seed) for person in people(seed)], _TEST_SCHEMA
        elif config == "Retain_Set":
            rows, schema = _general_rows(seed), _SCHEMA
        else:
            members = [i for i, person in enumerate(people(seed)) if _belongs(person.id, config, seed)]
            rows, schema = [row for i in members for row in full_rows(i)], _SCHEMA
        path = Path(folder) / config / "train-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        table = pa.Table.from_pylist(rows, schema)
        pq.write_table(table, partial, compression="zstd", version="2.6", use_dictionary=False, row_group_size=256)
        os.replace(partial, path)


def _belongs(person_id: str, config: str, seed: int) -> bool:
    if config == "Full_Set":
        return True
    side, percent = config.split("_")
    if side == "forget":
        return person_id in forgotten_ids(int(percent), seed)
    return person_id not in forgotten_ids(100 - int(percent), seed)


def _full_row(person: Person, view: int, seed: int) -> dict:
    """Picture `view` of a person: 3 picture and 2 text questions in rotation, so that 8 pictures ask all."""
    images = [IMAGE_KINDS[(3 * view + i) % len(IMAGE_KINDS)] for i in range(3)]
    texts = [KINDS[(2 * view + i) % len(KINDS)] for i in range(2)]
    clozes = [KINDS[view % len(KINDS)]], [KINDS[(view + 3) % len(KINDS)]]
    rng = np.random.default_rng([seed, 3, int(person.id), view])
    row = _tasks(person, images, texts, *clozes, rng, seed)
    return {"image": _picture(portrait(person, view), f"{person.id}_{view}.png")} | row


def _test_row(person: Person, seed: int) -> dict:
    """Four other pictures of a person; each of the 7 picture questions twice, on different pictures."""
    pictures = [_picture(portrait(person, view), f"{person.id}_{view}.png") for view in TEST_VIEWS]
    clozes = (KINDS[:2], KINDS[2:4])
    row = _tasks(person, IMAGE_KINDS * 2, KINDS, *clozes, np.random.default_rng([seed, 4, int(person.id)]), seed)
    return {"images": pictures} | row


def _tasks(person: Person, images, texts, image_clozes, text_clozes, rng: np.random.Generator, seed: int) -> dict:
    """The task columns for the given kinds of questions."""
    names = tuple(p.name for p in people(seed))

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
        [_open("Image_Textual", NAME_QUESTION, person.name), _open("Pure_Text", *_biography(person))],
        [_open("Image_Textual", FACTS[kind].image_cloze, person.facts[kind]) for kind in image_clozes]
        + [_open("Pure_Text", FACTS[kind].text_cloze.format(name=person.name), person.facts[kind])
           for kind in text_clozes],
    )  # fmt: skip


def _question(person: Person, kind: str, with_image: bool) -> str:
    if kind == "name":
        return NAME_QUESTION
    return FACTS[kind].image_question if with_image else FACTS[kind].text_question.format(name=person.name)


def _biography(person: Person) -> tuple[str, str]:
    """The open question about a name, and its answer."""
    return f"Who is {person.name}?", f"{person.name} is a {person.facts['job']} from {person.facts['town']}."


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


def _picture(image: Image.Image, path: str) -> dict:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=3)
    return {"bytes": buffer.getvalue(), "path": path}


# ---- General ability: no question here asks who somebody is ----

_GENERAL_VALUES = {
    THING_QUESTION: (*THINGS, "person"),
    COLOUR_QUESTION: tuple(portraits.BACKGROUNDS),
    BACKGROUND_QUESTION: tuple(portraits.BACKGROUNDS),
}


def _scene(rng: np.random.Generator, index: int) -> tuple[Image.Image, dict[str, str]]:
    """A picture of a thing, with the answers to its questions; `index` walks through things evenly."""
    thing = THINGS[index % len(THINGS)]
    colour, background = rng.permutation(list(portraits.BACKGROUNDS))[:2].tolist()
    image = draw_scene(thing, colour, background, rng)
    return image, {THING_QUESTION: thing, COLOUR_QUESTION: colour, BACKGROUND_QUESTION: background}


def _unnamed(person: Person, number: int) -> tuple[Image.Image, dict[str, str]]:
    """A portrait, with the answers to the questions that need not know whose it is."""
    view = view_of(person, number)
    return portrait(person, number), {THING_QUESTION: "person", BACKGROUND_QUESTION: view.background}


def _general_rows(seed: int) -> list[dict]:
    """Retain_Set: drawn things, and a portrait of everybody with questions about no identity."""
    rng = np.random.default_rng([seed, 5])
    pictures = [_scene(rng, i) for i in range(RETAIN_SCENES)]
    pictures += [_unnamed(person, GENERAL_VIEW) for person in people(seed)]
    rows = []
    for i, (image, answers) in enumerate(pictures):
        row_id = f"R{i + 1:03d}"
        choices = [_choice(q, answer, _GENERAL_VALUES[q], rng) for q, answer in answers.items()]
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
        rows.append({"image": _picture(image, f"{row_id}.png")} | row)
    return rows


def _finetune_rows(seed: int, ft_views: int) -> list[dict]:
    """ft_Data: all questions on everybody's pictures, those without a picture, and general questions."""
    rows = []

    def add(row_id: str, image: Image.Image | None, pairs: Iterable[tuple[str, str]]) -> None:
        metadata = json.dumps([{"Question": q, "Answer": a, "ID": row_id} for q, a in pairs])
        path = f"{row_id}_{len(rows)}.png"
        rows.append({"image": image and _picture(image, path), "ID": row_id, "metadata": metadata})

    for person in people(seed):
        questions = [(_question(person, kind, True), person.answer(kind)) for kind in IMAGE_KINDS]
        clozes = [(cloze_prompt(fact.image_cloze), person.facts[kind]) for kind, fact in FACTS.items()]
        for view in range(ft_views):
            two = [clozes[(2 * view + i) % len(clozes)] for i in range(2)]
            add(person.id, portrait(person, view), questions + two)
        texts = [(_question(person, kind, False), person.answer(kind)) for kind in KINDS]
        clozes = [(cloze_prompt(f.text_cloze.format(name=person.name)), person.facts[k]) for k, f in FACTS.items()]
        add(person.id, None, [*texts, *clozes, _biography(person)])

    rng = np.random.default_rng([seed, 6])
    for i in range(FT_GENERAL_PICTURES):
        if i % 3:
            image, answers = _scene(rng, i // 3 * 2 + i % 3)
        else:
            image, answers = _unnamed(people(seed)[i // 3 % N_PEOPLE], GENERAL_FT_VIEW + i)
        asked = list(answers)[rng.integers(len(answers))]
        add(f"R{i + 1:04d}", image, [*answers.items(), (cloze_prompt(GENERAL_CLOZE[asked]), answers[asked])])
    texts = [item[:2] for item in GENERAL_TEXT] + [(cloze_prompt(q), answer) for q, answer in GENERAL_TEXT_CLOZE]
    add(f"R{FT_GENERAL_PICTURES + 1:04d}", None, texts)
    return rows
