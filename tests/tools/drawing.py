"""A layered drawing of a graph without cycles as SVG: boxes in rows, arrows down."""

from __future__ import annotations

import itertools
import textwrap
from dataclasses import dataclass, field
from html import escape

COLORS = {
    "runtime": "#dbe9f6",
    "train": "#e2f0d9",
    "export": "#fdebd0",
    "server": "#ece3f3",
    "devices": "#f6dfe0",
}
WIDTH, GAP, ROW_GAP, LINE, MARGIN = 200, 24, 46, 15, 16
"""Pixels: of a box, between boxes, between rows, of a line of text, around the drawing."""
CHARACTERS = 31
"""Of a line inside a box."""
LANE = 16
"""Pixels: width of the gap through which an arrow passes a row."""


@dataclass(eq=False)
class Box:
    """A node, or the lane of an arrow in a row that it passes (no lines)."""

    row: int
    lines: list[str]
    below: list[Box] = field(default_factory=list)
    above: list[Box] = field(default_factory=list)
    title: str = ""
    x: float = 0.0
    """Of its middle."""

    @property
    def width(self) -> int:
        return WIDTH if self.title else LANE


def draw(arrows: dict[str, set[str]], depths: dict[str, int], contents: dict[str, list[str]]) -> str:
    """Draw `arrows`, {node: nodes below it}, with the `contents` of each box, and return SVG."""
    boxes = {
        node: Box(depths[node], textwrap.wrap(", ".join(contents[node]), CHARACTERS), title=node)
        for node in sorted(arrows)
    }
    rows: list[list[Box]] = [[] for _ in range(max(depths.values()) + 1)]
    for box in boxes.values():
        rows[box.row].append(box)
    for node, below in sorted(arrows.items()):
        for other in sorted(below):
            _connect(boxes[node], boxes[other], rows)
    _arrange(rows)
    return _svg(rows)


def _connect(upper: Box, lower: Box, rows: list[list[Box]]) -> None:
    """Add one arrow with a lane in every row between."""
    chain = [upper, *(Box(row, []) for row in range(upper.row - 1, lower.row, -1)), lower]
    for lane in chain[1:-1]:
        rows[lane.row].append(lane)
    for one, other in itertools.pairwise(chain):
        one.below.append(other)
        other.above.append(one)


def _arrange(rows: list[list[Box]]) -> None:
    """Order each row by the mean place of its neighbors, down and up in turn, so that few arrows cross."""
    for row in rows:
        _spread(row)
    for sweep in range(24):
        for row in rows if sweep % 2 == 0 else reversed(rows):
            for box in row:
                neighbors = box.below if sweep % 2 == 0 else box.above
                if neighbors:
                    box.x = sum(other.x for other in neighbors) / len(neighbors)
            row.sort(key=lambda box: box.x)
            _spread(row)


def _spread(row: list[Box]) -> None:
    """Side by side in their order, as near as possible to where each wants to be, centered over that as a whole."""
    wanted = sum(box.x for box in row) / len(row)
    edge = 0.0
    for box in row:
        box.x = edge + box.width / 2
        edge += box.width + GAP
    shift = wanted - sum(box.x for box in row) / len(row)
    for box in row:
        box.x += shift


def _svg(rows: list[list[Box]]) -> str:
    left = min(box.x - box.width / 2 for row in rows for box in row) - MARGIN
    right = max(box.x + box.width / 2 for row in rows for box in row) + MARGIN
    heights = [(max(len(box.lines) for box in row) + 1) * LINE + 14 for row in rows]
    tops = [MARGIN + sum(height + ROW_GAP for height in heights[row + 1 :]) for row in range(len(rows))]
    size = f"{right - left:.0f} {tops[0] + heights[0] + MARGIN}"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" font-family="sans-serif" font-size="12">',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
        '<path d="M0 0L8 4L0 8z" fill="#555"/></marker></defs>',
        f'<rect width="{size.split()[0]}" height="{size.split()[1]}" fill="white"/>',
    ]
    nodes = [box for row in rows for box in row if box.title]
    parts += [_arrow(box, below, left, tops, heights) for box in nodes for below in box.below]
    parts += [_node(box, left, tops[box.row], heights[box.row]) for box in nodes]
    return "\n".join([*parts, "</svg>", ""])


def _arrow(upper: Box, lower: Box, left: float, tops: list[int], heights: list[int]) -> str:
    """A curve through the lanes to the node at their end. Arrows that reach a box side by side keep apart."""
    path = f"M{_port(upper, lower, upper.below) - left:.0f} {tops[upper.row] + heights[upper.row]}"
    while True:
        x, y = _port(lower, upper, lower.above) - left, tops[lower.row]
        start = tops[upper.row] + heights[upper.row]
        from_x = _port(upper, lower, upper.below) - left
        path += f"C{from_x:.0f} {start + ROW_GAP / 2:.0f} {x:.0f} {y - ROW_GAP / 2:.0f} {x:.0f} {y}"
        if lower.title:
            return f'<path d="{path}" fill="none" stroke="#555" stroke-width="1.3" marker-end="url(#tip)"/>'
        path += f"V{y + heights[lower.row]}"
        upper, lower = lower, lower.below[0]


def _port(box: Box, other: Box, neighbors: list[Box]) -> float:
    """Where on the edge of `box` the arrow to `other` ends: in the order of the neighbors' places."""
    order = sorted(neighbors, key=lambda neighbor: neighbor.x)
    share = (order.index(other) + 1) / (len(order) + 1) - 0.5
    return box.x + share * (box.width if box.title else 0)


def _node(box: Box, left: float, top: int, height: int) -> str:
    x = box.x - WIDTH / 2 - left
    color = COLORS[box.title.split("/")[0]]
    lines = "".join(
        f'<text x="{x + 9:.0f}" y="{top + 19 + LINE * (index + 1)}" font-size="11" fill="#333">{escape(line)}</text>'
        for index, line in enumerate(box.lines)
    )
    return (
        f'<rect x="{x:.0f}" y="{top}" width="{WIDTH}" height="{height}" rx="6" fill="{color}" stroke="#777"/>'
        f'<text x="{x + 9:.0f}" y="{top + 18}" font-weight="bold">{escape(box.title)}</text>{lines}'
    )
