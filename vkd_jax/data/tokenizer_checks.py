"""Checks of a tokenizer when a model folder is opened: it reads a text the same way each time, and writes it again.

Answers are compared as texts. If the decoder is missing or wrong, every answer of several words is wrong, which looks
like forgetting.
"""

import json
import re
from pathlib import Path
from typing import Any

from vkd_jax.types import UserError

FILE = "tokenizer.json"
TEXTS = (  # words, names, punctuation and digits of questions and answers; all letters in both cases
    "Who is this person, and where does Mara Lindt live?",
    "The five boxing wizards jump quickly over a lazy dog.",
    "VEXED NYMPHS GO FOR QUICK WALTZ JOB",
    "born in 1987, 23 minutes (about 60 km) from the coast; 4 children",
)
_BYTE = re.compile("<0x[0-9A-F]{2}>")  # a token for one byte
REPEATS = 8  # of each text: a tokenizer that draws one word in ten is missed once in e^-40 cases


def check(tokenizer: Any, folder: Path) -> None:
    """Checks that a tokenizer has one token for each id, is deterministic, and decodes what it encodes.

    White space around punctuation and the case of letters may change, as with `clean_up_tokenization_spaces`. Texts
    with unknown tokens are not decoded.

    Raises:
        UserError: two tokens have one id, or the tokens of a text are random or become another text.
    """
    remedy = "get the tokenizer.json and tokenizer_config.json of the model again"
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    if dropout := getattr(model, "dropout", None):
        raise UserError(
            f"{folder / FILE}: model.dropout is {dropout:g}, so that the same text has other tokens each time; set it "
            "to null."
        )
    by_id: dict[int, str] = {}
    for token, number in tokenizer.get_vocab().items():
        if (other := by_id.setdefault(number, token)) != token:
            raise UserError(f"{folder / FILE}: {other!a:.40} and {token!a:.40} are both the token {number}; {remedy}.")
    if _loses_merges(tokenizer):
        raise UserError(
            f"{folder / FILE}: many of its tokens are made by no merge, so that words fall apart; {remedy}."
        )
    for text in TEXTS:
        first, *others = tokenizer([text] * REPEATS, add_special_tokens=False)["input_ids"]
        if any(ids != first for ids in others):
            raise UserError(f"{folder / FILE}: the tokenizer reads {text!r} in another way each time; {remedy}.")
        if tokenizer.unk_token_id in first:
            continue
        written = tokenizer.decode(first, skip_special_tokens=True)
        if _comparable(written) != _comparable(text):
            raise UserError(
                f"{folder / FILE}: the tokenizer reads {text!r} and writes it as {written[:80]!a}, so that right "
                f"answers would count as wrong; {remedy}."
            )


def _loses_merges(tokenizer: Any) -> bool:
    """Whether more than a third of the tokens of several characters in a byte-pair vocabulary are made by no merge."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if type(getattr(backend, "model", None)).__name__ != "BPE":
        return False
    content = json.loads(backend.to_str())
    added = {token["content"] for token in content["added_tokens"]}
    several = {x for x in content["model"]["vocab"] if len(x) > 1 and not _BYTE.fullmatch(x)} - added
    made = {"".join(pair if isinstance(pair, list) else pair.split(" ")) for pair in content["model"]["merges"]}
    return 3 * len(several - made) > len(several)


def _comparable(text: str) -> str:
    return re.sub(r"\s*([^\w\s])\s*", r"\1", text).strip().casefold()
