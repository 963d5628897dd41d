"""Scoring of the standard suites, on rows worked by hand after the published rules."""

import types

import pytest

from vkd_jax import methods, registry
from vkd_jax.benchmarks import general
from vkd_jax.checkpoints.bundle import ModelBundle
from vkd_jax.config.evaluation import EvalConfig
from vkd_jax.evaluation import metrics
from vkd_jax.evaluation.evaluate import evaluate
from vkd_jax.evaluation.inference import Answerer
from vkd_jax.evaluation.metrics import intervals, suites
from vkd_jax.evaluation.metrics.summary import summaries, summarize
from vkd_jax.evaluation.metrics.utility import model_utility
from vkd_jax.evaluation.metrics.vqa import normalize, vqa_accuracy
from vkd_jax.reporting import report, view
from vkd_jax.reporting.comparison import interval
from vkd_jax.results import main_kind
from vkd_jax.runtime import hub
from vkd_jax.runtime.mesh import make_mesh
from vkd_jax.types import EvalSet, Role


@pytest.mark.parametrize(
    ("answer", "normalized"),
    [
        ("Yes.", "yes"),
        ("The two dogs", "2 dogs"),
        ("none", "0"),
        ("1,000", "1000"),
        ("2.5 kg", "2.5 kg"),
        ("U.S. flag", "us flag"),
        ("black/white", "black white"),
        ("black / white", "black white"),
        ("t-shirt", "t shirt"),
        ("dont know!", "don't know"),
        ("a  red\tcar\n", "red car"),
        ("dog's", "dog 's"),
        ("well", "well"),  # not we'll
        ("A", "a"),  # a letter that is asked for
        ("the", "the"),
        ("?", "?"),
        ("r\u200be\u00add\u2060", "red"),
        ("cafe\u0301", "caf\u00e9"),
        ("\u200b\ufeff ", ""),
        ("", ""),
    ],
)
def test_answers_are_normalized_as_by_the_vqa_challenges(answer, normalized):
    assert normalize(answer) == normalized
    assert normalize(normalized) == normalized


@pytest.mark.parametrize(("agree", "accuracy"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_vqa_accuracy_leaves_one_person_out(agree, accuracy):
    references = ["Two"] * agree + [f"other {number}" for number in range(10 - agree)]
    assert vqa_accuracy("2", references) == pytest.approx(accuracy)


def test_vqa_accuracy_of_fewer_people():
    assert vqa_accuracy("red", ["red"]) == 0  # nobody else agrees
    assert vqa_accuracy("", ["red"] + [""] * 9) == vqa_accuracy("the", ["red"] + ["", "\u200b", " "] * 3) == 0
    assert vqa_accuracy("A.", ["a"] * 10) == 1 and vqa_accuracy("", ["a"] * 10) == 0
    assert vqa_accuracy("red", ["red", "red", "red", "blue"]) == pytest.approx((3 * 2 / 3 + 1) / 4)


@pytest.mark.parametrize(
    ("rule", "text", "verdict"),
    [
        (suites.first_yes_or_no, "Yes", "yes"),
        (suites.first_yes_or_no, "No, there is no dog. Yes?", "no"),
        (suites.first_yes_or_no, "know nothing", None),
        (suites.first_yes_or_no, "", None),
        (suites.pope_verdict, "No, there is a dog", "no"),
        (suites.pope_verdict, "There is not. Yes", "no"),
        (suites.pope_verdict, "Yes. There is no cat", "yes"),  # the second sentence does not count
        (suites.pope_verdict, "banana banana", "yes"),
        (suites.pope_verdict, "NO", "yes"),
        (suites.mme_verdict, "Yes, it is", "yes"),
        (suites.mme_verdict, " no.", "no"),
        (suites.mme_verdict, "N", "no"),
        (suites.mme_verdict, "note", "no"),
        (suites.mme_verdict, "it is: yes", None),
        (suites.scienceqa_letter, "B", "B"),
        (suites.scienceqa_letter, "B. because", "B"),
        (suites.scienceqa_letter, "B because", None),
        (suites.scienceqa_letter, "b", None),
        (suites.scienceqa_letter, "", None),
        (lambda text: suites.mmbench_letter(text, ("cat", "dog", "horse")), "B", "B"),
        (lambda text: suites.mmbench_letter(text, ("cat", "dog", "horse")), "The answer is (C).", "C"),
        (lambda text: suites.mmbench_letter(text, ("cat", "dog", "horse")), "A or B", None),
        (lambda text: suites.mmbench_letter(text, ("cat", "dog", "horse")), "A small brown dog", "B"),
        (lambda text: suites.mmbench_letter(text, ("cat", "dog", "horse")), "A. cat", "A"),
        (lambda text: suites.mmbench_letter(text, ("cat", "dog", "horse")), "cat and dog", None),
        (lambda text: suites.mmbench_letter(text, ("cat", "dog", "horse")), "D", None),
        (lambda text: suites.same_words(text, "tennis ball"), "Tennis ball.", True),
        (lambda text: suites.same_words(text, "yes"), "Yes, it is", False),
        (lambda text: suites.same_words(text, "tennis\u00a0ball\u200b"), "tennis ball", True),
        (lambda text: suites.mmvet_match(text, "-1 <AND> -5"), "x = -1 or x = -5", True),
        (lambda text: suites.mmvet_match(text, "-1 <AND> -5"), "x = -1", False),
        (lambda text: suites.mmvet_match(text, "cat<OR>kitten"), "It is a Kitten", True),
        (lambda text: suites.mmvet_match(text, "<OR>"), "anything", False),
        (lambda text: suites.mmvet_match(text, "red<OR>."), "It is blue.", False),
        (lambda text: suites.mmvet_match(text, "red <AND> ! <OR> \u200b"), "It is red.", True),
        (lambda text: suites.mmvet_match(text, "caf\u00e9 \u2212 5"), "Cafe\u0301 - 5", True),
    ],
)
def test_rules_of_the_suites(rule, text, verdict):
    assert rule(text) == verdict


def record(suite, prediction, answer, group="", **fields):
    known = dict(set=suite, person="", task="suite", modality="vqa", options=[], protocol="suite", category="")
    known |= dict(suite=suite, prediction=prediction, answer=answer, group=group, references=[], rotation=0)
    item = known | fields
    return item | {"correct": suites.correct(item)}


def means(items):
    return {name: figure.mean for name, figure in summarize(items).metrics.items()}


def test_pope_by_hand():
    """TP 2, FP 1, TN 1, FN 1, and an answer without a verdict, which is yes by POPE's rule."""
    said = [("yes", "yes"), ("Yes", "yes"), ("yes", "no"), ("no", "no"), ("no", "yes"), ("banana", "no")]
    items = [record("pope", text, truth, f"image {number // 2}") for number, (text, truth) in enumerate(said)]
    assert means(items) == pytest.approx(
        {
            "pope_accuracy": 3 / 6,
            "pope_precision": 2 / 4,
            "pope_recall": 2 / 3,
            "pope_f1": 4 / 7,
            "pope_yes_ratio": 4 / 6,
            "pope_no_verdict": 1 / 6,
        }
    )
    assert summarize(items).correct == 3
    never = [record("pope", "no", truth) for truth in ("yes", "no")]
    assert [means(never)[f"pope_{name}"] for name in ("precision", "recall", "f1")] == [0, 0, 0]


def test_mme_by_hand():
    """Two subtasks: one of two images with both questions right, and one image with one right."""
    rows = [("a/1", "yes", "yes"), ("a/1", "no", "no"), ("a/2", "yes", "yes"), ("a/2", "yes", "no")]
    rows += [("b/1", "no", "no"), ("b/1", "no", "yes")]
    items = [record("mme", text, truth, group, category=group[0]) for group, text, truth in rows]
    assert means(items) == pytest.approx(
        {"mme_score": (75 + 50) + (50 + 0), "mme_accuracy": 4 / 6, "mme_accuracy_plus": 1 / 3}
    )
    figures = summarize(items).metrics
    assert (figures["mme_score"].n, figures["mme_accuracy"].n, figures["mme_accuracy_plus"].n) == (3, 6, 3)
    assert figures["mme_score"].low == 50 + 50 and figures["mme_score"].high == 200 + 50


def test_mmbench_by_hand():
    """A question whose four rotations are right, and one of which the last is wrong."""
    items = []
    for name, wrong in (("1", None), ("2", 3)):
        for rotation in range(4):
            options = ["cat", "dog", "cow", "pig"][rotation:] + ["cat", "dog", "cow", "pig"][:rotation]
            letter = "ABCD"[(options.index("cat") + (rotation == wrong)) % 4]
            items.append(record("mmbench", letter, "cat", name, options=options, rotation=rotation))
    assert means(items) == {"mmbench_vanilla": 1, "mmbench_circular": 0.5}
    assert (summarize(items).correct, summarize(items).metrics["mmbench_circular"].n) == (7, 2)


def test_vizwiz_by_hand():
    unanswerable, red = ["unanswerable"] * 6 + ["dog"] * 4, ["red"] * 9 + ["unanswerable"]
    said = [("Unanswerable", unanswerable), ("dog", unanswerable), ("unanswerable", red), ("red", red)]
    items = [record("vizwiz", text, truth[0], references=truth) for text, truth in said]
    got = means(items)
    assert got["vizwiz_unanswerable_f1"] == pytest.approx(2 / 4)
    assert got["vqa_accuracy"] == pytest.approx((1 + 1 + 0.3 + 1) / 4)
    assert summarize(items).correct == 3


def test_suites_are_resampled_by_group_and_count_as_general_ability():
    """Forty answers about two images are two observations, which are not people."""
    items = [record("gqa", "red" if number < 20 else "?", "red", f"image {number // 20}") for number in range(40)]
    summary = summaries(items)["gqa"]["suite_vqa"]
    assert (summary.accuracy, summary.low, summary.high, summary.people) == (0.5, 0, 1, 0)
    assert summary.metrics["gqa_accuracy"].people == 0 and set(summary.metrics) == {"gqa_accuracy"}
    compared = interval([[item["correct"] for item in items]], [intervals.cluster_of(item) for item in items])
    assert (compared["low"], compared["high"], compared["people"]) == (0, 1, 0)
    utility = model_utility(items, [EvalSet("gqa", Role.GENERAL, "GQA", "GQA")])
    assert utility.value == 0.5 and list(utility.components) == ["gqa/accuracy"]
    assert main_kind(["suite_vqa"], "vqa") == "suite_vqa"


def test_metrics_of_suites_ignore_other_answers():
    other = dict(task="classification", prediction="A", correct=True, options=["a"], person="001", answer="a")
    assert all(
        metric.value(other) is None
        for metric in map(metrics.get, metrics.METRICS)
        if isinstance(metric, suites.SuiteMetric)
    )


def test_every_suite_is_asked_scored_and_reported():
    """The stand-ins, from their files to the report, with a shipped model; the worked example is not for suites."""
    config = EvalConfig(general=",".join(registry.SUITES), max_items=2, max_new_tokens=2, shots=1)
    sets = {}
    for suite in general.create(config):
        with suite.rows("evaluation") as rows:
            sets |= {name: [example for row in of_set for example in row] for name, of_set in rows.items()}
    folder = hub.fetch_model("tiny_llava")
    bundle = ModelBundle.load_for(methods.create("vkd", {}), folder, seed=0, dtype="float32", mesh=make_mesh())
    records = evaluate(Answerer(bundle, batch_size=16), sets, config)
    assert not any("answer_nll" in item or "worked_example" in item for item in records)
    results = summaries(records)
    figures = {name for kinds in results.values() for name in kinds["suite_vqa"].metrics}
    of_suites = {name for name in metrics.METRICS if isinstance(metrics.get(name), suites.SuiteMetric)}
    assert figures == of_suites - {"mmvet_score"}  # which needs a judge

    titles = [s for suite in general.create(config) for s in suite.asked_sets]
    run = types.SimpleNamespace(
        models={"vanilla": results},
        meta=types.SimpleNamespace(config={"eval": {}}),
        sets_with=lambda kind: titles,
        results=types.SimpleNamespace(summary=lambda model, name, kind: results[name][kind]),
    )
    page = report.render_section("general", view.general(run))
    assert all(eval_set.title in page for eval_set in titles) and "drawn stand-ins" in page
    assert "| POPE, random objects (drawn stand-in) | F1 ↑ | upstream | 2 | " in page and "MM-Vet's score needs" in page
    assert page.count("- pope: ") == 2  # one for POPE's rule and one for ours
