"""The plots of the report: their contents, read from the figures."""

import contextlib
import io

import pytest
from compared import found
from PIL import Image

from vkd_jax.reporting import comparison_plots, plots
from vkd_jax.results import STRONGEST, AttackCell, Summary

MODELS = ("vanilla", "unlearned", "retain_only")


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were drawn."""
    figures, drawing = [], plots.drawing

    @contextlib.contextmanager
    def spy(*size):
        with drawing(*size) as (figure, png):
            figures.append(figure)
            yield figure, png

    monkeypatch.setattr(plots, "drawing", spy)
    return figures


def size(png):
    with Image.open(io.BytesIO(png)) as image:
        assert image.format == "PNG"
        return image.size


def legend(figure):
    return [entry.get_text() for entry in figure.legends[0].get_texts()]


def attempt(correct, attacker=None, share=None, set_name="forget", **more):
    """The cells of the three models, with an interval of 10 points on both sides."""
    return [
        AttackCell(model, set_name, n / 20, 20, n / 20 - 0.1, n / 20 + 0.1, attacker=attacker, share=share, **more)
        for model, n in zip(MODELS, correct, strict=True)
    ]


def test_relearning_has_a_panel_per_attacker_and_a_line_per_model(drawn):
    cells = [
        *attempt((20, 2, 3), variant="unchanged"),
        *attempt((20, 20, 20), variant="unchanged", set_name="test"),
        *attempt((20, 8, 4), "visual", 0.2),
        *attempt((19, 19, 19), "visual", 0.2, "test"),
        *attempt((20, 5, 3), "all", 0.05),
        *attempt((20, 18, 9), "all", 0.5),
        *attempt((1, 1, 1), "all", 0.5, unit="people"),
        *attempt((20, 9, 6), "all", 0.2),
    ]
    assert min(size(plots.relearning_curves(cells, ["forget"]))) > 300
    visual, everything = drawn[-1].axes
    assert [visual.get_title(), everything.get_title()] == ["fine-tuning the visual weights", "fine-tuning all weights"]
    vanilla, unlearned, retain_only = (line.get_xydata().tolist() for line in everything.lines)
    assert vanilla == [[0, 100], [5, 100], [20, 100], [50, 100]]
    assert unlearned == [[0, 10], [5, 25], [20, 45], [50, 90]] and retain_only == [[0, 15], [5, 15], [20, 30], [50, 45]]
    assert [line.get_xydata().tolist() for line in visual.lines][1] == [[0, 10], [20, 40]]
    band = everything.collections[1].get_paths()[0].vertices.tolist()
    assert all([pytest.approx(20), pytest.approx(end)] in band for end in (35, 55))
    assert legend(drawn[-1]) == ["vanilla", "unlearned", "retain-only"]


def test_budgets_have_a_line_with_the_best_rate_and_the_control_as_a_band(drawn):
    budgets = [(25, 3e-4, (20, 5, 4)), (25, 3e-3, (20, 7, 2)), (100, 3e-4, (20, 9, 6)), (100, 3e-3, (20, 1, 8))]
    cells = attempt((20, 2, 3), variant="unchanged")
    for steps, rate, correct in budgets:
        cells += attempt(correct, "all", 0.25, steps=steps, learning_rate=rate, unit="questions")
        cells += attempt((9, 9, 9), "all", 0.5, steps=steps, learning_rate=rate, unit="questions")
        cells += attempt((9, 9, 9), "all", 0.25, steps=steps, learning_rate=rate, unit="people")
    assert min(size(plots.budget_curves(cells, ["forget"]))) > 300
    (axes,) = drawn[-1].axes
    control, unlearned = (axes.lines[0], next(line for line in axes.lines if line.get_marker() == "o"))
    assert control.get_xydata().tolist() == [[0, 15], [25, 20], [100, 40]]
    assert unlearned.get_xydata().tolist() == [[0, 10], [25, 35], [100, 45]]
    band = axes.collections[0].get_paths()[0].vertices.tolist()
    assert all([pytest.approx(100), pytest.approx(end)] in band for end in (30, 50))
    assert legend(drawn[-1]) == ["retain-only", "unlearned"] and "with 25 % of the questions" in axes.get_xlabel()
    assert plots.budget_curves([cell for cell in cells if cell.steps != 100], ["forget"]) is None


def test_a_comparison_with_one_share_has_the_steps_of_the_attacker(drawn):
    cell = {"mean": 0.3, "attacker": "visual", "share": 0.2, "unit": "questions", "set": "forget", "seeds": 2}
    steps = [cell | {"variant": STRONGEST, "steps": n, "mean": mean} for n, mean in ((400, 0.5), (25, 0.2))]
    assert comparison_plots.relearning(found(relearn=[cell | {"variant": ""}, *steps])).startswith(b"\x89PNG")
    (axes,) = drawn[-1].axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "25", "400"]
    assert axes.get_xlabel() == "steps of the attacker"
    assert axes.lines[-1].get_ydata()[1:] == pytest.approx([20, 50])
    shares = [cell | {"variant": "", "share": share} for share in (0.5, 0.2)]
    assert comparison_plots.relearning(found(relearn=[*shares, *steps])).startswith(b"\x89PNG")
    (axes,) = drawn[-1].axes
    assert axes.get_xlabel() == "forget questions relearned (%)"
    assert list(axes.lines[-1].get_xdata()) == [0, 20, 50]


def test_without_relearning_there_is_no_plot():
    cells = attempt((3, 3, 3), variant="unchanged")
    assert plots.relearning_curves([], ["forget"]) is plots.relearning_curves(cells, ["forget"]) is None


def accuracy(share):
    return {"vqa": Summary(share, 0, 0, share - 0.1, share + 0.1)}


@pytest.mark.parametrize("holdout", [False, True])
def test_forget_against_retain_marks_sets_by_their_role(drawn, holdout):
    """Names of sets do not matter; hollow markers and their legend entry need holdouts of both sets."""
    models = {
        "vanilla": {"f": accuracy(0.9), "r": accuracy(0.8), "f2": accuracy(0.85), "r2": accuracy(0.75)},
        "unlearned": {"f": accuracy(0.2), "r": accuracy(0.7), "f2": accuracy(0.3), "r2": accuracy(0.6)},
    }
    names = {"forget": "f", "retain": "r", "forget_holdout": "f2"} | ({"retain_holdout": "r2"} if holdout else {})
    plots.forget_against_retain(models, names, {"vqa": 0.25})
    image, text = drawn[-1].axes
    points = [[pytest.approx(90), pytest.approx(80)], [pytest.approx(20), pytest.approx(70)]]
    hollow = [[pytest.approx(85), pytest.approx(75)], [pytest.approx(30), pytest.approx(60)]]
    markers = [line.get_xydata().tolist()[0] for line in image.lines if line.get_marker() == "o"]
    assert markers == hollow * holdout + points
    assert len(image.texts) == 1 + holdout + 1 and not text.lines  # "chance" and the arrows
    assert ("holdout: other images of the same people" in legend(drawn[-1])) == holdout
    assert legend(drawn[-1])[:2] == ["vanilla", "unlearned"]


def test_losses_have_a_panel_per_stream(drawn):
    rows = [{"step": n, "forget_loss": 1.0, "forget_ce": n / 4, "retain_loss": 2.0, "loss": 3.0} for n in (20, 40)]
    plots.loss_curves(rows)
    forget, retain = drawn[-1].axes
    assert (forget.get_title(), retain.get_title()) == ("forget set", "retain set")
    assert [line.get_label() for line in forget.lines] == ["loss (minimized)", "ce"]
    assert forget.lines[1].get_xydata().tolist() == [[20, 5], [40, 10]] and len(retain.lines) == 1
