"""PPU-Bench, on small snapshots written here and on the synthetic people in its layout."""

import io
import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from vkd_jax import benchmarks
from vkd_jax.benchmarks import ppu
from vkd_jax.types import UserError

SPLITS = {
    "complete": {"forget5": ["s1"], "forget30": [1]},
    "selective": [{"id": "s1_a", "subject_id": "s1"}],
    "persona": {"delete_ids": ["s1_a"], "keep_ids": [{"sample_id": "s2_a"}]},
}


def image(shade):
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (shade, 0, 0)).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def row(subject, fact, modality="text_image", **more):
    shown = {"image": image(int(subject[1])) if modality == "text_image" else None}
    return {
        "sample_id": f"{subject}_{fact}", "subject_id": subject, "subject": "Ann", "modality": modality,
        "question": "Born in ___?", "answer_text": "Oslo", "answer_label": "B", "option_a": "Rome",
        "option_b": "Oslo", "option_c": "Lima", "option_d": None, **shown, **more,
    }  # fmt: skip


def rows(**more):
    return [row(s, fact, kind, **more) for s in ("s1", "s2") for fact in "ab" for kind in ("text_image", "text")]


def write(folder, config, rows):
    name, _, split = config.partition("/")
    (folder / name).mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / name / f"{split or 'train'}-00000-of-00001.parquet")


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "snapshot"
    for task in ppu.TASKS:
        write(folder, f"ppu_eval_{task}/test", rows())
    other = {"image_002": image(7), "image_003": image(8), "image_004": None}
    plain = {k: v for k, v in row("s1", "a").items() if k != "image"}
    for name in ("complete_r5", "selective", "persona"):
        write(folder, f"cross_image_{name}/test", [plain | other])
    for name in ppu.ADVERSARIAL:
        write(folder, f"{name}_persona/test", [row("s1", "a", question=f"{name}: born?", task_type="generation")])
    given = {"generated_answer": "He was born in Oslo.", "image_path": "x"}
    pairs = [row(s, fact, **given) for s in ("s1", "s2") for fact in "ab"]
    write(folder, "train_pair_qwen3", pairs)
    write(folder, "train_pair_qwen3_qa", [{k: v for k, v in r.items() if k != "subject_id"} for r in pairs])
    (folder / "split").mkdir()
    for name, value in SPLITS.items():
        (folder / "split" / f"{name}_split.json").write_text(json.dumps(value))
    return folder


def read(folder, finetune=False, **fields):
    benchmark = benchmarks.create("ppu", {"source": str(folder), **fields})
    return benchmarks.read(benchmark, folder.parent / "built", finetune)


@pytest.mark.parametrize(
    ("scenario", "forget", "retain"),
    [
        ("complete", {"s1_a", "s1_b"}, {"s2_a", "s2_b"}),
        ("selective", {"s1_a"}, {"s1_b", "s2_a", "s2_b"}),
        ("persona", {"s1_a"}, {"s2_a"}),
    ],
)
def test_scenarios(folder, scenario, forget, retain):
    sets = read(folder, finetune=True, scenario=scenario)
    assert {e.pair for e in sets["forget"]} == forget and {e.pair for e in sets["retain"]} == retain
    assert len(sets["forget"]) == 6 * len(forget) and len(sets["finetune_retain"]) == 2 * len(retain)
    assert [e.answer for e in sets["finetune_forget"]] == ["He was born in Oslo."] * 2 * len(forget)
    assert {e.modality for e in sets["finetune_forget"]} == {"qa", "vqa"}
    assert [e.image for e in sets["test"]] == [image(7)["bytes"], image(8)["bytes"]] * (len(sets["test"]) // 2)


def test_one_fact_is_asked_in_each_task_and_modality(folder):
    forget = read(folder, scenario="persona", adversarial=True)
    assert [(e.task, e.modality, e.question.partition("\n")[0], e.answer, e.options) for e in forget["forget"]] == [
        ("generation", "vqa", "Born in ___?", "Oslo", ()), ("generation", "qa", "Born in ___?", "Oslo", ()),
        ("cloze", "vqa", "Born in [Blank]?", "Oslo", ()), ("cloze", "qa", "Born in [Blank]?", "Oslo", ()),
        ("classification", "vqa", "Born in ___?", "Oslo", ("Rome", "Oslo", "Lima")),
        ("classification", "qa", "Born in ___?", "Oslo", ("Rome", "Oslo", "Lima")),
    ]  # fmt: skip
    assert len({e.image_id for e in forget["forget"] if e.image}) == 1  # the image of many rows is one
    assert [e.question for name in ppu.ADVERSARIAL for e in forget[name]] == [f"{n}: born?" for n in ppu.ADVERSARIAL]


def test_split_files_elsewhere(folder, tmp_path):
    (folder / "split").rename(tmp_path / "split")
    with pytest.raises(UserError, match="There is no complete_split.json in .*; pass data/split of the benchmark's"):
        read(folder)
    assert read(folder, splits=str(tmp_path / "split"))["forget"]


@pytest.mark.parametrize(
    ("scenario", "value", "problem"),
    [
        ("complete", {}, "complete_split.json: forget5 is missing"),
        ("complete", {"forget5": []}, "The forget set is empty"),
        ("complete", [], "it is an array, not an object; get the file of the scenario complete"),
        ("selective", {}, "it is an object, not a list"),
        ("selective", [{"name": 1}], "samples[0].sample_id is missing"),
        ("persona", {"delete_ids": ["s1_a"]}, "keep_ids is missing"),
        ("persona", {"delete_ids": ["s1_a"], "keep_ids": ["s1_a"]}, "1 facts are in both delete_ids and keep_ids"),
        ("persona", {"delete_ids": [True], "keep_ids": []}, "delete_ids[0] is the boolean True, not a text"),
        (
            "complete",
            {"forget5": ["s1", "s3"]},
            "forget5 has 1 of 2 IDs not among the subject_id of ppu_eval_generation",
        ),
        ("complete", {"forget5": ["S1"]}, "forget5 has 1 of 1 IDs not among"),
        ("selective", [{"id": "s1_a"}, "s1a"], "samples has 1 of 2 IDs not among the sample_id of"),
        ("persona", {"delete_ids": ["s1_a"], "keep_ids": ["s2_c"]}, "keep_ids has 1 of 1 IDs not among the sample_id"),
    ],
)
def test_bad_splits(folder, scenario, value, problem):
    (folder / "split" / f"{scenario}_split.json").write_text(json.dumps(value))
    with pytest.raises(UserError, match=re.escape(problem)):
        read(folder, scenario=scenario)


def test_a_fact_to_forget_has_one_spelling_in_the_training_rows(folder):
    pairs = [row("s1", fact, generated_answer="Oslo.") for fact in ("a", "b", "A")]
    for config in ("train_pair_qwen3", "train_pair_qwen3_qa"):
        write(folder, config, pairs)
    with pytest.raises(
        UserError, match="samples has 1 IDs that may also be spelled .*: s1_a and s1_A; correct the row"
    ):
        read(folder, finetune=True, scenario="selective")


@pytest.mark.parametrize(
    ("scenario", "change", "problem"),
    [
        ("selective", {"sample_id": "train_s1_a"}, "row 1: sample_id is 'train_s1_a', which is not among those of ppu"),
        ("complete", {"subject_id": "zz_s1"}, "row 1: subject_id is 'zz_s1', which is not among those of ppu_eval_gen"),
    ],
)
def test_training_is_about_what_is_asked(folder, scenario, change, problem):
    pairs = [row("s1", "a", generated_answer="Oslo."), row("s1", "a", generated_answer="Oslo.", **change)]
    write(folder, "train_pair_qwen3_qa", pairs)
    with pytest.raises(UserError, match=problem):
        read(folder, finetune=True, scenario=scenario)


def test_a_fact_is_about_one_person_in_all_files(folder):
    given = {"generated_answer": "He was born in Oslo.", "image_path": "x"}
    pairs = [row("s1", "a", **given), row("s2", "a", **given), row("s2", "b", **given, sample_id="s1_b")]
    for config in ("train_pair_qwen3", "train_pair_qwen3_qa"):
        write(folder, config, pairs)
    with pytest.raises(
        UserError, match="1 facts are in the set forget, .* in the set finetune_retain, .* not: s1_b; say"
    ):
        read(folder, finetune=True)


def test_adversarial_wordings_of_other_facts_are_not_of_the_forget_set(folder):
    facts = [
        row("s1", "a", question="A?", task_type="generation"),
        row("s2", "a", question="B?", task_type="generation"),
    ]
    write(folder, "paraphrase_persona/test", facts)
    assert [e.pair for e in read(folder, scenario="persona", adversarial=True)["paraphrase"]] == ["s1_a"]


@pytest.mark.parametrize(
    ("cells", "problem"),
    [
        ({"modality": "video"}, "row 0: modality is 'video', not one of"),
        ({"answer_label": "D"}, "answer_label is 'D', not one of the options"),
        ({"answer_label": "A"}, "answer_label is 'A', the option 'Rome', but its text is 'Oslo'"),
        ({"image": None}, "row 0: image is missing, and the modality has an image"),
        ({"sample_id": None}, "row 0: sample_id is missing"),
        ({"subject_id": 1.5}, "row 0: subject_id is the number 1.5, not a text"),
        ({"question": " "}, "row 0: question is blank"),
        ({"task_type": "essay"}, "row 0: task_type is 'essay', not one of"),
    ],
)
def test_bad_rows(folder, cells, problem):
    write(folder, "ppu_eval_classification/test", [row("s1", "a", **cells)])
    with pytest.raises(UserError, match=re.escape(problem)):
        read(folder)


def test_adversarial_wordings_of_another_forget_set_are_refused():
    with pytest.raises(UserError, match="data.adversarial: these wordings are published for forget=30, not 5"):
        benchmarks.create("ppu", {"adversarial": True}).check()


@pytest.mark.parametrize("scenario", ppu.SCENARIOS)
def test_the_synthetic_people_in_this_layout(tmp_path, scenario):
    fields = dict(scenario=scenario, forget=30, adversarial=True, n_people=20, people=3)
    sets = benchmarks.read(benchmarks.create("ppu", fields), tmp_path, finetune=True)
    facts = {"complete": 6 * 6, "selective": 20 * 2, "persona": 20 * 2}[scenario]
    assert len({e.pair for e in sets["forget"]}) == facts and len(sets["forget"]) == 6 * facts
    assert len(sets["finetune_forget"]) == 2 * facts and len(sets["test"]) == 3 * facts
    assert [len(sets[name]) for name in ppu.ADVERSARIAL] == [2 * facts] * 3
    assert {e.pair for e in sets["forget"]}.isdisjoint(e.pair for e in sets["retain"])
    assert len({e.person for e in sets["forget"]}) == (6 if scenario == "complete" else 20)
