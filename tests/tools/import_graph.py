"""Measure the import graph: the tables of docs/architecture.md.

`python tests/tools/import_graph.py` rewrites them. With a folder, it prints those of the tree in it. A node of a
package is a module or a sub-package directly in it. An edge means "imports", wherever in a file the import stands. The
depth of a node is the length of the longest path of imports from it. A cycle has no depth and is an error.
"""

from __future__ import annotations

import ast
import graphlib
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "architecture.md"
PACKAGES = ("train", "export", "runtime", "server", "devices")

Graph = dict[str, set[str]]
"""{node: nodes that it imports}"""
Module = tuple[str, ...]
"""("train", "model", "tensors")"""


def modules(root: Path) -> Iterator[tuple[Module, list[Module]]]:
    """Yield every module of the packages with its imports from them. The last part of an import may be a name."""
    for path in sorted(path for package in PACKAGES for path in (root / package).rglob("*.py")):
        module = path.relative_to(root).with_suffix("").parts
        imported = []
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                folder = (*module[: len(module) - node.level], *(node.module or "").split("."))
                imported += [(*folder, name.name) if node.module else (*folder[:-1], name.name) for name in node.names]
        yield module, imported


def graph(root: Path, node_of: Callable[[Module], str]) -> Graph:
    """Return the nodes that `node_of` names ("" for none) and the edges between them."""
    edges: Graph = {}
    for module, imported in modules(root):
        if node := node_of(module):
            edges.setdefault(node, set()).update({node_of(other) for other in imported} - {"", node})
    return edges


def nodes_within(root: Path, package: str) -> Graph:
    """Return the graph of the modules and sub-packages directly in a package."""
    return graph(root, lambda module: module[1] if module[0] == package and module[1] != "__init__" else "")


def packages_and_sub_packages(root: Path) -> Graph:
    """Return the graph of "train/model" and the like. "train" stands for the modules directly in it."""
    return graph(root, lambda module: "/".join(module[:2]) if root.joinpath(*module[:2]).is_dir() else module[0])


def all_modules(root: Path) -> Graph:
    """Return the graph of "train/model/tensors" and the like. A package stands for its `__init__`."""

    def module_of(name: Module) -> str:
        path = root.joinpath(*name)
        inner = path.is_dir() or path.with_suffix(".py").is_file()
        return "/".join(name if inner else name[:-1]).removesuffix("/__init__")

    return graph(root, module_of)


def depths(edges: Graph) -> dict[str, int]:
    """Return {node: depth}, 0 without imports. Raises graphlib.CycleError if nodes import each other."""
    depth: dict[str, int] = {}
    for node in graphlib.TopologicalSorter(edges).static_order():
        depth[node] = max((depth[below] + 1 for below in edges[node]), default=0)
    return depth


def without_detours(edges: Graph) -> Graph:
    """Return the edges that do not follow from others (the transitive reduction)."""

    def reached(node: str) -> set[str]:
        return edges[node].union(*map(reached, edges[node]))

    return {node: below - set().union(*map(reached, below)) for node, below in edges.items()}


def counts(root: Path) -> dict[str, tuple[int, int, int]]:
    """Return {package: (nodes, depth, edges)}."""
    nodes = {package: nodes_within(root, package) for package in PACKAGES}
    return {
        package: (len(edges), max(depths(edges).values()) + 1, sum(map(len, edges.values())))
        for package, edges in nodes.items()
    }


def tables(root: Path) -> str:
    """Return the Markdown tables of the counts, and of the packages and sub-packages with what they import."""
    lines = ["| package | nodes | depth | edges |", "| --- | ---: | ---: | ---: |"]
    lines += [f"| {package} | {' | '.join(map(str, found))} |" for package, found in counts(root).items()]
    edges = packages_and_sub_packages(root)
    direct, depth = without_detours(edges), depths(edges)
    lines += ["", "| package or sub-package | imports |", "| --- | --- |"]
    for node in sorted(edges, key=lambda node: (-depth[node], node)):
        lines.append(f"| `{node}` | {', '.join(f'`{below}`' for below in sorted(direct[node]))} |")
    return "\n".join(lines)


def with_tables(page: str, root: Path) -> str:
    """Return the page's text with current tables."""
    return re.sub(r"(?s)(<!-- imports -->\n\n).*(\n\n<!-- /imports -->)", rf"\g<1>{tables(root)}\g<2>", page)


def main() -> None:
    """Rewrite the tables, or print those of another tree."""
    if len(sys.argv) > 1:
        print(tables(Path(sys.argv[1])))
        return
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8"), ROOT), encoding="utf-8")


if __name__ == "__main__":
    main()
