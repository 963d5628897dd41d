"""The certificate as a page: its figures, one page at any size, text as text, the same bytes every time."""

import re
import zlib

import pytest

from vkd_jax.reporting import certificate_page
from vkd_jax.types import UserError

DIGEST = "0123456789abcdef" * 4
QUESTIONS = {"accuracy": 0.12345, "low": 0.05, "high": 0.2, "n": 81}
CONTENT = {
    "tensors": {"a": DIGEST, "b": DIGEST},
    "files": {"config.json": DIGEST},
    "forgotten": [DIGEST, "f" * 64],
    "model": {"base": "ORG/NAME", "method": "vkd"},
    "vkd_jax": "0.1.0",
    "commit": "abcdef0",
    "command": "vkd unlearn",
    "date": "2026-01-02",
    "figures": {
        "models": {
            "retain_only": {"forget": {"vqa": QUESTIONS | {"accuracy": 0.25}}},
            "unlearned": {"forget": {"vqa": QUESTIONS, "cloze_vqa": QUESTIONS | {"accuracy": 0.99}}},
            "vanilla": {"forget": {"vqa": QUESTIONS | {"accuracy": 1.0}, "qa": QUESTIONS | {"n": 48}}},
        },
        "attacks": {
            "relearn": {
                "cells": [{"model": "unlearned", "recovery": share} for share in (0.5, 0.625, None)]
                + [{"model": "retain_only", "recovery": 0.0}]
            },
            "leak": {},
        },
    },
}


def commands(pdf):
    """The drawing commands of the page."""
    streams = re.findall(rb"stream\r?\n(.*?)\r?\nendstream", pdf, re.DOTALL)
    return b"\n".join(zlib.decompress(stream) for stream in streams if stream[:1] == b"x")


def text(pdf):
    """The texts of the page. Fonts of type 3 have the codes of Latin-1."""
    lines = re.findall(rb"BT\n.*?\nET", commands(pdf), re.DOTALL)
    strings = ("".join(s.decode("latin-1") for s in re.findall(rb"\(((?:\\.|[^\\)])*)\)", line)) for line in lines)
    return re.sub(r"\\([()\\])", r"\1", "\n".join(strings)).replace("\xa0", " ")


def render(content=CONTENT, signer=None):
    return certificate_page.render(content, b"{}", signer)


@pytest.fixture(scope="module")
def page():
    return text(render())


def test_facts_and_figures_are_those_of_the_certificate(page):
    for fact in (
        "ORG/NAME",
        "vkd",
        "2 people",
        DIGEST,
        "f" * 64,
        "2 tensors and 1 other files",
        "abcdef0",
        "vkd unlearn",
    ):
        assert fact in page
    assert "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a" in page  # the SHA-256 of {}
    assert page.index("vanilla") < page.index("unlearned") < page.index("retain-only")
    assert "12.3 (5.0 to 20.0)" in page and "100.0 (5.0 to 20.0)" in page and "25.0 (5.0" in page
    assert "forget, with image, n=81" in page and "forget, text only, n=48" in page and "99.0" not in page
    assert "62.5 %" in page and "0.0 %" in page and "relearn, leak" in page and "Signature\nnone" in page


def test_a_signature_is_shown():
    page = text(render(signer="PUBLICKEY="))
    assert "Ed25519, public key PUBLICKEY=" in page and "--public_key PUBLIC.pem" in page


def test_the_same_certificate_makes_the_same_bytes():
    assert render() == render() and b"CreationDate" not in render()


@pytest.mark.parametrize("epoch", ["abc", "-1" + "0" * 30, "1.5"])
def test_a_variable_that_matplotlib_cannot_read_is_refused(epoch, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", epoch)
    with pytest.raises(UserError, match="SOURCE_DATE_EPOCH=.* is no time in seconds since 1970"):
        render()


def test_any_text_stays_text_on_one_page():
    hostile = "a$b^c$ (x) \\ \x1b[31m \u202e \u6f22\u5b57 <b>"
    sets = {f"set{number}": {"vqa": QUESTIONS} for number in range(40)}
    model = {"base": hostile * 60, "method": hostile}
    content = CONTENT | {"model": model, "command": hostile * 90, "forgotten": [DIGEST] * 500}
    pdf = render(content | {"figures": {"models": {"vanilla": sets}}})
    page = text(pdf)
    assert len(re.findall(rb"/Type /Page\b", pdf)) == 1
    assert "a$b^c$ (x) \\ \\x1b[31m \\u202e \\u6f22\\u5b57 <b>" in page
    assert "500 people" in page and "and 494 more" in page and "and 30 more" in page
    heights = [float(y) for y in re.findall(rb"[\d.]+ ([\d.]+) (?:Td|cm)", commands(pdf)) if float(y)]
    assert len(heights) > 40 and min(heights) > 20  # points


@pytest.mark.parametrize("figures", [None, [], {"models": 3}, {"models": {"vanilla": {"forget": {"vqa": {"n": 1}}}}}])
def test_a_certificate_with_other_figures_has_a_page(figures):
    assert "Certificate of unlearning" in text(render(CONTENT | {"figures": figures}))
