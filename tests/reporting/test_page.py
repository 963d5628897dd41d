"""The attacks' place in the report: its section by exact strings, the first page's sentence, and the curves."""

import contextlib
import io

import pytest
from PIL import Image

from vkd_jax.evaluation import metrics
from vkd_jax.reporting import page, plots

RESULTS = {"models": dict.fromkeys(("vanilla", "unlearned", "retain_only"), {})}


def tried(correct, **more):
    low, high = metrics.wilson(correct, 20)
    return {"mean": correct / 20, "correct": correct, "n": 20, "low": low, "high": high, **more}


def attacked(right, attacker, share, part="forget"):
    """A row of relearning: of 20 questions right before, after, and of the model that never knew them."""
    models = ("vanilla", "unlearned", "retain_only")
    recovery = (None, 0.25, -0.1)
    more = dict(attacker=attacker, share=share, set=part, before=0.1)
    return {m: tried(n, **more, recovery=x) for m, n, x in zip(models, right, recovery, strict=True)}


RELEARN = {
    "title": "Relearning: again",
    "about": "Some of it is taught again.",
    "unit": "right answers",
    "summary": {
        "before": {"vanilla": tried(20), "unlearned": tried(2), "retain_only": tried(3)},
        "visual 20 %": attacked((20, 8, 4), "visual", 0.2),
        "visual 20 %, other pictures": attacked((19, 19, 19), "visual", 0.2, "test"),
        "all 5 %": attacked((20, 5, 3), "all", 0.05),
        "all 20 %": attacked((20, 9, 6), "all", 0.2),
        "all 50 %": attacked((20, 18, 9), "all", 0.5),
    },
}
MEMBERSHIP = {
    "title": "Membership: who?",
    "about": "Scores are compared.",
    "unit": "AUC",
    "summary": {
        "loss": {
            "vanilla": {"mean": 1.0, "low": 0.999, "high": 1.0, "n": 20, "score": 0.0},
            "unlearned": {"mean": 0.534, "low": 0.476, "high": 0.58, "n": 20, "score": 0.9},
        }
    },
}


def section(curves=False, models=RESULTS["models"], **attacks):
    return page.attacks({"models": models, "attacks": attacks}, curves)


def test_each_attack_has_a_table_of_all_models():
    text = section(relearn=RELEARN, membership=MEMBERSHIP)
    assert text.startswith("## Attacks: does it come back?\n\nA model may keep what it no longer says.")
    assert "on one that never knew the people to forget: they are forgotten where" in text
    assert (
        "### Relearning: again\n\nSome of it is taught again.\n\n"
        "| what was tried | before | after | never knew them |\n| --- | ---: | ---: | ---: |\n"
        "| before | 100.0 % (20/20), 83.9 to 100.0 | 10.0 % (2/20), 2.8 to 30.1 | 15.0 % (3/20), 5.2 to 36.0 |\n"
        "| visual 20 % | 100.0 % (20/20), 83.9 to 100.0 | 40.0 % (8/20), 21.9 to 61.3; recovery .25 "
        "| 20.0 % (4/20), 8.1 to 41.6; recovery -.10 |\n"
    ) in text
    assert (
        "### Membership: who?\n\nScores are compared.\n\n"
        "| what was tried | before | after | never knew them |\n| --- | ---: | ---: | ---: |\n"
        "| loss | 1.00 (1.00 to 1.00) | .53 (.48 to .58) | – |\n"
    ) in text
    assert "<details>" not in text and "relearning.png" not in text
    drawn = section(relearn=RELEARN, membership=MEMBERSHIP, curves=True)
    assert "again.\n\n![Right answers by the share that was taught again](report/relearning.png)\n\n| what" in drawn
    assert drawn.count("![") == 1


def test_the_first_page_has_a_sentence_on_relearning():
    """Of the attacker who gets more of two with a fifth of the questions."""
    assert page._relearned({"attacks": {"relearn": RELEARN}}) == (
        "**Relearning.** After fine-tuning all weights on 20 % of the forgotten questions it answered **45.0 %** of "
        "the other ones right (25.8 to 65.8); a model that never knew them 30.0 % (14.5 to 51.9)."
    )
    alone = {"visual 50 %": {"unlearned": RELEARN["summary"]["all 50 %"]["unlearned"] | {"attacker": "visual"}}}
    assert page._relearned({"attacks": {"relearn": RELEARN | {"summary": alone}}}) == (
        "**Relearning.** After fine-tuning the visual weights on 50 % of the forgotten questions it answered "
        "**90.0 %** of the other ones right (69.9 to 97.2)."
    )
    for nothing in ({}, {"attacks": {}}, {"attacks": {"relearn": RELEARN | {"summary": {}}}}):
        assert page._relearned(nothing) == ""


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.534, ".53"), (1.0, "1.00"), (0.996, "1.00"), (0.0, ".00"), (-0.1, "-.10"), (1.25, "1.25"), (-1.5, "-1.50"),
     (10.5, "10.50")],
)  # fmt: skip
def test_decimals(value, shown):
    assert page._decimals(value) == shown


def test_without_attacks_there_is_no_section():
    assert section() == page.attacks(RESULTS, False) == ""


def test_an_attack_that_found_nothing_to_ask_says_so():
    empty = {name: MEMBERSHIP | {"title": name, "summary": {}} for name in ("membership", "leak", "probe", "prompts")}
    text = section(models=dict.fromkeys(("vanilla", "unlearned"), {}), **empty)
    assert "there are no people here whom no model ever met" in text and "held_out=DIR" in text
    assert "no question of text alone" in text and "no other pictures" in text and "nothing to ask" in text
    assert "was not measured here" in text and "| --- |" not in text


@pytest.mark.parametrize("count", [8, 9])
def test_a_long_table_is_folded(count):
    rows = {f"variant {i}": {"vanilla": tried(1), "unlearned": tried(2)} for i in range(count)}
    text = section(rephrase=RELEARN | {"summary": rows})
    assert ("<details><summary>All 9 figures</summary>\n\n| what" in text) == (count == 9)
    assert text.count("</details>") == (count == 9) and "| variant 7 | 5.0 % (1/20)" in text


@pytest.mark.parametrize("start", ["before", "unchanged"])
def test_relearning_is_drawn_with_a_panel_an_attacker_and_a_line_a_model(monkeypatch, start):
    drawn = []
    figure_of = plots.drawing

    @contextlib.contextmanager
    def spy(*size):
        with figure_of(*size) as (figure, png):
            drawn.append(figure)
            yield figure, png

    monkeypatch.setattr(plots, "drawing", spy)
    rows = {start if name == "before" else name: row for name, row in RELEARN["summary"].items()}
    with Image.open(io.BytesIO(plots.relearning_curves(rows))) as image:
        assert image.format == "PNG" and min(image.size) > 300
    visual, everything = drawn[-1].axes
    assert [visual.get_title(), everything.get_title()] == ["fine-tuning the visual weights", "fine-tuning all weights"]
    before, after, never = (line.get_xydata().tolist() for line in everything.lines)
    assert before == [[0, 100], [5, 100], [20, 100], [50, 100]]
    assert after == [[0, 10], [5, 25], [20, 45], [50, 90]] and never == [[0, 15], [5, 15], [20, 30], [50, 45]]
    assert [line.get_xydata().tolist() for line in visual.lines][1] == [[0, 10], [20, 40]]
    low, high = metrics.wilson(9, 20)
    band = everything.collections[1].get_paths()[0].vertices
    assert [pytest.approx(20), pytest.approx(100 * low)] in band.tolist()
    assert [pytest.approx(20), pytest.approx(100 * high)] in band.tolist()
    legend = drawn[-1].legends[0]
    assert [entry.get_text() for entry in legend.get_texts()] == ["before", "after", "never knew them"]


def test_nothing_taught_again_draws_nothing():
    assert plots.relearning_curves({}) == plots.relearning_curves({"before": {"vanilla": tried(3)}}) == b""
