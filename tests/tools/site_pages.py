"""Write the pages of the documentation site into a folder, for mkdocs.

`python tests/tools/site_pages.py FOLDER` copies README, docs/, research/ and others to the same places.
It adds docs/reference/: a page for each command from its parser, and one for Python from the docstrings.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import itertools
import shutil
import sys
import textwrap
from pathlib import Path

from efficientllm.export.targets import known_targets, load_exporter
from efficientllm.runtime.base import flags
from efficientllm.runtime.command_line import COMMANDS, GROUPS

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "LICENSE", "docs", "deploy", "research")
PACKAGES = ("train", "export", "runtime", "devices")
"""Packages with names for programs."""
TABLE_STYLE = """.md-typeset table:not([class]) th { min-width: 0; }
.md-typeset table:not([class]) :is(th, td) { padding: .6em; }
"""
"""Narrower columns than the theme's, which cut tables of 13 columns on a page of 1,200 pixels."""


def parser_of(command: str) -> flags.Parser:
    """Return the parser of `efficientllm COMMAND`, with that name in its texts."""
    sys.argv = [f"efficientllm {command}"]
    return importlib.import_module(f"efficientllm.{COMMANDS[command].module}").build_parser()


def _invocation(action: argparse.Action) -> str:
    """Return an option or positional as it is typed."""
    value = action.metavar or (action.dest.upper() if action.option_strings else action.dest)
    if action.choices:
        value = "|".join(map(str, action.choices))
    shown = [" ".join([value] if isinstance(value, str) else value)] if action.nargs != 0 else []
    names = [name for name in action.option_strings if not name.startswith("--no-")]
    if isinstance(action, argparse.BooleanOptionalAction):
        names, shown = [f"{names[0]}, --no-{names[0].removeprefix('--')}"], []
    return " ".join([", ".join(names), *shown]).strip()


def flag_tables(parser: argparse.ArgumentParser) -> str:
    """Return a table of each group of flags, in the order of the help."""
    lines: list[str] = []
    for group in parser._action_groups:
        actions = [action for action in group._group_actions if action.help != argparse.SUPPRESS]
        if actions:
            heading = (group.title or "").removesuffix(".").capitalize()
            lines += ["", f"### {heading}", "", "| flag | meaning |", "| --- | --- |"]
            for action in actions:
                text = (action.help or "") % {"prog": parser.prog, "default": action.default}
                cells = (each.replace("|", "\\|") for each in (_invocation(action), text))
                lines.append("| `{}` | {} |".format(*cells))
    return "\n".join(lines)


def command_page(command: str) -> str:
    """Return the reference page of a command: purpose, examples, flags, and for export those of each target."""
    parser = parser_of(command)
    parts = [f"# efficientllm {command}", parser.description or "", "```bash\n" + "\n".join(parser.examples) + "\n```"]
    parts += ["## Flags", flag_tables(parser)]
    if parser.epilog:
        parts.append(parser.epilog % {"prog": parser.prog})
    for target in known_targets() if command == "export" else ():
        own = argparse.ArgumentParser(add_help=False)
        flags.add_section(own, load_exporter(target).options)
        parts += [f"## --target {target}", flag_tables(own)]
    return "\n\n".join(parts) + "\n"


def _definitions(package: str) -> dict[str, ast.AST]:
    """Return {public name: its definition} of a package, by the imports for type checkers in its __init__.py."""
    tree = ast.parse((ROOT / package / "__init__.py").read_text("utf-8"))
    found: dict[str, ast.AST] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module:
            module = ast.parse((ROOT / package / f"{node.module.replace('.', '/')}.py").read_text("utf-8"))
            for alias in node.names:
                (definition,) = (each for each in module.body if getattr(each, "name", "") == alias.name)
                found[alias.asname or alias.name] = definition
    return found


def _documented(name: str, node: ast.AST, level: int = 3) -> list[str]:
    """Return the section of a function or class: signature, docstring, and fields and methods of a class."""
    doc = ast.get_docstring(node) if isinstance(node, ast.FunctionDef | ast.ClassDef) else None
    if not doc or name.startswith("_"):
        return []
    parts = [f"{'#' * level} {name}"]
    if isinstance(node, ast.FunctionDef):
        result = f" -> {ast.unparse(node.returns)}" if node.returns else ""
        parts.append(f"```python\n{name}({ast.unparse(node.args)}){result}\n```")
    # docstrings are plain text: trees and examples keep their lines
    for paragraph in doc.split("\n\n"):
        is_text = not any(mark in paragraph for mark in ("├", "with load", "export(", "train(", "benchmark("))
        parts.append(paragraph if is_text else f"```python\n{textwrap.dedent(paragraph)}\n```")
    if isinstance(node, ast.ClassDef):
        fields = []
        for pair in itertools.pairwise(node.body):
            match pair:
                case (ast.AnnAssign() as field, ast.Expr(value=ast.Constant(value=str(text)))):
                    declared = f"{ast.unparse(field.target)}: {ast.unparse(field.annotation)}"
                    fields.append(f"- `{declared}`: {' '.join(text.split())}")
        parts += ["\n".join(fields)] if fields else []
        for method in node.body:
            parts += _documented(getattr(method, "name", "_"), method, level + 1)
    return parts


def python_page() -> str:
    """Return the reference page of the names that programs import."""
    parts = ["# Python", "Every name is imported from its package, such as `from efficientllm.runtime import load`."]
    for package in PACKAGES:
        parts.append(f"## efficientllm.{package}")
        for name, node in sorted(_definitions(package).items()):
            parts += _documented(name, node)
    return "\n\n".join(parts) + "\n"


def write_pages(folder: Path) -> None:
    """Write all pages into `folder`, which is replaced."""
    shutil.rmtree(folder, ignore_errors=True)
    for name in PAGES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
        else:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, folder / name)
    (folder / "assets").mkdir()
    (folder / "assets" / "tables.css").write_text(TABLE_STYLE, encoding="utf-8")
    reference = folder / "docs" / "reference"
    reference.mkdir()
    lines = ["# Reference", "", "[Python](python.md): the names for programs.", ""]
    for group, commands in GROUPS.items():
        lines += [f"## {group.capitalize()}", ""]
        lines += [f"- [efficientllm {name}]({name}.md): {each.summary}" for name, each in commands.items()]
        lines.append("")
    (reference / "index.md").write_text("\n".join(lines), encoding="utf-8")
    (reference / "python.md").write_text(python_page(), encoding="utf-8")
    for command in COMMANDS:
        (reference / f"{command}.md").write_text(command_page(command), encoding="utf-8")


if __name__ == "__main__":
    write_pages(Path(sys.argv[1]))
