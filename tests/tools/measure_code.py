"""How long, how annotated and how commented the code is: `python tests/tools/measure_code.py [ROOT ...]`.

Prints a Markdown table of the modules of the five packages under each ROOT (this tree without one); tests are left out.
Read by ast, so nothing is imported. Nested functions and methods count too, from their `def` to their last line.
"""

from __future__ import annotations

import ast
import io
import statistics
import sys
import tokenize
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from import_graph import PACKAGES, ROOT

Function = ast.FunctionDef | ast.AsyncFunctionDef
MANY_PARAMETERS = 6


@dataclass(frozen=True)
class Module:
    """One source file."""

    source: str
    tree: ast.Module

    @classmethod
    def read(cls, path: Path) -> Module:
        source = path.read_text(encoding="utf-8")
        return cls(source, ast.parse(source))

    @property
    def num_lines(self) -> int:
        return len(self.source.splitlines())

    @property
    def functions(self) -> list[Function]:
        return [node for node in ast.walk(self.tree) if isinstance(node, Function)]

    @property
    def commented_lines(self) -> int:
        """Lines with a comment, full or trailing; notes to linters and type checkers are none."""
        tokens = tokenize.generate_tokens(io.StringIO(self.source).readline)
        comments = [token.string for token in tokens if token.type == tokenize.COMMENT]
        return sum(not comment.startswith(("# type:", "# noqa", "# pyright:")) for comment in comments)

    @property
    def num_tokens(self) -> int:
        """Names, operators and numbers; strings, docstrings and comments do not count."""
        tokens = tokenize.generate_tokens(io.StringIO(self.source).readline)
        return sum(token.type in (tokenize.NAME, tokenize.OP, tokenize.NUMBER) for token in tokens)


def parameters(function: Function) -> list[ast.arg]:
    """All of them, `self` and `cls` left out."""
    arguments = function.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    starred = [argument for argument in (arguments.vararg, arguments.kwarg) if argument]
    return [argument for argument in [*named, *starred] if argument.arg not in ("self", "cls")]


def is_annotated(function: Function) -> bool:
    return function.returns is not None and all(argument.annotation for argument in parameters(function))


def spread(values: Sequence[int]) -> str:
    """'median / p90 / max'."""
    p90 = statistics.quantiles(values, n=10, method="inclusive")[-1]
    return f"{statistics.median(values):.0f} / {p90:.0f} / {max(values)}"


def measure(root: Path) -> dict[str, str]:
    """{quantity: value} of the tree at `root`."""
    modules = [Module.read(path) for package in PACKAGES for path in sorted((root / package).rglob("*.py"))]
    functions = [function for module in modules for function in module.functions]
    lines = sum(module.num_lines for module in modules)
    public = [function for function in functions if not function.name.startswith("_")]
    commented = sum(module.commented_lines for module in modules)
    return {
        "modules": f"{len(modules)}",
        "lines": f"{lines:,}",
        "names, operators and numbers per line": f"{sum(module.num_tokens for module in modules) / lines:.2f}",
        "functions": f"{len(functions)}",
        "function length, median / p90 / max": spread([(f.end_lineno or f.lineno) - f.lineno + 1 for f in functions]),
        "module length, median / p90 / max": spread([module.num_lines for module in modules]),
        "fully annotated functions": f"{sum(map(is_annotated, functions)) / len(functions):.1%}",
        "public functions with a docstring": f"{sum(map(bool, map(ast.get_docstring, public))) / len(public):.0%}",
        f"functions with more than {MANY_PARAMETERS} parameters": str(
            sum(len(parameters(function)) > MANY_PARAMETERS for function in functions)
        ),
        "lines with a comment": f"{commented} ({commented / lines:.1%})",
    }


def main() -> None:
    roots = [Path(argument) for argument in sys.argv[1:]] or [ROOT]
    measured = [measure(root) for root in roots]
    print(f"| | {' | '.join(map(str, sys.argv[1:] or ['now']))} |\n| --- |{' ---: |' * len(roots)}")
    for quantity in measured[0]:
        print(f"| {quantity} | {' | '.join(values[quantity] for values in measured)} |")


if __name__ == "__main__":
    main()
