"""Distances of answers, by hand; ties; the limits of bfloat16; the verdict."""

import math

import numpy as np
import pytest

from vkd_jax.types import NotFinite
from vkd_jax.verify import comparison
from vkd_jax.verify.answers import Answer

FEATURES = np.array([[3.0, 4.0], [0.0, 0.0]], np.float32)
LOGITS = np.array([[0.0, 2.0, 4.0], [4.0, 0.0, 2.0]], np.float32)


def answer(features=0.0, logits=0.0, tokens=(2, 0)):
    return Answer(np.arange(5), FEATURES + features, LOGITS + np.float32(logits), np.array(tokens))


def compare(ours, theirs=None, exact=None):
    theirs = theirs or answer()
    limits = (comparison.limits([theirs], [exact]),) if exact else ()
    return comparison.compare("1 x 1", ours, theirs, exact or theirs, *limits)


def test_distances_are_those_of_the_docstring():
    found = compare(answer(features=[0.5, 0.0], logits=[0.0, 0.0, 0.3]))
    assert found.features == pytest.approx(math.sqrt(0.125 / 6.25))  # mean squares 0.5^2 / 2 and 25 / 4
    assert found.logits == pytest.approx(math.sqrt(0.03 / (8 / 3)), rel=1e-5)  # variance of 0, 2 and 4
    assert found.largest == pytest.approx(0.3, rel=1e-5)
    p, q = (np.exp(x) / np.exp(x).sum() for x in (LOGITS[1].astype(float), [4.0, 0.0, 2.3]))
    assert found.kl == pytest.approx((p * np.log(p / q)).sum(), rel=1e-5)
    assert found.stage == "features" and (found.equal, found.compared) == (2, 2)


def test_equal_answers_are_the_same():
    found = compare(answer())
    assert (found.stage, found.features, found.logits, found.largest, found.kl) == ("", 0, 0, 0, 0)
    same, sentence = comparison.verdict([found, found], "float32")
    assert same and "largest |logit difference| 0.0e+00, KL 0.0e+00 nats, all 4 greedy tokens equal." in sentence


def test_text_only_answers_have_no_features():
    text = Answer(np.arange(5), np.zeros((0, 2)), LOGITS, np.array([2, 0]))
    found = compare(text, text)
    assert math.isnan(found.features) and found.stage == "" and " - " in comparison.table([found])


def test_a_token_may_differ_only_where_rounding_decides():
    other = answer(logits=1e-4, tokens=(2, 2))
    assert compare(other).stage == "tokens"  # PyTorch's logits of 0 and 2 are 4 and 2
    assert (compare(other).equal, compare(other).compared) == (1, 2)
    near = answer()
    near.logits[1] = 4.0, 0.0, 4.0 - 1e-4
    found = compare(answer(logits=near.logits - LOGITS + [-1e-4, 0, 1e-4], tokens=(2, 2)), near)
    assert found.tied and found.stage == "" and (found.equal, found.compared) == (1, 1)
    assert "all 1 greedy tokens equal (1 more are ties" in comparison.verdict([found], "float32")[1]


def test_the_limit_of_bfloat16_is_twice_the_distance_of_pytorch():
    theirs = answer(features=[0.1, 0.0], logits=[0.1, 0.0, 0.0])
    near = compare(answer(features=[-0.19, 0.0], logits=[0.0, 0.0, -0.19]), theirs, answer())
    assert near.stage == "" and near.limits == pytest.approx((2 * 0.04 * math.sqrt(0.5), 0.2 / math.sqrt(8)), rel=1e-4)
    assert compare(answer(features=[-0.21, 0.0]), theirs, answer()).stage == "features"
    assert compare(answer(logits=[0.0, 0.0, -0.21]), theirs, answer()).stage == "logits"


def test_the_earliest_stage_of_all_questions_is_named():
    found = [compare(answer(logits=[1, 0, 0])), compare(answer(features=1)), compare(answer()), compare(None)]
    assert [x.stage for x in found] == ["logits", "features", "", "prompt"]
    assert comparison.verdict(found, "float32")[1].startswith(
        "not the same model in float32: the prompts have other tokens (in 3 of 4 questions)."
    )
    assert "the image features differ first, by 4.0e-01 of their size" in comparison.verdict(found[:3], "float32")[1]
    assert compare(Answer(np.arange(5), FEATURES[:1], LOGITS, np.array([2, 0]))).stage == "features"


def test_nan_is_a_difference():
    assert compare(answer(logits=math.nan)).stage == "logits"
    assert compare(answer(features=math.nan)).stage == "features"


@pytest.mark.parametrize(
    "change",
    [
        {"features": FEATURES * 0},
        {"features": FEATURES + math.nan},
        {"logits": LOGITS * 0},
        {"logits": np.array([[0.0, 2.0, 4.0], [3.0, 3.0, 3.0]])},
        {"logits": LOGITS + math.inf},
    ],
)
def test_an_answer_whose_distances_are_undefined_is_refused(change):
    comparison.check(answer())
    with pytest.raises(NotFinite, match=r"in PyTorch are NaN or infinite, or the same for every input"):
        comparison.check(answer()._replace(**change))


def test_limits_are_those_of_all_questions():
    theirs = [answer(features=[0.1, 0.0]), answer(features=[0.3, 0.0])]
    features, logits = comparison.limits(theirs, [answer()] * 2)
    assert features == pytest.approx(2 * math.sqrt((0.1**2 + 0.3**2) / 2 / 2 / 6.25), rel=1e-4) and logits == 0
