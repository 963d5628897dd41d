"""Makes the screenshots of the documentation, with Playwright and an installed Chromium.

python docs/make_screenshots.py report WORKDIR      cards, questions and curves of the report of a run with attacks
python docs/make_screenshots.py demo URL            the demo app that `vkd demo` serves, after a question and an attack
"""

import argparse
import io
import shutil
from collections.abc import Callable
from pathlib import Path

from PIL import Image
from playwright import sync_api

IMAGES = Path(__file__).parent / "images"
WIDTH = 1280  # pixels
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-lcd-text", "--hide-scrollbars")
TIMEOUT = 300_000  # milliseconds, for the first question of the demo


HEIGHT = 1000  # pixels; what is below is cut off


def save(name: str, png: bytes, height: int | None = None) -> None:
    """Saves a screenshot, or its top, with a palette of 256 colors."""
    image = Image.open(io.BytesIO(png)).convert("RGB")
    image = image.crop((0, 0, image.width, min(height or image.height, image.height))).quantize(256, method=1)
    image.save(IMAGES / name, optimize=True)
    print(IMAGES / name, (IMAGES / name).stat().st_size)


def report(page: sync_api.Page, workdir: str) -> None:
    """The top of the report, its filtered questions, and the curve of relearning."""
    page.goto((Path(workdir).resolve() / "report.html").as_uri())
    save("report.png", page.screenshot())
    page.get_by_label("Set", exact=True).select_option(label="people to forget")
    page.get_by_label("unlearned", exact=True).select_option(label="right")
    save("report_items.png", page.locator("#every-item").screenshot(), HEIGHT)
    page.locator("#attacks .curve [role=slider]").first.press("End")
    save("report_curves.png", page.locator("#attacks .curve").first.screenshot())


def demo(page: sync_api.Page, url: str) -> None:
    """The demo with both answers and the course of an attack."""
    page.goto(url)
    page.get_by_role("button", name="Ask both models").click()
    page.locator(".body-cell").first.wait_for()
    page.get_by_role("button", name="Attack the second model").click()
    grid = page.locator("[role=grid]").nth(2)
    grid.get_by_text("50", exact=True).first.wait_for()
    page.wait_for_timeout(1000)  # for the animation of the button
    save("demo.png", page.screenshot(full_page=True))


def main() -> None:
    """Runs the command line."""
    makers: dict[str, Callable[[sync_api.Page, str], None]] = {"report": report, "demo": demo}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=makers)
    parser.add_argument("source", help="folder of a finished run, or address of the demo")
    args = parser.parse_args()
    with sync_api.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        page = browser.new_page(viewport={"width": WIDTH, "height": 1120}, reduced_motion="reduce")
        page.set_default_timeout(TIMEOUT)
        makers[args.what](page, args.source)
        browser.close()


if __name__ == "__main__":
    main()
