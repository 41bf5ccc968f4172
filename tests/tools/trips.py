"""Count how often a run's configuration is handed on: `python tests/tools/trips.py [ROOT]`.

Start at `run_training` of train/run.py and follow, depth first, every call that passes the configuration, the plan or
one of their sections. A stop is a distinct pair of caller and callee. A return is a stop in a module that the walk had
visited before. Calls are resolved by imports, and methods by name where the name is unique in the package `train`.
"""

from __future__ import annotations

import ast
import re
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from import_graph import ROOT

SECTIONS = "config|settings|run|source|optimizer|pruning|quantisation|compute|budget|data"
CARRIER = re.compile(rf"(^|\.)_?(config|plan|settings|pruning)(\.({SECTIONS}))*$")
"""Expressions that hold the configuration, the plan or a section of one."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass
class Index:
    """Functions of the package `train` by module and name."""

    functions: dict[tuple[str, str], Function] = field(default_factory=dict)
    classes: dict[tuple[str, str], list[Function]] = field(default_factory=dict)
    imports: dict[str, dict[str, tuple[str, str]]] = field(default_factory=dict)
    methods: dict[str, list[tuple[str, Function]]] = field(default_factory=lambda: defaultdict(list))

    @classmethod
    def of(cls, root: Path) -> Index:
        """Read every module of the package."""
        index = cls()
        for path in sorted((root / "train").rglob("*.py")):
            module = ".".join(path.relative_to(root).with_suffix("").parts)
            tree = ast.parse(path.read_text(encoding="utf-8"))
            index.imports[module] = dict(_imports(module, tree))
            for node in tree.body:
                if isinstance(node, Function):
                    index.functions[module, node.name] = node
                if isinstance(node, ast.ClassDef):
                    methods = [method for method in node.body if isinstance(method, Function)]
                    index.classes[module, node.name] = methods
                    for method in methods:
                        index.methods[method.name].append((module, method))
        return index

    def resolve(self, module: str, callee: ast.expr) -> list[tuple[str, Function]]:
        """Return the module and the functions that a call runs; empty outside the package."""
        if isinstance(callee, ast.Name):
            key = self.imports[module].get(callee.id, (module, callee.id))
            if key in self.functions:
                return [(key[0], self.functions[key])]
            return [
                (key[0], method) for method in self.classes.get(key, []) if method.name in ("__init__", "__post_init__")
            ]
        if isinstance(callee, ast.Attribute):
            if isinstance(callee.value, ast.Name):
                home = self.imports[module].get(callee.value.id)
                if home and home in self.classes:
                    return [(home[0], method) for method in self.classes[home] if method.name == callee.attr]
                if home and (".".join(home), callee.attr) in self.functions:
                    return [(".".join(home), self.functions[".".join(home), callee.attr])]
            found = self.methods.get(callee.attr, [])
            return found if len(found) == 1 else []
        return []


def _imports(module: str, tree: ast.Module) -> list[tuple[str, tuple[str, str]]]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*module.split(".")[: -node.level], *(node.module or "").split(".")]
            home = ".".join(part for part in base if part)
            found += [(name.asname or name.name, (home, name.name)) for name in node.names]
    return found


def count(root: Path) -> tuple[int, int, int]:
    """Return stops, modules and returns of the walk from `run_training`."""
    index = Index.of(root)
    stops: set[tuple[str, str, str]] = set()
    modules: list[str] = []
    walked: set[tuple[str, str, int]] = set()
    returns = 0

    def walk(module: str, function: Function) -> None:
        nonlocal returns
        if (module, function.name, function.lineno) in walked:
            return
        walked.add((module, function.name, function.lineno))
        for call in (node for node in ast.walk(function) if isinstance(node, ast.Call)):
            values = [*call.args, *(keyword.value for keyword in call.keywords)]
            if not any(CARRIER.search(ast.unparse(value)) for value in values):
                continue
            for home, callee in index.resolve(module, call.func):
                stop = (f"{module}.{function.name}", home, callee.name)
                if stop in stops:
                    continue
                stops.add(stop)
                returns += home in modules and home != module
                if home not in modules:
                    modules.append(home)
                walk(home, callee)

    walk("train.run", index.functions["train.run", "run_training"])
    return len(stops), len(modules), returns


def main() -> None:
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT
    stops, modules, returns = count(root)
    print(f"{stops} stops in {modules} modules, {returns} returns")


if __name__ == "__main__":
    main()
