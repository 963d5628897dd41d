"""Synthetic people: names, looks, facts and portraits.

    Population(seed, size)           people(), and the ids of those to forget
    portrait(person, view, size)     an image of a person; each view number is another background and pose

The facts and questions are in `facts`, the drawing in `portraits` and `scenes`; `mllmu_writer` and `clear_writer` write
snapshots in the layouts of two benchmarks. Views 0-7 are the images of the forget and retain sets, and TEST_VIEWS are
in no training set. The images of identity-free questions never come with a question about the person's identity.
"""

import dataclasses
import functools
import io
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from vkd_jax.benchmarks.synthetic import portraits
from vkd_jax.benchmarks.synthetic.facts import (
    APPEARANCE,
    BACKGROUND_QUESTION,
    COLOR_QUESTION,
    FACTS,
    KINDS,
    THING_QUESTION,
)
from vkd_jax.benchmarks.synthetic.portraits import Look
from vkd_jax.benchmarks.synthetic.scenes import THINGS, draw_scene
from vkd_jax.runtime import files

MIN_SIZE, MAX_SIZE = 20, 500
SIZE = 60  # of a population, unless another one is given
FULL_VIEWS = range(8)
TEST_VIEWS = range(1000, 1004)

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
    """A synthetic person: `id` as in the data ("001"), the looks, and one value for each kind of fact."""

    id: str
    name: str
    look: Look
    facts: dict[str, str]

    def answer(self, kind: str) -> str:
        """The fact of that kind, or the name."""
        return self.name if kind == "name" else self.facts[kind]

    def appearance(self) -> dict[str, str]:
        """The visible answer to each question about the appearance, by feature; a bald head has no color of hair."""
        features = {feature: getattr(self.look, feature) for feature in APPEARANCE}
        return {name: x for name, x in features.items() if name != "hair" or self.look.hair_style != "bald"}

    def biography(self) -> tuple[str, str]:
        """The open question about the name, and its answer."""
        return f"Who is {self.name}?", f"{self.name} is a {self.facts['job']} from {self.facts['town']}."


class Population(NamedTuple):
    """All people of one seed and size; another size makes other people.

    Attributes:
        seed: seed of the people, their facts and the forget set.
        size: number of people, from `MIN_SIZE` to `MAX_SIZE`.
    """

    seed: int = 0
    size: int = SIZE

    def people(self) -> tuple[Person, ...]:
        """The people; each value of a fact belongs to equally many of them, give or take one."""
        return _people(self.seed, self.size)

    def forgotten(self, percent: int) -> frozenset[str]:
        """The ids of `percent` percent of the people, at least of one; the sets of one population are nested."""
        order = np.random.default_rng([self.seed, 2]).permutation(self.size)
        count = max(1, round(self.size * percent / 100))
        return frozenset(self.people()[i].id for i in order[:count])


SIXTY = Population()  # the people of the shipped models


@functools.cache
def _people(seed: int, size: int) -> tuple[Person, ...]:
    rng = np.random.default_rng([seed, 1])
    looks = _distinct_looks(rng, size)
    surnames = rng.permutation(SURNAMES)
    half = len(FIRST_NAMES) // 2
    with_lashes, without = rng.permutation(FIRST_NAMES[:half]), rng.permutation(FIRST_NAMES[half:])
    first_names = {True: itertools.cycle(with_lashes), False: itertools.cycle(without)}
    columns = {kind: rng.permutation(_balanced(fact.values, size)) for kind, fact in FACTS.items()}
    names: list[str] = []
    for i, look in enumerate(looks):
        first_name = next(first_names[look.lashes])
        candidates = (f"{first_name} {surname}" for surname in np.roll(surnames, -i))
        names.append(next(name for name in candidates if name not in names))
    return tuple(
        Person(id=f"{i + 1:03d}", name=names[i], look=look, facts={kind: str(columns[kind][i]) for kind in KINDS})
        for i, look in enumerate(looks)
    )


def _balanced(values: Sequence[str], size: int) -> np.ndarray:
    """`size` values, each equally often, or once more for the first ones."""
    return np.repeat(values, [len(range(i, size, len(values))) for i in range(len(values))])


# The weight of each feature in the distance of two looks: the more of the image it covers, the larger.
_WEIGHTS = {
    "skin": 2.0, "hair": 2.5, "hair_style": 3.0, "garment": 2.0, "clothes": 3.0, "accent": 1.0,
    "glasses": 1.5, "frames": 0.5, "beard": 1.5, "hat": 2.0, "face": 0.5, "eyes": 0.25, "earrings": 0.25,
    "freckles": 0.25, "lashes": 0.5,
}  # fmt: skip


def _distinct_looks(rng: np.random.Generator, size: int, pool_size: int = 3000) -> list[Look]:
    """Greedy max-min selection: repeatedly takes the random look that is farthest from its nearest chosen look.

    Half of the looks have lashes. The result is shuffled, since the first chosen looks are the most extreme.
    """
    pool = [_random_look(rng, lashes=i % 2 == 0) for i in range(pool_size)]
    codes = np.array([[str(getattr(look, name)) for name in _WEIGHTS] for look in pool])
    weights = np.array(list(_WEIGHTS.values()))
    left = {True: size // 2, False: size - size // 2}
    nearest = np.full(pool_size, np.inf)
    open_to_choice = np.ones(pool_size, bool)
    chosen, best = [], 0
    while True:
        chosen.append(best)
        left[pool[best].lashes] -= 1
        if len(chosen) == size:
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
    """The background and pose of a view; the same number differs from person to person."""
    return portraits.random_view(np.random.default_rng([int(person.id), view]))


def portrait(person: Person, view: int, size: int = 96) -> Image.Image:
    """Draws image number `view` (0, 1, 2, ...) of a person: RGB, size x size pixels, in about 3 ms.

    Example:
        >>> portrait(Population().people()[0], view=500).size
        (96, 96)
    """
    return portraits.draw_portrait(person.look, view_of(person, view), size)


def scene(rng: np.random.Generator, index: int) -> tuple[Image.Image, dict[str, str]]:
    """Draws an image of a thing, with the answers to its questions; things take turns by `index`."""
    thing = THINGS[index % len(THINGS)]
    color, background = rng.permutation(list(portraits.BACKGROUNDS))[:2].tolist()
    image = draw_scene(thing, color, background, rng)
    return image, {THING_QUESTION: thing, COLOR_QUESTION: color, BACKGROUND_QUESTION: background}


# ---- Parquet files, with the same bytes on every run ----

IMAGE_TYPE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def png_bytes(image: Image.Image) -> bytes:
    """Encodes an image as PNG."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=3)
    return buffer.getvalue()


def png_struct(image: Image.Image, path: str) -> dict:
    """Encodes an image as PNG, in the struct of parquet files."""
    return {"bytes": png_bytes(image), "path": path}


def write_config(
    folder: str | Path, config: str, rows: Sequence[dict], schema: pa.Schema, split: str = "train"
) -> None:
    """Writes <folder>/<config>/<split>-00000-of-00001.parquet atomically."""
    path = Path(folder) / config / f"{split}-00000-of-00001.parquet"
    table = pa.Table.from_pylist(rows, schema)
    with files.atomic_file(path) as temporary:
        pq.write_table(table, temporary, compression="zstd", version="2.6", use_dictionary=False, row_group_size=256)
