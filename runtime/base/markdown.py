"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Collection, Sequence


def markdown_table(rows: Sequence[Sequence[str]], left: Collection[int] = (0,)) -> str:
    """`rows`, header first, all of one length, as a table without a final newline; columns not in `left` end right."""
    header, *body = rows
    marks = ["---" if index in left else "---:" for index in range(len(header))]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, marks, *body))
