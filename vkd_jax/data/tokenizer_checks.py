"""Checks of a tokenizer: it reads a text the same way each time, and writes it again.

`check` tries a few texts when a model folder is opened, and `check_round_trip` each question and answer. Answers are
compared as texts: if the tokenizer changes a word, no model can answer with it, which looks like forgetting.
"""

import codecs
import contextlib
import json
import re
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vkd_jax.runtime import files, json_files
from vkd_jax.runtime.storage import first_line
from vkd_jax.types import UserError

FILE = "tokenizer.json"
REMEDY = "get the tokenizer.json and tokenizer_config.json of the model again"
TEXTS = (  # words, names, punctuation and digits of questions and answers; all letters in both cases
    "Who is this person, and where does Mara Lindt live?",
    "The five boxing wizards jump quickly over a lazy dog.",
    "VEXED NYMPHS GO FOR QUICK WALTZ JOB",
    "born in 1987, 23 minutes (about 60 km) from the coast; 4 children",
)
_BYTE = re.compile("<0x[0-9A-F]{2}>")  # a token for one byte
MOST_TOKENS, MOST_BROKEN = 2000, 0.05  # that are tried, and the share of them that merges may miss
REPEATS = 8  # of each text: a tokenizer that draws one word in ten is missed once in e^-40 cases


def check_encoding(folder: Path) -> None:
    """Checks that the texts of a model folder, such as settings and chat templates, are UTF-8.

    Raises:
        UserError: one of them is not, or begins with a byte order mark.
    """
    for file in sorted((*folder.glob("*.json"), *folder.glob("*.jinja"))):
        data = files.read_bytes(file, json_files.MOST_BYTES)
        if data.startswith(codecs.BOM_UTF8):
            raise UserError(f"{file} begins with a byte order mark; save it without one.")
        try:
            data.decode()
        except UnicodeDecodeError as error:
            raise UserError(f"{file} is not UTF-8; save it in that encoding.") from error


def check(tokenizer: Any, folder: Path) -> None:
    """Checks that a tokenizer has one token for each id, is deterministic, and decodes what it encodes.

    White space around punctuation and the case of letters may change, as with `clean_up_tokenization_spaces`. Texts
    with unknown tokens are not decoded; one of the texts has to be without.

    Raises:
        UserError: two tokens have one id, a special token is a word, or the tokens of a text are random, unknown, or
            become another text.
    """
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    if dropout := getattr(model, "dropout", None):
        raise UserError(
            f"{folder / FILE}: model.dropout is {dropout:g}, so that the same text has other tokens each time; set it "
            "to null."
        )
    by_id: dict[int, str] = {}
    for token, number in tokenizer.get_vocab().items():
        if (other := by_id.setdefault(number, token)) != token:
            raise UserError(f"{folder / FILE}: {other!a:.40} and {token!a:.40} are both the token {number}; {REMEDY}.")
    if words := sorted(token for token in tokenizer.all_special_tokens if token.replace(" ", "").isalnum()):
        raise UserError(
            f"{folder}: the special token {words[0]!a:.40} is a word, which texts may contain; get its "
            "tokenizer_config.json again."
        )
    if problem := _merge_problem(tokenizer):
        raise UserError(f"{folder / FILE}: {problem}; {REMEDY}.")
    known = 0
    for text in TEXTS:
        first, *others = encode(tokenizer, folder, [text] * REPEATS, add_special_tokens=False)[0]
        if any(ids != first for ids in others):
            raise UserError(f"{folder / FILE}: the tokenizer reads {text!r} in another way each time; {REMEDY}.")
        if tokenizer.unk_token_id in first:
            continue
        known += 1
        written = tokenizer.decode(first, skip_special_tokens=True)
        if _comparable(written) != _comparable(text):
            raise UserError(
                f"{folder / FILE}: the tokenizer reads {text!r} and writes it as {written[:80]!a}, so that right "
                f"answers would count as wrong; {REMEDY}."
            )
    if not known:
        raise UserError(
            f"{folder / FILE}: the tokenizer reads parts of every text as unknown, such as of {TEXTS[1]!r}; {REMEDY}."
        )


@contextlib.contextmanager
def panics_as_errors() -> Iterator[None]:
    """Context manager that raises RuntimeError for a panic of tokenizers, which derives from BaseException."""
    try:
        yield
    except (Exception, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as panic:
        raise RuntimeError(first_line(panic)) from panic


def encode(
    tokenizer: Any, folder: Path, texts: Sequence[str], add_special_tokens: bool
) -> tuple[list[list[int]], list[list[tuple[int, int]]]]:
    """Returns the tokens of each text, and the first and last character of each token.

    Raises:
        UserError: the tokenizer fails at these texts, e.g. because a regular expression in it does not end.
    """
    try:
        with panics_as_errors():
            out = tokenizer(texts, return_offsets_mapping=True, add_special_tokens=add_special_tokens)
    except Exception as error:  # tokenizers raises errors without a type of their own
        raise UserError(
            f"{folder / FILE}: the tokenizer fails ({type(error).__name__}: {first_line(error)[:100]}) at the text "
            f"{texts[0][:80]!a}; {REMEDY}."
        ) from error
    return out["input_ids"], out["offset_mapping"]


def check_round_trip(tokenizer: Any, folder: Path, tokens: Sequence[int], text: str, parts: Sequence[str]) -> None:
    """Checks that the tokens of a text have its letters and digits; unknown tokens stand for any.

    Args:
        tokenizer: the tokenizer.
        folder: its model folder.
        tokens: the tokens of the text.
        text: the text without special tokens.
        parts: parts of it, such as a question and its answer, of which the message names one that changes.

    Raises:
        UserError: the tokenizer writes another text.
    """
    if tokenizer.unk_token_id in tokens:
        return
    written = _letters(tokenizer.decode(tokens, skip_special_tokens=True))
    if written != _letters(text):
        changed = next((part for part in parts if _letters(part) not in written), text)
        raise UserError(
            f"{folder / FILE}: the tokenizer changes the text {changed[:80]!a}, so correct answers would count as "
            f"wrong; {REMEDY}."
        )


def check_answers(tokenizer: Any, folder: Path, answers: Sequence[str | None], tokens: Sequence[Sequence[int]]) -> None:
    """Checks that each answer to a question has tokens of its own, and no unknown ones, which no model can write.

    Raises:
        UserError: two answers have the same tokens, so that their scores would be equal, or one has an unknown token.
    """
    by_tokens: dict[tuple[int, ...], str] = {}
    for answer, ids in zip(answers, tokens, strict=True):
        if answer is None:
            continue
        if tokenizer.unk_token_id in ids[:-1]:  # some tokenizers end an answer with it
            raise UserError(
                f"{folder / FILE}: the tokenizer reads a part of the answer {answer[:80]!a} as unknown, so no model "
                f"can write it; {REMEDY}, or remove the question."
            )
        other = by_tokens.setdefault(tuple(ids), answer)
        if other.split() != answer.split():
            raise UserError(
                f"{folder / FILE}: the tokenizer reads the answers {other[:80]!a} and {answer[:80]!a} as the same "
                f"tokens, so no model can choose between them; {REMEDY}, or change one of them."
            )


def _letters(text: str) -> str:
    """The letters and digits of a text without case, in one of the encodings that Unicode has for each."""
    return "".join(filter(str.isalnum, unicodedata.normalize("NFKC", text).casefold()))


def _merge_problem(tokenizer: Any) -> str:
    """What is wrong with the merges of a byte-pair tokenizer; "" if nothing is.

    Merges that were learned make each token out of its own text, up to one in a hundred of some published tokenizers.
    In another order, as in a file whose lists were sorted, they split words otherwise than the model has seen them.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if type(getattr(backend, "model", None)).__name__ != "BPE":
        return ""
    content = json.loads(backend.to_str())
    added = {token["content"] for token in content["added_tokens"]}
    several = {x for x in content["model"]["vocab"] if len(x) > 1 and not _BYTE.fullmatch(x)} - added
    made = {"".join(pair if isinstance(pair, list) else pair.split(" ")) for pair in content["model"]["merges"]}
    if 3 * len(several - made) > len(several):
        return "many of its tokens are made by no merge, so that words fall apart"
    reachable = sorted(several & made)
    sample = reachable[:: len(reachable) // MOST_TOKENS + 1]
    broken = sum([piece.value for piece in backend.model.tokenize(token)] != [token] for token in sample)
    if MOST_BROKEN * len(sample) < broken:
        return f"its merges do not make {broken} of {len(sample)} tokens out of their text, as in another order"
    return ""


def _comparable(text: str) -> str:
    return re.sub(r"(?<!\s)\s+(?=[^\w\s])|(?<=[^\w\s])\s+", "", text).strip().casefold()
