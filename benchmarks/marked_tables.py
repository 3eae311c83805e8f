"""Tables in Markdown that a command makes: found by their marks, compared, and put in place.

<!-- table: NAME -->
| ... |
<!-- end: NAME -->
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def marked(text: str, name: str) -> str:
    """What stands between the marks of a table.

    Raises:
        ValueError: the marks are not there, each once and in order.
    """
    start, end = _borders(text, name)
    return text[start:end]


def replaced(text: str, name: str, table: str) -> str:
    """The text with another table between the marks.

    Raises:
        ValueError: the marks are not there, each once and in order.
    """
    start, end = _borders(text, name)
    return f"{text[:start]}{table}{text[end:]}"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()) -> str:
    """A Markdown table, ending with a line feed.

    Args:
        header, rows: of equally many cells; a vertical bar in a cell is written so that it stays one.
        right: numbers of the columns that are aligned to the right.
    """
    rule = ["---:" if column in right else "---" for column in range(len(header))]
    cells = [header, rule, *rows]
    assert {len(row) for row in cells} == {len(header)}
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |\n" for row in cells)


def update(path: Path, name: str, table: str, *, is_check: bool) -> bool:
    """Compare the table in a file with a new one, and put that in its place unless it is only a check.

    Returns:
        Whether they were equal.
    """
    text = path.read_text(encoding="utf-8")
    is_equal = marked(text, name) == table
    if not is_equal and not is_check:
        path.write_text(replaced(text, name, table), encoding="utf-8")
    return is_equal


def _borders(text: str, name: str) -> tuple[int, int]:
    opening, closing = f"<!-- table: {name} -->\n", f"<!-- end: {name} -->\n"
    if text.count(opening) != 1 or text.count(closing) != 1 or text.index(opening) > text.index(closing):
        raise ValueError(f"no table {name!r}: expected {opening.strip()!r}, then {closing.strip()!r}, each once")
    return text.index(opening) + len(opening), text.index(closing)
