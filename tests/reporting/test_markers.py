"""Tables between markers of Markdown pages are rendered and checked; malformed markers are rejected."""

import json
from pathlib import Path

import pytest

from vkd_jax.reporting import markers, tables

ROOT = Path(__file__).parents[2]
TABLES = {"names": lambda rows: "\n".join(f"| {row['name']} |" for row in rows)}


@pytest.fixture
def page(tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps([{"name": "vkd"}]))
    (tmp_path / "text.json").write_text("[1]")
    return tmp_path / "page.md"


def refresh(page, check=False):
    return markers.refresh([page], TABLES, "table", "python -m x", check)


def test_pages_are_rendered_and_checked(page, capsys):
    text = "before\n<!-- table: rows.json names -->\n{}\n<!-- /table -->\nafter\n<!-- perf: rows.json steps -->\n"
    page.write_text(text.format("old"))
    assert refresh(page, check=True) == 1
    assert capsys.readouterr().err == f"{page} is stale: run python -m x {page}\n"
    assert page.read_text() == text.format("old")
    assert refresh(page) == 0 and page.read_text() == text.format("| vkd |")  # markers with another word are left alone
    assert refresh(page, check=True) == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- table: rows.json -->\n<!-- /table -->", "a marker lacks its end, its file or its table."),
        ("<!-- table: rows.json names -->\nno end", "a marker lacks its end, its file or its table."),
        ("<!-- table: rows.json kept -->\n<!-- /table -->", "the table 'kept'. Supported values: names."),
        ("<!-- table: none.json names -->\n<!-- /table -->", "a marker names none.json, which cannot be read"),
        ("<!-- table: text.json names -->\n<!-- /table -->", "does not contain what the table 'names' shows"),
    ],
)
def test_invalid_markers_are_rejected(page, capsys, text, message):
    page.write_text(text)
    assert refresh(page, check=True) == 2 and message in capsys.readouterr().err


def _edit(field, value):
    def edit(results):
        results["rows"][2]["sets"]["forget/vqa"][field] = value

    return edit


@pytest.mark.parametrize(
    "edit",
    [
        _edit("mean", 7.0),
        _edit("mean", float("nan")),
        _edit("low", 0.9),
        _edit("high", 1.5),
        lambda results: results["rows"].append(results["rows"][2]),
        lambda results: results["rows"][2]["attacks"]["relearn"][0].update(mean=float("inf")),
    ],
)
def test_figures_that_are_impossible_are_rejected(tmp_path, capsys, edit):
    results = json.loads((ROOT / "docs" / "results" / "tiny_robust.json").read_text())
    edit(results)
    (tmp_path / "edited.json").write_text(json.dumps(results))
    page = tmp_path / "page.md"
    page.write_text("<!-- table: edited.json resisting -->\n<!-- /table -->")
    assert tables.main([str(page)]) == 2
    assert "error: a marker names edited.json: a comparison has " in (shown := capsys.readouterr().err), shown


def test_a_missing_page_is_rejected(tmp_path, capsys):
    assert refresh(tmp_path / "none.md") == 2 and "none.md" in capsys.readouterr().err


def test_the_tables_of_readme_and_docs_are_up_to_date():
    pages = [str(path) for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]]
    assert tables.main([*pages, "--check"]) == 0
