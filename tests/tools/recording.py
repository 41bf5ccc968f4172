"""Record commands in a terminal as an animated picture: `python tests/tools/recording.py OUTPUT.svg COMMAND...`.

Every piece of output appears in the picture as long after the start as it did in the terminal.
README's is of `efficientllm chat demo` with two questions.
"""

from __future__ import annotations

import html
import os
import pty
import re
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

COLUMNS = 92
LINE_HEIGHT, LETTER_WIDTH, MARGIN = 20, 8.4, 16
"""Pixels."""
PAUSE_SECONDS = 0.8
"""Time between a command and its start."""

Piece = tuple[float, str]
"""(seconds since the start, text)"""


def record(command: str) -> Iterator[Piece]:
    """Run a command in a pseudo-terminal and yield its output with the time of each piece."""
    pid, file = pty.fork()
    if pid == 0:
        os.execvpe("sh", ["sh", "-c", command], {**os.environ, "TERM": "dumb", "COLUMNS": str(COLUMNS)})
    start = time.monotonic()
    try:
        while piece := os.read(file, 4096):
            yield time.monotonic() - start, piece.decode("utf-8", "replace").replace("\r", "")
    except OSError:  # the end on Linux
        pass
    finally:
        os.close(file)
        if os.waitpid(pid, 0)[1]:
            sys.exit(f"{command} failed")


def lines_of(pieces: list[Piece]) -> list[list[Piece]]:
    """Return the words of `pieces` as lines of at most COLUMNS characters."""
    text = "".join(piece for _, piece in pieces)
    times = [when for when, piece in pieces for _ in piece]
    lines, position = [], 0
    for line in text.rstrip().split("\n"):
        for part in textwrap.wrap(line, COLUMNS) or [""]:
            position = text.index(part, position)
            words = re.finditer(r"\s*\S+", part)
            lines.append([(times[position + word.start()], word[0]) for word in words])
            position += len(part)
    return lines


def picture(lines: list[list[Piece]]) -> str:
    """Return an SVG in which every piece appears at its time."""
    width, height = COLUMNS * LETTER_WIDTH + 2 * MARGIN, len(lines) * LINE_HEIGHT + 2 * MARGIN
    rows = []
    for row, pieces in enumerate(lines):
        words = "".join(
            f'<tspan style="animation-delay:{when:.2f}s">{html.escape(text, quote=False)}</tspan>'
            for when, text in pieces
        )
        rows.append(
            f'<text x="{MARGIN}" y="{MARGIN + (row + 0.7) * LINE_HEIGHT:g}" xml:space="preserve">{words}</text>'
        )
    style = (
        "text{font:14px monospace;fill:#e6e6e6}tspan{animation:show .01s both}@keyframes show{from{fill:transparent}}"
        "@media(prefers-reduced-motion){tspan{animation:none}}"
    )
    body = "\n".join(rows)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}">\n'
        f'<style>{style}</style>\n<rect width="100%" height="100%" rx="8" fill="#1e1e24"/>\n{body}\n</svg>\n'
    )


def main() -> None:
    output, *commands = sys.argv[1:]
    shown: list[Piece] = []
    for command in commands:
        start = shown[-1][0] + PAUSE_SECONDS if shown else 0.0
        shown.append((start, f"$ {command}\n"))
        shown += [(start + PAUSE_SECONDS + when, text) for when, text in record(command)]
    Path(output).write_text(picture(lines_of(shown)), encoding="utf-8")


if __name__ == "__main__":
    main()
