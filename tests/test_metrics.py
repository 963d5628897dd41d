"""Judging and counting answers, against values worked out by hand."""

import math

import pytest

from vkd_jax import metrics


def test_wilson_by_hand():
    # z = 1.959964; centre (p + z^2/2n) / (1 + z^2/n), half width z sqrt(p(1-p)/n + z^2/4n^2) / (1 + z^2/n).
    z, p, n = 1.959964, 0.3, 10
    centre, shrink = p + z * z / (2 * n), 1 + z * z / n
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = metrics.wilson(3, 10)
    assert low == pytest.approx((centre - half) / shrink, abs=1e-6) == pytest.approx(0.1078, abs=1e-4)
    assert high == pytest.approx((centre + half) / shrink, abs=1e-6) == pytest.approx(0.6032, abs=1e-4)


def test_wilson_leaves_doubt_at_both_ends():
    assert metrics.wilson(0, 10) == pytest.approx((0.0, 0.27753), abs=1e-4)
    assert metrics.wilson(10, 10) == pytest.approx((1 - 0.27753, 1.0), abs=1e-4)


@pytest.mark.parametrize(("correct", "n"), [(1, 0), (3, 2), (-1, 2)])
def test_wilson_refuses_impossible_counts(correct, n):
    with pytest.raises(ValueError):
        metrics.wilson(correct, n)


def test_summarise():
    low, high = metrics.wilson(3, 4)
    items = [{"correct": True}, {"correct": False}, {"correct": True}, {"correct": True}]
    assert metrics.summarise(items) == {"accuracy": 0.75, "correct": 3, "n": 4, "low": low, "high": high}
    assert metrics.summarise(iter(items)) == metrics.summarise(items)


def test_summarise_needs_items():
    with pytest.raises(ValueError, match="without questions"):
        metrics.summarise([])


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("b)", "B"),
        (" d.", "D"),
        ("(A)", "A"),
        ("A: baker", "A"),
        ("a", "A"),
        ("A Baker", "A"),
        ("B baker", "B"),
        ("**C**: a baker", "C"),
        ("A is correct", "A"),
        ("A\n\nThe person is a baker.", "A"),
        ("A.\nB is wrong", "A"),
        ("The answer is C", "C"),
        ("the answer is a", "A"),
        ("Answer: D. foo", "D"),
        ("Answer: **B**", "B"),
        ("A possible answer is B", "B"),
        ("It is a man; option C.", "C"),
        ("I would say (d), the pilot", "D"),
        ("Option A", "A"),
        ("It's B because of the hat", "B"),
        ("The portrait shows the baker [C].", "C"),
    ],
)
def test_first_letter_finds_the_choice(text, letter):
    assert metrics.first_letter(text) == letter


@pytest.mark.parametrize(
    "text",
    [
        "",
        "  \n",
        "E",
        "A person with a hat",
        "a baker",
        "It is a dog",
        "The answer is a baker",
        "Because of the hat",
        "Dog",
        "B.A. in arts",
        "A-frame",
        "I don't know",
        "D'Arcy",
        "C'est la vie",
        "Madrid",
        "vitamin C",
        "The answer is not B",
        "AB",
    ],
)
def test_first_letter_is_none_without_a_choice(text):
    assert metrics.first_letter(text) is None


@pytest.mark.parametrize(
    ("prediction", "truth", "right"),
    [
        ("She lives in Port Varda.", "port varda", True),
        ("PILOT", "Pilot ", True),
        ("Port", "Port Varda", False),
        ("", "Pilot", False),
        ("copilot", "pilot", True),  # a substring, as the benchmark defines it
    ],
)
def test_cloze_correct(prediction, truth, right):
    assert metrics.cloze_correct(prediction, truth) is right


def test_cloze_needs_a_truth():
    with pytest.raises(ValueError, match="empty ground truth"):
        metrics.cloze_correct("anything", " ")
