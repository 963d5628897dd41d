"""The demo in a browser: on the shipped models, under attack, and with markup as text; no error, no foreign request."""

import contextlib
import importlib.util
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from demo_page import MARKUP
from PIL import Image

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install '.[test]'")
if importlib.util.find_spec("gradio") is None:
    pytest.skip("gradio is not installed: pip install '.[demo]'", allow_module_level=True)

PROGRAMS = Path(__file__).parents[1] / "programs"
CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
RIGHT = "Right answer, which an attacker teaches the second model"
UPLOADED = "Method not implemented."  # a warning of gradio 6.31 after each upload, whose progress it stops watching
TIMEOUT = 240_000  # milliseconds; nothing waits that long


@pytest.fixture(scope="module")
def browser():
    if not shutil.which(CHROMIUM):
        pytest.skip(f"{CHROMIUM} is not installed: apt-get install chromium")
    with playwright.sync_playwright() as started, started.chromium.launch(executable_path=CHROMIUM, args=FLAGS) as it:
        yield it


@contextlib.contextmanager
def opened(browser, *command):
    """The page that a command serves on the port after it; nothing is logged, or requested from elsewhere."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    analytics = {"GRADIO_ANALYTICS_ENABLED": "True"}  # what the page is served with overrides it
    process = subprocess.Popen(
        [sys.executable, *command, str(port)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | analytics,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        server = f"http://127.0.0.1:{port}/"
        assert process.stdout.readline().startswith(f"{server} ")
        problems = []
        with contextlib.closing(browser.new_context(viewport={"width": 1280, "height": 1600})) as context:
            page = context.new_page()
            page.set_default_timeout(TIMEOUT)
            page.on("console", lambda message: problems.append(message.text))
            page.on("pageerror", lambda error: problems.append(str(error)))
            page.on("request", lambda request: problems.append(request.url))
            page.goto(server)
            yield page
        assert [x for x in problems if not x.startswith((server, "data:", f"blob:{server}", UPLOADED))] == []
    finally:
        process.kill()
        process.communicate()


def wait_for(page, label, value):
    """Waits until the text field with a label has a value."""
    page.wait_for_function(
        """([label, value]) => [...document.querySelectorAll("label")].some(
        (x) => x.innerText.trim() === label && x.querySelector("input, textarea")?.value === value)""",
        arg=[label, value],
    )


def table(page, number, cells):
    """The rows of a table once it has this many cells."""
    locator = page.locator(".gradio-container [role=grid]").nth(number).locator(".body-cell")
    locator.nth(cells - 1).wait_for()
    return [text.strip() for text in locator.all_inner_texts()]


def test_the_shipped_models_answer_and_are_attacked(browser):
    with opened(browser, "-m", "vkd_jax.demo", "--port") as page:
        wait_for(page, RIGHT, "Otto Lindt")
        page.get_by_role("button", name="Thumbnail 2 of 12").click()
        wait_for(page, RIGHT, "Selma Ueda")
        page.get_by_role("button", name="Ask both models").click()
        wait_for(page, "Before: tiny_llava", "Selma Ueda")
        before, after = (table(page, number, 6) for number in (0, 1))
        assert before[::2] == ["Selma", "Ueda", "</s>"] and min(map(float, before[1::2])) > 50
        assert after[::2] != before[::2] and after[4] == "</s>"
        page.get_by_label("number input for Training steps").fill("2")
        page.get_by_role("button", name="Attack the second model").click()
        rows = table(page, 2, 9)
        assert rows[::3] == ["0", "1", "2"] and rows[1] == f"{after[0]} {after[2]}" and float(rows[2]) < 50


def test_markup_in_data_is_text(browser, tmp_path):
    portrait = tmp_path / "portrait.png"
    Image.new("RGB", (8, 8)).save(portrait)
    with opened(browser, PROGRAMS / "demo_page.py") as page:
        page.get_by_role("button", name="Thumbnail 2 of 2").click()
        page.get_by_role("button", name="Ask both models").click()
        for label in (f"Before: {MARKUP}", f"After: {MARKUP}", RIGHT):
            wait_for(page, label, MARKUP)
        assert table(page, 0, 2) == table(page, 1, 2) == [MARKUP, "50.0"]
        page.get_by_role("button", name="Attack the second model").click()
        assert table(page, 2, 6) == ["0", MARKUP, "25.0", "50", MARKUP, "25.0"]
        page.get_by_label("Remove Image").click()
        page.locator("input[type=file]").first.set_input_files(portrait)
        wait_for(page, RIGHT, "")
        page.get_by_label("Question").fill(MARKUP)
        page.get_by_role("button", name="Ask both models").click()
        page.get_by_text(f"{MARKUP} cannot be used.").wait_for()
        assert page.locator("b", has_text="bold").count() == 0 and page.locator("img[src*=example]").count() == 0
