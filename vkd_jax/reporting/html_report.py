"""Renders report.html, a self-contained file, from the sections of report.md.

The sentences and tables are those of report.md, converted from Markdown with raw HTML switched off. This module adds
the cards, the curves, and every item as JSON. Style and script are inline. The page's Content-Security-Policy allows
only these two, by their hashes, and images as data URIs.
"""

import base64
import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.utils
import markdown_it
from markdown_it.rules_block import StateBlock
from markdown_it.token import Token
from markupsafe import Markup

from vkd_jax import messages
from vkd_jax.reporting import attack_view, brief_view, charts, curves, items, plots
from vkd_jax.reporting.finished_run import Run
from vkd_jax.types import Role

CARDS = ("forgotten", "kept", "recovered")  # sections that are cards at the top of the page
FACTS = ("text_only", "basis")  # sections beside each other below the cards
EARLY = ("words", "portraits")  # sections before the list of every item
SCROLLS = 'role="group" aria-label="Table, scrolls sideways" tabindex="0"'  # reachable by the keyboard
_FOLD = re.compile(r"<details><summary>(?:<b>)?(.*?)(?:</b>)?(: .*)?</summary>")


@dataclasses.dataclass(frozen=True)
class Section:
    """A section of report.md in HTML.

    Args:
        name: its name in `view.SECTIONS`.
        title: its heading as text; "" without one.
        lead: its first paragraph.
        body: everything after that.
    """

    name: str
    title: str
    lead: Markup
    body: Markup


def render(
    run: Run,
    pages: Mapping[str, str],
    values: Mapping[str, Mapping[str, Any]],
    sheet: Mapping[str, Sequence[plots.Card]],
    losses: Sequence[Mapping],
    attacks: items.AttackRecords,
    images: Mapping[str, bytes],
) -> str:
    """Renders report.html.

    Args:
        run: the run.
        pages: the Markdown of each section, by name, in order.
        values: what each section's function returned.
        sheet: the portraits under their headings.
        losses: the logged steps of training.
        attacks: the records of the attacks.
        images: encoded images by `image_id`.
    """
    environment = _environment()
    relearn, forget = run.results.attacks.get("relearn"), [s.name for s in run.results.with_role(Role.FORGET)]
    panels = {"losses": curves.losses(losses)}
    if relearn:
        panels["relearning"] = curves.relearning(relearn.strongest().cells, forget)
        panels["relearning_steps"] = curves.budgets(relearn.cells, forget)
    drawings = {name: [charts.curve(panel) for panel in several] for name, several in panels.items()}
    drawings["forget_retain"] = charts.planes(run)
    macros = environment.get_template("figures.html.jinja").module
    figures = {name: macros.figures(name, panels) for name, panels in drawings.items()}
    figures["portraits"] = macros.portraits(_portraits(sheet))
    sections = {name: section_of(name, text, figures) for name, text in pages.items()}
    css, script = _source("report.css"), _source("report.js")
    data = items.items_of(run, images, attacks)
    return environment.get_template("report.html.jinja").render(
        policy=_policy(css, script),
        css=Markup(css),
        script=Markup(script),
        # The same escapes as the filter tojson: no "<" in the page, so that no text can end the element.
        data=jinja2.utils.htmlsafe_json_dumps(data, dumps=_dumps),
        run=run,
        sections=sections,
        cards=[(sections[name], brief_view.card(run, name, values[name])) for name in CARDS],
        facts=[sections[name] for name in FACTS if name in sections],
        early=[sections[name] for name in EARLY if name in sections],
        rest=[section for name, section in sections.items() if name not in ("opening", *CARDS, *FACTS, *EARLY)],
        n_items=len(data["items"]["set"]),
        n_images=len(data["images"]),
        side=items.SIDE,
        most_mib=items.MOST_IMAGE_BYTES // 2**20,
    )


def section_of(name: str, text: str, figures: Mapping[str, Markup]) -> Section:
    """Converts a section of report.md; raw HTML and links in it stay text.

    Args:
        name: its name.
        text: its Markdown.
        figures: by name, what replaces the image `report/NAME.png`.
    """
    tokens, title = _parser().parse(text), ""
    for before, token, after in zip(tokens, tokens[1:], tokens[2:], strict=False):
        if token.children and [child.type for child in token.children] == ["image"]:
            before.hidden = after.hidden = True  # a figure is no paragraph
    if tokens and tokens[0].type == "heading_open" and tokens[0].tag in ("h1", "h2"):
        title = "".join(child.content for child in tokens[1].children or ())
        tokens = tokens[3:]
    end = 0
    if tokens and tokens[0].type == "paragraph_open":
        end = 1 + next(i for i, token in enumerate(tokens) if token.type == "paragraph_close")
    lead, body = (_rendered(chosen, figures) for chosen in (tokens[:end], tokens[end:]))
    return Section(name, title, lead, body)


def _rendered(tokens: Sequence[Token], figures: Mapping[str, Markup]) -> Markup:
    parser = _parser()
    return Markup(parser.renderer.render(tokens, parser.options, {"figures": figures}))


@functools.cache
def _parser() -> markdown_it.MarkdownIt:
    parser = markdown_it.MarkdownIt("commonmark", {"html": False}).enable("table")
    parser.disable(["link", "autolink", "html_inline", "html_block", "reference"])
    parser.block.ruler.before("paragraph", "fold", _fold, {"alt": ["paragraph"]})
    parser.add_render_rule("image", _figure)
    parser.add_render_rule("table_open", lambda *_: f'<div class="table" {SCROLLS}><table>\n')
    parser.add_render_rule("table_close", lambda *_: "</table></div>\n")
    for name in ("th_open", "td_open"):
        parser.add_render_rule(name, _cell)
    return parser


def _fold(state: StateBlock, start: int, _: int, silent: bool) -> bool:
    """Parses the lines of templates that fold a table; no text of data has these tags, because "<" is escaped."""
    line = state.src[state.bMarks[start] : state.eMarks[start]]
    match = _FOLD.fullmatch(line)
    if not match and line != "</details>":
        return False
    if not silent:
        state.line = start + 1
        if match:
            state.push("details_open", "details", 1)
            state.push("summary_open", "summary", 1)
            inline = state.push("inline", "", 0)
            inline.content, inline.children = "".join(filter(None, match.groups())), []
            state.push("summary_close", "summary", -1)
        else:
            state.push("details_close", "details", -1)
    return True


def _figure(renderer: Any, tokens: Sequence[Token], index: int, _: Any, env: Mapping[str, Any]) -> str:
    source = str(tokens[index].attrs["src"])
    return env["figures"].get(source.removeprefix("report/").removesuffix(".png"), "")


def _cell(renderer: Any, tokens: Sequence[Token], index: int, *_: Any) -> str:
    """A cell of a table; the policy forbids the style attribute that aligns numbers."""
    token = tokens[index]
    attributes = ' scope="col"' * (token.tag == "th") + ' class="number"' * ("style" in token.attrs)
    return f"<{token.tag}{attributes}>"


def _portraits(sheet: Mapping[str, Sequence[plots.Card]]) -> list[dict[str, Any]]:
    return [
        {
            "heading": heading,
            "cards": [{"card": card, "uri": card.image and Markup(items.data_uri(card.image))} for card in cards],
        }
        for heading, cards in sheet.items()
        if cards
    ]


def _policy(css: str, script: str) -> str:
    allowed = "; ".join(f"{kind}-src '{_hash(text)}'" for kind, text in (("style", css), ("script", script)))
    return f"default-src 'none'; img-src data:; {allowed}; base-uri 'none'; form-action 'none'"


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _dumps(value: Any, **_: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _source(name: str) -> str:
    environment = _environment()
    return environment.loader.get_source(environment, name)[0]


def _text(value: Any) -> Any:
    """Every value that the page shows: invisible characters of data are shown as escapes; Jinja escapes HTML."""
    return messages.escaped(value, keep="\n") if isinstance(value, str) and not isinstance(value, Markup) else value


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("vkd_jax.reporting"),
        autoescape=True,
        finalize=_text,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= attack_view.FILTERS
    return environment
