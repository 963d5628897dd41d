"""The score in the reply of a judge: a number is read only where nothing says that it may be something else.

A label before "score" that is not known, a condition or another scale after the number, or a further number that may be
the score gives no score: a missing score is counted, and a wrong one is not noticed.
"""

import re

MOST_CHARACTERS = 200  # of a line, or before a label, that are looked at; some expressions take their square in time
# A number, with its largest value if that is given. It does not end in a percent sign, in a separator of thousands,
# in another word, in a range or in a sum.
_NUMBER = re.compile(
    r"""([0-9]++(?:\.[0-9]++)?+)
        (?:[*_\s]*+[(\[]?\s*+(?:/|(?:out\ )?of|max(?:imum|\.)?:?)\s*+([0-9]++(?:\.[0-9]++)?+))?+
        (?! \w | \s*(?:[%\u2030/]|percent) | [.,'\u2019\ \u00a0\u2009\u202f]?[0-9]
            | \s*(?:[-\u2010-\u2015~+*x\u00d7\u00b1=\u2192\u2026;&]|->|\.\.|\+/-|to|or|and|plus|minus|times)
              \s*(?:maybe\s*|perhaps\s*)?[0-9] )""",
    re.IGNORECASE | re.VERBOSE,
)
# Where a score begins in a text: after "score:".
_SCORE = re.compile(
    r"""\b(?:score|grade|rating)[*_"'`\s]*+(?:[:=]|is\b)[*_"'`\s]*+""",
    re.IGNORECASE | re.VERBOSE,
)
_SENTENCE = re.compile(r"""\n|[.!?][*_"'`)\]]*\s""")  # its end
# What may precede "score" in its sentence. Any other word, such as "reference" or "starting", may name another number.
_PLAIN = re.compile(
    r"""[\W_]*(?:[0-9]+[.)]\s*)?[\W_]*(?:(?:no|so|thus|hence|therefore|the|my|your|final|overall)[\s,:*_]+)*
      | .*[{,]\s*["']""",  # a key of a JSON object
    re.IGNORECASE | re.VERBOSE | re.DOTALL,
)
# Labels of the bounds of a scale, which are not the score, and say nothing about it.
_BOUND = re.compile(
    r"""\b(?:max|maximum|possible|perfect|highest|full|best|min|minimum|lowest|worst|passing|threshold)\b
        (?:\ (?:score|grade|rating))?\W*\Z""",
    re.IGNORECASE | re.VERBOSE,
)
# A fraction, such as 7/10. It counts at the beginning of a reply, or if it is all of its last line.
_SHARE = re.compile(r"[0-9]++(?:\.[0-9]++)?+\s*+(?:/|out\ of\b)\s*+[0-9]++", re.IGNORECASE)
_AROUND = "*_\"'`. \t\r\n"  # characters that may surround a number that stands alone
# What follows a score that stands alone: the end of its sentence or line, a colon, a reason, a remark without numbers,
# or another field of a JSON object.
_END = re.compile(
    r"""[*_"'`)\]}]*+[^\S\n]*+
        (?: [.!:](?!\S) | \n | \Z | [.!:]?[*_"'`)\]}]+(?!\S) | ,\s*"\w+"\s*:
          | ,\ (?:because|since|as)\b | [(\u2013\u2014-][^\d\n]*(?:\n|\Z))""",
    re.VERBOSE,
)
# The rest of the sentence says when the score would be the number, of what it is, or on which scale.
_CONDITION = re.compile(
    r"""\A\W*(?:of|out|from|for|on|in|at|by|over|to|with|without|before|after|per|but|not)\b
      | \b(?:if|unless|when|whenever|provided|assuming|suppos\w+|otherwise|would|until
             |scale|max|maximum|min|minimum|threshold|out\ of)\b""",
    re.IGNORECASE | re.VERBOSE,
)
# The next sentence takes something away from the score, adds to it, or makes it a condition.
_CORRECTION = re.compile(
    r"\W*(?:if|unless|provided|assuming|minus|plus|less|deduct\w*|subtract\w*|wait|actually|correction)\b", re.I
)
_JSON_FIELD = re.compile(r""",\s*"\w+"\s*:""")
_FIELD = re.compile(r"""[\W_]*([^\W\d][\w\ ]*)["'*_\s]*[:=]["'*_\s]*([0-9]++(?:\.[0-9]++)?+)\W*""")  # "Deductions: 8"
# What a model thinks before it replies. Without an end it was cut off; a chat template may have written its beginning.
_THOUGHTS = (re.compile(r"<think>.*?(?:</think>|\Z)", re.S | re.I), re.compile(r"\A.*</think>", re.S | re.I))


def read(reply: str, largest: float) -> float | None:
    """The score in a reply, 0 to 1; None if the reply has none that is clear, or one out of range.

    A reply is a number alone; or the last "score: 7" in it counts; or it begins with "7/10", or has that alone in its
    last line after a whole sentence, and no other share. The 10 must be `largest`. The score's sentence or line ends
    after it, or has a remark without a condition, and no other number that may be the score follows alone. Percent,
    separators of thousands, ranges and sums are not read, nor is text inside <think>...</think>. "0.8" of 10 may be
    of 1, and is not read either.

    Example:
        >>> read("Score: 7 of 10", 10), read("Passing score: 7", 10)
        (0.7, None)
    """
    for thought in _THOUGHTS:
        reply = thought.sub("\n", reply)
    text = _bare(reply)
    match = _NUMBER.fullmatch(text)
    if match is None and _SCORE.search(reply):
        match = _after_label(reply, largest)
    elif match is None and text and len(_SHARE.findall(text)) == 1:
        if _SHARE.match(text):
            match = _alone(_NUMBER.match(text), largest)
        else:
            before, _, last = text.rpartition("\n")
            match = _NUMBER.fullmatch(_bare(last)) if re.search(r"[.!?][*_\"'`)\s]*\Z", before) else None
    if match is None or (match[2] and float(match[2]) != largest) or _may_be_of_1(match, largest):
        return None
    return float(match[1]) / largest if float(match[1]) <= largest else None


def _bare(text: str) -> str:
    """A text without the characters that may surround a number; "" if the number has no digit before its point."""
    bare = text.strip(_AROUND)
    before = text[: text.find(bare)].rstrip(_AROUND.replace(".", ""))
    return "" if bare[:1].isdigit() and before.endswith(".") else bare


def _may_be_of_1(match: re.Match[str], largest: float) -> bool:
    """Whether a number looks like one on a scale from 0 to 1, and the scale is another."""
    return not match[2] and "." in match[1] and 0 < float(match[1]) <= 1 < largest


def _after_label(reply: str, largest: float) -> re.Match[str] | None:
    """The number after the last "score:" that is not a bound of the scale; None if that may be another score."""
    for label in reversed(list(_SCORE.finditer(reply))):
        before = _SENTENCE.split(reply[max(0, label.start() - MOST_CHARACTERS) : label.start()])[-1]
        if not _BOUND.search(before):
            return _alone(_NUMBER.match(reply, label.end()), largest) if _PLAIN.fullmatch(before) else None
    return None


def _alone(match: re.Match[str] | None, largest: float) -> re.Match[str] | None:
    """The match of a number whose sentence does not go on, and after which no other score stands alone."""
    if match is None or not _END.match(match.string, match.end()):
        return None
    rest = match.string[match.end() :]
    sentence, *further = _SENTENCE.split(_JSON_FIELD.split(rest)[0])
    following = next((text for text in further if text.strip(_AROUND)), "")
    if _CONDITION.search(sentence) or _CORRECTION.match(following):
        return None
    first, *lines = rest.split("\n")
    texts = (text.strip(_AROUND) for text in (*re.split(r"[.!]\s", first), *lines))
    numbers = [float(other[1]) for other in map(_NUMBER.fullmatch, texts) if other]
    short = (line for line in lines if len(line) <= MOST_CHARACTERS)
    fields = [field.groups() for field in map(_FIELD.fullmatch, short) if field]
    numbers += [float(number) for label, number in fields if not _BOUND.search(label) and float(number) != largest]
    return None if any(number <= largest and number != float(match[1]) for number in numbers) else match
