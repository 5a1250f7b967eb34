"""Tables in Markdown."""

from collections.abc import Iterable


def grid(rows: Iterable[Iterable[str]]) -> str:
    """Rows of cells, the first of them the head; without a newline at the end."""
    lines = [list(row) for row in rows]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
