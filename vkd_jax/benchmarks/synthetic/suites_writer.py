"""Writes stand-ins of the standard suites: drawn things and portraits with questions, in each suite's own layout.

They show that a suite runs from its files to its figures. Their figures say nothing about the suites.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import ImageDraw

from vkd_jax.benchmarks.synthetic.facts import BACKGROUND_QUESTION, COLOR_QUESTION, THING_QUESTION
from vkd_jax.benchmarks.synthetic.people import IMAGE_TYPE, SIXTY, png_struct, portrait, scene, view_of, write_config
from vkd_jax.benchmarks.synthetic.portraits import BACKGROUNDS
from vkd_jax.benchmarks.synthetic.scenes import THINGS, WHITE

SCENES, PORTRAITS = 8, 2
VIEW = 4000  # of the portraits, which are in no other set
SEED = 11
PEOPLE = 10  # who answer each question of VQAv2, VizWiz and TextVQA
WORDS = ("stop", "open", "exit", "cafe")  # written into the images of TextVQA
ROTATION = 1_000_000  # between the indices of a question's copies in MMBench

_TEXT, _TEXTS, _INT = pa.string(), pa.list_(pa.string()), pa.int64()


@dataclasses.dataclass(frozen=True)
class Picture:
    """A drawn image and what is true of it."""

    name: str
    image: Mapping[str, Any]  # as in parquet files
    facts: Mapping[str, str]  # by question

    @property
    def thing(self) -> str:
        """What the image shows."""
        return self.facts[THING_QUESTION]

    def absent(self, number: int) -> str:
        """A thing that the image does not show."""
        others = [thing for thing in THINGS if thing != self.thing]
        return others[number % len(others)]


Rows = list[dict[str, Any]]


@functools.cache
def pictures() -> tuple[Picture, ...]:
    """The drawn images: things, then portraits with identity-free questions."""
    rng = np.random.default_rng(SEED)
    drawn = [scene(rng, index) for index in range(SCENES)]
    for person in SIXTY.people()[:PORTRAITS]:
        facts = {THING_QUESTION: "person", BACKGROUND_QUESTION: view_of(person, VIEW).background}
        drawn.append((portrait(person, VIEW), facts))
    return tuple(
        Picture(f"drawn_{number:02d}", png_struct(image, f"drawn_{number:02d}.png"), facts)
        for number, (image, facts) in enumerate(drawn)
    )


def write(folder: str | Path, suite: str, config: str, split: str) -> None:
    """Writes the stand-in of a suite, with the same bytes on every run.

    Args:
        folder: the folder to write <config>/<split>-00000-of-00001.parquet to.
        suite: a key of `registry.SUITES`.
        config: the folder of the questions.
        split: the split.
    """
    rows, columns = WRITERS[suite]
    write_config(
        folder, config, rows(), pa.schema([*columns, *([] if suite == "gqa" else [("image", IMAGE_TYPE)])]), split
    )
    if suite == "gqa":
        images = [{"id": picture.name, "image": picture.image} for picture in pictures()]
        write_config(
            folder, "testdev_balanced_images", images, pa.schema([("id", _TEXT), ("image", IMAGE_TYPE)]), split
        )


def _pope() -> Rows:
    rows: Rows = []
    for category in ("random", "popular", "adversarial"):
        for number, picture in enumerate(pictures()):
            for thing, answer in ((picture.thing, "yes"), (picture.absent(number), "no")):
                asked = {"question": f"Is there a {thing} in the image?", "answer": answer, "category": category}
                ids = {"id": str(len(rows)), "question_id": str(len(rows) + 1), "image_source": picture.name}
                rows.append({**ids, **asked, "image": picture.image})
    return rows


def _mme() -> Rows:
    rows: Rows = []
    for number, picture in enumerate(pictures()):
        background, other = picture.facts[BACKGROUND_QUESTION], list(BACKGROUNDS)[number % len(BACKGROUNDS)]
        other = other if other != background else list(BACKGROUNDS)[(number + 1) % len(BACKGROUNDS)]
        asked = {
            "existence": [f"Is there a {thing} in this image?" for thing in (picture.thing, picture.absent(number))],
            "color": [f"Is the background {color}?" for color in (background, other)],
            "numerical_calculation": [f"Is one plus one {count}?" for count in ("two", "three")],
        }
        for category, questions in asked.items():
            for question, answer in zip(questions, ("Yes", "No"), strict=True):
                rows.append(
                    {
                        "question_id": f"{category}/{picture.name}.png",
                        "question": f"{question} Please answer yes or no.",
                        "answer": answer,
                        "category": category,
                        "image": picture.image,
                    }
                )
    return rows


def _options(truth: str, values: Sequence[str], number: int) -> list[str]:
    """Four options with the truth at one of the places in turn."""
    others = [value for value in values if value != truth][number % 4 :][:3]
    return [*others[: number % 4], truth, *others[number % 4 :]]


def _mmbench() -> Rows:
    rows: Rows = []
    for number, picture in enumerate(pictures()):
        options = _options(picture.thing, THINGS, number)
        for rotation in range(4):
            rotated = options[rotation:] + options[:rotation]
            rows.append(
                {
                    "index": number + rotation * ROTATION,
                    "question": THING_QUESTION,
                    "hint": None,
                    "answer": "ABCD"[rotated.index(picture.thing)],
                    **dict(zip("ABCD", rotated, strict=True)),
                    "category": "object_localization",
                    "image": picture.image,
                }
            )
    return rows


def _scienceqa() -> Rows:
    rows: Rows = []
    for number, picture in enumerate(pictures()):
        options = _options(picture.facts[BACKGROUND_QUESTION], list(BACKGROUNDS), number)
        truth = options.index(picture.facts[BACKGROUND_QUESTION])
        asked = {"question": BACKGROUND_QUESTION, "choices": options, "answer": truth, "hint": ""}
        rows.append({**asked, "subject": "natural science", "image": picture.image})
    return rows


def _facts() -> list[tuple[Picture, str, str]]:
    return [(picture, question, answer) for picture in pictures() for question, answer in picture.facts.items()]


def _gqa() -> Rows:
    return [
        {"id": f"{number:04d}", "imageId": picture.name, "question": question, "answer": answer}
        for number, (picture, question, answer) in enumerate(_facts())
    ]


def _answers(truth: str, number: int) -> list[str]:
    """The answers of ten people, one to four of whom give another one."""
    return [truth] * (PEOPLE - 1 - number % 4) + ["unsure"] * (1 + number % 4)


def _vqav2() -> Rows:
    rows: Rows = []
    for number, (picture, question, truth) in enumerate(_facts()):
        answers = [
            {"answer": answer, "answer_confidence": "yes", "answer_id": person}
            for person, answer in enumerate(_answers(truth, number), 1)
        ]
        ids = {"question_id": number, "image_id": int(picture.name.removeprefix("drawn_"))}
        asked = {"question": question, "multiple_choice_answer": truth, "answers": answers, "answer_type": "other"}
        rows.append({**ids, **asked, "image": picture.image})
    return rows


def _vizwiz() -> Rows:
    rows: Rows = []
    for number, (picture, question, answer) in enumerate(_facts()):
        truth = answer if question != COLOR_QUESTION else "unanswerable"
        category = "unanswerable" if truth == "unanswerable" else "other"
        asked = {"question": question, "answers": _answers(truth, number), "category": category}
        rows.append({"question_id": f"VizWiz_val_{number:08d}.jpg", **asked, "image": picture.image})
    return rows


def _textvqa() -> Rows:
    rows: Rows = []
    rng = np.random.default_rng(SEED + 1)
    for number, word in enumerate(WORDS):
        image, _ = scene(rng, number)
        ImageDraw.Draw(image).text((30, 78), word, WHITE)
        asked = {"question": "what does the sign say?", "answers": _answers(word, number)}
        rows.append({"question_id": number, "image_id": word, **asked, "image": png_struct(image, f"{word}.png")})
    return rows


def _mmvet() -> Rows:
    return [
        {
            "question_id": f"v1_{number}",
            "question": "What is in this picture, and what colour is the background?",
            "answer": f"{picture.thing}<AND>{picture.facts[BACKGROUND_QUESTION]}",
            "capability": "rec",
            "image": picture.image,
        }
        for number, picture in enumerate(pictures())
    ]


_ANSWER = pa.struct([("answer", _TEXT), ("answer_confidence", _TEXT), ("answer_id", _INT)])
Columns = Sequence[tuple[str, pa.DataType]]


def _columns(kind: pa.DataType, names: str) -> list[tuple[str, pa.DataType]]:
    return [(name, kind) for name in names.split()]


WRITERS: Mapping[str, tuple[Callable[[], Rows], Columns]] = {  # by suite: its rows and its columns besides the image
    "gqa": (_gqa, _columns(_TEXT, "id imageId question answer")),
    "mmbench": (_mmbench, [("index", _INT), *_columns(_TEXT, "question hint answer A B C D category")]),
    "mme": (_mme, _columns(_TEXT, "question_id question answer category")),
    "mmvet": (_mmvet, _columns(_TEXT, "question_id question answer capability")),
    "pope": (_pope, _columns(_TEXT, "id question_id question answer image_source category")),
    "scienceqa": (_scienceqa, [("choices", _TEXTS), ("answer", pa.int8()), *_columns(_TEXT, "question hint subject")]),
    "textvqa": (_textvqa, [("question_id", _INT), ("answers", _TEXTS), *_columns(_TEXT, "image_id question")]),
    "vizwiz": (_vizwiz, [("answers", _TEXTS), *_columns(_TEXT, "question_id question category")]),
    "vqav2": (
        _vqav2,
        [
            *_columns(_INT, "question_id image_id"),
            ("answers", pa.list_(_ANSWER)),
            *_columns(_TEXT, "question multiple_choice_answer answer_type"),
        ],
    ),
}
