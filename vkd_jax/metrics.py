"""How an answer is judged and how answers are counted: pure functions of texts and numbers."""

import re
from collections.abc import Iterable, Mapping

from scipy.stats import binomtest

# Where an answer may name its option: at its start, after a word that announces it, or in brackets. The
# letter stands alone: nothing of a word touches it ("Cat", "D'Arcy", "B.A.", "A-frame").
_CHOICE = re.compile(
    r"""(?: ^\W* | \b(?:answer|option|choice|letter|is|it['’]s|be|choose|pick|select|say)\b\W* | [(\[] )
        (?<![\w'’.-]) ([a-d]) (?![\w'’-]|\.\w)""",
    re.IGNORECASE | re.VERBOSE,
)
_NEXT_WORD = re.compile(r"\s+(\w+)")
_VERDICTS = {"is", "was", "because", "since", "as", "and", "or"}  # "A is right", "A because ..."


def wilson(correct: int, n: int) -> tuple[float, float]:
    """95 % Wilson score interval of a proportion.

    It stays inside [0, 1] and is honest at 0 and at n right answers, where the normal approximation says that
    there is no doubt at all.

    Args:
        correct: number of right answers, 0 <= correct <= n.
        n: number of questions, at least 1.

    Returns:
        (low, high), shares between 0 and 1.

    Raises:
        ValueError: if n < 1 or correct is outside [0, n].

    Reference: Wilson (1927), Probable inference, the law of succession, and statistical inference.
    """
    interval = binomtest(correct, n).proportion_ci(confidence_level=0.95, method="wilson")
    return float(interval.low), float(interval.high)


def summarise(items: Iterable[Mapping]) -> dict[str, float | int]:
    """Count the right answers of judged items.

    Args:
        items: mappings with a boolean `correct`.

    Returns:
        {"accuracy": correct / n, "correct", "n", "low", "high"}, the last two the 95 % Wilson interval.

    Raises:
        ValueError: without items there is no accuracy.
    """
    verdicts = [bool(item["correct"]) for item in items]
    if not verdicts:
        raise ValueError("no items to summarise: a set without questions has no accuracy")
    correct, n = sum(verdicts), len(verdicts)
    low, high = wilson(correct, n)
    return {"accuracy": correct / n, "correct": correct, "n": n, "low": low, "high": high}


def first_letter(text: str) -> str | None:
    """The option letter that an answer in free text chooses.

    A letter that opens the answer decides ("B", "b)", "**C**: a baker"); else the first one in brackets or
    after a word that announces it ("The answer is C", "I would say (D)"). The article "a" and letters inside
    words and abbreviations are not choices.

    Returns:
        "A", "B", "C" or "D"; None if the answer chooses nothing, which counts as wrong.
    """
    for match in _CHOICE.finditer(text):
        letter, word = match[1], _NEXT_WORD.match(text, match.end())
        article = letter in "aA" and word and word[1] not in _VERDICTS
        if article and (letter == "a" or not word[1][0].isupper()):
            continue  # "a man", "A tall man"; but "A Baker" is option A
        return letter.upper()
    return None


def cloze_correct(prediction: str, truth: str) -> bool:
    """Whether the blank was filled right: the lower-cased truth is a substring of the lower-cased prediction.

    Raises:
        ValueError: an empty truth would be found in every prediction.
    """
    if not truth.strip():
        raise ValueError("a cloze question with an empty ground truth cannot be judged")
    return truth.strip().lower() in prediction.lower()
