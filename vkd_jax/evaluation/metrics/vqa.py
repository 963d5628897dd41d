"""VQA accuracy: agreement of a short answer with the answers of several people, after normalization.

Reference: Antol et al. (2015), VQA: visual question answering; https://visualqa.org/evaluation.html.
"""

import functools
import re
from collections.abc import Sequence

from vkd_jax.benchmarks.names import plain_name

_DIGITS = "zero one two three four five six seven eight nine ten".split()
NUMBERS = {word: str(number) for number, word in enumerate(_DIGITS)} | {"none": "0"}
ARTICLES = {"a", "an", "the"}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
# Words that people write without their apostrophe. Those that are other words then ("well", "ill", "its") are left out.
_CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't
    he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've
    needn't not've o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'll somebody's
    someone'd someone'll someone's something'd something'll that's there'd there're there's they'd they'd've
    they'll they're they've wasn't we'd've we've weren't what'll what're what's what've when's where'd where's
    where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all
    you'd you'd've you'll you're you've
"""
CONTRACTIONS = {
    variant: word
    for word in _CONTRACTED.split()
    for variant in (word.replace("'", ""), word.replace("'", "", 1), "".join(word.rsplit("'", 1)))
}
_PERIOD = re.compile(r"\.(?!\d)")


@functools.lru_cache(maxsize=4096)
def normalize(answer: str) -> str:
    """Normalizes an answer as the scripts of the VQA challenges do.

    Lower case, without commas, question marks, other punctuation, articles and periods that are in no number; number
    words up to ten become digits, and contractions get their apostrophes. Punctuation that touches a space is removed,
    and other punctuation becomes a space. Where nothing would be left, articles stay ("a" may be a letter that is asked
    for), or else punctuation: only a text that is blank becomes "".

    Example:
        >>> normalize("The two dogs.")
        '2 dogs'
    """
    answer = plain_name(answer).lower()
    text = " ".join(answer.replace(",", "").replace("?", "").replace("'s", " 's").split())
    result = text
    for mark in PUNCTUATION:
        joined = f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if joined else " ")
    words = [NUMBERS.get(word, word) for word in _PERIOD.sub("", result).split()]
    words = [word for word in words if word not in ARTICLES] or words
    return " ".join(CONTRACTIONS.get(word, word) for word in words) or answer


def vqa_accuracy(prediction: str, references: Sequence[str]) -> float:
    """The official VQA accuracy of one answer.

    For each person in turn, the answer is compared with those of the others: min(1, number that agree / 3). The
    accuracy is the mean over the people. With ten people it is 0, 0.3, 0.6, 0.9 or 1 for 0, 1, 2, 3 or at least 4 who
    agree. A blank answer never agrees.

    Args:
        prediction: the model's answer.
        references: the answers of at least one person.

    Example:
        >>> round(vqa_accuracy("Red", ["red"] * 2 + ["blue"] * 8), 10)
        0.6
    """
    given = normalize(prediction)
    agree = [normalize(reference) == given != "" for reference in references]
    total = sum(agree)
    return sum(min(1.0, (total - one) / 3) for one in agree) / len(agree)
