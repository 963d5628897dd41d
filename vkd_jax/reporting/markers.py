"""Tables in Markdown pages, rendered between markers from JSON files.

A marker is a comment, `<!-- WORD: FILE.json NAME -->`, and ends with `<!-- /WORD -->`. FILE.json is relative to the
page, and NAME names one of the tables of the program that renders markers with this WORD.
"""

import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vkd_jax import messages
from vkd_jax.config import command_line
from vkd_jax.runtime import files
from vkd_jax.types import UserError, located

Tables = Mapping[str, Callable[[Any], str]]


def fill(text: str, folder: Path, tables: Tables, word: str) -> str:
    """Returns the text of a page with its tables rendered again.

    Args:
        text: The text of the page.
        folder: The folder that the markers' files are relative to.
        tables: Functions from the contents of a JSON file to a Markdown table, by name.
        word: The first word of the markers.

    Raises:
        UserError: A marker is malformed, names an unknown table, or names a file that cannot be read or rendered.
    """

    def render(match: re.Match) -> str:
        start, file, name, end = match.groups()
        if name not in tables:
            raise UserError(f"a marker asks for the table {name!r}. Supported values: {messages.choices(tables)}.")
        try:
            results = json.loads((folder / file).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"a marker names {file}, which cannot be read: {error}") from error
        try:
            with located(f"a marker names {file}"):
                return f"{start}{tables[name](results)}\n{end}"
        except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
            raise UserError(f"a marker names {file}, which does not contain what the table {name!r} shows.") from error

    pattern = re.compile(rf"(<!-- {word}: (\S+) (\w+) -->\n).*?(<!-- /{word} -->)", re.DOTALL)
    if len(pattern.findall(text)) < text.count(f"<!-- {word}:"):
        raise UserError("a marker lacks its end, its file or its table.")
    return pattern.sub(render, text)


def refresh(pages: Sequence[Path], tables: Tables, word: str, program: str, check: bool) -> int:
    """Renders the tables of some pages again, or checks that they are fresh, and returns the exit status.

    Args:
        pages: Paths of Markdown files.
        tables: See `fill`.
        word: See `fill`.
        program: The command that the message about a stale page asks for.
        check: Whether to write nothing and report stale pages only.

    Returns:
        0 on success, 1 if `check` is set and a table is stale, 2 on bad input.
    """
    status = 0
    try:
        for path in pages:
            text = path.read_text(encoding="utf-8")
            fresh = fill(text, path.parent, tables, word)
            if fresh != text and check:
                print(f"{path} is stale: run {program} {path}", file=sys.stderr)
                status = 1
            elif fresh != text:
                files.write_bytes(path, fresh.encode())
    except (UserError, OSError, UnicodeDecodeError) as error:
        return command_line.bad_input(error)
    return status
