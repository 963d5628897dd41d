"""Writes an example of a deletion request: folders of images and questions about synthetic people.

python docs/example_request.py FOLDER
"""

import json
import sys
from pathlib import Path

from vkd_jax.benchmarks.synthetic import people

QUESTIONS = {"name": "Who is this person?", "job": "What is this person's job?", "town": "What is this person's town?"}
VIEWS = {"forget": range(8), "retain": range(8), "test": people.TEST_VIEWS}  # test: images that were in no training set

requester, *others = sorted(people.SIXTY.people(), key=lambda person: person.name != "Otto Lindt")
for name, views in VIEWS.items():
    folder = Path(sys.argv[1]) / name
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for person in others if name == "retain" else [requester]:
        for view in views:
            file = f"{person.id}_{view}.png"
            people.portrait(person, view=view).save(folder / file)
            for kind, question in QUESTIONS.items():
                rows.append(dict(file_name=file, question=question, answer=person.answer(kind), person=person.name))
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{folder}: {len(rows)} questions")
