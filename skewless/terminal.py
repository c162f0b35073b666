"""Plain text for a terminal."""

from __future__ import annotations


def printable(text: str) -> str:
    """The text with what would move a terminal's cursor, or turn the direction of reading, escaped."""
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)


def columns(head: list[str], rows: list[list[str]]) -> str:
    """A table; the first column is flush left, and so are those with words in them."""
    table = [head, *rows]
    widths = [max(len(row[k]) for row in table) for k in range(len(head))]
    left = [any(row[k][:1].isalpha() for row in rows) for k in range(len(head))]
    lines = [
        "  ".join(
            c.ljust(w) if k == 0 or left[k] else c.rjust(w) for k, (c, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in table
    ]
    return "\n".join(line.rstrip() for line in [lines[0], "  ".join("-" * w for w in widths), *lines[1:]])
