"""Whether an answer is correct: the option letter in a generated text, and the missing words of a cloze question."""

import difflib
import functools
import re
import string
from collections.abc import Callable, Mapping, Sequence

import regex

from vkd_jax.benchmarks.names import has_words, text_key
from vkd_jax.evaluation.metrics.base import Metric

LETTERS = string.ascii_uppercase  # of the options, in order

_VERDICTS = {"is", "was", "because", "since", "as", "and", "or"}  # "A is right", "A because ..."
_NEXT_WORD = re.compile(r"\s+(\w+)")
# An option is ruled out by words before it in its clause, "I can't choose A", or after it, "A is clearly wrong".
_CLAUSE = re.compile(r"[.;:,!?\n]|\bbut\b", re.IGNORECASE)  # where one ends
_NOT = re.compile(r"\b(?:not|cannot|\w+n['’]t|unable|never|neither|nor|except|without|than|instead)\b", re.IGNORECASE)
_WRONG = re.compile(
    r"""["'*)\]]*\ (?:(?:is|was|seems|must\ be|would\ be)\ (?:\w+ly\ )?(?:not|never|wrong|incorrect|false|impossible)\b
        |(?:can|could|would|does)\ ?not\b|\w+n['’]t\b)""",
    re.IGNORECASE | re.VERBOSE,
)
_BEFORE = 100  # characters before a letter that are looked at


@functools.cache
def _choice(options: int) -> re.Pattern:
    """Matches an option letter at the start of an answer, after a word that announces it, or in brackets.

    The letter must not touch a word or an abbreviation ("Cat", "D'Arcy", "B.A.", "A-frame").
    """
    return re.compile(
        rf"""(?: ^\W* | \b(?:answer|option|choice|letter|is|it['’]s|be|choose|pick|select|say)\b\W* | [(\[] )
            (?<![\w'’.-]) ([a-{LETTERS[options - 1].lower()}]) (?![\w'’-]|\.\w)""",
        re.IGNORECASE | re.VERBOSE,
    )


def first_letter(text: str | None, options: int = 4) -> str | None:
    """The option letter that a generated answer chooses.

    A letter at the start of the answer counts ("B", "b)", "**C**: a baker"); else the first one in brackets or
    after a word that announces it ("The answer is C", "I would say (D)"). The article "a", the pronoun "I", letters
    inside words and abbreviations, and options that are ruled out ("not (A)", "A is wrong") are not choices.

    Args:
        text: the answer.
        options: number of options; with four, "E" chooses nothing.

    Returns:
        "A", "B", ...; None if the answer chooses nothing, which counts as wrong.
    """
    text = text or ""
    for match in _choice(options).finditer(text):
        letter, word = match[1], _NEXT_WORD.match(text, match.end())
        article = letter in "aA" and word and word[1] not in _VERDICTS
        if article and (letter == "a" or not word[1][0].isupper()):
            continue  # "a man", "A tall man"; but "A Baker" is option A
        if letter in "iI" and word and word[1] != "is":
            continue  # "I think"
        clause = _CLAUSE.split(text[max(0, match.start(1) - _BEFORE) : match.start(1)])[-1]
        if _NOT.search(clause) or _WRONG.match(text, match.end()):
            continue
        return letter.upper()
    return None


def first_character(text: str | None, options: int = 4) -> str | None:
    """The option letter that an answer chooses by the rule of MLLMU-Bench: its first letter or digit, upper-cased.

    The first letter of any word counts: "accordion" chooses A.
    """
    character = next((c for c in text or "" if c.isalnum()), "").upper()
    return character if character and character in LETTERS[:options] else None


def similar_option(text: str | None, options: Sequence[str]) -> str:
    """The letter of the option that resembles an answer most by the rule of UMU-Bench, `difflib`'s ratio.

    Of equally similar options the first one counts, so that an empty answer chooses A.
    """
    ratios = [difflib.SequenceMatcher(None, text or "", option).ratio() for option in options]
    return LETTERS[ratios.index(max(ratios))]


_STRICT = re.compile(r"[Tt]he answer is ([A-Z])|^([A-Z])$")


def strict_letter(text: str | None, options: int = 4) -> str | None:
    """The option letter by the rule of OFFSIDE: of "The answer is B", or of an answer that is one letter."""
    match = _STRICT.search(text or "")
    letter = match and (match[1] or match[2])
    return letter if letter and letter in LETTERS[:options] else None


LETTER_RULES: dict[str, Callable[[str | None, Sequence[str]], str | None]] = {  # by protocol: (answer, options)
    "letter": lambda text, options: first_letter(text, len(options)),
    "letter:first_character": lambda text, options: first_character(text, len(options)),
    "letter:similar_option": similar_option,
    "letter:strict": lambda text, options: strict_letter(text, len(options)),
}


# A letter, mark or digit of a script that separates words by spaces; names in others touch the characters around them.
_IN_WORD = (
    r"[[\p{L}\p{M}\p{N}]--[\p{Han}\p{Hiragana}\p{Katakana}\p{Hangul}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}]]"
)


@functools.lru_cache(maxsize=4096)
def _whole_words(truth: str) -> regex.Pattern:
    """Matches a text that neither begins nor ends within a word."""
    edge = rf"(?:(?<!{_IN_WORD})|(?!{_IN_WORD}))"
    return regex.compile(f"(?V1){edge}{regex.escape(truth)}{edge}")


def open_correct(prediction: str | None, truth: str, substring: bool = False) -> bool:
    """Whether an open answer is correct: the prediction contains the truth as whole words.

    Neither case nor another spelling of the same characters counts, see `names.text_key`.

    Args:
        prediction: the answer.
        truth: the true words.
        substring: whether the truth may begin and end within words, the rule of MLLMU-Bench and UMU-Bench, by which
            "copilot" has "pilot".

    Raises:
        ValueError: the truth has no letter and no digit; almost every prediction contains such a text.
    """
    prediction, truth = text_key(prediction or ""), text_key(truth)
    if not has_words(truth):
        raise ValueError(f"an open question with the true answer {truth!r} cannot be judged")
    return truth in prediction and (substring or _whole_words(truth).search(prediction) is not None)


ACCURACY = Metric(
    name="accuracy",
    title="correct answers",
    unit="%",
    direction="by_role",
    item=lambda record: float(record["correct"]),
    in_report=False,
)


def _no_letter(record: Mapping) -> float | None:
    if record.get("protocol") != "letter":
        return None
    return float(first_letter(record["prediction"], len(record["options"])) is None)


NO_LETTER = Metric(
    name="no_letter",
    title="answers without an option letter",
    unit="%",
    direction="down",
    tasks=("classification",),
    item=_no_letter,
    in_report=False,
)
