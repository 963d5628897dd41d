"""report.md and its files for a small run with known figures; tables of several runs."""

import errno
import io
import json
import re

import matplotlib
import pytest
from PIL import Image
from recorded import add_records
from report_folders import CELLS, FREE, IMAGES, OPTIONS, PEOPLE, RIGHT, N, item, make_run, relearn_of

from vkd_jax.benchmarks.mllmu import Mllmu
from vkd_jax.evaluation.metrics import intervals
from vkd_jax.reporting import comparison, examples, plots, report, tables, terminal, view
from vkd_jax.results import RunResults
from vkd_jax.types import UserError


@pytest.fixture
def run(tmp_path):
    make_run(tmp_path)
    return tmp_path


@pytest.fixture
def undrawn(monkeypatch):
    """Skips drawing, which takes a second, for tests of the text."""
    for name in ("forget_against_retain", "portrait_sheet", "loss_curves"):
        monkeypatch.setattr(plots, name, lambda *_: b"")


def size(png) -> tuple[int, int]:
    with Image.open(png) as image:
        image.load()
        assert image.format == "PNG"
        return image.size


def test_the_report_shows_what_was_forgotten_and_the_evidence(run, undrawn):
    path = report.write(run, IMAGES)
    text = path.read_text()
    assert path == run / "report.md"
    assert "asked to forget 3 of them" in text
    assert "accuracy 100.0 % before and **25.0 %** after unlearning (3.7 to 74.4; 12 questions about 3 people)" in text
    assert "its interval includes chance (25.0 %)" in text
    assert "| people to retain | 100.0 % (12/12), 51.0 to 100.0 | 91.7 % (11/12), 75.0 to 100.0 | -8.3 |" in text
    assert "300,000 of 1,200,000 (25.0 %)" in text
    assert "9 of 80, by SHA-256" in text and "no tensor changed" in text and "bit-identical" in text
    assert "python -m vkd_jax.main --config configs/tiny.py --workdir run" in text
    assert "0123456789abcdef" in text and "`options`" in text
    assert "**reconstruction**" in text
    assert "| all stages | 34.5 |" in text
    assert '"steps": 300' in text


def test_the_terminal_shows_the_accuracy_on_each_set_and_where_the_report_is(run):
    head, *rows, _, page = terminal.summary(RunResults.read(run), "DIR").splitlines()
    assert re.split(r"\s{2,}", head) == ["accuracy in % (95 % interval)", "vanilla", "unlearned"]
    cells = ["people to forget, with image", "100.0 (43.9 to 100.0)", "25.0 (3.7 to 74.4)"]
    assert re.split(r"\s{2,}", rows[0]) == cells
    assert len(rows) == 2 * len(Mllmu.EVAL_SETS) and page == "DIR/report.html"


def test_the_report_counts_one_person_in_the_singular():
    assert report._environment().from_string("{{ 1 | people }}, {{ 2 | people }}").render() == "1 person, 2 people"


def test_the_terminal_shows_what_relearning_brings_back(tmp_path):
    make_run(tmp_path, right={**RIGHT, "retain_only": RIGHT["unlearned"]}, attacks=relearn_of(CELLS))
    *_, row, _, page = terminal.summary(RunResults.read(tmp_path), "DIR").splitlines()
    cells = ["people to forget, after an attacker relearned 20 %", "-", "50.0 (20.0 to 80.0)", "-"]
    assert re.split(r"\s{2,}", row) == cells and page == "DIR/report.html"


def test_report_shows_the_means_of_open_answers(tmp_path, undrawn):
    make_run(tmp_path, right={**RIGHT, "retain_only": RIGHT["unlearned"]})
    results = json.loads((tmp_path / "results.json").read_text())
    results["models"]["vanilla"]["forget"]["generation_vqa"] = FREE
    results["models"]["unlearned"]["forget"]["generation_vqa"] = FREE
    (tmp_path / "results.json").write_text(json.dumps(results))
    text = report.write(tmp_path, IMAGES).read_text()
    assert "MLLMU-Bench, forgetting 5 %; data: synthetic people." in text
    assert "| people to forget | 3 | 12 | 12 | 7 |" in text
    assert "| general ability, nothing about these people | – | 12 | 12 | – |" in text
    assert "| people to forget | 7 | 0.500 (0.250 to 0.750) | 0.500 (0.250 to 0.750) | – |" in text


def test_report_of_a_data_set_without_options(tmp_path, undrawn):
    """A user's data set may have only open questions."""
    make_run(tmp_path, chance={})
    results = json.loads((tmp_path / "results.json").read_text())
    free = {name: {"generation_vqa": FREE} for name in ("forget", "retain")}
    results["models"] = {"vanilla": free, "unlearned": free}
    (tmp_path / "results.json").write_text(json.dumps(results))
    text = report.write(tmp_path, IMAGES).read_text()
    assert "accuracy 42.9 % before" in text and "Chance is" not in text and "Multiple choice" not in text


def test_a_data_set_without_people_has_cards_for_each_set(tmp_path):
    make_run(tmp_path)
    for name in ("vanilla", "unlearned"):
        file = tmp_path / "answers" / f"{name}.jsonl"
        items = [json.loads(line) | {"person": ""} for line in file.read_text().splitlines()]
        for it in items:  # open questions with characters that matplotlib would interpret
            if it["set"] == "forget":
                it |= {
                    "task": "generation",
                    "protocol": "generation",
                    "options": [],
                    "question": "Why\u2028$5% or $\\foo$?",
                }
        file.write_text("".join(json.dumps(it, ensure_ascii=False) + "\n" for it in items))
    results = json.loads((tmp_path / "results.json").read_text())
    for eval_set in results["meta"]["benchmark"]["sets"]:
        eval_set["people"] = 0
    (tmp_path / "results.json").write_text(json.dumps(results))
    text = report.write(tmp_path, IMAGES).read_text()
    assert "asked to forget part of what it knew" in text and "the questions about what to forget" in text
    names = {path.name for path in (tmp_path / "portraits").iterdir()}
    assert names == {*(f"forget_{i}.png" for i in (1, 2, 3)), *(f"retain_{i}.png" for i in (1, 2, 3, 4))}


def test_report_shows_its_plots_and_leaves_no_temporary_files(run):
    text = report.write(run, IMAGES).read_text()
    shown = re.findall(r"!\[.+\]\((.+)\)", text)
    assert shown == ["report/forget_retain.png", "report/portraits.png", "report/losses.png"]
    assert all(min(size(run / name)) > 300 for name in shown)
    assert sorted(path.name for path in (run / "report").iterdir()) == sorted(name[7:] for name in shown)
    assert not list(run.rglob("*.tmp"))


def test_all_files_of_a_report_are_known_by_name(run, undrawn):
    report.write(run, IMAGES)
    (run / "report" / "notes").mkdir()
    names = report.files_of(run)
    assert names[:2] == list(report.FILES) and "report/losses.png" in names and "report/notes" not in names
    assert {name.partition("/")[0] for name in names[2:]} == {"report", "portraits"}
    assert all(name.startswith(report.PREFIXES) and (run / name).is_file() for name in names)


def test_plots_are_independent_of_the_matplotlib_style_and_keep_it(run, monkeypatch):
    report.write(run, IMAGES)
    first = {path.name: path.read_bytes() for path in (run / "report").iterdir()}
    monkeypatch.setitem(matplotlib.rcParams, "font.size", 33.0)
    before = dict(matplotlib.rcParams)
    report.write(run, IMAGES)
    assert first == {path.name: path.read_bytes() for path in (run / "report").iterdir()}
    assert dict(matplotlib.rcParams) == before


def test_a_full_disk_leaves_the_old_report(run, undrawn, monkeypatch):
    old = report.write(run, IMAGES).read_bytes()

    write_bytes = report.Path.write_bytes

    def full(path, data):
        write_bytes(path, data[:10])
        if "report.md" in path.name:  # a temporary file beside it
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(report.Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        report.write(run, IMAGES)
    assert (run / "report.md").read_bytes() == old
    assert not list(run.rglob("*.tmp"))


def test_report_shows_incomplete_forgetting_and_changed_text(tmp_path, undrawn):
    right = {**RIGHT, "unlearned": {**RIGHT["unlearned"], "forget": (9, 6)}}
    make_run(tmp_path, right=right, method={"name": "grad_diff", "train": "all"}, manifest=(80, 60))
    text = report.write(tmp_path, IMAGES).read_text()
    assert "**The unlearned model still knows something about them**: it is above chance (25.0 %)" in text
    assert "**60 tensors changed**" in text and "**not identical**" in text
    assert "reconstruction" not in text and "left unchanged on purpose" not in text


def test_report_compares_with_a_retain_only_model(tmp_path, undrawn):
    make_run(tmp_path, right={**RIGHT, "retain_only": RIGHT["unlearned"]})
    text = report.write(tmp_path, IMAGES).read_text()
    assert "| vanilla | unlearned | retain-only |" in text
    assert "could not be told apart from the retain-only model (25.0 %, 3.7 to 74.4), so these questions" in text


def test_report_of_a_method_that_does_not_train(run, undrawn):
    (run / "train" / "metrics.jsonl").unlink()
    assert "losses.png" not in report.write(run, IMAGES).read_text()
    assert not (run / "report" / "losses.png").exists()


def test_a_missing_image_is_an_empty_frame():
    card = plots.Card(None, "person 1", "Who?", "x" * 80, ("y", True), ("", False))
    assert size(io.BytesIO(plots.portrait_sheet({"Kept": [card]})))[0] > 300


def test_the_last_row_of_a_repeated_step_counts(run, undrawn, monkeypatch):
    rows = []
    monkeypatch.setattr(plots, "loss_curves", lambda logged: rows.extend(logged) or b"")
    with (run / "train" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "forget_loss": 0.5}\n{"step": 60, "forg')  # a resume, then a kill within a line
    report.write(run, IMAGES)
    assert [(row["step"], row["forget_loss"]) for row in rows] == [(20, 1 / 20), (40, 0.5), (60, 1 / 60)]


def test_cards_show_one_question_of_each_of_the_first_people(tmp_path):
    records = {
        model: [item(name, n, "vqa", name == "retain" or model == "vanilla") for name in PEOPLE for n in range(N)]
        for model in ("vanilla", "unlearned")
    }
    records["unlearned"].reverse()  # answers are matched by question, not by position
    results = RunResults.from_json(make_run(tmp_path))
    forgotten, kept = report.cards(view.Run(results, records), IMAGES).values()
    assert [card.title for card in forgotten] == ["person 001", "person 002", "person 003"]
    assert [card.title for card in kept] == ["person 004", "person 005", "person 006", "person 007"]
    # The second question of the second person is number 4, and its true answer is the first option.
    card = forgotten[1]
    assert (card.truth, card.vanilla, card.unlearned) == ("baker", ("baker", True), ("pilot", False))
    assert all(card.unlearned == (card.truth, True) for card in kept)
    assert forgotten[0].image == IMAGES["001/0"]


# ---- Attacks; see also test_sections.py ----


def tried(correct, **more):
    low, high = intervals.wilson(correct / 20, 20)
    return {"mean": correct / 20, "correct": correct, "n": 20, "low": low, "high": high, **more}


def test_report_shows_relearning_and_draws_it(tmp_path):
    cells = [
        tried(n, model=name, attacker="all", share=0.25, unit="questions", set="forget")
        for name, n in (("vanilla", 20), ("unlearned", 9))
    ]
    attack = {"title": "Again", "about": "About.", "metric": "accuracy", "variants": {}, "cells": cells}
    make_run(tmp_path, attacks={"relearn": attack})
    text = report.write(tmp_path, IMAGES).read_text()
    assert (
        "- Relearning: after fine-tuning all weights on 25 % of the forget set" in text[: text.index("## What was m")]
    )
    assert "### Again\n\nAbout.\n\n![" in text and "(report/relearning.png)\n\n| variant" in text
    assert min(size(tmp_path / "report" / "relearning.png")) > 300


def test_a_report_without_attacks_does_not_mention_them(run, undrawn):
    text = report.write(run, IMAGES).read_text()
    assert "## Attacks" not in text and "Relearning" not in text
    assert not (run / "report" / "relearning.png").exists()


def test_an_audited_model_is_not_reported_as_trained_here(tmp_path, undrawn):
    results = make_run(tmp_path)
    del results["trainable"]
    results["meta"]["config"]["stage"] = "audit"
    (tmp_path / "results.json").write_text(json.dumps(results))
    text = report.write(tmp_path, IMAGES).read_text()
    assert "Weights trained" not in text and "reconstruction" not in text and "9 of 80" in text


@pytest.mark.parametrize(
    ("prediction", "shown"),
    [("pilot", "pilot"), ("B", "B, pilot"), ("(c)", "C, nurse"), ("no idea", "no idea"), ("", "(nothing)")],
)
def test_letters_are_followed_by_their_option(prediction, shown):
    assert examples.answer_text({"prediction": prediction, "options": OPTIONS}) == shown


def test_runs_are_in_one_table_with_seeds_of_one_config_averaged(tmp_path, capsys):
    worse = {**RIGHT, "unlearned": {**RIGHT["unlearned"], "forget": (6, 12)}}
    make_run(tmp_path / "vkd-0", seed=0)
    make_run(tmp_path / "vkd-1", seed=1, right=worse)
    make_run(tmp_path / "grad-diff", right=worse, method={"name": "grad_diff", "train": "all"})
    add_records(*tmp_path.iterdir())
    assert tables.main([str(tmp_path / name) for name in ("vkd-0", "vkd-1", "grad-diff")]) == 0
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()[2:5]]
    assert [row[0] for row in cells] == ["vanilla", "vkd, train=visual", "grad_diff, train=all"]
    assert cells[0][2] == "100.0 (100–100)" and cells[0][-2] == "–"
    # (25 + 50) / 2, and 2 + 30 and 2 + 40 seconds.
    assert cells[1][2].startswith("37.5 (") and cells[1][-2] == "37"
    assert cells[2][2].startswith("50.0 (")


def test_runs_of_different_configs_have_their_own_rows(tmp_path):
    make_run(tmp_path / "a", method={"name": "vkd", "train": "visual", "distance": "mse"})
    make_run(tmp_path / "b", seed=1, method={"name": "vkd", "train": "visual", "distance": "cosine"})
    add_records(*tmp_path.iterdir())
    groups = comparison.by_label([tmp_path / "a", tmp_path / "b"])
    assert list(groups) == ["vkd, train=visual, distance=mse", "vkd, train=visual, distance=cosine"]


@pytest.mark.parametrize("break_it", ["missing", "torn", "protocol", "twice", "tuned", "changed", "answers"])
def test_runs_that_cannot_be_compared_are_rejected(run, tmp_path, break_it, capsys):
    other = tmp_path / "other"
    make_run(other, seed=1)
    message = {
        "missing": "no results.json",
        "torn": "it is not JSON",
        "protocol": "one protocol",
        "twice": "twice",
        "tuned": "have no unlearned model",
        "changed": "results.json is damaged or was changed",
        "answers": "unlearned.jsonl is damaged or was changed",
    }
    results = json.loads((other / "results.json").read_text())
    if break_it == "missing":
        (other / "results.json").unlink()
    elif break_it == "torn":
        (other / "results.json").write_text("{")
    elif break_it == "protocol":
        results["meta"]["protocol"] = "letter"
        (other / "results.json").write_text(json.dumps(results))
    elif break_it == "tuned":
        del results["models"]["unlearned"]
        (other / "results.json").write_text(json.dumps(results))
    elif break_it == "twice":
        make_run(other, seed=0)
    add_records(run, other)
    if break_it == "changed":
        results["timing"]["unlearn"] = 1.0
        (other / "results.json").write_text(json.dumps(results))
    elif break_it == "answers":
        lines = (other / "answers" / "unlearned.jsonl").read_text().splitlines(keepends=True)
        (other / "answers" / "unlearned.jsonl").write_text("".join(lines[:-1]))
    assert tables.main([str(run), str(other)]) == 2
    captured = capsys.readouterr()
    assert message[break_it] in captured.err and captured.out == ""


def test_missing_answers_are_named(run):
    (run / "answers" / "unlearned.jsonl").unlink()
    with pytest.raises(UserError, match=r"unlearned.jsonl is missing"):
        report.write(run, IMAGES)


def test_torn_answers_are_named(run):
    (run / "answers" / "unlearned.jsonl").write_text('{"set": "for')
    with pytest.raises(UserError, match=r"unlearned.jsonl, line 1: it is not JSON"):
        report.write(run, IMAGES)
