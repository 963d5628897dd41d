"""Lists in error messages: the first items, a count, and a file with all of them."""

import contextlib
import os
import tempfile
from collections.abc import Sequence

MOST_ITEMS = 3
MOST_CHARACTERS = 120  # of one item


def listed(items: Sequence[str], separator: str = ", ") -> str:
    """The items of a list for a message: all of a short list; else the first, a count, and a file with the whole list.

    Args:
        items: the items; longer ones than `MOST_CHARACTERS` are shortened.
        separator: the text between two items.

    Example:
        >>> listed(["a", "b", "c"])
        'a, b, c'
        >>> listed(["a", "b", "c", "d", "e"])
        'a, b, c and 2 more (all 5 are listed in /tmp/vkd_jax_0f3b9y.txt)'
    """
    shown = separator.join(map(_shortened, items[:MOST_ITEMS]))
    if len(items) <= MOST_ITEMS:
        return shown
    with contextlib.suppress(OSError):  # a full disk must not hide the message
        descriptor, path = tempfile.mkstemp(prefix="vkd_jax_", suffix=".txt")
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(f"{item}\n" for item in items)
        return f"{shown} and {len(items) - MOST_ITEMS} more (all {len(items)} are listed in {path})"
    return f"{shown} and {len(items) - MOST_ITEMS} more"


def _shortened(item: str) -> str:
    return item if len(item) <= MOST_CHARACTERS else f"{item[: MOST_CHARACTERS - 4]} ..."
