"""report.html in a browser: search, filters, items, keyboard, colors, charts; no error and no request."""

import contextlib
import json
import shutil

import pytest
from report_folders import CELLS, IMAGES, RIGHT, make_run, relearn_of, relearned

from vkd_jax.reporting import report

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install '.[test]'")
CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
MARKUP = "<b>bold</b><img src='http://example.com/x.png' onerror='alert(1)'>"
PAGE = 25  # items on a page of the list


@pytest.fixture(scope="module")
def browser():
    if not shutil.which(CHROMIUM):
        pytest.skip(f"{CHROMIUM} is not installed: apt-get install chromium")
    with playwright.sync_playwright() as started, started.chromium.launch(executable_path=CHROMIUM, args=FLAGS) as it:
        yield it


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """The page of a run with 120 items, markup in one question and its answers, and one attack."""
    folder = tmp_path_factory.mktemp("run")
    make_run(folder, right={**RIGHT, "retain_only": RIGHT["unlearned"]}, attacks=relearn_of(CELLS))
    for name in RIGHT:
        file = folder / "answers" / f"{name}.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        rows[5] |= {"question": f"Who? {MARKUP}", "prediction": MARKUP, "person": MARKUP}
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    records = folder / "attacks" / "relearn" / "unlearned.jsonl"
    records.parent.mkdir(parents=True)
    records.write_text("".join(json.dumps(relearned(n, n == 4)) + "\n" for n in (1, 4, 7)))
    report.write(folder, IMAGES)
    return (folder / "report.html").as_uri()


@pytest.fixture
def opened(browser, url):
    """Opens the page; at the end, nothing was logged as an error and nothing else was requested."""
    with contextlib.ExitStack() as stack:
        problems = []

        def get(**options):
            context = stack.enter_context(contextlib.closing(browser.new_context(reduced_motion="reduce", **options)))
            page = context.new_page()
            page.set_default_timeout(60_000)  # milliseconds; nothing waits that long
            page.on("console", lambda message: problems.append(message.text))
            page.on("pageerror", lambda error: problems.append(str(error)))
            page.on("request", lambda request: problems.append(request.url))
            page.goto(url)
            return page

        yield get
        assert [x for x in problems if x != url and not x.startswith("data:image/webp;base64,")] == []


def status(page):
    return page.locator(".status").inner_text()


def rows(page):
    return page.locator(".items tbody tr")


def test_filters_and_search(opened):
    page = opened()
    assert status(page).startswith("120 of 120 questions match. Right: vanilla 111 of 120, unlearned")
    assert rows(page).count() == PAGE
    page.get_by_label("Set", exact=True).select_option(label="people to forget")
    page.get_by_label("Kind").select_option(label="Multiple choice, with image")
    assert status(page) == "12 of 120 questions match. Right: vanilla 12 of 12, unlearned 3 of 12, retain-only 3 of 12."
    page.get_by_label("unlearned", exact=True).select_option(label="wrong")
    page.get_by_label("vanilla", exact=True).select_option(label="right")
    assert status(page).startswith("9 of 120") and rows(page).count() == 9
    page.get_by_role("button", name="Show all").click()
    assert status(page).startswith("120 of 120")
    page.get_by_label("Role").select_option(label="general ability")
    assert status(page).startswith("24 of 120")
    page.get_by_label("Role").select_option(index=0)
    page.get_by_label("Search").fill("002 vqa PILOT")  # the person, a part of the id, the answer
    assert status(page).startswith("4 of 120") and "person 002" in rows(page).first.inner_text()
    page.get_by_label("Search").fill("no such words")
    assert status(page) == "0 of 120 questions match."


def test_answers_under_an_attack(opened):
    page = opened()
    page.get_by_label("Answers").select_option(label="fine-tuning all weights on 20 % of the questions")
    assert status(page) == "3 of 3 questions match. Right: vanilla 0 of 0, unlearned 1 of 3, retain-only 0 of 0."
    page.get_by_label("unlearned", exact=True).select_option(label="right")
    assert rows(page).count() == 1
    rows(page).first.get_by_role("button").click()
    assert "Relearning: fine-tuning all weights on 20 %" in page.get_by_role("dialog").inner_text()


def test_a_card_leads_to_its_questions(opened):
    page = opened()
    page.get_by_role("link", name="See these 12 questions with their answers").first.click()
    assert status(page).startswith("12 of 120")
    assert page.get_by_label("Set", exact=True).input_value() == "0"


def test_an_item_shows_picture_options_and_answers(opened):
    page = opened()
    rows(page).nth(3).get_by_role("button").click()
    dialog = page.get_by_role("dialog")
    assert dialog.get_by_role("heading", level=3).inner_text() == "What does this person do for a living?"
    assert dialog.locator("img").evaluate("image => image.naturalWidth") == 48
    assert dialog.locator("li").all_inner_texts() == ["baker", "pilot", "nurse", "judge (right answer)"]
    answers = dialog.locator("tbody tr").all_inner_texts()
    assert ["vanilla" in answers[0], "correct" in answers[0], "wrong" in answers[1], "baker" in answers[1]] == [
        True
    ] * 4
    dialog.get_by_role("button", name="Next question").click()
    assert dialog.locator(".place").inner_text().endswith("002/vqa/4")
    dialog.get_by_role("button", name="Close").click()
    assert not dialog.is_visible()


def test_html_in_data_is_text(opened):
    page = opened()
    page.get_by_label("Search").fill("<b>bold")
    assert MARKUP in rows(page).first.inner_text() and rows(page).count() == 1
    rows(page).first.get_by_role("button").click()
    dialog = page.get_by_role("dialog")
    assert dialog.get_by_role("heading", level=3).inner_text() == f"Who? {MARKUP}"
    assert dialog.inner_text().count(MARKUP) == 2 and page.locator("b", has_text="bold").count() == 0


def test_the_list_works_with_the_keyboard_alone(opened):
    page = opened()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    page.locator("input[type=search]").focus()
    for _ in range(8):  # five selects and three verdicts, of which none has a choice
        page.keyboard.press("Tab")
    page.keyboard.press("Tab")  # the table scrolls
    names = []
    for _ in range(4):
        page.keyboard.press("Tab")
        names.append(page.evaluate("document.activeElement.className"))
    assert "ask" in names
    while page.evaluate("document.activeElement.className") != "ask":
        page.keyboard.press("Shift+Tab")
    chosen = page.evaluate("document.activeElement.textContent")
    page.keyboard.press("Enter")
    assert page.get_by_role("dialog").is_visible()
    page.keyboard.press("Escape")
    assert not page.get_by_role("dialog").is_visible()
    assert page.evaluate("document.activeElement.textContent") == chosen


def test_pages_of_the_list(opened):
    page = opened()
    pager = page.locator(".pager")
    assert pager.locator("span").inner_text() == "Page 1 of 5" and pager.get_by_text("Previous").is_disabled()
    pager.get_by_text("Next").click()
    assert pager.locator("span").inner_text() == "Page 2 of 5"
    rows(page).last.get_by_role("button").click()
    page.get_by_role("dialog").get_by_role("button", name="Next question").click()
    assert pager.locator("span").inner_text() == "Page 3 of 5"


def test_charts_answer_to_pointer_and_keyboard(opened):
    page = opened()
    chart = page.locator("#training .curve").first
    slider, stop = chart.get_by_role("slider"), chart.locator("output").first
    assert stop.inner_text() == "60"
    slider.press("Home")
    assert (
        stop.inner_text() == "20" and slider.get_attribute("aria-valuetext") == "step 20, loss (minimized) 0.05, ce 0.1"
    )
    slider.press("ArrowRight")
    assert stop.inner_text() == "40" and chart.locator(".cursor").get_attribute("visibility") == "visible"
    slider.hover(position={"x": 5, "y": 50})
    assert stop.inner_text() == "20"
    assert page.locator("#attacks .curve .band").count() == 2


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colors_follow_the_system_and_the_switch_and_are_legible(opened, scheme):
    page = opened(color_scheme=scheme)
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    other = "dark" if scheme == "light" else "light"
    page.locator(f"input[name=scheme][value={other}]").check()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != background
    page.locator("input[name=scheme][value=auto]").check()
    contrasts = page.evaluate(CONTRASTS)
    assert len(contrasts) > 60 and min(contrasts.values()) >= 4.5, min(contrasts.items(), key=lambda item: item[1])


# The contrast of each text with the nearest background behind it, as of WCAG 2.
CONTRASTS = """() => {
  const parse = (color) => color.match(/[\\d.]+/g).map(Number);
  const light = (color) => {
    const shares = parse(color).slice(0, 3).map((c) => c / 255);
    const [r, g, b] = shares.map((c) => (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const results = {};
  for (const node of document.querySelectorAll("main *, .top *, .contents *")) {
    const texts = [...node.childNodes].filter((child) => child.nodeType === 3).map((child) => child.data.trim());
    const text = texts.join("");
    if (!text || node.closest("svg, option, .hidden, noscript") || node.disabled) continue;
    const behind = (x) => getComputedStyle(x).backgroundColor;
    let back = node;
    while (back.parentElement && (parse(behind(back))[3] ?? 1) === 0) back = back.parentElement;
    const [a, b] = [getComputedStyle(node).color, behind(back)].map(light).sort((x, y) => y - x);
    results[text.slice(0, 40)] = (a + 0.05) / (b + 0.05);
  }
  return results;
}"""


def test_every_control_has_a_name_and_headings_are_in_order(opened):
    page = opened()
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll("button, select, input, [role=slider], [role=img], nav, dialog")]
        .filter((x) => !(x.labels?.length || x.textContent.trim() || x.ariaLabel || x.getAttribute("aria-labelledby")))
        .map((x) => x.outerHTML.slice(0, 80))"""
    )
    assert unnamed == []
    levels = page.evaluate(
        "[...document.querySelectorAll('main :is(h1, h2, h3, h4)')].map((x) => Number(x.tagName[1]))"
    )
    assert levels.count(1) == 1 and all(b - a <= 1 for a, b in zip(levels, levels[1:], strict=False))
    assert page.locator("img:not([alt])").count() == 0


def test_a_narrow_screen_and_paper(opened):
    page = opened(viewport={"width": 390, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.emulate_media(media="print")
    assert not page.locator("#every-item").is_visible() and page.locator("#forgotten .strip").is_visible()
    widths = [card.bounding_box()["width"] for card in page.locator(".card").all()]
    assert widths[0] == widths[1] < widths[2] / 2
