"""Folders of finished runs with known answers, which tests of the reports share."""

import io
import json

from PIL import Image, ImageDraw

from vkd_jax.benchmarks.mllmu import Mllmu
from vkd_jax.evaluation.metrics.summary import summaries
from vkd_jax.runtime.dataclass_json import encode

PEOPLE = {"forget": ("001", "002", "003"), "retain": ("004", "005", "006", "007"), "real": ("",)}
OPTIONS = ["baker", "pilot", "nurse", "judge"]
RIGHT = {  # correct answers to 12 questions of each set: with image, text only
    "vanilla": {
        "forget": (12, 12),
        "test": (10, 12),
        "retain": (12, 12),
        "retain_test": (11, 12),
        "real": (9, 9),
    },
    "unlearned": {
        "forget": (3, 12),
        "test": (4, 12),
        "retain": (11, 12),
        "retain_test": (10, 12),
        "real": (9, 9),
    },
}
N = 12


MEAN = {"mean": 0.5, "low": 0.25, "high": 0.75, "n": 7}
FREE = {"accuracy": 3 / 7, "correct": 3, "n": 7, "low": 0.2, "high": 0.7, "rouge_l": MEAN}


def portrait(person: str) -> bytes:
    """A face with different colors for each person."""
    number = int(person or 9)
    image = Image.new("RGB", (48, 48), (60 * number % 256, 90, 200 - 20 * number))
    draw = ImageDraw.Draw(image)
    draw.ellipse((10, 8, 38, 44), fill=(230 - 15 * number, 190 - 12 * number, 150))
    draw.ellipse((17, 20, 20, 24), fill="black")
    draw.ellipse((28, 20, 31, 24), fill="black")
    draw.arc((18, 26, 30, 36), 20, 160, fill="black")
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


IMAGES = {f"{person}/0": portrait(person) for people in PEOPLE.values() for person in people}


def item(part: str, number: int, modality: str, right: bool) -> dict:
    people = PEOPLE[{"test": "forget", "retain_test": "retain"}.get(part, part)]
    person = people[number % len(people)]
    truth = OPTIONS[number % 4]
    wrong = OPTIONS[(number + 1) % 4]
    return {
        "set": part, "id": f"{person}/{modality}/{number}", "person": person, "task": "classification",
        "modality": modality, "protocol": "options", "question": "What does this person do for a living?",
        "answer": truth, "options": OPTIONS, "prediction": truth if right else wrong, "correct": right,
        "image_id": f"{person}/0" if modality == "vqa" else "",
    }  # fmt: skip


def make_run(workdir, seed=0, right=RIGHT, method=None, manifest=(9, 0), **more):
    """A finished run's folder, and its results."""
    models = {}
    for model, parts in right.items():
        items = [
            item(part, number, modality, number < count)
            for part, counts in parts.items()
            for modality, count in zip(("vqa", "qa"), counts, strict=True)
            for number in range(N)
        ]
        file = workdir / "answers" / f"{model}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(it) + "\n" for it in items))
        models[model] = encode(summaries(items))
    people = {"forget": 3, "test": 3, "retain": 4, "retain_test": 4}
    results = {
        "schema_version": 2,
        "meta": {
            "command": "python -m vkd_jax.main --config configs/tiny.py --workdir run",
            "config": {
                "seed": seed,
                "method": method or {"name": "vkd", "train": "visual"},
                "train": {"steps": 300},
                "eval": {"max_new_tokens": 8},
            },
            "seed": seed,
            "commit": "0123456789abcdef",
            "versions": {"python": "3.11.7", "jax": "0.10.2"},
            "devices": "1 x cpu",
            "protocol": "options",
            "protocols": ["options"],
            "shots": 0,
            "benchmark": {
                "title": "MLLMU-Bench, forgetting 5 %",
                "source": "synthetic people",
                "sets": [encode(s) | {"people": people.get(s.name, 0)} for s in Mllmu.EVAL_SETS],
            },
            "date": "2026-01-02T03:04:05+00:00",
        },
        "models": models,
        "timing": {"data": 1.0, "prepare": 2.0, "unlearn": 30.0 + 10 * seed, "report": 1.5},
        "chance": {"forget": {"vqa": 0.25, "qa": 0.25}},
        "utility": {model: {"value": 0.5, "low": 0.4, "high": 0.6, "components": {}} for model in right},
        "forget_quality": {},
        "text_logits_identical": manifest[1] == 0,
        "trainable": {"parameters": 300_000, "of": 1_200_000},
        "manifest": {"changed": manifest[0], "tensors": 80, "language_model_changed": manifest[1]},
        **more,
    }
    (workdir / "results.json").write_text(json.dumps(results))
    write_metrics(workdir)
    return results


def write_metrics(workdir):
    """Writes the metrics of a training, in which step 40 ran twice."""
    rows = [
        {
            "step": step,
            "forget_loss": 1 / step,
            "forget_ce": 2 / step,
            "retain_loss": 3 / step,
            "loss": 4 / step,
        }
        for step in (20, 40, 60)
    ]
    rows.insert(2, {"step": 40, "forget_loss": 9.0, "forget_ce": 9.0, "retain_loss": 9.0, "loss": 9.0})
    (workdir / "train").mkdir(exist_ok=True)
    (workdir / "train" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def relearned(number, correct, **more):
    """One answer under a relearning attack."""
    name, prediction = item("forget", number, "vqa", correct)["id"], OPTIONS[number % 4]
    attempt = {"variant": "", "attacker": "all", "share": 0.2, "unit": "questions"}
    return attempt | {"set": "forget", "id": name, "prediction": prediction, "correct": correct} | more


def relearn_of(cells):
    """The attack of results.json."""
    return {"relearn": {"title": "Relearning: again", "about": "About.", "cells": cells}}


CELLS = [
    {"model": name, "set": "forget", "mean": 0.5, "n": 2, "low": 0.2, "high": 0.8, "people": 2, "correct": 1} | more
    for name in ("vanilla", "unlearned")
    for more in ({"variant": "unchanged"}, {"attacker": "all", "share": 0.2, "unit": "questions"})
]
