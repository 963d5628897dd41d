"""Lines of Markdown tables."""

from collections.abc import Iterable


def row(cells: Iterable[str]) -> str:
    """Joins cells to a line of a Markdown table."""
    return f"| {' | '.join(cells)} |"
