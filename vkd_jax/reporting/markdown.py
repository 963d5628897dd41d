"""Text from data and paths as Markdown: the one place where it is escaped, for reports, comparisons and pages.

Values that are `Markup` are Markdown already and are left alone, so that escaping twice changes nothing.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from markupsafe import Markup

from vkd_jax import messages

# An underscore between letters or digits, as in "grad_diff", has no meaning.
_MARKDOWN = re.compile(r"[\\`*\[\]<>&|~$#]|(?<![^\W_])_|_(?![^\W_])")
_HTML = {"<": "&lt;", ">": "&gt;", "&": "&amp;"}


def escape(value: Any) -> Markup:
    """Escapes Markdown and HTML, joins lines, and shows control characters; for every value that a page shows.

    Example:
        >>> escape("a|b <i>*c*")
        Markup('a\\\\|b &lt;i&gt;\\\\*c\\\\*')
    """
    if isinstance(value, Markup):
        return value
    text = _MARKDOWN.sub(lambda match: _HTML.get(match[0], f"\\{match[0]}"), plain(value))
    return Markup(text)


def code(value: Any, in_table: bool = False) -> Markup:
    """Quotes text as inline code, with a longer run of backticks than any in the text.

    Args:
        value: the text.
        in_table: whether it stands in a table, where GitHub requires a backslash before "|" even in code.
    """
    text = plain(value)
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    padding = " " if text.startswith("`") or text.endswith("`") else ""
    return Markup(f"{fence}{padding}{text.replace('|', chr(92) + '|') if in_table else text}{padding}{fence}")


def plain(value: Any) -> str:
    """A value as one line without control characters, e.g. for plots."""
    return messages.escaped(" ".join(str(value).split()))


def row_of(cells: Iterable[Any]) -> str:
    """Joins cells to a row of a table; cells that are not `Markup` are escaped."""
    return f"| {' | '.join(map(escape, cells))} |"


def numeric_table(heads: Sequence[Any], rows: Sequence[Sequence[Any]]) -> str:
    """A table whose first column is text and whose other columns are numbers."""
    return "\n".join(row_of(cells) for cells in (heads, ["---", *["---:"] * (len(heads) - 1)], *rows))
