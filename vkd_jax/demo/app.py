"""The page of the demo, and the images that it offers."""

import functools
import html
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from vkd_jax.benchmarks.synthetic import people
from vkd_jax.data.images import MOST_IMAGE_BYTES, open_image
from vkd_jax.demo.session import MOST_STEPS, Answer, Session
from vkd_jax.runtime import files
from vkd_jax.types import Diverged, UserError, located

QUESTION = "Who is this person?"
STEPS = 50
VIEW = 500  # the drawn portraits that are offered; the shipped models were trained on others
MOST_IMAGES = 60
HEADS = ["token", "probability (%)"]
COURSE = ["step", "answer", "right answer (%)"]
SANS = ("system-ui", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif")
MONO = ("ui-monospace", "Consolas", "monospace")
PEOPLE = "Or pick one of the synthetic people; the first six are to forget"
FOLDER = "Or pick one"
ABOUT = """# Before and after unlearning
Ask two models the same question about the same image. Then teach the second one the right answer, and watch how
many steps it takes. Nothing leaves this machine."""


class Offer(NamedTuple):
    """An image to pick, its caption, and the right answer to `QUESTION` if it is known."""

    image: Image.Image
    caption: str
    answer: str = ""


def portraits() -> list[Offer]:
    """Portraits of the six synthetic people to forget, and of six to retain."""
    forgotten = people.SIXTY.forgotten(10)
    everybody = sorted(people.SIXTY.people(), key=lambda person: person.id not in forgotten)[:12]
    return [Offer(people.portrait(person, view=VIEW), person.name, person.name) for person in everybody]


def read_images(folder: Path) -> list[Offer]:
    """The first images of a folder, at most `MOST_IMAGES`, with their names as captions.

    Raises:
        UserError: there is no folder, no image in it, or one that cannot be read.
    """
    paths = sorted(path for path in folder.glob("*") if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))
    if not paths:
        raise UserError(f"--images={folder}: there is no folder with PNG, JPEG or WebP files.")
    offers = []
    for path in paths[:MOST_IMAGES]:
        with located(f"--images: {path}"):
            offers.append(Offer(open_image(files.read_bytes(path, MOST_IMAGE_BYTES)).convert("RGB"), path.stem))
    return offers


def create(session: Session, names: Sequence[str], images: Sequence[Offer], label: str = PEOPLE) -> Any:
    """Creates the page.

    Args:
        session: both models.
        names: what they are called on the page.
        images: images to pick; the first one is picked at the beginning.
        label: what they are.

    Returns:
        A `gradio.Blocks`, which `serve` serves.

    Raises:
        UserError: gradio is not installed.
    """
    gradio = _gradio()
    table = functools.partial(gradio.Dataframe, interactive=False, datatype="str", wrap=True)
    with gradio.Blocks(title="vkd_jax: before and after unlearning", analytics_enabled=False) as page:
        gradio.Markdown(ABOUT)
        with gradio.Row():
            sources = ["upload", "clipboard"]
            image = gradio.Image(images[0].image, type="pil", label="Image", sources=sources, height=300)
            offers = [offer[:2] for offer in images]
            options = dict(columns=4, height=300, allow_preview=False, buttons=[], scale=2)
            gallery = gradio.Gallery(offers, label=label, **options)
        question = gradio.Textbox(QUESTION, label="Question")
        ask_button = gradio.Button("Ask both models", variant="primary")
        answers = []
        with gradio.Row():
            for name in names:
                with gradio.Column():
                    answers += [gradio.Textbox(label=name), table(headers=HEADS, label="Tokens of the answer")]
        with gradio.Row():
            right = gradio.Textbox(images[0].answer, label="Right answer, which an attacker teaches the second model")
            steps = gradio.Slider(1, MOST_STEPS, STEPS, step=1, label="Training steps")
        attack_button = gradio.Button("Attack the second model")
        course = table(headers=COURSE, label="Relearning attack")

        def pick(event: gradio.SelectData) -> tuple[Image.Image, str]:
            offer = images[event.index]
            return offer.image, offer.answer

        run = functools.partial(_call, gradio.Error)
        gallery.select(pick, None, [image, right], api_visibility="private")
        image.upload(lambda: "", None, right, api_visibility="private")  # the answer was about another image
        for button, function, inputs, outputs in (
            (ask_button, ask, [question, image], answers),
            (attack_button, attack, [question, right, image, steps], course),
        ):
            button.click(
                functools.partial(run, functools.partial(function, session)),
                inputs,
                outputs,
                api_visibility="private",
                concurrency_limit=1,
                concurrency_id="models",  # one question or attack at a time
            )
    return page


def serve(page: Any, port: int) -> str:
    """Serves the page on this machine alone, in threads of its own, and returns its address.

    The page loads no font, script or style from elsewhere, and sends nothing.

    Raises:
        UserError: the port is in use.
    """
    theme = _gradio().themes.Default(font=SANS, font_mono=MONO)
    try:
        _, url, _ = page.launch(
            server_name="127.0.0.1",
            server_port=port,
            theme=theme,
            share=False,
            inbrowser=False,
            ssr_mode=False,
            enable_monitoring=False,
            footer_links=[],
            prevent_thread_lock=True,
            quiet=True,
        )
    except OSError:
        raise UserError(f"--port={port}: the port is in use; give another one.") from None
    return url


def ask(session: Session, question: str, image: Image.Image | None) -> Iterator[list[Any]]:
    """The answers of both models, each followed by its rows of tokens, once."""
    yield [value for answer in session.ask(question, image) for value in (answer.text, token_rows(answer))]


def attack(session: Session, question: str, right: str, image: Image.Image, steps: float) -> Iterator[list[list[Any]]]:
    """The rows of the attack so far, each time that there is a new one."""
    rows: list[list[Any]] = []
    for attempt in session.relearn(question, right, image, int(steps)):
        rows = [*rows, [attempt.step, attempt.answer.text, _percent(attempt.right)]]
        yield rows


def token_rows(answer: Answer) -> list[list[Any]]:
    """Each token of an answer with its probability in percent."""
    return [[token, _percent(probability)] for token, probability in answer.tokens]


def _percent(probability: float) -> str:
    return f"{100 * probability:.1f}"


def _call(error_type: type[Exception], function: Callable[..., Iterator[Any]], *values: Any) -> Iterator[Any]:
    """Calls a function of the page. The page renders messages as HTML, so they are escaped."""
    try:
        yield from function(*values)
    except (UserError, Diverged) as error:
        raise error_type(html.escape(str(error)), print_exception=False) from None


def _gradio() -> Any:
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported and when it starts
    try:
        import gradio
    except ImportError:
        raise UserError("the demo needs gradio: pip install '.[demo]'.") from None
    return gradio
