"""Text from data and paths is shown as text: Markdown, tables, and the labels of plots."""

import pytest
from markdown_it import MarkdownIt

from vkd_jax.reporting import markdown, plots, tables

HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "[x](javascript:alert(1))",
    "![x](http://host/x.png)",
    "a | b | c",
    "``` `` `",
    "a\n\n# heading\n\n- item",
    "</details>\n<!-- ",
    "*a* __b__ ~~c~~ _d_",
    "\x1b[31mred\x1b[0m\x07",
    "gpj.\u202eexe",
    "a\u2028b\u0085c",
    "$\\frac{1}{2}$ $x",
    "{{7*7}} {% raw %}",
    "&lt;b&gt; \\",
    "[^1] [a]: http://host",
]
_PAGE = MarkdownIt("commonmark").enable(["table", "strikethrough"])


def shown(page):
    """The text that a reader sees, and the types of all tokens of a page."""
    tokens = _PAGE.parse(page)
    inline = [child for token in tokens for child in token.children or ()]
    return "".join(t.content for t in inline if t.type in ("text", "code_inline")), {t.type for t in (*tokens, *inline)}


@pytest.mark.parametrize("text", HOSTILE)
def test_readers_see_the_text_itself(text):
    expected = markdown.plain(text)
    assert not any(c in expected for c in "\n\x1b\u202e\u2028\x85")
    assert shown(f"a {markdown.escape(text)} b") == (
        f"a {expected} b",
        {"paragraph_open", "paragraph_close", "inline", "text"},
    )
    content, types = shown(f"a {markdown.code(text)} b")
    assert content == f"a {expected.strip()} b" and types == {
        "paragraph_open",
        "paragraph_close",
        "inline",
        "text",
        "code_inline",
    }
    row = tables.numeric_table(["name", "n"], [[text, 1], [markdown.code(text, in_table=True), 2]])
    content, types = shown(row)
    assert content == f"namen{expected}1{expected.strip()}2"
    assert not types & {"html_block", "html_inline", "link_open", "image", "em_open", "strong_open", "s_open"}


@pytest.mark.parametrize("text", HOSTILE)
def test_plots_draw_the_text_itself(text):
    card = plots.Card(None, text, text, text, (text, True), (text, False))
    assert plots.portrait_sheet({text: [card], "other": []}).startswith(
        b"\x89PNG"
    )  # a formula with an error would raise
    rows = [{"step": 1, "forget_loss": 1.0, f"forget_{text}": 2.0}]
    assert plots.loss_curves(rows).startswith(b"\x89PNG")


def test_a_comparison_shows_failures_and_labels_as_text():
    text = "a | <b>\x1b[0m `c`"
    row = {
        "label": text,
        "sets": {},
        "attacks": {},
        "runs": [],
        "trials": [{"settings": text, "forgot": 0.5, "kept": 1.0}],
    }
    content, types = shown(tables.tuning({"rows": [row]}))
    plain = markdown.plain(text)
    assert content.endswith(f"{plain}{plain}50.0100.0chosen") and "html_inline" not in types
