"""Evaluation on eight simulated devices and in two processes gives the records of one device."""

import numpy as np
import pytest

NUMBERS = ("scores", "answer_nll", "probability", "paraphrase_nll", "perturbed_nll", "truth_ratio")


@pytest.fixture
def alone(eight_devices):
    return eight_devices["evaluation"]


def assert_same(records, expected):
    assert [list(record) for record in records] == [list(record) for record in expected]
    for record, other in zip(records, expected, strict=True):
        for key in record:
            if key in NUMBERS:
                np.testing.assert_allclose(record[key], other[key], atol=1e-4, rtol=1e-4)
            else:
                assert record[key] == other[key]


def test_the_records_differ_enough_to_compare(alone):
    records = alone["1,1,1"]["records"]
    assert alone["1,1,1"]["batch"] == 3 and len(records) == 23 + 11  # 23 questions, 11 of them by two protocols
    for kind in ("letter", "generation"):
        assert len({r["prediction"] for r in records if r["protocol"] == kind}) > 3
    assert len({r["prediction"] for r in records if r["protocol"] == "options"}) > 1
    assert len({round(r["answer_nll"], 3) for r in records if "answer_nll" in r}) > 15


def test_eight_devices_give_the_records_of_one(alone):
    eight = alone["2,2,2"]
    assert (eight["batch"], eight["rows_per_device"]) == (4, 1)  # three rows, rounded up to the shards
    assert_same(eight["records"], alone["1,1,1"]["records"])


def test_each_of_two_processes_has_all_records(alone, two_processes):
    for results in two_processes:
        evaluated = results["evaluation"]
        assert results["devices"] == [4, 2] and (evaluated["batch"], evaluated["rows_per_device"]) == (4, 1)
        assert_same(evaluated["records"], alone["1,1,1"]["records"])
