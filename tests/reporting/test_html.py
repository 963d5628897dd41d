"""report.html without a browser: self-contained, safe, with the figures of results.json and the words of report.md."""

import base64
import hashlib
import html.parser
import io
import json
import re

import pytest
from PIL import Image
from report_folders import CELLS, IMAGES, OPTIONS, RIGHT, item, make_run, relearn_of, relearned
from report_results import MODELS, attempt, results_with, run_of, shown

from vkd_jax.reporting import brief_view, charts, curves, html_report, items, plots, report, view
from vkd_jax.results import AttackResults, RunResults

VOID = {"meta", "img", "input", "br", "hr"}


class Page(html.parser.HTMLParser):
    """The elements of a page with their attributes, its text, and the contents of its scripts and styles."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.raw, self.words, self._open = [], {}, [], []
        self.feed(text)
        assert not self._open, "unclosed elements"
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append((tag, dict(attrs).get("type", "")))

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop()[0] == tag

    def handle_data(self, data):
        if self._open and self._open[-1][0] in ("script", "style"):
            self.raw[self._open[-1]] = data
        else:
            self.words.append(data)

    @property
    def data(self):
        return json.loads(self.raw["script", "application/json"])


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a run with `make_run` and returns its page and its report.md, without drawing the plots as PNG."""
    for name in ("forget_against_retain", "portrait_sheet", "loss_curves", "relearning_curves"):
        monkeypatch.setattr(plots, name, lambda *_: b"")

    def make(images=IMAGES, records=None, **more):
        make_run(tmp_path, **more)
        for name, lines in (records or {}).items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
        markdown = report.write(tmp_path, images).read_text()
        return (tmp_path / "report.html").read_text(), markdown

    return make


# ---- One file, and nothing else ----


def test_the_page_loads_nothing(write):
    text, _ = write()
    page = Page(text)
    for tag, attributes in page.elements:
        assert tag not in ("link", "iframe", "object", "embed", "base", "use"), tag
        for name in ("src", "href", "data", "action", "srcset", "poster", "formaction"):
            value = attributes.get(name) or "#"
            assert value.startswith(("#", "data:image/webp;base64,")), (tag, name, value)
    assert not re.search(r"url\(|@import|\bfetch\(|XMLHttpRequest|import\(|sendBeacon", text)


def test_the_policy_admits_only_the_styles_and_the_script_of_the_page(write):
    text, _ = write()
    page = Page(text)
    policy = next(a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    hashes = {
        kind: base64.b64encode(hashlib.sha256(page.raw[tag, ""].encode()).digest()).decode()
        for kind, tag in (("style-src", "style"), ("script-src", "script"))
    }
    assert policy == (
        f"default-src 'none'; img-src data:; style-src 'sha256-{hashes['style-src']}'; "
        f"script-src 'sha256-{hashes['script-src']}'; base-uri 'none'; form-action 'none'"
    )
    names = {name for _, attributes in page.elements for name in attributes}
    assert "style" not in names and not any(name.startswith("on") for name in names)


HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'`&amp;{{7*7}}<!--\u202e"


def test_hostile_text_adds_no_element(tmp_path, write):
    """Names, questions, answers, paths and settings are text, wherever they are shown."""

    def page(text):
        right = {**RIGHT, "retain_only": RIGHT["unlearned"]}
        results = make_run(tmp_path, right=right, method={"name": text})
        meta = results["meta"]
        meta |= {name: text for name in ("command", "commit", "devices", "date")} | {"versions": {text: text}}
        meta["config"] |= {"model": {"path": text, "base": text}, text: text}
        meta["benchmark"] |= {"title": text, "source": text}
        for eval_set in meta["benchmark"]["sets"]:
            eval_set |= {"title": text, "short": text}
        cells = [cell | ({} if cell.get("attacker") else {"variant": text}) for cell in CELLS]
        results["attacks"] = relearn_of(cells) | {text[:8]: {"title": text, "about": "About.", "cells": cells}}
        results["timing"] = {text: 1.0}
        (tmp_path / "results.json").write_text(json.dumps(results))
        for model in right:
            file = tmp_path / "answers" / f"{model}.jsonl"
            rows = [json.loads(line) for line in file.read_text().splitlines()]
            for row in rows:
                row |= {"question": text, "answer": text, "options": [text, "b"], "prediction": text, "person": text}
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        report.write(tmp_path, {})
        return Page((tmp_path / "report.html").read_text())

    hostile, plain = page(HOSTILE), page("plain")
    structure = [[(tag, sorted(attributes)) for tag, attributes in x.elements] for x in (hostile, plain)]
    assert structure[0] == structure[1]
    shown = HOSTILE.replace("\u202e", "\\u202e")  # a character that turns the direction of a line around
    assert shown in hostile.data["strings"] and shown in hostile.text and "\u202e" not in hostile.text
    assert {s["title"] for s in hostile.data["sets"]} == {shown}


def test_raw_html_and_links_of_a_section_are_text():
    section = html_report.section_of(
        "x", "## T <b>\n\n<i>a</i> [b](javascript:c)\n\n![d](http://e)\n\n<http://f>\n", {}
    )
    assert section.title == "T <b>"
    page = Page(section.lead + section.body)
    assert {tag for tag, _ in page.elements} <= {"p"} and "[b](javascript:c)" in page.text


# ---- The same figures and words ----


def test_items_have_the_figures_of_the_results(tmp_path, write):
    text, _ = write(right={**RIGHT, "retain_only": RIGHT["unlearned"]})
    data, results = Page(text).data, RunResults.read(tmp_path)
    places = list(zip(data["items"]["set"], data["items"]["kind"], strict=True))
    for model, sets in results.models.items():
        for name, kinds in sets.items():
            for kind, summary in kinds.items():
                number = [s["name"] for s in data["sets"]].index(name), [k["name"] for k in data["kinds"]].index(kind)
                marks = [m for m, at in zip(data["answers"][model]["correct"], places, strict=True) if at == number]
                assert (marks.count("1"), len(marks)) == (summary.correct, summary.n), (model, name, kind)


def test_an_item_has_its_question_and_every_answer(write):
    text, _ = write()
    data = Page(text).data
    strings, first = data["strings"], item("forget", 0, "vqa", False)
    for name in ("id", "person", "question", "answer"):
        assert strings[data["items"][name][0]] == first[name]
    assert [strings[number] for number in data["items"]["options"][0]] == OPTIONS
    assert strings[data["answers"]["vanilla"]["text"][0]] == "baker" and data["answers"]["vanilla"]["correct"][0] == "1"
    # The unlearned model has 3 of 12 right.
    assert strings[data["answers"]["unlearned"]["text"][3]] == "baker"
    assert data["answers"]["unlearned"]["correct"].startswith("1110")
    assert data["images"][data["items"]["image"][0]].startswith("data:image/webp;base64,")
    assert {"1", "0"} == set(data["items"]["pictured"])


def test_sentences_are_those_of_the_markdown(write):
    text, markdown = write(attacks=relearn_of(CELLS))
    page = Page(text)
    words = "".join(page.text.split())
    lines = [line.removeprefix("- ") for line in markdown.splitlines() if line and line[0] not in "#|!<`{} "]
    assert len(lines) > 30
    for line in lines:
        plain = re.sub(r"\*\*|(?<!\\)[*`]|\\(?=\W)", "", line)
        assert "".join(plain.split()) in words, line


def test_cards_show_what_is_judged():
    run = run_of(results_with(people=2))
    card = brief_view.card(run, "forgotten", view.SECTIONS["forgotten"](run))
    assert [(m["model"], m["mean"], m["result"]) for m in card["marks"]] == [
        ("vanilla", 1.0, False),
        ("unlearned", 0.1, True),
        ("retain_only", 0.15, False),
    ]
    assert (card["about"], card["chance"], card["questions"]["set"]) == ("People to forget, with image", 0.25, "forget")
    assert brief_view.card(run, "recovered", view.SECTIONS["recovered"](run)) is None


@pytest.mark.parametrize(
    ("attacks", "notes"),
    [
        (
            {"relearn": {"attacker": "all", "share": 0.2}},
            ["before the attack", "after the attack", "after the same attack"],
        ),
        ({"prompts": {"variant": "role"}}, ["before the attack", "under attack"]),
    ],
)
def test_the_card_of_attacks_shows_before_and_after(attacks, notes):
    tried = {
        name: AttackResults("T", "A", cells=(*attempt((20, 2, 3), "unchanged"), *attempt((20, 8, 4), **given)))
        for name, given in attacks.items()
    }
    run = run_of(results_with(attacks=tried))
    card = brief_view.card(run, "recovered", view.SECTIONS["recovered"](run))
    assert [mark["note"] for mark in card["marks"]] == notes
    assert [mark["mean"] for mark in card["marks"]][:2] == [0.1, 0.4]
    assert [mark["result"] for mark in card["marks"]][:2] == [False, True]


# ---- What a run does not have ----


def test_a_run_without_attacks_images_and_training_says_so(tmp_path, write):
    make_run(tmp_path)
    (tmp_path / "train" / "metrics.jsonl").unlink()
    report.write(tmp_path, {})
    page = Page((tmp_path / "report.html").read_text())
    assert "Not measured: this run made no attack." in page.text and "This run has none." in page.text
    assert page.text.count("no image") > 3 and "0 images are in this file" in page.text
    assert page.data["images"] == page.data["attempts"] == [] and set(page.data["items"]["image"]) == {-1}
    assert not any("curve" in (attributes.get("class") or "") for _, attributes in page.elements)


def test_a_data_set_without_people_and_options(tmp_path, write):
    results = make_run(tmp_path, chance={})
    free = {"accuracy": 0.5, "correct": 6, "n": 12, "low": 0.2, "high": 0.8}
    for model in ("vanilla", "unlearned"):
        file = tmp_path / "answers" / f"{model}.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        rows = [
            row | {"task": "generation", "protocol": "generation", "options": [], "person": ""}
            for row in rows
            if row["set"] in ("forget", "retain") and row["modality"] == "vqa"
        ]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        results["models"][model] = {name: {"generation_vqa": free} for name in ("forget", "retain")}
    (tmp_path / "results.json").write_text(json.dumps(results))
    report.write(tmp_path, IMAGES)
    page = Page((tmp_path / "report.html").read_text())
    assert "No verdict : the questions have no options" in page.text
    assert [kind["title"] for kind in page.data["kinds"]] == ["Open answer, with image"]


# ---- Attacks ----


def test_answers_under_attack_are_listed_by_attempt(write):
    records = [
        relearned(1, False, variant="unchanged", attacker=None, share=None, unit=None),
        relearned(1, True),
        relearned(4, False),
        relearned(2, True, trained_on=True),
        relearned(5, True, id="not asked"),
        {"variant": "loss", "set": "forget", "id": relearned(1, True)["id"], "member": True, "score": 0.5},
    ]
    name = "attacks/relearn/unlearned.jsonl"
    text, _ = write(attacks=relearn_of(CELLS), records={name: records})
    data = Page(text).data
    assert [(x["attack"], x["title"]) for x in data["attempts"]] == [
        ("Relearning: again", "fine-tuning all weights on 20 % of the questions")
    ]
    tried = data["attempts"][0]
    assert tried["items"] == [1, 4] and list(tried["answers"]) == ["unlearned"]
    assert tried["answers"]["unlearned"]["correct"] == "10"
    assert [data["strings"][number] for number in tried["answers"]["unlearned"]["text"]] == ["pilot", "baker"]


# ---- Images ----


def picture(side):
    stream = io.BytesIO()
    Image.effect_noise((side, 2 * side), 90).save(stream, "PNG")
    return stream.getvalue()


def test_images_are_scaled_and_the_first_are_embedded(monkeypatch):
    images = {name: picture(400) for name in "abc"}
    uri = items.data_uri(images["a"])
    with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as image:
        assert image.format == "WEBP" and image.size == (128, 256)
    assert list(items.embed(["c", "none", "a", "b"], images)) == ["c", "a", "b"]
    monkeypatch.setattr(items, "MOST_IMAGE_BYTES", 2 * len(uri) + 4000)
    assert len(uri) > 8000
    assert list(items.embed(["c", "a", "b"], images)) == ["c", "a"]


# ---- Curves ----


@pytest.mark.parametrize("rows", [[(1, -2.0)], [(1, 3.0), (2, 3.0)], [(20, 1e-9), (40, 5e6), (60, -1.5)]])
def test_curves_stay_within_their_axes(rows):
    (panel,) = curves.losses([{"step": step, "forget_loss": loss} for step, loss in rows])
    chart = charts.curve(panel)
    points = chart["lines"][0]["points"]
    assert len(points) == len(chart["rows"]) == len(chart["stops"]) == len(rows)
    assert all(charts.LEFT <= x <= charts.RIGHT and charts.TOP <= y <= charts.BOTTOM for x, y in points)
    assert [float(row[1].replace("−", "-")) for row in chart["rows"]] == [pytest.approx(loss, 1e-3) for _, loss in rows]


def test_a_curve_of_relearning_has_bands_and_a_table():
    cells = (*attempt((20, 2, 3), "unchanged"), *attempt((20, 8, 4), "", "all", 0.2))
    (panel,) = curves.relearning(cells, ["forget"])
    chart = charts.curve(panel)
    assert [line["name"] for line in chart["lines"]] == list(MODELS) and all(line["band"] for line in chart["lines"])
    assert chart["rows"][1] == ["20", "100.0 % (83.9 to 100.0)", "40.0 % (21.9 to 61.3)", "20.0 % (8.1 to 41.6)"]
    assert chart["stops"] == [charts.LEFT, charts.RIGHT] and [tick["text"] for tick in chart["y_ticks"]][-1] == "100"


def test_a_folded_table_is_an_element():
    cells = tuple(cell for i in range(9) for cell in attempt((1, 2, 3), f"variant {i}"))
    run = run_of(results_with(attacks={"rephrase": AttackResults("Images", "About.", cells=cells)}))
    section = html_report.section_of("attacks", shown("attacks", run), {})
    page = Page(section.lead + section.body)
    tags = [tag for tag, _ in page.elements]
    assert tags.count("details") == tags.count("summary") == 1 and "All 9 rows" in page.text
    assert section.title == "Attacks: can the knowledge be recovered?"


def test_steps_of_an_attacker_are_on_a_logarithmic_axis():
    cells = attempt((20, 2, 3), "unchanged")
    for steps, correct in ((10, (20, 5, 4)), (100, (20, 9, 6)), (1000, (20, 11, 8))):
        cells += attempt(correct, "", "all", 0.2, steps=steps, unit="questions")
    (panel,) = curves.budgets(cells, ["forget"])
    chart = charts.curve(panel)
    gaps = [b - a for a, b in zip(chart["stops"], chart["stops"][1:], strict=False)]
    assert [tick["text"] for tick in chart["x_ticks"]] == ["0", "10", "100", "1000"]
    assert gaps == pytest.approx([gaps[0]] * 3, abs=0.2) and [row[0] for row in chart["rows"]] == [
        "0",
        "10",
        "100",
        "1000",
    ]
