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
# An option is ruled out, or in doubt, by words before it in its clause, "I can't choose A", or after it, "A is wrong".
_BUT = r"(?:any|every|all|each|no|none)\w*(?:\s+\w+){0,3}\s+but"  # "any option but A": but A is ruled out
_CLAUSE = regex.compile(rf"[.;:,!?\n]|\bbut\b(?<!\b{_BUT})", regex.IGNORECASE)  # where one ends
_NOT = re.compile(
    r"""\b(?:not|cannot|\w+n['’]t|unable|never|neither|nor|except|without|than|instead|doubt|refuse|reject|eliminate|exclude
        |if|whether|hard\ to\ say|rule\ out|"""
    + _BUT
    + r""")\b""",
    re.IGNORECASE | re.VERBOSE,
)
_WRONG = re.compile(
    r"""["'*)\]]*(?:\? | \ (?:(?:is|was|seems|must\ be|would\ be)\ (?:\w+ly\ )?
            (?:not|never|no|less|wrong|incorrect|false|impossible|unlikely|doubtful|ruled\ out)\b
        |(?:can|could|would|does)\ ?not\b|\w+n['’]t\b))""",
    re.IGNORECASE | re.VERBOSE,
)
_BEFORE = 100  # characters before a letter that are looked at


@functools.cache
def _choices(options: int) -> tuple[re.Pattern, re.Pattern]:
    """Patterns of an option letter that an answer states, and of a further one that is joined to it, "A or B".

    A letter is stated at the start of the answer, after a word that announces it, in brackets, or at the start of a
    line or sentence before a mark, as in a list. It must not touch a word or an abbreviation ("Cat", "D'Arcy", "B.A.",
    "A-frame", "C++").
    """
    last = LETTERS[options - 1]
    end = r"(?![\w+\#-]|['’]\w|\.\w)"
    stated = rf"""(?: ^\W* | [.;\n][\ \t]*(?=\w[).:]) | [(\[{{]
            | (?P<answer>\banswer\b(?:\s*(?:is|:))?\W*)
            | \b(?:option|choice|letter|is|it['’]s|be|choose|pick|select|say)\b\W* )
        (?<![\w.-])(?<!\w['’]) (?P<letter>[a-{last.lower()}]) {end}"""
    joined = rf"""["'*)\]}}.]* (?: \s*[,/&]\s* | \s+(?:or|and)\s+ (?:option\s+)? ) ["'*(\[{{]*
        (?P<letter>[A-{last}]) {end}"""
    return re.compile(stated, re.IGNORECASE | re.VERBOSE), re.compile(joined, re.VERBOSE)


def _is_word(text: str, match: re.Match) -> bool:
    """Whether a letter is the article or the pronoun: "a man", "A tall man", "I think"; but "A Baker" is option A."""
    letter, word = match["letter"], _NEXT_WORD.match(text, match.end())
    if letter in "iI":
        return word is not None and word[1] != "is"
    article = letter in "aA" and word is not None and word[1] not in _VERDICTS
    return article and (letter == "a" or not word[1][0].isupper())


def _is_ruled_out(text: str, match: re.Match) -> bool:
    clause = _CLAUSE.split(text[max(0, match.start("letter") - _BEFORE) : match.start("letter")])[-1]
    return bool(_NOT.search(clause) or _WRONG.match(text, match.end()))


def first_letter(text: str | None, options: int = 4) -> str | None:
    """The option letter that a generated answer chooses.

    A letter counts if the answer states it: at its start ("B", "b)", "**C**: a baker"), in brackets, or after a word
    that announces it ("I would say (D)"). If some follow the word "answer" ("The answer is C"), they alone count. The
    article "a", the pronoun "I", letters inside words and abbreviations, and options that are ruled out or in doubt
    ("not (A)", "A is wrong", "A?") are not stated. An answer that states two options ("A or B", or a list of them)
    chooses none.

    Args:
        text: the answer.
        options: number of options; with four, "E" chooses nothing.

    Returns:
        "A", "B", ...; None if the answer does not choose one option, which counts as wrong.
    """
    text = text or ""
    stated, joined = _choices(options)
    letters: dict[bool, set[str]] = {True: set(), False: set()}  # by whether they are called the answer
    for match in stated.finditer(text):
        called = bool(match["answer"])
        while match and not _is_word(text, match) and not _is_ruled_out(text, match):
            letters[called].add(match["letter"].upper())
            match = joined.match(text, match.end())
    chosen = letters[True] or letters[False]
    return chosen.pop() if len(chosen) == 1 else None


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


def counted_option(record: Mapping) -> str | None:
    """The letter of the option that an answer chooses by the rule of its protocol; None if it is the option itself."""
    options, prediction = record["options"], record["prediction"]
    if not options or prediction in options:
        return None
    return LETTER_RULES.get(record.get("protocol"), LETTER_RULES["letter"])(prediction, options)


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
