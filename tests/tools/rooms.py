"""Which room imports which: the table and the picture of docs/architecture.md.

`python tests/tools/rooms.py` writes both anew; with a folder, it prints the table of the tree in it. A room of a
package is a module or a sub-package that lies directly in it, an arrow is "imports", wherever in a file the import
stands; a room's floor is the length of the longest way down from it, so a cycle has no floors and is an error.
"""

from __future__ import annotations

import ast
import graphlib
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from drawing import draw

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "architecture.md"
PICTURE = ROOT / "docs" / "images" / "rooms.svg"
PACKAGES = ("train", "export", "runtime", "server", "devices")

BEFORE = {
    "train": (34, 12, 113),
    "export": (29, 5, 68),
    "runtime": (27, 6, 59),
    "server": (10, 7, 16),
    "devices": (19, 5, 47),
}
"""What this script counts in commit f93a1ba, where no package but the first two had sub-packages."""

Graph = dict[str, set[str]]
"""{room: rooms that it imports}"""
Module = tuple[str, ...]
"""("train", "model", "tensors")"""


def modules(root: Path) -> Iterator[tuple[Module, list[Module]]]:
    """Every module of the packages and what it imports of them; the last part of an import may be a name inside it."""
    for path in sorted(path for package in PACKAGES for path in (root / package).rglob("*.py")):
        module = path.relative_to(root).with_suffix("").parts
        imported = []
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                folder = (*module[: len(module) - node.level], *(node.module or "").split("."))
                imported += [(*folder, name.name) if node.module else (*folder[:-1], name.name) for name in node.names]
        yield module, imported


def graph(root: Path, room_of: Callable[[Module], str]) -> Graph:
    """The rooms that `room_of` names ("" for none) and the arrows between them."""
    arrows: Graph = {}
    for module, imported in modules(root):
        if room := room_of(module):
            arrows.setdefault(room, set()).update({room_of(other) for other in imported} - {"", room})
    return arrows


def rooms_within(root: Path, package: str) -> Graph:
    """The modules and sub-packages that lie directly in a package."""
    return graph(root, lambda module: module[1] if module[0] == package and module[1] != "__init__" else "")


def packages_and_sub_packages(root: Path) -> Graph:
    """ "train/model" and its like; "train" stands for the modules that lie directly in it."""
    return graph(root, lambda module: "/".join(module[:2]) if root.joinpath(*module[:2]).is_dir() else module[0])


def all_modules(root: Path) -> Graph:
    """ "train/model/tensors" and its like; a package's own name stands for its `__init__`."""

    def module_of(name: Module) -> str:
        path = root.joinpath(*name)
        inner = path.is_dir() or path.with_suffix(".py").is_file()
        return "/".join(name if inner else name[:-1]).removesuffix("/__init__")

    return graph(root, module_of)


def floors(arrows: Graph) -> dict[str, int]:
    """{room: floor}, 0 for rooms that import none; graphlib.CycleError where rooms import each other."""
    floor: dict[str, int] = {}
    for room in graphlib.TopologicalSorter(arrows).static_order():
        floor[room] = max((floor[below] + 1 for below in arrows[room]), default=0)
    return floor


def without_detours(arrows: Graph) -> Graph:
    """The arrows that do not follow from others (the transitive reduction)."""

    def reached(room: str) -> set[str]:
        return arrows[room].union(*map(reached, arrows[room]))

    return {room: below - set().union(*map(reached, below)) for room, below in arrows.items()}


def counts(root: Path) -> dict[str, tuple[int, int, int]]:
    """{package: (rooms, floors, arrows)}"""
    rooms = {package: rooms_within(root, package) for package in PACKAGES}
    return {
        package: (len(arrows), max(floors(arrows).values()) + 1, sum(map(len, arrows.values())))
        for package, arrows in rooms.items()
    }


def table(root: Path) -> str:
    lines = ["| | rooms | floors | arrows | cycles |", "| --- | ---: | ---: | ---: | ---: |"]
    for package, now in counts(root).items():
        pairs = [f"{before} → {after}" for before, after in zip(BEFORE[package], now, strict=True)]
        lines.append(f"| {package} | {' | '.join(pairs)} | 0 → 0 |")
    return "\n".join(lines)


def picture(root: Path) -> str:
    """SVG of the packages and sub-packages with the names of their modules."""
    arrows = packages_and_sub_packages(root)
    contents: dict[str, list[str]] = {room: [] for room in arrows}
    for module, _ in modules(root):
        folder = root.joinpath(*module[:2]).is_dir()
        if module[-1] != "__init__":
            contents["/".join(module[:2]) if folder else module[0]].append("/".join(module[2 if folder else 1 :]))
    return draw(without_detours(arrows), floors(arrows), contents)


def with_table(page: str, root: Path) -> str:
    """The page's text with its table as it is now."""
    return re.sub(r"(?s)(<!-- rooms -->\n\n).*(\n\n<!-- /rooms -->)", rf"\g<1>{table(root)}\g<2>", page)


def main() -> None:
    if len(sys.argv) > 1:
        print(table(Path(sys.argv[1])))
        return
    PICTURE.write_text(picture(ROOT), encoding="utf-8")
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8"), ROOT), encoding="utf-8")


if __name__ == "__main__":
    main()
