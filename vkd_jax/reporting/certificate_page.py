"""A certificate as one printable page: a PDF whose every figure is one of certificate.json."""

import datetime
import hashlib
import io
import os
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

import matplotlib
import matplotlib.style
from matplotlib.backends.backend_pdf import FigureCanvasPdf
from matplotlib.figure import Figure

from vkd_jax import messages
from vkd_jax.reporting.names import MODALITIES, MODELS
from vkd_jax.results import main_kind
from vkd_jax.runtime.records import mapping
from vkd_jax.types import UserError

A4 = (8.27, 11.69)  # inches
LEFT, TOP = 0.09, 0.94  # shares of the page
LINE = 0.0165  # of the height
WIDTH = 72  # characters of a value in a line
MOST_LINES = 3  # of one value
MOST_DIGESTS, MOST_SETS = 6, 10  # rows; a longer certificate says how many more it has
INK, QUIET = "#222222", "#5a5d65"
STYLE = {
    "font.family": "DejaVu Sans Mono",  # comes with matplotlib, and has no ligatures, which readers do not find
    "text.parse_math": False,  # "$" in a path is no formula
    "pdf.compression": 6,
    "pdf.fonttype": 3,
}
LIMITS = (
    "The figures say what was measured, on these questions and under these attacks. They do not prove that nothing is "
    "left: other questions, other images or more training may bring some of it back."
)


def render(content: Mapping[str, Any], file: bytes, signer: str | None) -> bytes:
    """Renders the page.

    Args:
        content: what certificate.json says, from `checkpoints.certificate.read`.
        file: the bytes of certificate.json.
        signer: the public key whose signature was checked, in Base64; None for an unsigned certificate.

    Returns:
        A PDF of one page, equal for equal arguments.

    Raises:
        UserError: SOURCE_DATE_EPOCH, which matplotlib reads, is not a time.
    """
    if epoch := os.environ.get("SOURCE_DATE_EPOCH"):
        try:
            datetime.datetime.fromtimestamp(int(epoch), datetime.UTC)
        except (ValueError, OverflowError, OSError) as error:
            raise UserError(
                f"SOURCE_DATE_EPOCH={epoch[:40]} is no time in seconds since 1970; correct or unset this variable."
            ) from error
    with matplotlib.style.context(["default", STYLE]):
        figure = Figure(figsize=A4)
        FigureCanvasPdf(figure)
        y = _write(figure, TOP, "Certificate of unlearning", size=18, weight="bold") - LINE
        for title, value in _facts(content, file, signer):
            y = _fact(figure, y, title, value)
        y = _table(figure, y - LINE, content)
        for line in textwrap.wrap(LIMITS, 98):
            y = _write(figure, y, line, color=QUIET)
        stream = io.BytesIO()
        figure.savefig(stream, format="pdf", metadata={"CreationDate": None, "Title": "Certificate of unlearning"})
    return stream.getvalue()


def _facts(content: Mapping[str, Any], file: bytes, signer: str | None) -> Iterator[tuple[str, str]]:
    model, forgotten = content["model"], content["forgotten"]
    yield "Unlearned from", _text(model.get("base")) or "a model that was fine-tuned in the same run"
    yield "Method", _text(model.get("method"))
    digests = sorted(map(_text, forgotten))
    rest = len(digests) - MOST_DIGESTS
    yield "Forgotten", f"{messages.people(len(digests))}, by SHA-256 of what the data calls each:"
    for digest in digests[:MOST_DIGESTS]:
        yield "", digest
    if rest > 0:
        yield "", f"and {rest} more"
    yield "Model", f"{len(content['tensors'])} tensors and {len(content['files'])} other files, with a SHA-256 each"
    yield "Made by", f"vkd_jax {_text(content.get('vkd_jax'))}, commit {_text(content.get('commit'))}"
    yield "On", _text(content.get("date"))
    yield "Command", _text(content.get("command"))
    yield "certificate.json", hashlib.sha256(file).hexdigest()
    yield "Signature", f"Ed25519, public key {signer}" if signer else "none"
    yield "To check", "vkd verify FOLDER --certificate" + (" --public_key PUBLIC.pem" if signer else "")


def _table(figure: Figure, y: float, content: Mapping[str, Any]) -> float:
    """The accuracies of each set by its main kind of question, and the highest recovery by relearning."""
    figures = mapping(content.get("figures"))
    models = {name: mapping(value) for name, value in mapping(figures.get("models")).items()}
    columns = [name for name in MODELS if name in models]
    if not columns:
        return y
    xs = [LEFT, *(LEFT + 0.28 + 0.19 * number for number in range(len(columns)))]
    heads = ["accuracy in % (95 % interval)", *(MODELS[name] for name in columns)]
    y = _row(figure, y, xs, heads, weight="bold")
    rows = []
    for name in dict.fromkeys(set_name for model in columns for set_name in models[model]):
        for modality, words in MODALITIES.items():
            kind = main_kind(mapping(models[columns[0]].get(name)), modality)
            cells = [mapping(mapping(models[model].get(name)).get(kind)) for model in columns]
            if any(cells):
                count = _text(next(cell.get("n") for cell in cells if cell))
                rows.append([f"{_text(name)}, {words}, n={count}", *map(_accuracy, cells)])
    for cells in rows[:MOST_SETS]:
        y = _row(figure, y, xs, cells)
    if len(rows) > MOST_SETS:
        y = _row(figure, y, xs, [f"and {len(rows) - MOST_SETS} more"])
    if attacks := mapping(figures.get("attacks")):
        recovery = mapping(attacks.get("relearn")).get("cells") or []
        best = [_highest(recovery, name) for name in columns]
        if any(best):
            y = _row(figure, y, xs, ["highest recovery by relearning", *best])
        y = _fact(figure, y - LINE / 2, "Attacks", ", ".join(map(_text, attacks)))
    return y - LINE


def _accuracy(cell: Mapping[str, Any]) -> str:
    values = [cell.get(key) for key in ("accuracy", "low", "high")]
    if not all(isinstance(value, int | float) for value in values):
        return "–"
    return "{:.1f} ({:.1f} to {:.1f})".format(*(100 * value for value in values))


def _highest(cells: Any, model: str) -> str:
    """The highest share of the lost accuracy that an attacker recovered, in percent."""
    own = [cell.get("recovery") for cell in map(mapping, cells) if cell.get("model") == model]
    values = [value for value in own if isinstance(value, int | float)]
    return f"{100 * max(values):.1f} %" if values else ""


def _fact(figure: Figure, y: float, title: str, value: str) -> float:
    lines = textwrap.wrap(value, WIDTH) or ["–"]
    if len(lines) > MOST_LINES:
        lines = [*lines[: MOST_LINES - 1], lines[MOST_LINES - 1][: WIDTH - 4] + " ..."]
    _write(figure, y, title, color=QUIET)
    for line in lines:
        y = _write(figure, y, line, x=LEFT + 0.16)
    return y


def _row(figure: Figure, y: float, xs: list[float], cells: list[str], weight: str = "normal") -> float:
    for x, cell in zip(xs, cells, strict=False):
        _write(figure, y, textwrap.shorten(cell, 33, placeholder=" ..."), x=x, weight=weight)
    return y - LINE


def _write(figure: Figure, y: float, text: str, *, x: float = LEFT, size: float = 8, **options: Any) -> float:
    """Writes one line, and returns where the next one is."""
    figure.text(x, y, text, size=size, color=options.pop("color", INK), va="top", **options)
    return y - LINE * max(size / 8, 1)


def _text(value: Any) -> str:
    """A value as printable Latin-1 text, which the font has; other characters are escaped."""
    return messages.escaped("" if value is None else str(value)).encode("latin-1", "backslashreplace").decode("latin-1")
