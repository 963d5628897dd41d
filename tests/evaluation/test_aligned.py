"""Facts that are asked with an image and in text alone, in benchmarks that publish no pairs."""

import pytest

from vkd_jax import benchmarks
from vkd_jax.benchmarks.mllmu import Mllmu
from vkd_jax.evaluation.metrics.summary import summaries


def asked(set_name, modality, answer, correct, person="ann", **more):
    fields = {"task": "cloze", "options": [], "prediction": "", "protocol": "cloze", "image_id": modality, **more}
    return {"set": set_name, "modality": modality, "person": person, "answer": answer, "correct": correct, **fields}


RECORDS = [
    asked("forget", "vqa", "Oslo", False),  # wrong, but one of the two questions in text is right
    asked("forget", "qa", "oslo", False),
    asked("forget", "qa", "Oslo", True),
    asked("forget", "vqa", "baker", False),  # wrong in both
    asked("forget", "vqa", "baker", True),
    asked("forget", "qa", "baker", False),
    asked("forget", "vqa", "cat", False),  # not asked in text, or about another person, task or set
    asked("forget", "qa", "cat", False, person="bob"),
    asked("forget", "qa", "cat", False, task="generation"),
    asked("retain", "qa", "cat", False),
    asked("retain", "vqa", "Lima", True, person="cleo"),
    asked("retain", "qa", "Lima", True, person="cleo"),
    asked("retain", "vqa", "dog", True, person="cleo"),
    asked("retain", "qa", "dog", False, person="cleo"),
    asked("real", "vqa", "blue", True, person=""),
    asked("real", "qa", "blue", True, person=""),
]


@pytest.mark.parametrize("forgets_text", [False, True])
def test_facts_are_aligned_if_they_are_to_go_in_both_modalities(forgets_text):
    found = summaries(RECORDS, benchmarks.eval_sets(Mllmu(), forgets_text))
    figures = {
        (name, kind, metric): (figure.mean, figure.n)
        for name, kinds in found.items()
        for kind, summary in kinds.items()
        for metric, figure in summary.metrics.items()
        if metric.startswith("both_")
    }
    expected = {("forget", "cloze_vqa", "both_wrong"): (pytest.approx(1 / 3), 3)}
    expected |= {("retain", "cloze_vqa", "both_right"): (0.5, 2)}
    assert figures == (expected if forgets_text else {})


def test_published_pairs_have_their_own_metrics():
    records = [record | {"pair": "1"} for record in RECORDS[3:6]]
    metrics = summaries(records, benchmarks.eval_sets(Mllmu(), True))["forget"]["cloze_vqa"].metrics
    assert not [name for name in metrics if name.startswith("both_")]
