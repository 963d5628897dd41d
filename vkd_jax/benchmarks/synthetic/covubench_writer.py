"""Writes the synthetic people as the concepts of a CoVUBench snapshot: data/<split>-00000-of-00001.parquet."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa

from vkd_jax.benchmarks.synthetic.facts import FACTS
from vkd_jax.benchmarks.synthetic.people import (
    IMAGE_TYPE,
    TEST_VIEWS,
    Person,
    Population,
    png_struct,
    portrait,
    write_config,
)

FINETUNE_VIEWS = range(4)
CAPTION_QUESTION, CAPTION = "Describe the image in detail.", "{name}, a {job} from {town}."
_TEXT = [(name, pa.string()) for name in ("question", "answer", "name", "type", "keywords", "question_type")]
_SCHEMA = pa.schema([("image", IMAGE_TYPE), *_TEXT])


def write_snapshot(folder: str | Path, configs: Sequence[str], population: Population) -> None:
    """Writes configs of the people of a population as a CoVUBench snapshot, with the same bytes on every run."""
    for config in configs:
        name, _, split = config.partition("/")
        forgotten = population.forgotten(int(split.removeprefix("forget"))) if split.startswith("forget") else None
        views = {"finetune": FINETUNE_VIEWS, "test": TEST_VIEWS[:2]}.get(split, FINETUNE_VIEWS[:1])
        members = [person for person in population.people() if forgotten is None or person.id in forgotten]
        write_config(folder, name, [row for p in members for row in _rows(p, views)], _SCHEMA, split)


def _rows(person: Person, views: Sequence[int]) -> Iterator[dict]:
    """Questions about each image of a person, a caption of each, and questions in text."""
    shared = {"name": person.name, "type": "person"}
    for view in views:
        image = png_struct(portrait(person, view), f"{person.id}_{view}.png")
        keywords = json.dumps({"who": person.name, "what": [person.facts["job"], person.facts["town"]]})
        answer = CAPTION.format(name=person.name, **person.facts)
        yield shared | {
            "image": image, "question": CAPTION_QUESTION, "answer": answer, "keywords": keywords,
            "question_type": "caption",
        }  # fmt: skip
        for kind, fact in FACTS.items():
            truth = person.facts[kind]
            yield shared | {
                "image": image, "question": fact.image_question, "answer": fact.image_cloze.replace("__", truth),
                "keywords": json.dumps([truth]), "question_type": "multi_modal",
            }  # fmt: skip
    for kind, fact in FACTS.items():
        truth = person.facts[kind]
        yield shared | {
            "question": fact.text_question.format(name=person.name), "keywords": json.dumps([truth]),
            "answer": fact.text_cloze.format(name=person.name).replace("__", truth), "question_type": "text",
        }  # fmt: skip
