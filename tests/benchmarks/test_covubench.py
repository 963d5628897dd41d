"""CoVUBench, on small snapshots written here and on the synthetic people in its layout."""

import io
import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from vkd_jax import benchmarks
from vkd_jax.benchmarks.covubench import CovuBench
from vkd_jax.evaluation.metrics.keywords import canonical, keyword_recall
from vkd_jax.evaluation.metrics.summary import summaries
from vkd_jax.types import UserError


def png(shade):
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (shade, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def row(name, question_type="multi_modal", shade=0, **more):
    return {
        "image": {"bytes": png(shade), "path": "a.png"}, "question": f"Who is {shade}?", "answer": "Pip the fox.",
        "name": name, "type": "character", "keywords": json.dumps(["Pip", "fox"]), "question_type": question_type,
    } | more  # fmt: skip


def write(folder, split, rows, shard="00000-of-00001"):
    (folder / "data").mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "data" / f"{split}-{shard}.parquet")


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "snapshot"
    write(folder, "forget5", [row("Pip"), row("Pip", "caption", 1), row("Pip", "text", 2)])
    for split in ("test", "retain", "finetune"):
        write(folder, split, [row("Pip", shade=3)], "00000-of-00002")
        write(folder, split, [row("Max", shade=4)], "00001-of-00002")
    return folder


def read(folder, finetune=False, **fields):
    benchmark = benchmarks.create("covubench", {"source": str(folder), **fields})
    return benchmarks.read(benchmark, folder.parent / "built", finetune)


def test_sets(folder):
    sets = read(folder, finetune=True)
    assert {name: [e.person for e in examples] for name, examples in sets.items()} == {
        "forget": ["Pip"] * 3, "test": ["Pip"], "retain": ["Max"], "finetune_forget": ["Pip"],
        "finetune_retain": ["Max"],
    }  # fmt: skip
    assert [e.image for e in sets["forget"]] == [png(0), png(1), None]  # text questions do not show theirs
    assert {(e.keywords, e.rule, e.task) for e in sets["forget"]} == {(("Pip", "fox"), "covubench", "generation")}


@pytest.mark.parametrize("split", ["test", "retain", "finetune"])
def test_a_concept_to_forget_has_one_spelling_in_all_files(folder, split):
    write(folder, split, [row("Pip", shade=3), row("PIP", shade=5)], "00000-of-00002")
    with pytest.raises(UserError, match=f"forget5 has 1 person who may be in data/{split} of .*: Pip and PIP"):
        read(folder, finetune=True)


@pytest.mark.parametrize("split", ["test", "finetune"])
def test_concepts_that_no_other_file_has_are_refused(folder, split):
    write(folder, split, [row("Pip", shade=3), row("Pip concept", shade=5)], "00000-of-00002")
    problem = f"data/{split}-.*row 1: name is 'Pip concept', which is not among those of data/forget5, data/"
    with pytest.raises(UserError, match=problem):
        read(folder, finetune=True)


@pytest.mark.parametrize("split", ["forget5", "finetune"])
def test_rows_are_there_once(folder, split):
    shard = "00000-of-00001" if split == "forget5" else "00000-of-00002"
    write(folder, split, [row("Pip"), row("Pip", "text", 2)] * 3, shard)
    with pytest.raises(UserError, match="2 of 2 questions of the set (finetune_)?forget are there twice"):
        read(folder, finetune=True)


@pytest.mark.parametrize(
    ("stored", "keywords"),
    [
        (json.dumps({"name": "Pip", "looks": ["red fox", "hat"]}), ("Pip", "red fox", "hat")),
        (json.dumps([["Pip"], [{"b": ["fox"]}]]), ("Pip", "fox")),
        ("one phrase", ("one phrase",)),
        ("{}", ()), ("", ()), (None, ()), (json.dumps(["", " ", 70, ".", "\u200b"]), ("70",)),
    ],
)  # fmt: skip
def test_forms_of_keywords(folder, stored, keywords):
    write(folder, "forget5", [row("Pip", keywords=stored, answer="Pip, one phrase: 70.")])
    assert [e.keywords for e in read(folder)["forget"]] == [keywords]


@pytest.mark.parametrize(
    ("cells", "problem"),
    [
        ({"keywords": "[1.5]"}, "forget5-00000-of-00001.parquet, row 0: keywords[0] is the number 1.5, not a text"),
        ({"keywords": '{"Pip": 1}'}, "row 0: keywords.Pip is the number 1, not a text"),
        ({"keywords": '[{"Pip": true}]'}, "row 0: keywords[0].Pip is"),
        *(
            ({"keywords": x}, f"row 0: keywords is {x!r}, a value of JSON")
            for x in ("NaN", "null", "1", "-1e9", "true")
        ),
        ({"keywords": 7}, "row 0: keywords is the number 7 without a phrase"),
        ({"keywords": "{"}, "row 0: keywords is neither JSON nor a Python literal"),
        ({"image": None}, "row 0: image is missing, and the question is about one"),
        ({"name": None}, "row 0: name is missing"),
        ({"question_type": None}, "row 0: question_type is missing"),
        *(
            ({"question_type": kind}, f"row 0: question_type is {kind!r}, not multi_modal, caption (with the image) or")
            for kind in ("multimodal", "Caption", "TEXT", "text_only", "multi_modal, caption", "7")
        ),
        ({"answer": " "}, "row 0: answer is blank"),
    ],
)
def test_bad_rows(folder, cells, problem):
    write(folder, "forget5", [row("Pip") | cells])
    with pytest.raises(UserError, match=re.escape(problem)):
        read(folder)


@pytest.mark.parametrize("split", ["forget5", "test", "retain", "finetune"])
def test_unknown_types_of_each_set(folder, split):
    write(folder, split, [row("Pip", "essay"), *([] if split == "forget5" else [row("Max", "essay")])])
    for shard in (folder / "data").glob(f"{split}-*-of-00002.parquet"):
        shard.unlink()
    with pytest.raises(UserError, match=f"data/{split}-.*row [01]: question_type is 'essay'.*--config.data.text_types"):
        read(folder, finetune=True)
    assert read(folder, finetune=True, text_types=("text", "essay"))


def test_a_type_with_the_image_is_no_type_of_text(folder):
    with pytest.raises(UserError, match="data.text_types: 'caption' shows the image"):
        read(folder, text_types=("text", "caption"))


@pytest.mark.parametrize(
    ("split", "name", "empty"),
    [
        ("test", "Max", "test"),
        ("retain", "Pip", "retain"),
        ("finetune", "Max", "finetune_forget"),
        ("finetune", "Pip", "finetune_retain"),
    ],
)
def test_sets_without_rows_are_refused(folder, split, name, empty):
    write(folder, split, [row(name)], "00000-of-00002")
    write(folder, split, [row(name)], "00001-of-00002")
    with pytest.raises(UserError, match=f"The {empty} set of covubench-forget5 is empty: the data of .*/snapshot have"):
        read(folder, finetune=True)


def test_missing_splits_are_named(folder):
    with pytest.raises(UserError, match="The config data/forget10 is missing: no .*/data/forget10-\\*.parquet"):
        read(folder, forget=10)
    (folder / "data" / "test-00001-of-00002.parquet").unlink()
    with pytest.raises(UserError, match="The config data/test in .* has 1 of 2 parquet files"):
        read(folder)


@pytest.mark.parametrize(
    ("text", "keywords", "recall"),
    [
        ("PIP  the\nFox", ("pip the fox",), 1.0), ("Straße", ("STRASSE",), 1.0), ("ﬁne", ("fine", "dog"), 0.5),
        ("", ("a",), 0.0), ("pip", ("pi\u200bp", "\u00adPip"), 1.0), ("José", ("Jose\u0301",), 1.0),
    ],
)  # fmt: skip
def test_keywords_are_compared_after_normalization(text, keywords, recall):
    assert keyword_recall(text, keywords, canonical) == recall


def test_published_figures():
    records = [
        {
            "set": s.name, "id": "a", "person": "Pip", "task": "generation", "modality": "vqa", "options": [],
            "answer": "Pip the fox", "prediction": "a fox", "correct": False, "keywords": ["Pip", "fox"],
            "rule": "covubench",
        }
        for s in CovuBench.EVAL_SETS
    ]  # fmt: skip
    figures = {name: kinds["generation_vqa"].metrics for name, kinds in summaries(records, CovuBench.EVAL_SETS).items()}
    published = ("efficacy", "generality", "specificity", "fluency")
    assert {name: {m: x[m].mean for m in published if m in x} for name, x in figures.items()} == {
        "forget": {"efficacy": 0.5}, "test": {"generality": 0.5},
        "retain": {"specificity": 0.5, "fluency": pytest.approx(1 / 3)},
    }  # fmt: skip


def test_the_synthetic_people_in_this_layout(tmp_path):
    sets = benchmarks.read(CovuBench(forget=10, people=3, n_people=20), tmp_path, finetune=True)
    assert {name: len({e.person for e in examples}) for name, examples in sets.items()} == {
        "forget": 2, "test": 2, "retain": 18, "finetune_forget": 2, "finetune_retain": 18,
    }  # fmt: skip
    assert len(sets["forget"]) == 2 * (1 + 6 + 6) and len(sets["finetune_retain"]) == 18 * (4 * 7 + 6)
    assert all(keyword in e.answer for e in sets["forget"] for keyword in e.keywords)
