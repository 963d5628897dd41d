"""Texts that users see: every error is one line of at most `MOST_CHARACTERS`, and long lists are shortened.

`UserError` applies `sentence` to its message, so that no caller has to. Names, paths and texts from data may contain
line ends, ANSI escape sequences and characters that reverse the direction of a line; `escaped` makes them visible.
"""

import contextlib
import os
import tempfile
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

MOST_CHARACTERS = 600  # of an error
MOST_ITEMS = 3  # of a list that has no bound; one more is shown, too, rather than counted
MOST_CHOICES = 24  # of the supported values of a name, which the reader needs in full
MOST_ITEM_CHARACTERS = 120

_ENDING = 200  # characters of the end of a long message that are kept: they say what to do
# Controls, surrogates, line separators, formatting, private and unassigned characters.
_INVISIBLE = frozenset({"Cc", "Cs", "Zl", "Zp", "Cf", "Co", "Cn"})
_JOINERS = "\u200c\u200d"  # zero-width characters that Persian, Hindi and emoji need


def escaped(text: str, keep: str = "") -> str:
    """A text in which characters that are invisible, or that steer a terminal, are shown as Python's escapes.

    Args:
        text: any text.
        keep: characters that are left alone, e.g. line ends.

    Example:
        >>> print(escaped("red\\x1b[31m"))
        red\\x1b[31m
    """
    return "".join(ascii(c)[1:-1] if c not in keep and _steers(c) else c for c in text)


def people(number: int) -> str:
    """A number of people in words: "1 person", "6 people"."""
    return "1 person" if number == 1 else f"{number} people"


def sentence(text: str, most: int = MOST_CHARACTERS, note: str = "") -> str:
    """A message in one line of at most `most` characters, escaped; the middle of a long one is left out.

    Args:
        text: the message.
        most: the largest number of characters, those of the note included.
        note: text that follows a message that was shortened, e.g. the file that has all of it.
    """
    text = escaped(text.strip())
    if len(text) <= most:
        return text
    beginning = most - _ENDING - len(note) - len(" ... ")
    return f"{text[:beginning]} ... {text[-_ENDING:]}{note}"


def listed(items: Iterable[Any], separator: str = ", ", most: int = MOST_ITEMS) -> str:
    """The items of a list for a message: all of a short list; else the first, a count, and a file with the whole list.

    Args:
        items: the items; longer ones than `MOST_ITEM_CHARACTERS` are shortened.
        separator: the text between two items.
        most: the number of items that are shown, or one more if that is all of them.

    Example:
        >>> listed(["a", "b", "c"])
        'a, b, c'
        >>> listed([])
        'nothing'
        >>> listed(["a", "b", "c", "d", "e"])  # doctest: +SKIP
        'a, b, c and 2 more (all 5 are listed in /tmp/vkd_jax_0f3b9y.txt)'
    """
    items = [escaped(str(item)) for item in items]
    if len(items) <= most + 1:
        return separator.join(map(_shortened, items)) or "nothing"
    path, shown = write_lines(items), separator.join(map(_shortened, items[:most]))
    return f"{shown} and {len(items) - most} more" + (f" (all {len(items)} are listed in {path})" if path else "")


def choices(names: Iterable[Any]) -> str:
    """The supported values of a name for a message, as `listed`, but more of them."""
    return listed(names, most=MOST_CHOICES)


def write_lines(lines: Sequence[str]) -> str | None:
    """Writes lines to a temporary file, and returns its path; None on a full disk, which must not hide a message."""
    with contextlib.suppress(OSError):
        descriptor, path = tempfile.mkstemp(prefix="vkd_jax_", suffix=".txt")
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(f"{line}\n" for line in lines)
        return path
    return None


def _steers(character: str) -> bool:
    return unicodedata.category(character) in _INVISIBLE and character not in _JOINERS


def _shortened(item: str) -> str:
    return item if len(item) <= MOST_ITEM_CHARACTERS else f"{item[: MOST_ITEM_CHARACTERS - 4]} ..."
