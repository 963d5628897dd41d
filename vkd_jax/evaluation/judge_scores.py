"""The score in the reply of a judge.

The prompts request a number and nothing else, so only a reply that is a score as a whole is read. Any other word may
say of which scale, for which answer or under which condition the number is, or take it back. Such a reply gives no
score: a missing score is counted, and a wrong one is not noticed.
"""

import re

_AROUND = r"""[*_"'`\s]*+"""  # characters that mark a text as bold, code or quoted
# A score as a whole: "7", "7/10", "**Score:** 7 out of 10."
_SCORE = re.compile(
    rf"""{_AROUND}
        (?:(?:(?:the|my|your|final|overall)\ )*(?:score|grade|rating){_AROUND}(?:[:=]|\bis\b){_AROUND})?
        (?P<number>[0-9]++(?:\.[0-9]++)?+)
        (?:{_AROUND}\(?(?:/|out\ of\b|of\b)\s*+(?P<largest>[0-9]++(?:\.[0-9]++)?+)\)?)?
        {_AROUND}\.?{_AROUND}""",
    re.IGNORECASE | re.VERBOSE,
)
# The same as JSON: '{"score": 7}', which may stand in a block of code.
_JSON = re.compile(
    r"""\s*(?:```(?:json)?\s*)?\{\s*"(?:score|grade|rating)"\s*:\s*(?P<quote>"?)
        (?P<number>[0-9]++(?:\.[0-9]++)?+)(?P<largest>)(?P=quote)\s*\}\s*(?:```)?\s*""",
    re.IGNORECASE | re.VERBOSE,
)
_THINK = re.compile(r"<(/?)think>", re.IGNORECASE)


def read(reply: str, largest: float) -> float | None:
    """The score in a reply, 0 to 1; None if the reply has another form, or a number out of range.

    A reply is a number, which may be called a score, grade or rating and may state the largest one, which must be
    `largest`; or a JSON object of one such field. Text inside <think>...</think> is ignored. "0.8" of 10 may be of 1,
    and is not read.

    Example:
        >>> read("Score: 7 of 10", 10), read("Score: 7, if the name is right", 10)
        (0.7, None)
    """
    reply = _without_thoughts(reply)
    match = _SCORE.fullmatch(reply) or _JSON.fullmatch(reply)
    if match is None or (match["largest"] and float(match["largest"]) != largest):
        return None
    number = float(match["number"])
    if not match["largest"] and "." in match["number"] and 0 < number <= 1 < largest:
        return None
    return number / largest if number <= largest else None


def _without_thoughts(reply: str) -> str:
    """A reply without what a model thinks before it; a chat template may have written the first <think>."""
    kept: list[str] = []
    position, begun = 0, None
    for mark in _THINK.finditer(reply):
        if not mark[1]:
            begun = mark.start() if begun is None else begun
            continue
        kept = [] if begun is None else [*kept, reply[position:begun]]
        position, begun = mark.end(), None
    return "\n".join([*kept, reply[position:]])
